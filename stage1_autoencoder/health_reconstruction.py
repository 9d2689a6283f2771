"""What encoding and decoding costs, and what drawing, lower precision and other sizes add: a section of the report."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor

from ..common.runtime import MixedPrecision
from .health import Figure, LatentData, Plot, Section, Verdict
from .health_passes import (
    LPIPS_MISSING,
    REFUSALS,
    Coder,
    Lpips,
    NotFinite,
    Passes,
    factor_of,
    graded,
    mean_lpips,
    mean_psnr,
    subset,
)

IMAGES = 16
"""Images measured."""
SCALES = (Fraction(1, 2), Fraction(1), Fraction(3, 2))
"""Sizes of the curve over resolutions, in units of the data's."""
POOR = 20.0
"""PSNR in dB below which a reconstruction is noted; a fault is none better than one colour per image."""
SAMPLING_NOTE, SAMPLING_FAULT = 1.0, 3.0
PRECISION_NOTE, PRECISION_FAULT = 0.1, 1.0
LARGER_NOTE, LARGER_FAULT = 0.0, 3.0
INVISIBLE = 40.0
"""PSNR in dB from which on a difference is taken for invisible: a verdict counts none above it."""
CAP = f" (what is above {INVISIBLE:g} dB counts as that)"


def reconstruction(autoencoder: Coder, data: LatentData, *, batch_size: int, lpips: Lpips | None) -> Section:
    """Return PSNR and LPIPS of the round trip: of the mode, of a draw, in bf16 (and on GPUs fp16), at other sizes.

    All are against the images, in dB; gaps are how much lower the second figure is. ``bf16`` is autocast over encoder
    and decoder. The curve is of the images resized by bicubic interpolation with antialiasing to 1/2, 1 and 3/2 of
    their size, each against itself; a size that does not divide by the downsampling, or that the autoencoder refuses,
    has none.
    """
    data, passes = subset(data, IMAGES), Passes(autoencoder, batch_size)
    mode, drawn = passes.decode(data.mean), passes.decode(data.drawn)
    figures: dict[str, Figure] = {"images": len(data.images)}
    for name, images in {"": mode, "_sampled": drawn}.items():
        figures[f"psnr{name}"] = mean_psnr(images, data.images)
        figures[f"lpips{name}"] = mean_lpips(lpips, images, data.images, batch_size)
    psnr, sampled = mean_psnr(mode, data.images), mean_psnr(drawn, data.images)
    precisions = {"no": mean_psnr(_round_trip(passes, data.images), data.images)}
    lower: tuple[MixedPrecision, ...] = ("bf16", "fp16") if passes.device.type == "cuda" else ("bf16",)
    precisions |= {name: _lower_psnr(passes, data.images, name) for name in lower}
    gaps = {name: precisions["no"] - value for name, value in precisions.items() if name != "no"}
    curve = _curve(passes, data)
    one_colour = mean_psnr(data.images.mean(dim=(-2, -1), keepdim=True).expand_as(data.images), data.images)
    figures |= {"psnr_one_colour": one_colour, "sampling_gap": psnr - sampled}
    figures |= {f"psnr_{name}": precisions[name] for name in gaps} | {f"{name}_gap": gap for name, gap in gaps.items()}
    figures |= {"scales": [float(scale) for scale in SCALES], "psnr_by_scale": curve}
    verdicts = [
        _poor_verdict(psnr, one_colour, data),
        _sampling_verdict(psnr, sampled, data, "" if lpips else LPIPS_MISSING),
        _precision_verdict(precisions, gaps),
        _resolution_verdict(curve, data),
    ]
    return Section("reconstruction", figures, verdicts, _plots(curve, data))


def _loss(before: float, after: float) -> float:
    """Return by how many dB ``after`` is worse, below `INVISIBLE`."""
    return min(before, INVISIBLE) - min(after, INVISIBLE)


def _round_trip(passes: Passes, images: Tensor) -> Tensor:
    return passes.decode(passes.encode(images))


def _lower_psnr(passes: Passes, images: Tensor, precision: MixedPrecision) -> float:
    """Return the PSNR of the round trip in lower precision; minus infinity where that overflows."""
    try:
        return mean_psnr(_round_trip(replace(passes, precision=precision), images), images)
    except NotFinite:
        return -math.inf


