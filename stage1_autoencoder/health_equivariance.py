"""Does encoding commute with moving, turning and scaling the picture? A section of the latent health report.

A latent that is a picture of the picture is easier to denoise with a convolutional network: making it one improves
generation (EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509). With a transform T, the image x, encoder E and decoder D,
the section compares E(T x) with T E(x), and D of the one with D of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .health import Figure, LatentData, Plot, Section, Verdict
from .health_passes import (
    REFUSALS,
    Coder,
    Lpips,
    Passes,
    factor_of,
    graded,
    image_spread,
    mean_psnr,
    ratio,
    root_mean_square,
    subset,
    whitening_of,
)

IMAGES = 16
"""Images measured."""
SHIFTS = range(1, 8)
"""In pixels; where the downsampling is larger, it is measured too: a shift by a whole site."""
UNRELATED = 2**0.5
"""Relative error between latents that have nothing to do with each other but mean and variance."""
WHOLE_SHIFT_NOTE, WHOLE_SHIFT_FAULT = 0.5, 1.0
SCALE_NOTE, TURN_NOTE = 1.0, 1.3


class Pair(NamedTuple):
    """Both orders of one transform, and the images they stand for.

    Attributes:
        name: of the transform, as in the figures.
        encoded: raw latents E(T x).
        moved: raw latents T E(x), of the same shape.
        images: T x, the pixels that these latents stand for.
    """

    name: str
    encoded: Tensor
    moved: Tensor
    images: Tensor


def equivariance(autoencoder: Coder, data: LatentData, *, batch_size: int, lpips: Lpips | None) -> Section:
    """Return how far encoding is from commuting with scale, flip, quarter turns and shifts.

    For each transform two relative errors: of the latents, rms(E(T x) - T E(x)) over the rms of E(T x), both whitened
    per channel, and of the images that they decode to, rms(D(T E(x)) - D(E(T x))) over the images' standard deviation.
    ``<transform>_psnr`` is that of D(T E(x)) against T x, EQ-VAE's own criterion, and ``<transform>_psnr_encoded`` that
    of D(E(T x)), which it would be if the two commuted.

    Scale is a half, by bicubic interpolation with antialiasing and by area, of image and latent alike; it is left out
    where the halves do not divide by the downsampling. A shift is along the width, between two crops of the same image,
    so that no border moves in; the latent is shifted by the same distance, bilinearly where it is no whole number of
    sites, and one site at each side, where the crop's border has its influence, is not compared. Transforms that the
    images are too small for, or whose shape the autoencoder refuses, have no figures.

    ``lpips`` is not used.
    """
    data, whiten, passes = subset(data, IMAGES), whitening_of(data), Passes(autoencoder, batch_size)
    spread = image_spread(data.images)
    figures: dict[str, Figure] = {"images": len(data.images)}
    latent_errors: dict[str, float] = {}
    for name, encoded, moved, images in _pairs(passes, data):
        whitened = whiten(encoded)
        error = ratio(root_mean_square(whitened - whiten(moved)), root_mean_square(whitened))
        from_encoded, from_moved = passes.decode(encoded), passes.decode(moved)
        figures |= {
            f"{name}_latent_error": error,
            f"{name}_image_error": ratio(root_mean_square(from_encoded - from_moved), spread),
            f"{name}_psnr": mean_psnr(from_moved, images),
            f"{name}_psnr_encoded": mean_psnr(from_encoded, images),
        }
        if error is not None:
            latent_errors[name] = error
    verdict, plots = _verdict(latent_errors, factor_of(data), len(data.images)), _plots(latent_errors)
    return Section("equivariance", figures, [verdict], plots)


def _pairs(passes: Passes, data: LatentData) -> Iterator[Pair]:
    images, factor = data.images, factor_of(data)
    latents = passes.encode(images)  # not data.mean: that may have been encoded in another precision
    for name, transform in _turns_and_scales(images.shape[-2:], factor).items():
        turned = transform(images)
        if (encoded := _encoded(passes, turned)) is not None:
            yield Pair(name, encoded, transform(latents), turned)
    yield from _shifts(passes, images, factor)


def _encoded(passes: Passes, images: Tensor) -> Tensor | None:
    """Return the latents of images of another shape than the data's; None where the autoencoder refuses them."""
    try:
        return passes.encode(images)
    except REFUSALS:
        return None


