"""The plots of a study: effects, metrics against each other, curves of all seeds and spectra, as PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .health_plots import plain_ticks
from .report_figures import Canvas, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Interval = tuple[float, float]
Points = Sequence[tuple[float, float]]

COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
"""Petroff's ten (2021, arXiv 2107.02270), chosen to be told apart by the colour-blind too."""
MARKERS = "os^DvP<X>p"
BETTER, WORSE, OPEN = COLOURS[0], COLOURS[2], "0.45"
WIDTH = 4.6
"""Of a plot in inches, as in the health report: a telephone shows it at about this size."""
LINE, LABEL = 0.26, 30
"""Of a forest plot: inches from row to row, and characters of a line of a label."""
LABELS_BELOW = 2
"""Columns of a legend."""
LOGARITHMIC_FROM = 4
"""Ratio of the largest value to the smallest from which a logarithmic axis has enough marks to be read."""


@dataclass(frozen=True)
class Style:
    """How a variant looks in every plot; after ten, lines are dashed."""

    colour: str
    marker: str
    line: Literal["-", "--"]


@dataclass(frozen=True)
class Row:
    """One effect of a forest plot.

    Attributes:
        label: of what against what; long ones have several lines, see :func:`label_lines`.
        estimate: the effect.
        interval: its own 95 % interval.
        simultaneous: the one that holds for all claims together, of an effect that decides one.
        better: whether more than chance, and in which direction; None is neither.
        limits: what claims allow it to be worse by, where any do.
    """

    label: str
    estimate: float
    interval: Interval | None = None
    simultaneous: Interval | None = None
    better: bool | None = None
    limits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Dots:
    """A variant in a scatter plot: a point per seed, the mean of both, and its error bars ``(low, high)``."""

    points: Points
    mean: tuple[float, float]
    x_interval: Interval
    y_interval: Interval


