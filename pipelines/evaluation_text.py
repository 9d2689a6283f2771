"""How a result is printed: every figure with its interval, and one line fit for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.evaluation import Result
from ..common.inception import FEATURES_NAME

_PAPER = {
    "rfid": ("rFID", 2), "fid": ("FID", 2), "kid_mean": ("KID", 5), "precision": ("precision", 3),
    "recall": ("recall", 3), "density": ("density", 3), "coverage": ("coverage", 3), "fd_dinov2": ("FD-DINOv2", 1),
    "psnr": ("PSNR", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 4),
}  # fmt: skip
"""What a paper calls the figures, and with how many digits."""
_NETWORKS = {FEATURES_NAME: "Inception 2015-12-05"}


def describe(result: Result) -> str:
    """Return every figure on a line, N, what must be known of them, and :func:`paper_line`."""
    lines = [_figure(result, name) for name in result.metrics]
    lines.append(_count(result.protocol))
    lines += [f"warning: {note}" for note in result.protocol.get("notes", [])]
    lines += [f"{name}: not computed ({why})" for name, why in result.not_computed.items()]
    lines += _worst(result)
    return "\n".join([*lines, paper_line(result)])


def paper_line(result: Result) -> str:
    """Return the figures, their intervals and what defines them as one line."""
    named = {name: how for name, how in _PAPER.items() if name in result.metrics}
    figures = ", ".join(_in_paper(result, name, *how) for name, how in named.items())
    return f"{figures or 'nothing measured'} ({', '.join(_definition(result))})"


def _figure(result: Result, name: str) -> str:
    text = f"{name}: {result.metrics[name]:.6g}"
    if name in result.intervals:
        text += " [{:.6g}, {:.6g}]".format(*result.intervals[name])
    if name.endswith("_extrapolated"):
        error = result.protocol.get(name, {}).get("error")
        text += " (estimated for infinitely many samples" + (f", error {error:.2g})" if error is not None else ")")
    return text


def _count(protocol: dict[str, Any]) -> str:
    reference = protocol.get("num_reference")
    against = "given statistics" if reference is None else f"{reference:,}"
    return f"N = {protocol['num_samples']:,} against {against}"


def _worst(result: Result) -> list[str]:
    """Name the worst images of the figure that shows them best."""
    shown = next((name for name in ("lpips", "psnr") if name in result.worst), None)
    if shown is None:
        return []
    images = ", ".join(f"{image['name'] or image['index']} ({image['value']:.4g})" for image in result.worst[shown])
    return [f"worst by {shown}: {images}"]


def _in_paper(result: Result, name: str, title: str, digits: int) -> str:
    if name == "lpips":
        title += f" ({result.protocol.get('lpips_net')})"
    text = f"{title} {result.metrics[name]:.{digits}f}"
    if name in result.intervals:
        text += " [{}]".format(", ".join(f"{bound:.{digits}f}" for bound in result.intervals[name]))
    return text


def _data_name(spec: str) -> str:
    """Return what a paper would call the data: of a path on this machine, the last part."""
    path = Path(spec)
    return path.name if path.is_absolute() else spec


def _definition(result: Result) -> list[str]:
    protocol = result.protocol
    parts = [_count(protocol)]
    if protocol.get("reference") is not None:
        parts[0] += f" of {_data_name(protocol['reference'])}"
    if any(name in result.metrics for name in ("fid", "rfid")):
        parts.append(_NETWORKS.get(protocol["features"], protocol["features"]))
    if "fd_dinov2" in result.metrics:
        parts.append(protocol["dinov2"]["features"])
    if protocol.get("size"):
        parts.append(f"{protocol['size']} px")
    resize, crop = protocol.get("resize", {}).get("data"), protocol.get("crop")
    parts += [str(what) for what in (resize, crop) if what not in (None, "none")]
    if "kid" in protocol:
        parts.append(f"KID of {protocol['kid']['subsets']} subsets of {protocol['kid']['subset_size']:,}")
    if protocol.get("sampler"):
        parts.append(f"{protocol['sampler']} {protocol['steps']} steps")
    if protocol.get("guidance") not in (None, 1):
        parts.append(f"guidance {protocol['guidance']:g}")
    if protocol.get("seeds"):
        parts.append(f"seeds {protocol['seeds']}")
    if result.intervals:
        parts.append("95 % intervals")
    return parts
