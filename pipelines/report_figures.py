"""The plots of a report: training curves and latent histograms, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..common.errors import WavelatentError
from ..common.latent_cache import LatentCache
from ..common.latents import Whitening
from ..common.randomness import generator
from .diffusion_run import inputs_of
from .report_runs import Run, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LATENTS = 512
"""Images whose latents the histograms are drawn from."""
SATURATED = 0.95
"""Share of the bound beyond which a bounded latent counts as saturated."""

TITLES = {
    "psnr": "PSNR on training batches (dB)",
    "latent/std": "Std of raw latents",
    "latent/max_abs": "Largest raw latent",
    "latent/mean": "Mean of raw latents",
}
HIDDEN = ("learning_rate", "images_per_second", "data_wait_share")


@dataclass(frozen=True)
class Figure:
    """A plot as PNG bytes, with its title and the text that stands for it."""

    title: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Latents:
    """Statistics of a variant's latents; ``figure`` and ``saturated`` are None where the cache is gone."""

    channels: list[dict[str, float]]
    """Per channel ``mean``, ``std``, ``min``, ``max`` over the whole cache, from its manifest."""
    figure: Figure | None
    saturated: float | None
    """Share of values beyond 95 % of the bound, for a bounded bottleneck."""
    note: str


def curve_figures(runs: Mapping[str, Run]) -> list[Figure]:
    """Return one plot per logged quantity with a line per run, runs by variant name; losses on a log axis."""
    names = dict.fromkeys(
        name
        for run in runs.values()
        for line in run.curves
        for name, value in line.items()
        if name not in ("step", "images", "seconds", *HIDDEN) and isinstance(value, int | float)
    )
    return [_curve(name, runs) for name in sorted(names, key=_order)]


def _order(name: str) -> tuple[int, str]:
    """Sort what is read first to the front: the loss, PSNR, the other terms, health."""
    first = ["loss/total", "loss/denoising", "psnr"]
    prefixes = ["loss/", "gradient_norm", "latent/"]
    if name in first:
        return first.index(name), name
    return len(first) + next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), 9), name


def _curve(name: str, runs: Mapping[str, Run]) -> Figure:
    title = TITLES.get(name, name)
    ends = []
    with _Canvas() as canvas:
        log = name.startswith(("loss/", "gradient_norm"))
        for number, (variant, run) in enumerate(runs.items()):
            points = [(line["step"], line[name]) for line in run.curves if isinstance(line.get(name), int | float)]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            log = log and min(values) > 0
            canvas.axes.plot(
                steps, values, color=f"C{number}", linewidth=1.4, label=variant, marker="." * (len(steps) < 3)
            )
            ends.append(f"{variant} ends at {values[-1]:.4g}")
        if log:
            canvas.axes.set_yscale("log")
        canvas.axes.set_xlabel("step")
        canvas.axes.set_title(title, fontsize=10)
        canvas.axes.grid(alpha=0.25, which="both", linewidth=0.5)
        canvas.axes.legend(fontsize=8, frameon=False)
        png = canvas.png()
    return Figure(title, f"{title} over training steps: {'; '.join(ends)}.", png)


def latents_of(variant: Variant) -> Latents | None:
    """Return the statistics and the histograms of the latents that the variant's denoiser was trained on."""
    run = variant.second
    if run is None:
        return None
    stats = run.inputs["latents"]["stats"]
    keys = ("mean", "std", "min", "max")
    channels = [dict(zip(keys, row, strict=True)) for row in zip(*(stats[key] for key in keys), strict=True)]
    try:
        cache = LatentCache.open(run.inputs["latents"]["path"], verify=False)
    except WavelatentError as error:
        return Latents(channels, None, None, f"no histograms: {error}")
    if inputs_of(cache)["latents"]["fingerprint"] != run.inputs["latents"]["fingerprint"]:
        return Latents(channels, None, None, f"no histograms: {cache.path} is no longer the cache of this run")
    raw = _draw(cache)
    white = Whitening.from_statistics(run.config["whitening"], stats)(raw)
    bound = _bound(variant)
    saturated = None if bound is None else float((raw.abs() > SATURATED * bound).float().mean())
    note = f"drawn from the posteriors of {len(raw)} of {len(cache):,} cached images"
    return Latents(channels, _histograms(variant.name, raw, white, bound), saturated, note)


def _draw(cache: LatentCache) -> Tensor:
    """Draw raw latents ``[N, C, h, w]`` of images spread evenly over the cache."""
    positions = np.unique(np.linspace(0, len(cache) - 1, min(LATENTS, len(cache))).round().astype(np.int64))
    batch = cache.read(positions)
    return batch.posterior.sample([generator("report", index) for index in batch.index.tolist()])


def _bound(variant: Variant) -> float | None:
    bottleneck: dict[str, Any] = variant.first.config["model"]["bottleneck"] if variant.first else {}
    return float(bottleneck["bound"]) if bottleneck.get("kind") == "bounded" else None


def _histograms(name: str, raw: Tensor, white: Tensor, bound: float | None) -> Figure:
    with _Canvas(columns=2) as canvas:
        for axes, latents, title in zip(canvas.all, (raw, white), ("raw", "whitened"), strict=True):
            values = latents.flatten().numpy()
            reach = float(np.quantile(np.abs(values), 0.999)) * 1.1 or 1.0
            edges = np.linspace(-reach, reach, 81)
            for channel in latents.transpose(0, 1).flatten(1).numpy():
                density, _ = np.histogram(channel, edges, density=True)
                axes.plot((edges[1:] + edges[:-1]) / 2, density, color="C0", alpha=0.25, linewidth=0.7)
            axes.hist(values, edges.tolist(), density=True, color="C0", alpha=0.35)
            axes.set_title(f"{title}: mean {values.mean():.2f}, std {values.std():.2f}", fontsize=10)
            axes.set_yticks([])
            if title == "whitened":
                x = np.linspace(-reach, reach, 200)
                axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1, label="N(0, 1)")
                axes.legend(fontsize=8, frameon=False)
            elif bound is not None:
                for side in (-bound, bound):
                    axes.axvline(side, color="C3", linewidth=1, linestyle=":")
        png = canvas.png()
    kurtosis = float(white.double().pow(4).mean() / white.double().square().mean().square())
    alt = (
        f"Histograms of the raw and the whitened latents of {name}; whitened mean {white.mean():.2f}, "
        f"std {white.std():.2f}, kurtosis {kurtosis:.2f} (3 for a Gaussian)."
    )
    return Figure(name, alt, png)


class _Canvas:
    """Axes in our style, drawn without a display, and closed again."""

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

    def __enter__(self) -> _Canvas:
        return self

    def __exit__(self, *_: object) -> None:
        self.figure.clear()

    def png(self) -> bytes:
        """Return the figure as PNG."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()
