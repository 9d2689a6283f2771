"""The latents of a report: their statistics, and their histograms beside N(0, 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..common.errors import WavelatentError
from ..common.latent_cache import LatentCache
from ..common.latents import Whitening
from ..common.randomness import generator
from .diffusion_run import inputs_of
from .report_figures import Canvas, Figure
from .report_runs import Variant, joined

LATENTS = 512
"""Images whose latents the histograms are drawn from."""
SATURATED = 0.95
"""Share of the bound beyond which a bounded latent counts as saturated."""


@dataclass(frozen=True)
class Latents:
    """Statistics of a variant's latents; ``figure`` and ``saturated`` are None where the cache is gone."""

    channels: list[dict[str, float]]
    """Per channel ``mean``, ``std``, ``min``, ``max`` over the whole cache, from its manifest."""
    figure: Figure | None
    saturated: float | None
    """Share of values beyond 95 % of the bound, for a bounded bottleneck."""
    note: str


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
    raw = draw_latents(cache)
    white = Whitening.from_statistics(run.config["whitening"], stats)(raw)
    bound = _bound(variant)
    saturated = None if bound is None else float((raw.abs() > SATURATED * bound).float().mean())
    note = f"drawn from the posteriors of {len(raw)} of {len(cache):,} cached images"
    return Latents(channels, _histograms(variant.name, raw, white, bound), saturated, note)


def distinct_latents(variants: Sequence[Variant], latents: Mapping[str, Latents | None]) -> dict[str, Latents]:
    """Return the latents of each cache and whitening once, by the names of the variants that were trained on them."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for variant in variants:
        if (run := variant.second) is not None:
            key = (run.inputs["latents"]["fingerprint"], str(run.config["whitening"]))
            sharing.setdefault(key, []).append(variant.name)
    found = {joined(names): latents[names[0]] for names in sharing.values()}
    return {name: item for name, item in found.items() if item is not None}


def draw_latents(cache: LatentCache) -> Tensor:
    """Draw raw latents ``[N, C, h, w]`` of images spread evenly over the cache."""
    positions = np.unique(np.linspace(0, len(cache) - 1, min(LATENTS, len(cache))).round().astype(np.int64))
    batch = cache.read(positions)
    return batch.posterior.sample([generator("report", index) for index in batch.index.tolist()])


def _bound(variant: Variant) -> float | None:
    bottleneck: dict[str, Any] = variant.first.config["model"]["bottleneck"] if variant.first else {}
    return float(bottleneck["bound"]) if bottleneck.get("kind") == "bounded" else None


def _histograms(name: str, raw: Tensor, white: Tensor, bound: float | None) -> Figure:
    with Canvas(columns=2) as canvas:
        for axes, latents, title in zip(canvas.all, (raw, white), ("raw", "as the denoiser sees them"), strict=True):
            values = latents.flatten().numpy()
            reach = float(np.quantile(np.abs(values), 0.999)) * 1.1 or 1.0
            edges = np.linspace(-reach, reach, 81)
            for channel in latents.transpose(0, 1).flatten(1).numpy():
                density, _ = np.histogram(channel, edges, density=True)
                axes.plot((edges[1:] + edges[:-1]) / 2, density, color="C0", alpha=0.25, linewidth=0.7)
            axes.hist(values, edges.tolist(), density=True, color="C0", alpha=0.35)
            axes.set_title(f"{title}: mean {values.mean():.2f}, std {values.std():.2f}", fontsize=10)
            axes.set_yticks([])
            if latents is white:
                x = np.linspace(-reach, reach, 200)
                axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1, label="N(0, 1)")
                axes.legend(fontsize=8, frameon=False)
            elif bound is not None:
                for side in (-bound, bound):
                    axes.axvline(side, color="C3", linewidth=1, linestyle=":")
        png = canvas.png()
    kurtosis = float(white.double().pow(4).mean() / white.double().square().mean().square())
    alt = (
        f"Histograms of the latents of {name}, raw and as the denoiser sees them: there mean {white.mean():.2f}, "
        f"std {white.std():.2f}, kurtosis {kurtosis:.2f} (3 for a Gaussian)."
    )
    return Figure(name, alt, png)


def latent_record(latents: Latents | None) -> dict[str, Any] | None:
    """Return the statistics as plain JSON values."""
    if latents is None:
        return None
    return {"channels": latents.channels, "saturated": latents.saturated, "note": latents.note}