def _turns_and_scales(size: torch.Size, factor: int) -> dict[str, Callable[[Tensor], Tensor]]:
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "flip": lambda x: x.flip(-1),
        "turn_90": lambda x: torch.rot90(x, 1, (-2, -1)),
        "turn_180": lambda x: torch.rot90(x, 2, (-2, -1)),
        "turn_270": lambda x: torch.rot90(x, 3, (-2, -1)),
    }
    if all(side % (2 * factor) == 0 for side in size):
        transforms["half_bicubic"] = lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
        transforms["half_area"] = lambda x: F.avg_pool2d(x, 2)
    return transforms


def _shifts(passes: Passes, images: Tensor, factor: int) -> Iterator[Pair]:
    """Compare crops of one width at column 0 and at column ``shift``."""
    shifts = sorted({*SHIFTS, factor})
    width = (images.shape[-1] - shifts[-1]) // factor * factor
    sites = width // factor
    if sites - shifts[-1] // factor < 2 or (first := _encoded(passes, images[..., :width])) is None:
        return
    margin = 1 if sites - shifts[-1] // factor >= 5 else 0
    for shift in shifts:
        crop = images[..., shift : shift + width]
        moved = shifted(first, shift / factor)
        stop = moved.shape[-1] - margin
        inside = slice(margin, stop)
        pixels = crop[..., margin * factor : stop * factor]
        yield Pair(f"shift_{shift}", passes.encode(crop)[..., inside], moved[..., inside], pixels)


def shifted(latents: Tensor, sites: float) -> Tensor:
    """Return what lies ``sites`` >= 0 further along the width, bilinear; narrower by ``sites``, rounded up."""
    whole, share = int(sites), sites - int(sites)
    left = latents[..., whole:]
    return left if share == 0 else torch.lerp(left[..., :-1], left[..., 1:], share)


def _verdict(errors: dict[str, float], factor: int, count: int) -> Verdict:
    whole = {name: error for name, error in errors.items() if name in {f"shift_{s}" for s in _whole(factor)}}
    scales = {name: error for name, error in errors.items() if name.startswith("half_")}
    turns = {name: error for name, error in errors.items() if name.startswith(("flip", "turn_"))}
    level = graded(max(whole.values(), default=None), WHOLE_SHIFT_NOTE, WHOLE_SHIFT_FAULT)
    for others, note in ((scales, SCALE_NOTE), (turns, TURN_NOTE)):
        if level == "ok":
            level = graded(max(others.values(), default=None), note, math.inf)
    measured = ", ".join(f"{_words(name)} {error:.2f}" for name, error in {**turns, **scales, **whole}.items())
    text = (
        f"Relative error of the latents against the transformed ones ({count} images; 0 commutes, {UNRELATED:.2f} is "
        f"unrelated): {measured or 'not defined, the latents are the same everywhere'}."
    )
    return Verdict(
        level,
        "not_equivariant",
        text,
        f"fault: above {WHOLE_SHIFT_FAULT:g} for a shift by whole sites; note: above {WHOLE_SHIFT_NOTE:g} for one, "
        f"{SCALE_NOTE:g} for half the size or {TURN_NOTE:g} for a flip or a turn",
        "ours: convolutional encoders commute with shifts by whole sites (we measured 0.10 to 0.19 on trained ones, of "
        "flips and turns 0.8 to 1.3, of half the size 0.6 to 0.8); with the rest only those trained to do (arXiv "
        "2502.09509)",
    )


def _whole(factor: int) -> list[int]:
    return [shift for shift in {*SHIFTS, factor} if shift % factor == 0]


def _words(name: str) -> str:
    kind, _, which = name.partition("_")
    return {"shift": f"shift by {which} px", "turn": f"turn by {which}°", "half": f"half ({which})"}.get(kind, kind)


def _plots(errors: dict[str, float]) -> list[Plot]:
    shifts = {int(name.removeprefix("shift_")): error for name, error in errors.items() if name.startswith("shift_")}
    others = {_words(name): [error] for name, error in errors.items() if not name.startswith("shift_")}
    plots = [Plot("Error of the latents by transform", others, kind="bar", labels=("transform", "relative error"))]
    if shifts:
        series = {"latents": list(shifts.values())}
        x, labels = [float(shift) for shift in shifts], ("shift in pixels", "relative error")
        plots.append(Plot("Error of the latents by shift", series, x=x, labels=labels))
    return plots
