"""The plots of a report: training curves, losses by noise level and metrics with their intervals, as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..stage2_diffusion.validation import SIGMA_BINS
from .comparison import NOT_COMPARABLE
from .report_metrics import METRICS_BY_KEY, Cell
from .report_runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "psnr": "PSNR on training batches (dB)",
    "latent/std": "Std of raw latents",
    "latent/max_abs": "Largest raw latent",
    "latent/mean": "Mean of raw latents",
    "validation/loss": "Validation loss",
    "loss/denoising": "Training loss",
    "quick_fid": "Quick FID (few samples: only within this page)",
    "quick_kid": "Quick KID",
}
HIDDEN = ("learning_rate", "images_per_second", "data_wait_share", "quick_seconds")
SIGMA_LOSSES = {"validation": "Validation loss", "loss/denoising": "Training loss"}
"""Losses that are logged by range of noise level, as ``<name>/sigma_<range>``."""
BY_SIGMA = re.compile(rf"({'|'.join(SIGMA_LOSSES)})/sigma_(.+)")


@dataclass(frozen=True)
class Figure:
    """A plot as PNG bytes, with its title and the text that stands for it; a ``wide`` one takes the whole row."""

    title: str
    alt: str
    png: bytes
    wide: bool = False


def curve_figures(runs: Mapping[str, Run]) -> list[Figure]:
    """Return one plot per logged quantity with a line per run, runs by variant name; losses on a log axis.

    Losses that are logged by range of noise level are panels of one plot, and end as bars over the ranges.
    """
    names = dict.fromkeys(
        name
        for run in runs.values()
        for line in run.curves
        for name, value in line.items()
        if name not in ("step", "images", "seconds", *HIDDEN) and isinstance(value, int | float)
    )
    plain = [name for name in names if not BY_SIGMA.fullmatch(name)]
    figures = [_curve(name, runs) for name in sorted(plain, key=_order)]
    for loss, title in SIGMA_LOSSES.items():
        ranges = [name for name in SIGMA_BINS if f"{loss}/sigma_{name}" in names]
        if ranges:
            figures += [_ending_by_sigma(loss, title, ranges, runs), _curves_by_sigma(loss, title, ranges, runs)]
    return figures


def _order(name: str) -> tuple[int, str]:
    """Sort what is read first to the front: how good the model is, the loss, the other terms, health."""
    first = ["validation/loss", "quick_fid", "quick_kid", "loss/total", "loss/denoising", "psnr"]
    prefixes = ["loss/", "gradient_norm", "latent/"]
    if name in first:
        return first.index(name), name
    return len(first) + next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), 9), name


def _curve(name: str, runs: Mapping[str, Run]) -> Figure:
    title = TITLES.get(name, name)
    with Canvas() as canvas:
        log = name.startswith(("loss/", "validation/", "gradient_norm", "quick_fid"))
        ends = _lines(canvas.axes, name, runs, log=log)
        canvas.axes.set_title(title, fontsize=10)
        canvas.axes.legend(fontsize=8, frameon=False)
        png = canvas.png()
    return Figure(title, f"{title} over training steps: {'; '.join(ends)}.", png)


def _lines(axes: Axes, name: str, runs: Mapping[str, Run], *, log: bool) -> list[str]:
    """Draw a logged quantity of every run; return where each ends."""
    ends = []
    for number, (variant, run) in enumerate(runs.items()):
        if not (points := run.logged(name)):
            continue
        steps, values = zip(*points, strict=True)
        log = log and min(values) > 0
        style = "-" if number < 10 else "--"  # there are ten colours
        marker = "." * (len(steps) < 3)
        axes.plot(steps, values, style, color=f"C{number % 10}", linewidth=1.4, label=variant, marker=marker)
        ends.append(f"{variant} ends at {values[-1]:.4g}")
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    return ends


def _curves_by_sigma(loss: str, title: str, ranges: Sequence[str], runs: Mapping[str, Run]) -> Figure:
    title = f"{title} over steps by noise level"
    with Canvas(columns=len(ranges)) as canvas:
        ends = []
        for axes, name in zip(canvas.all, ranges, strict=True):
            found = _lines(axes, f"{loss}/sigma_{name}", runs, log=True)
            axes.set_title(f"{title.partition(' over')[0]}, sigma {name}", fontsize=10)
            ends.append(f"sigma {name}: {', '.join(found)}")
        canvas.axes.legend(fontsize=8, frameon=False)
        png = canvas.png()
    return Figure(title, f"{title}. {'; '.join(ends)}.", png, wide=True)


def _ending_by_sigma(loss: str, title: str, ranges: Sequence[str], runs: Mapping[str, Run]) -> Figure:
    title = f"{title} by noise level, at the end"
    ends = []
    with Canvas() as canvas:
        for number, (variant, run) in enumerate(runs.items()):
            last = [points[-1][1] if (points := run.logged(f"{loss}/sigma_{name}")) else None for name in ranges]
            found = {place: value for place, value in enumerate(last) if value is not None}
            if found:
                shift = (number - (len(runs) - 1) / 2) * 0.8 / len(runs)
                places = [place + shift for place in found]
                colour = f"C{number % 10}"
                canvas.axes.bar(places, list(found.values()), 0.8 / len(runs), color=colour, label=variant)
                losses = ", ".join(f"{ranges[place]}: {value:.4g}" for place, value in found.items())
                ends.append(f"{variant} {losses}")
        canvas.axes.set_xticks(range(len(ranges)), ranges)
        canvas.axes.set_xlabel("noise level sigma", fontsize=8)
        canvas.axes.set_ymargin(0.1 + 0.1 * len(ends))  # room for the legend
        canvas.axes.set_title(title, fontsize=10)
        canvas.axes.legend(fontsize=8, frameon=False, loc="upper right")
        png = canvas.png()
    return Figure(title, f"{title}: {'; '.join(ends)}.", png)


def interval_figures(names: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> list[Figure]:
    """Return one plot per metric that has an interval anywhere: a point per variant, with error bars.

    A figure that is not comparable with the first is grey, and its label says so.
    """
    keys = [key for key in METRICS_BY_KEY if any(key in row and row[key].interval for row in rows)]
    return [_intervals(key, names, [row[key] for row in rows]) for key in keys]


def _intervals(key: str, names: Sequence[str], cells: Sequence[Cell]) -> Figure:
    metric = METRICS_BY_KEY[key]
    title = f"{metric.title} and its interval"
    labels: list[str] = []
    texts: list[str] = []
    with Canvas() as canvas:
        for name, cell in zip(names, cells, strict=True):
            if cell.value is None:
                continue
            place, colour = len(labels), "0.6" if cell.differing else "C0"
            low, high = cell.interval or (cell.value, cell.value)
            canvas.axes.plot(cell.value, place, "o", color=colour, markersize=5)
            canvas.axes.plot([low, high], [place, place], "-|", color=colour, linewidth=1.4, markersize=8)
            labels.append(f"{name}\n({NOT_COMPARABLE})" if cell.differing else name)
            between = f" between {low:.4g} and {high:.4g}" if cell.interval else " without interval"
            texts.append(f"{name} {cell.text}{between}{f', {NOT_COMPARABLE}' if cell.differing else ''}")
        canvas.axes.set_yticks(range(len(labels)), labels)
        canvas.axes.set_ylim(len(labels) - 0.5, -0.5)  # the first on top, as in the table
        canvas.axes.grid(alpha=0.25, axis="x", linewidth=0.5)
        canvas.axes.set_xlabel(f"{metric.better} is better", fontsize=8)
        canvas.figure.suptitle(title, fontsize=10)
        png = canvas.png()
    return Figure(title, f"{title} ({metric.better} is better): {'; '.join(texts)}.", png)


class Canvas:
    """Axes in our style, side by side, drawn without a display, and closed again."""

    def __init__(self, columns: int = 1) -> None:
        import matplotlib as mpl

        mpl.use("Agg", force=False)
        from matplotlib.figure import Figure as Plot

        self.figure = Plot(figsize=(4.2 * columns, 2.8), dpi=120, layout="constrained")
        self.all: Sequence[Axes] = [self.figure.add_subplot(1, columns, n + 1) for n in range(columns)]
        self.axes: Axes = self.all[0]
        for axes in self.all:
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)

    def __enter__(self) -> Canvas:
        return self

    def __exit__(self, *_: object) -> None:
        self.figure.clear()

    def png(self) -> bytes:
        """Return the figure as PNG."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()
