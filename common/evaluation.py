"""Measures streams of uint8 images against a reference; knows no model.

:func:`measure_reconstruction` takes pairs, :func:`measure_generation` takes samples; both return figures, what could
not be computed and why, and how each figure was defined.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm import tqdm

from .errors import WavelatentError
from .feature_distances import (
    KID_SEED,
    MAX_PRECISION_RECALL,
    NEIGHBOURS,
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from .files import write_atomically
from .image_metrics import psnr, ssim
from .images import to_float
from .inception import InceptionFeatures, extract_features
from .lpips_metric import PerceptualDistance
from .reference_features import Reference

SMALL_SAMPLE = 10_000
PSNR_PROTOCOL = "dB per image over RGB in [0, 255] rounded to uint8, mean over images"
SSIM_PROTOCOL = "Wang 2004, Gaussian 11x11 sigma 1.5, range 255, RGB, mean over images"


class Result(BaseModel):
    """What ``evaluate`` prints and saves: ``metrics``, ``not_computed`` (metric: reason), ``protocol``, ``seconds``."""

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, float]
    not_computed: dict[str, str] = {}
    protocol: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values; ``not_computed`` only where something was not."""
        content = self.model_dump(mode="json")
        if not self.not_computed:
            del content["not_computed"]
        return content

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
    """Figures, the reasons for those that are missing, and the parts of the protocol that only measuring decides."""

    metrics: dict[str, float] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


def measure_reconstruction(
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: Reference | None,
    extractor: InceptionFeatures | None,
    lpips: PerceptualDistance | None,
    total: int | None = None,
) -> Measurement:
    """Measure pairs (originals, reconstructions), each uint8 ``[B,3,H,W]``.

    ``psnr``, ``ssim`` and ``lpips`` compare each pair and are averaged; ``rfid`` compares the set of reconstructions
    with ``reference``. A metric whose network is None is left out; the caller says why.
    """
    per_image: dict[str, list[Tensor]] = {}
    statistics = FeatureStatistics(extractor.dim) if extractor else None
    result = Measurement()
    count = 0
    with tqdm(total=total, desc="Reconstructions", unit="img", leave=False) as progress:
        for originals, reconstructions in pairs:
            for name, values in _compare(originals, reconstructions, lpips, result.not_computed).items():
                per_image.setdefault(name, []).append(values.double().cpu())
            if extractor is not None and statistics is not None:
                statistics.update(extractor(reconstructions))
            count += len(originals)
            progress.update(len(originals))
    result.metrics.update({name: float(torch.cat(values).mean()) for name, values in per_image.items()})
    result.protocol = {"num_samples": count, "psnr": PSNR_PROTOCOL, "ssim": SSIM_PROTOCOL}
    if reference is not None and statistics is not None:
        _frechet(result, "rfid", statistics, reference)
    return result


def measure_generation(
    samples: Iterable[Tensor], *, reference: Reference, extractor: InceptionFeatures, total: int | None = None
) -> Measurement:
    """Measure samples, uint8 ``[B,3,H,W]``: ``fid``, ``kid_mean``, ``kid_std``, ``precision``, ``recall``."""
    features = extract_features(extractor, samples, total=total, label="Inception, samples")
    result = Measurement(protocol={"num_samples": len(features)})
    _frechet(result, "fid", FeatureStatistics.of(features), reference)
    _kernel(result, features, reference)
    _precision_recall(result, features, reference)
    return result


def _compare(
    originals: Tensor, reconstructions: Tensor, lpips: PerceptualDistance | None, not_computed: dict[str, str]
) -> dict[str, Tensor]:
    values = {"psnr": psnr(reconstructions, originals)}
    try:
        values["ssim"] = ssim(reconstructions, originals)
    except ValueError as error:
        not_computed["ssim"] = str(error)
    if lpips is not None:
        try:
            with torch.no_grad():
                pair = (to_float(images).to(lpips.device) for images in (reconstructions, originals))
                values["lpips"] = lpips(*pair)
        except ValueError as error:
            not_computed["lpips"] = str(error)
    return values


def _frechet(result: Measurement, name: str, statistics: FeatureStatistics, reference: Reference) -> None:
    try:
        result.metrics[name] = frechet_distance(statistics, reference.statistics)
    except WavelatentError as error:
        result.not_computed[name] = str(error)
        return
    fewer = min(statistics.count, len(reference))
    if fewer < SMALL_SAMPLE:
        result.protocol.setdefault("notes", []).append(
            f"{name} at {fewer} images is biased upwards: compare it only with figures from the same numbers of images"
        )


def _kernel(result: Measurement, features: Tensor, reference: Reference) -> None:
    try:
        kid = kernel_distance(features, reference.features)
    except WavelatentError as error:
        result.not_computed["kid_mean"] = result.not_computed["kid_std"] = str(error)
        return
    result.metrics.update(kid_mean=kid.mean, kid_std=kid.std)
    result.protocol["kid"] = {
        "kernel": "(x.y / 2048 + 1)^3, unbiased",
        "subsets": kid.subsets,
        "subset_size": kid.subset_size,
        "seed": KID_SEED,
    }


def _precision_recall(result: Measurement, features: Tensor, reference: Reference) -> None:
    samples, others = features[:MAX_PRECISION_RECALL], reference.features[:MAX_PRECISION_RECALL]
    try:
        precision, recall = precision_recall(samples, others)
    except WavelatentError as error:
        result.not_computed["precision"] = result.not_computed["recall"] = str(error)
        return
    result.metrics.update(precision=precision, recall=recall)
    result.protocol["precision_recall"] = {
        "num_samples": len(samples),
        "num_reference": len(others),
        "neighbours": NEIGHBOURS,
    }