def _curve(passes: Passes, data: LatentData) -> list[float | None]:
    """Return the PSNR at each of `SCALES`."""
    factor = factor_of(data)
    curve: list[float | None] = []
    for scale in SCALES:
        size = [side * scale for side in data.images.shape[-2:]]
        divides = all(side % factor == 0 for side in size)
        curve.append(_resized_psnr(passes, data.images, [int(side) for side in size]) if divides else None)
    return curve


def _resized_psnr(passes: Passes, images: Tensor, size: list[int]) -> float | None:
    """Return the PSNR of images resized to ``size``, against themselves; None where the autoencoder refuses them."""
    if list(images.shape[-2:]) != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
    try:
        return mean_psnr(_round_trip(passes, images), images)
    except REFUSALS:
        return None


def _poor_verdict(psnr: float, one_colour: float, data: LatentData) -> Verdict:
    return Verdict(
        "ok" if psnr >= POOR else "note" if psnr > one_colour else "fault",
        "poor_reconstruction",
        f"Encoding and decoding gives {psnr:.2f} dB ({len(data.images)} images); each image's mean colour in its place "
        f"would give {one_colour:.2f} dB",
        f"note: below {POOR:g} dB; fault: no better than one colour per image either",
        "ours: LiteVAE (arXiv 2405.14477) reports 28 dB on faces of 256 px; at 20 the error is a tenth of the range",
    )


def _sampling_verdict(psnr: float, sampled: float, data: LatentData, remark: str) -> Verdict:
    text = f"Decoding a draw from the posterior gives {sampled:.2f} dB and its mean {psnr:.2f} dB"
    if data.std is None:
        text = f"The encoder is deterministic: there is nothing to draw; PSNR is {psnr:.2f} dB"
    return Verdict(
        graded(_loss(psnr, sampled), SAMPLING_NOTE, SAMPLING_FAULT),
        "sampling_gap",
        f"{text} ({len(data.images)} images).{remark}",
        f"note: a draw is more than {SAMPLING_NOTE:g} dB worse; fault: more than {SAMPLING_FAULT:g} dB{CAP}",
        "ours: at 3 dB the posterior's noise makes as much error as the autoencoder, and stage two learns the draws",
    )


def _precision_verdict(precisions: dict[str, float], gaps: dict[str, float]) -> Verdict:
    measured = " and ".join(
        f"{precisions[name]:.2f} dB in {name}" if math.isfinite(precisions[name]) else f"what is not finite in {name}"
        for name in gaps
    )
    unmeasured = "" if "fp16" in gaps else " fp16 is measured on a GPU only."
    return Verdict(
        graded(_loss(precisions["no"], min(precisions[name] for name in gaps)), PRECISION_NOTE, PRECISION_FAULT),
        "bf16_gap",
        f"Encoding and decoding gives {precisions['no']:.2f} dB in float32, {measured}.{unmeasured}",
        f"note: more than {PRECISION_NOTE:g} dB worse in lower precision; fault: more than {PRECISION_FAULT:g} dB{CAP}",
        "ours: a tenth of a dB is below what papers report, a whole one is what they report as progress",
    )


def _resolution_verdict(curve: list[float | None], data: LatentData) -> Verdict:
    height, width = data.images.shape[-2:]
    parts = [
        f"{int(width * scale)}x{int(height * scale)} {value:.2f} dB"
        for scale, value in zip(SCALES, curve, strict=True)
        if value is not None
    ]
    same, larger = curve[SCALES.index(Fraction(1))], curve[SCALES.index(Fraction(3, 2))]
    gap = None if larger is None or same is None else _loss(same, larger)
    return Verdict(
        graded(gap, LARGER_NOTE, LARGER_FAULT),
        "resolution_gap",
        f"PSNR by size of the same images: {', '.join(parts)}.",
        f"note: the images enlarged by a half come out more than {LARGER_NOTE:g} dB worse; fault: more than "
        f"{LARGER_FAULT:g} dB{CAP}; smaller ones, which hold more detail per pixel, are shown and not judged",
        "ours: enlarged images hold nothing new, so an autoencoder that is not tied to its size finds them easier",
    )


def _plots(curve: list[float | None], data: LatentData) -> list[Plot]:
    known = [(float(scale * data.images.shape[-1]), value) for scale, value in zip(SCALES, curve, strict=True) if value]
    if len(known) < 2:
        return []
    sizes, values = zip(*known, strict=True)
    labels = ("width in pixels", "PSNR in dB")
    return [Plot("Reconstruction by size", {"PSNR": list(values)}, x=list(sizes), labels=labels)]
