"""The protocol lock: which figures may stand side by side, decided in this one place.

A figure is defined by more than its name: the reference, the sizes of both sets, the resize, the network, the sampler.
Two figures are comparable where every field of the protocol that defines them agrees. Where one differs, a table says
:data:`NOT_COMPARABLE` and names it. The rule errs on the side of refusing: a field that it does not know defines every
figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

NOT_COMPARABLE = "not comparable"

IDENTITY = (
    "autoencoder.path", "autoencoder.fingerprint", "run", "guide", "model_sha256", "autoencoder_fingerprint", "samples",
    "reference", "notes", "ema", "ema_step", "guide_ema", "guide_step", "guide_sha256", "evaluations",
    "library versions", "intervals", "fid_extrapolated", "rfid_extrapolated", "fd_dinov2_extrapolated", "dinov2.source",
)  # fmt: skip
"""Fields that say what was measured, with which software or how surely, and do not define a figure."""

_INCEPTION = ("features", "weights_sha256", "resize.features")
DEFINED_BY: dict[str, tuple[str, ...]] = {
    "psnr": ("psnr",),
    "ssim": ("ssim",),
    "lpips": ("lpips_net", "lpips_sha256"),
    "rfid": _INCEPTION,
    "fid": _INCEPTION,
    "kid_mean": (*_INCEPTION, "kid"),
    "kid_std": (*_INCEPTION, "kid"),
    "precision": (*_INCEPTION, "precision_recall"),
    "recall": (*_INCEPTION, "precision_recall"),
    "density": (*_INCEPTION, "precision_recall"),
    "coverage": (*_INCEPTION, "precision_recall"),
    "fd_dinov2": ("dinov2",),
}
"""Per metric the fields that define it and not every metric; what no metric claims defines them all."""

_CLAIMED = {field for fields in DEFINED_BY.values() for field in fields}


def protocol_differences(first: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> list[str]:
    """Name the fields that must agree and do not, each as ``field (other's against first's value)``.

    Args:
        first: the protocol, nested or already flat, that the other one is held against.
        other: the protocol that is held against it.
        metric: the figure to compare. Where no field claims it, it is defined by the fields that define them all.
    """
    first, other = flatten(first), flatten(other)
    own = DEFINED_BY.get(metric, ())
    names = [
        name
        for name in dict.fromkeys([*first, *other])
        if not _within(name, IDENTITY) and (_within(name, own) or not _within(name, _CLAIMED))
    ]
    return [
        f"{name} ({plain(other.get(name))} against {plain(first.get(name))})"
        for name in names
        if first.get(name) != other.get(name)
    ]


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as ``{"a.b": value}``."""
    if not isinstance(content, Mapping) or not content:
        return {prefix[:-1]: content} if prefix else {}
    return {key: value for name, inner in content.items() for key, value in flatten(inner, f"{prefix}{name}.").items()}


def plain(value: Any) -> str:
    """Return a value of a protocol or a configuration as a table shows it."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _within(name: str, fields: Iterable[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)
