"""The figures of an evaluation, from features and per-image values; knows no model.

:func:`set_figures` compares two sets of features, :func:`mean_figures` averages what was measured image by image; both
return figures with their intervals, what could not be computed and why, and how each figure was defined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from .errors import WavelatentError
from .feature_distances import KID_SEED, FrechetReference, kernel_distance
from .files import write_atomically
from .intervals import (
    Interval,
    frechet_at_infinity,
    frechet_interval,
    kernel_interval,
    manifold_intervals,
    mean_interval,
)
from .manifolds import DENSITY_NEIGHBOURS, MANIFOLD_NEIGHBOURS, manifold_figures
from .reference_features import Reference

SMALL_SAMPLE = 5_000
PSNR_PROTOCOL = "dB per image over RGB in [0, 255] rounded to uint8, mean over images"
SSIM_PROTOCOL = "Wang 2004, Gaussian 11x11 sigma 1.5, range 255, RGB, mean over images"
INTERVALS_PROTOCOL = "95 %, over draws of the samples; the reference is fixed"
EXTRAPOLATION = "at 1/N = 0 of a line through N, N/2, N/3 and N/4 samples; the bias of a finite reference stays"
KERNEL_NAMES = ("kid_mean", "kid_std")
MANIFOLD_NAMES = ("precision", "recall", "density", "coverage")
_NO_FEATURES = "the reference is statistics (mu and sigma) without images, which give the Fréchet distance only"
_SUFFIX = "_interval"


class Result(BaseModel):
    """What ``evaluate`` prints and saves.

    In JSON an interval stands in ``metrics`` beside its figure, as ``fid_interval: [low, high]``; here it is in
    ``intervals``.

    Attributes:
        metrics: figures by name.
        intervals: 95 % intervals of figures, by the figure's name.
        not_computed: why a figure is missing.
        without_weights: those of them that a network would have given whose weights were not to be had; where a result
            does not say, as older ones do not, all of them.
        protocol: how the figures were defined and what was measured.
        worst: of a reconstruction, by figure, the worst images: ``index``, ``name`` (or None) and ``value``.
        seconds: what it took.
    """

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = {}
    not_computed: dict[str, str] = {}
    without_weights: tuple[str, ...] = ()
    protocol: dict[str, Any]
    worst: dict[str, list[dict[str, Any]]] = {}
    seconds: float

    @model_validator(mode="before")
    @classmethod
    def _intervals_apart(cls, content: Any) -> Any:
        metrics = content.get("metrics") if isinstance(content, dict) else None
        if not isinstance(metrics, Mapping):
            return content
        found = {name.removesuffix(_SUFFIX): each for name, each in metrics.items() if name.endswith(_SUFFIX) and each}
        figures = {name: value for name, value in metrics.items() if not name.endswith(_SUFFIX)}
        return {**content, "metrics": figures, "intervals": {**content.get("intervals", {}), **found}}

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_version(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "without_weights" in content:
            return content
        return {**content, "without_weights": tuple(content.get("not_computed", ()))}

    @property
    def is_final(self) -> bool:
        """Whether measuring again could give no more figures: all are there, or weights are not what is missing."""
        return not self.without_weights

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values; what is missing and ``worst`` only where there is something in them."""
        content = self.model_dump(mode="json", exclude={"metrics", "intervals"})
        if not self.not_computed:
            del content["without_weights"]
        metrics: dict[str, Any] = {}
        for name, value in self.metrics.items():
            metrics[name] = value
            if name in self.intervals:
                metrics[f"{name}{_SUFFIX}"] = list(self.intervals[name])
        return {"metrics": metrics, **{k: v for k, v in content.items() if v or k not in ("not_computed", "worst")}}

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result | None:
        """Read what :meth:`save` wrote; None where there is nothing, or something else."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


@dataclass
class Measurement:
    """Figures, their intervals, the reasons for missing ones, and the parts of the protocol that measuring decides."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Measurement) -> None:
        """Take over everything that ``other`` holds."""
        self.metrics.update(other.metrics)
        self.intervals.update(other.intervals)
        self.not_computed.update(other.not_computed)
        self.protocol.update(other.protocol)
        self.notes += other.notes


def mean_figures(values: Mapping[str, Tensor], *, intervals: bool) -> Measurement:
    """Return the means of per-image values ``[N]``: ``psnr``, ``ssim``, ``lpips``."""
    result = Measurement({name: float(each.double().mean()) for name, each in values.items()})
    if intervals:
        result.intervals = {name: mean_interval(each) for name, each in values.items()}
    return result