def label_lines(text: str) -> str:
    """Return a label in lines that leave room for the plot."""
    return textwrap.fill(text, LABEL)


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a style per variant, by its place."""
    count = len(COLOURS)
    return {
        name: Style(COLOURS[n % count], MARKERS[n % count], "-" if n < count else "--") for n, name in enumerate(names)
    }


def forest(title: str, groups: Mapping[str, Sequence[Row]], xlabel: str, *, ratio: bool) -> Figure:
    """Return effects with their intervals, in groups; on a logarithmic axis about 1 where they are ratios.

    The thick line is the 95 % interval of the effect, the thin one that of all claims together. A dotted mark is the
    margin of a claim.
    """
    labels: list[tuple[float, str, bool]] = []  # place, text, whether it is a group's name
    texts: list[str] = []
    place = 0.0
    with Canvas() as canvas:
        axes = canvas.axes
        for group, rows in groups.items():
            labels.append((place, group, True))
            for row in rows:
                more = 0.25 * LINE * row.label.count("\n")
                place += LINE + more
                _effect(axes, row, place)
                labels.append((place, row.label, False))
                place += more
                texts.append(f"{group}, {' '.join(row.label.split())}: {_in_words(row)}")
            place += LINE * 1.3
        canvas.figure.set_size_inches(WIDTH, place + 0.95)
        if ratio:
            axes.set_xscale("log")
            _ratio_ticks(axes, [row for rows in groups.values() for row in rows])
        axes.axvline(1 if ratio else 0, color="0.3", linewidth=0.9, zorder=0)
        axes.set_ylim(place - 0.7 * LINE, -0.7 * LINE)
        axes.set_yticks([where for where, *_ in labels], [text for _, text, _ in labels], fontsize=7.5)
        for tick, (*_, bold) in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set_fontweight("bold" if bold else "normal")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(alpha=0.25, axis="x", linewidth=0.5)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_title(title, fontsize=10)
        png = canvas.png()
    return Figure(title, f"{title} ({xlabel}). {'; '.join(texts)}.", png)


def _effect(axes: Axes, row: Row, place: float) -> None:
    colour = OPEN if row.better is None else BETTER if row.better else WORSE
    for limit in row.limits:
        axes.plot([limit] * 2, [place - 0.45 * LINE, place + 0.45 * LINE], ":", color="0.2", linewidth=1.1)
    if row.simultaneous:
        axes.plot(row.simultaneous, [place] * 2, "-|", color=colour, linewidth=0.9, markersize=5)
    if row.interval:
        axes.plot(row.interval, [place] * 2, "-", color=colour, linewidth=2.6, solid_capstyle="butt")
    axes.plot(row.estimate, place, "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.6)


def _in_words(row: Row) -> str:
    text = f"{row.estimate:.3g}"
    if row.interval:
        text += f" between {row.interval[0]:.3g} and {row.interval[1]:.3g}"
    if row.simultaneous:
        text += f" (simultaneously {row.simultaneous[0]:.3g} to {row.simultaneous[1]:.3g})"
    if row.limits:
        text += f", margin at {' and '.join(f'{limit:.3g}' for limit in row.limits)}"
    return text


def _ratio_ticks(axes: Axes, rows: Sequence[Row]) -> None:
    """Mark plain numbers, as many as have room: of a narrow range the differences of a linear axis."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    ends = [
        value for row in rows for value in (row.estimate, *row.limits, *(row.simultaneous or ()), *(row.interval or ()))
    ]
    low, high = min([*ends, 0.95]), max([*ends, 1.05])
    axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    if high / low > 6:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks: Sequence[float] = [step * 10.0**power for power in decades for step in (1, 2, 5)]
    else:
        marks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.xaxis.set_major_locator(FixedLocator([mark for mark in marks if low <= mark <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def scatter(title: str, dots: Mapping[str, Dots], labels: tuple[str, str], looks: Mapping[str, Style]) -> Figure:
    """Return a point per variant, named beside it, with error bars, and a pale one per seed."""
    texts = []
    with Canvas() as canvas:
        canvas.figure.set_size_inches(WIDTH, 3.6)
        axes = canvas.axes
        for name, of in dots.items():
            look, (x, y) = looks[name], of.mean
            axes.plot(*zip(*of.points, strict=True), look.marker, color=look.colour, alpha=0.35, markersize=4)
            axes.plot(of.x_interval, (y, y), "-", color=look.colour, linewidth=1.1)
            axes.plot((x, x), of.y_interval, "-", color=look.colour, linewidth=1.1)
            axes.plot(x, y, look.marker, color=look.colour, markersize=7, markeredgecolor="white", markeredgewidth=0.7)
            texts.append(f"{name} at {x:.4g} and {y:.4g}")
        axes.set_xlabel(labels[0], fontsize=8)
        axes.set_ylabel(labels[1], fontsize=8)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.margins(0.14)
        axes.set_title(title, fontsize=10)
        _name_beside(canvas, dots)
        png = canvas.png()
    return Figure(title, f"{title}: {labels[1]} over {labels[0]}. {'; '.join(texts)}.", png)


SIDES = ((6, 4, "left"), (-6, 4, "right"), (6, -11, "left"), (-6, -11, "right"), (0, 9, "center"), (0, -16, "center"))
"""Where a name may stand: points to the right of and above its dot, and its alignment."""


def _name_beside(canvas: Canvas, dots: Mapping[str, Dots]) -> None:
    """Write every name beside its mean, on the side where it covers the least of points, error bars and other names."""
    from matplotlib.transforms import Bbox

    canvas.figure.draw_without_rendering()  # only now is it known where points are
    axes = canvas.axes
    inside = axes.get_window_extent()
    taken = []
    for of in dots.values():
        corners = [(of.x_interval[0], of.y_interval[0]), of.mean, (of.x_interval[1], of.y_interval[1])]
        (left, low), (x, y), (right, high) = axes.transData.transform(corners)
        taken += [Bbox.from_bounds(x - 7, y - 7, 14, 14), Bbox.from_bounds(left, y - 2, right - left, 4)]
        taken.append(Bbox.from_bounds(x - 2, low, 4, high - low))
    for name, of in dots.items():
        best: tuple[float, tuple[int, int, str], Bbox] | None = None
        for side in SIDES:
            text = _beside(axes, name, of.mean, side)
            box = text.get_window_extent()
            text.remove()
            outside = max(0.0, inside.x0 - box.x0) + max(0.0, box.x1 - inside.x1)
            cost = sum(_overlap(box, other) for other in taken) + 50 * outside
            if best is None or cost < best[0] - 1e-6:
                best = cost, side, box
        assert best is not None, "there are sides"
        _beside(axes, name, of.mean, best[1])
        taken.append(best[2])


def _beside(axes: Axes, name: str, place: tuple[float, float], side: tuple[int, int, str]) -> Annotation:
    x, y, align = side
    text = axes.annotate(name, place, (x, y), textcoords="offset points", ha=align, fontsize=7.5)
    text.set_in_layout(False)  # or the axes would make room for it, and points move
    return text


def _overlap(box: Bbox, other: Bbox) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def curves(
    title: str,
    lines: Mapping[str, Sequence[Points]],
    looks: Mapping[str, Style],
    labels: tuple[str, str] = ("step", ""),
    *,
    log: str = "",
    reference: tuple[str, Points] | None = None,
) -> Figure:
    """Return the lines of every variant, one per seed, all in the variant's colour.

    Args:
        title: of the plot.
        lines: by variant, ``(x, y)`` per seed.
        looks: of the variants.
        labels: of the two axes.
        log: which axes are logarithmic, where all values there are above 0 and span enough.
        reference: a dashed line that is no variant's, and its name.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    drawn = {name: [points for points in seeds if points] for name, seeds in lines.items()}
    drawn = {name: seeds for name, seeds in drawn.items() if seeds}
    below = -(-(len(drawn) + (reference is not None)) // LABELS_BELOW)
    ends = []
    with Canvas() as canvas:
        canvas.figure.set_size_inches(WIDTH, 2.7 + 0.17 * below)
        axes, handles = canvas.axes, []
        for name, seeds in drawn.items():
            look = looks[name]
            for points in seeds:
                marker = look.marker if len(points) < 3 else ""
                axes.plot(*zip(*points, strict=True), look.line, color=look.colour, linewidth=1, marker=marker)
            handles.append(Line2D([], [], color=look.colour, linestyle=look.line, label=name))
            ends.append(f"{name} {', '.join(f'{points[-1][1]:.4g}' for points in seeds)}")
        if reference:
            axes.plot(*zip(*reference[1], strict=True), "k--", linewidth=1)
            handles.append(Line2D([], [], color="k", linestyle="--", label=reference[0]))
        every = [point for seeds in drawn.values() for points in seeds for point in points]
        for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            values = [point[letter == "y"] for point in every]
            if letter in log and min(values) > 0 and max(values) > LOGARITHMIC_FROM * min(values):
                axes.set(**{f"{letter}scale": "log"})
                plain_ticks(axis)
            elif labels[letter == "y"] == "step":
                axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(labels[0], fontsize=8)
        axes.set_ylabel(labels[1], fontsize=8)
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.set_title(title, fontsize=10)
        canvas.figure.legend(handles=handles, loc="outside lower left", ncols=LABELS_BELOW, fontsize=7.5, frameon=False)
        png = canvas.png()
    return Figure(title, f"{title} over {labels[0]}, a line per seed, which end at: {'; '.join(ends)}.", png)
