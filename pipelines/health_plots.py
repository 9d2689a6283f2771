"""Draws the plots of the latent health report, as PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..stage1_autoencoder.health import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MOST_NAMED = 8
"""Series above which a legend would hide the plot: they are drawn thin, in the order of a colour map."""
PANELS_PER_ROW = 4
WIDTH, HEIGHT = 4.6, 2.9
"""Of a plot in inches; a telephone shows it at about this size."""


def draw(plot: Plot) -> bytes:
    """Return a plot as PNG, on white in any theme."""
    from matplotlib.figure import Figure  # drawn through its own canvas: no display, and no state of pyplot's

    count = len(plot.series) if plot.kind == "image" else 1
    columns = min(count, PANELS_PER_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, HEIGHT * max(1.0, 0.6 * rows)), dpi=130, layout="constrained")
    figure.suptitle(plot.title, fontsize=10)
    panels: list[Axes] = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    if plot.kind == "image":
        _draw_maps(figure, panels, plot)
    else:
        _draw_series(panels[0], plot)
        _frame(panels[0], plot)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def alternative(plot: Plot) -> str:
    """Return the text that stands for a plot: what it shows, of what, and the range of the values."""
    values = np.concatenate([np.asarray(values, dtype=float).ravel() for values in plot.series.values()])
    finite = values[np.isfinite(values)]
    names = list(plot.series)
    of = ", ".join(names) if len(names) <= MOST_NAMED else f"{names[0]} to {names[-1]}"
    reach = f"from {finite.min():.4g} to {finite.max():.4g}" if len(finite) else "none of them finite"
    axes = " over ".join(label for label in reversed(plot.labels) if label)
    return f"{plot.title} ({of}){f': {axes}' if axes else ''}; values {reach}."


def _draw_maps(figure: Any, panels: Sequence[Axes], plot: Plot) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes, (name, rows) in zip(panels, plot.series.items(), strict=True):
        image = axes.imshow(np.asarray(rows, dtype=float), cmap="viridis", interpolation="nearest")
        axes.tick_params(labelsize=6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
        if len(panels) > 1:
            axes.set_title(name, fontsize=8)
    panels[-1].set_xlabel(plot.labels[0], fontsize=8)
    panels[0].set_ylabel(plot.labels[1], fontsize=8)


def _draw_series(axes: Axes, plot: Plot) -> None:
    import matplotlib as mpl

    if plot.kind == "bar" and all(len(values) == 1 for values in plot.series.values()):
        axes.bar(list(plot.series), [float(values[0]) for values in plot.series.values()])  # type: ignore[arg-type]
        axes.tick_params(axis="x", labelrotation=30)
        return
    named = len(plot.series) <= MOST_NAMED
    bar_width = 0.8 / max(len(plot.series), 1)
    for number, (name, values) in enumerate(plot.series.items()):
        y = np.asarray(values, dtype=float)
        x = np.arange(len(y)) if plot.x is None else np.asarray(plot.x, dtype=float)
        colour = f"C{number}" if named else mpl.colormaps["viridis"](number / (len(plot.series) - 1))
        if plot.kind == "bar":
            step = float(np.diff(x).min()) if len(x) > 1 else 1.0
            offset = (number - (len(plot.series) - 1) / 2) * bar_width
            axes.bar(x + step * offset, y, width=step * bar_width, color=colour, label=name)
        else:
            marker = "." if len(y) <= 12 else ""
            axes.plot(x, y, color=colour, linewidth=1.4 if named else 0.6, marker=marker, label=name)
    if named and len(plot.series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _frame(axes: Axes, plot: Plot) -> None:
    """Label the axes, and make them logarithmic where that is asked for and there is anything positive to show."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(plot.labels[0], fontsize=9)
    axes.set_ylabel(textwrap.fill(plot.labels[1], 32), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25, linewidth=0.5)
    if plot.x is None and any(len(values) > 1 for values in plot.series.values()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # numbers of channels, or the like
    values = np.concatenate([np.asarray(values, dtype=float) for values in plot.series.values()])
    if "x" in plot.log and plot.x is not None and min(plot.x) > 0:
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    if "y" in plot.log and (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")
        if values[values > 0].max() < 1000 * values[values > 0].min():
            plain_ticks(axes.yaxis)


def plain_ticks(axis: Axis) -> None:
    """Mark 1, 2 and 5 of every decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