def set_figures(
    name: str, features: Tensor, reference: Reference, *, only_frechet: bool = False, intervals: bool = True
) -> Measurement:
    """Compare features ``[N, dim]`` with a reference's.

    Args:
        name: what the Fréchet distance is called: ``fid`` and ``rfid`` are for Inception's features alone.
        features: of the samples; may be mapped from a file.
        reference: what they are held against. Where it is statistics without features, only the Fréchet distance can
            be had.
        only_frechet: leave out ``kid_mean``, ``kid_std``, ``precision``, ``recall``, ``density`` and ``coverage``.
        intervals: also give intervals of all but ``kid_std``, which is a spread itself, and the Fréchet distance
            extrapolated to infinitely many samples as ``<name>_extrapolated``.
    """
    result = Measurement()
    _frechet(result, name, features, reference, intervals)
    if not only_frechet:
        _kernel(result, features, reference, intervals)
        _manifolds(result, features, reference, intervals)
    return result


def _frechet(result: Measurement, name: str, features: Tensor, reference: Reference, intervals: bool) -> None:
    if reference.statistics.mean.shape != features.shape[1:]:
        result.not_computed[name] = (
            f"the reference's statistics are of {len(reference.statistics.mean)} features, not {features.shape[1]}"
        )
        return
    try:
        against = FrechetReference(reference.statistics)
        figure = against.distance(features)
        if intervals:
            result.intervals[name] = frechet_interval(features, against, figure=figure)
    except WavelatentError as error:
        result.not_computed[name] = str(error)
        return
    result.metrics[name] = figure
    _warn_of_few(result, name, len(features), len(reference))
    if intervals:
        _extrapolate(result, f"{name}_extrapolated", features, against)


def _warn_of_few(result: Measurement, name: str, samples: int, reference: int) -> None:
    """Note, under a name that does not change, that few images bias the distance; of a reference, 0 is unknown."""
    if min(samples, reference or samples) < SMALL_SAMPLE:
        against = f" against {reference:,}" if reference else ""
        result.notes.append(
            f"small-sample: {name} of {samples:,} images{against}, fewer than {SMALL_SAMPLE:,}, is biased upwards: "
            "compare it only with figures from the same numbers of images"
        )


def _extrapolate(result: Measurement, name: str, features: Tensor, against: FrechetReference) -> None:
    try:
        line = frechet_at_infinity(features, against)
    except WavelatentError as error:
        result.notes.append(str(error))
        return
    result.metrics[name] = line.value
    result.intervals[name] = line.interval
    points = [list(point) for point in line.points]
    result.protocol[name] = {"method": EXTRAPOLATION, "error": line.error, "slope": line.slope, "points": points}


def _kernel(result: Measurement, features: Tensor, reference: Reference, intervals: bool) -> None:
    if not len(reference):
        result.not_computed.update(dict.fromkeys(KERNEL_NAMES, _NO_FEATURES))
        return
    try:
        kid = kernel_distance(features, reference.features)
    except WavelatentError as error:
        result.not_computed.update(dict.fromkeys(KERNEL_NAMES, str(error)))
        return
    result.metrics.update(kid_mean=kid.mean, kid_std=kid.std)
    if intervals:
        result.intervals["kid_mean"] = kernel_interval(features, reference.features, kid)
    result.protocol["kid"] = {
        "kernel": f"(x.y / {features.shape[1]} + 1)^3, unbiased",
        "subsets": kid.subsets,
        "subset_size": kid.subset_size,
        "seed": KID_SEED,
    }


def _manifolds(result: Measurement, features: Tensor, reference: Reference, intervals: bool) -> None:
    if not len(reference):
        result.not_computed.update(dict.fromkeys(MANIFOLD_NAMES, _NO_FEATURES))
        return
    try:
        figures = manifold_figures(features, reference.features)
    except WavelatentError as error:
        result.not_computed.update(dict.fromkeys(MANIFOLD_NAMES, str(error)))
        return
    result.metrics.update({name: getattr(figures, name) for name in MANIFOLD_NAMES})
    if intervals:
        result.intervals.update(manifold_intervals(features, reference.features))
    result.protocol["precision_recall"] = {
        "num_samples": figures.num_samples,
        "num_reference": figures.num_reference,
        "neighbours": MANIFOLD_NEIGHBOURS,
        "density_neighbours": DENSITY_NEIGHBOURS,
    }
