"""Reconstruction losses as pure functions that return one value per image, ``[B]``; weights live in the objective.

Images and target are ``[B, 3, H, W]``. Whatever dtype or autocast they come in, the arithmetic is float32. Each
reduction is a mean, so that a weight means the same at every image size.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from ..common.config import Config
from ..common.torchvision_import import ensure_torchvision
from .edge_padding import next_multiple, pad_edges
from .wavelets import haar_bands


class WaveletCharbonnierConfig(Config):
    """The term of :func:`wavelet_charbonnier`. LiteVAE states neither of its settings nor its weight."""

    weight: float = Field(0.0, ge=0)
    """0 leaves the term out."""
    epsilon: float = Field(1e-3, gt=0)
    """Below differences of this size the loss is quadratic; ours."""
    levels: int = Field(1, ge=1)
    """Of the wavelet transform; one level, the finest, is ours."""


class HighPassConfig(Config):
    """The term of :func:`high_pass_l1`. LiteVAE states neither the size of its Gaussian nor the weight."""

    weight: float = Field(0.0, ge=0)
    """0 leaves the term out."""
    sigma: float = Field(1.0, gt=0)
    """Standard deviation of the Gaussian in pixels; ours."""


class LowPassConfig(Config):
    """The term of :func:`low_pass_l2`."""

    weight: float = Field(0.0, ge=0)
    """0 leaves the term out."""
    sigma: float = Field(2.0, gt=0)
    """Standard deviation of the Gaussian in pixels; ours."""


def l1(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over channels and pixels."""
    return _mean(_difference(images, target).abs())


def l2(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over channels and pixels."""
    return _mean(_difference(images, target).square())


def wavelet_charbonnier(images: Tensor, target: Tensor, epsilon: float, levels: int) -> Tensor:
    """Charbonnier penalty on the high-frequency Haar bands of the difference (LiteVAE, arXiv 2405.14477, appendix).

    ``mean over levels l of mean over bands, channels and sites sqrt(d_l^2 + epsilon^2)``, where ``d_l`` are LH, HL and
    HH of level ``l`` of ``images - target``, orthonormal coefficients divided by ``2^l`` as in the encoder. Equal
    images give ``epsilon``, not 0. The mean over levels, which counts each level alike, is ours. Where sides do not
    divide by ``2^levels``, the border pixels of the difference are repeated outwards until they do, and count.
    """
    difference = _difference(images, target)
    height, width = (next_multiple(side, 2**levels) for side in difference.shape[-2:])
    low = pad_edges(difference, height, width)
    penalties = []
    for _ in range(levels):
        low, *high = (haar_bands(low) / 2).chunk(4, dim=1)
        penalties.append(_mean((torch.cat(high, dim=1).square() + epsilon**2).sqrt()))
    return torch.stack(penalties).mean(dim=0)


def high_pass_l1(images: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Mean over channels and pixels of ``|h(images) - h(target)|``, where ``h(x) = x - gauss(x)``.

    From LiteVAE (arXiv 2405.14477, appendix). See :func:`gaussian_blur` for the Gaussian and for what it raises.
    """
    difference = _difference(images, target)
    return _mean((difference - gaussian_blur(difference, sigma)).abs())


def low_pass_l2(images: Tensor, target: Tensor, sigma: float) -> Tensor:
    """Mean over channels and pixels of ``(gauss(images) - gauss(target))^2``: colours and large shapes, no texture.

    See :func:`gaussian_blur` for the Gaussian and for what it raises.
    """
    return _mean(gaussian_blur(_difference(images, target), sigma).square())


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur ``[B, C, H, W]`` in float32 with a normalised Gaussian of ``sigma`` pixels, cut at ``ceil(3 sigma)``.

    torchvision's, reflected at the borders, so that constant images stay as they are. The cut is ours.

    Raises:
        ValueError: a side is too short to be reflected, that is, not longer than ``ceil(3 sigma)``.
    """
    radius = math.ceil(3 * sigma)
    if min(images.shape[-2:]) <= radius:
        height, width = images.shape[-2:]
        raise ValueError(f"a Gaussian of sigma {sigma:g} needs sides of at least {radius + 1} px, got {height}x{width}")
    ensure_torchvision()
    from torchvision.transforms import functional

    size = 2 * radius + 1
    with torch.autocast(images.device.type, enabled=False):
        return functional.gaussian_blur(images.float(), [size, size], [sigma, sigma])


def _difference(images: Tensor, target: Tensor) -> Tensor:
    assert images.shape == target.shape, f"images {tuple(images.shape)} and target {tuple(target.shape)}"
    return images.float() - target.float()


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)
