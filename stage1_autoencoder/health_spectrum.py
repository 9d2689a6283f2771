"""The latent health report on spatial frequencies: the section ``spectrum``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .health import Figure, LatentData, Plot, Section, Verdict
from .health_measures import every_nth, in_words, plain, positions, usable, whitened

MAX_IMAGES = 1000
BLOCK = 100  # images transformed at once
HIGH = 0.25  # cycles per site: the upper half of the band
MIN_RADII = 3
# White noise has slope 0. The flattest spectrum of the autoencoders that we trained is -0.5, as a mean over channels.
WHITE_SLOPE = -0.2


def spectrum(data: LatentData) -> Section:
    """Return the radially averaged power of whitened drawn latents, and of the images at the same frequencies.

    The power is that of the orthonormal DCT-II, as Skorokhodov et al. (2025, arXiv 2502.14831) compare latents with
    images: unlike a Fourier transform, it does not see the jump from one edge to the opposite one. The first ``h x w``
    coefficients of the images are those that a latent grid of ``h x w`` sites can carry.
    """
    data = usable(data)
    latents = every_nth(whitened(data.drawn), MAX_IMAGES)
    images = every_nth(data.images, MAX_IMAGES).float()
    height, width = latents.shape[2:]
    radii, frequencies = radial_bins(height, width)
    figures: dict[str, Figure] = {
        "images": len(latents),
        "frequencies": plain(frequencies),
    }
    if len(frequencies) < MIN_RADII:
        text = f"A latent grid of {height} x {width} sites is too small for a spectrum"
        return Section("spectrum", figures, [Verdict("ok", "white_spectrum", text, "none", "ours")])
    by_channel = dct_power(latents, height, width)
    of_latents = by_channel.mean(dim=0)
    of_images = dct_power(images, height, width).mean(dim=0)
    radial, radial_images = (radial_mean(power, radii, len(frequencies)) for power in (of_latents, of_images))
    slopes = torch.stack([spectral_slope(frequencies, radial_mean(p, radii, len(frequencies))) for p in by_channel])
    slope, slope_images = (float(spectral_slope(frequencies, power)) for power in (radial, radial_images))
    figures |= {
        "power": plain(radial),
        "image_power": plain(radial_images),
        "slope": _or_none(slope),
        "image_slope": _or_none(slope_images),
        "channel_slopes": plain(slopes),
        "high_frequency_share": _or_none(high_frequency_share(of_latents)),
        "image_high_frequency_share": _or_none(high_frequency_share(of_images)),
        "white_high_frequency_share": high_frequency_share(torch.ones(height, width)),
    }
    plot = Plot(
        "Power by spatial frequency, normalised",
        {
            "latents": [float(p) for p in _normalised(radial)],
            "images": [float(p) for p in _normalised(radial_images)],
        },
        x=[float(f) for f in frequencies],
        labels=("cycles per site", "share of power"),
        log="xy",
    )
    verdict = _white_verdict(slope, slope_images, slopes, high_frequency_share(of_latents))
    return Section("spectrum", figures, [verdict], [plot])


def dct_power(fields: Tensor, height: int, width: int) -> Tensor:
    """Return the power of the first DCT-II coefficients of ``[N, C, H, W]``, mean over N: ``[C, height, width]``.

    The transform is orthonormal: of white noise of variance s every coefficient has the power s.
    """
    rows, columns = _dct_matrix(fields.shape[2], height), _dct_matrix(fields.shape[3], width)
    total = torch.zeros(fields.shape[1], height, width, dtype=torch.float64)
    for block in fields.split(BLOCK):
        total += (rows @ block @ columns.T).square().sum(dim=0, dtype=torch.float64)
    return total / len(fields)


def _dct_matrix(size: int, kept: int) -> Tensor:
    """Return the first ``kept`` rows of the orthonormal DCT-II of ``size`` values."""
    order = torch.arange(kept, dtype=torch.float64)[:, None]
    site = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (site + 0.5) * order / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _radius(height: int, width: int) -> Tensor:
    """Return the frequency of every coefficient in cycles per site, ``[height, width]``."""
    vertical = torch.arange(height, dtype=torch.float64) / (2 * height)
    horizontal = torch.arange(width, dtype=torch.float64) / (2 * width)
    return (vertical[:, None].square() + horizontal.square()).sqrt()


def radial_bins(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the bin of every coefficient ``[height, width]``, -1 for none, and the mean frequency of the bins.

    Bins are as wide as the lowest frequency of the shorter axis. The constant, and what lies beyond 0.5 cycles per
    site, where the corners of the grid hold some directions only, are in none.
    """
    radius = _radius(height, width)
    rounded = (radius * 2 * min(height, width)).round()
    inside = (radius > 0) & (radius <= 0.5)
    kept = rounded[inside].unique()
    bins = torch.where(inside, torch.searchsorted(kept, rounded.contiguous()), -1)
    return bins, radial_mean(radius, bins, len(kept))


def radial_mean(values: Tensor, bins: Tensor, count: int) -> Tensor:
    """Return the mean of ``[height, width]`` in every one of ``count`` bins."""
    return torch.tensor([float(values[bins == index].mean()) for index in range(count)], dtype=torch.float64)


def spectral_slope(frequencies: Tensor, power: Tensor) -> Tensor:
    """Return the least-squares slope of log power over log frequency: 0 is white, about -2 a natural image.

    NaN where a power is zero.
    """
    x, y = frequencies.log(), power.log()
    x = x - x.mean()
    slope = (x * (y - y.mean())).sum() / x.square().sum()
    return torch.where(slope.isfinite(), slope, math.nan)


def high_frequency_share(power: Tensor) -> float:
    """Return the share of the power ``[height, width]`` from 0.25 cycles per site on, of all but the constant's."""
    radius = _radius(*power.shape)
    total = power[radius > 0].sum()
    return float(power[radius >= HIGH].sum() / total) if total > 0 else math.nan


def _normalised(power: Tensor) -> Tensor:
    return power / power.sum().clamp_min(1e-30)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _white_verdict(slope: float, image_slope: float, slopes: Tensor, share: float) -> Verdict:
    white = positions(slopes > WHITE_SLOPE)
    of_images = f" (the images': {image_slope:.2f})" if math.isfinite(image_slope) else ""
    measured = (
        f"the slope of log power over log frequency is {slope:.2f}{of_images}, and {100 * share:.3g} % of the power is "
        "in the upper half of the band"
    )
    if not math.isfinite(slope):
        text = "Some frequencies have no power at all: there is no slope"
    elif slope > WHITE_SLOPE:
        text = f"The latents are nearly white noise in space: {measured}"
    elif white:
        text = f"Nearly white: {in_words(white)}; over all channels {measured}"
    else:
        text = f"The spectrum falls: {measured}"
    return Verdict(
        "fault" if slope > WHITE_SLOPE else "note" if white else "ok",
        "white_spectrum",
        text,
        f"a slope above {WHITE_SLOPE:g} is a fault, of single channels a note",
        "ours; that strong high frequencies hinder diffusion is Skorokhodov et al.'s finding (2025, arXiv 2502.14831)",
    )
