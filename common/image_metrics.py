"""PSNR and SSIM between uint8 images, per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_OF_IDENTICAL = 100.0
_WINDOW, _SIGMA = 11, 1.5


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB per image, ``[B]`` float64, of uint8 ``[B,3,H,W]``.

    The error is averaged over the pixels and channels of one image, the peak is 255. Identical images, whose ratio is
    infinite, count as 100 dB.
    """
    _check(images, target)
    error = (images.double() - target.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255.0**2 / error)).clamp(max=PSNR_OF_IDENTICAL)


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity per image, ``[B]`` float64, of uint8 ``[B,3,H,W]``.

    As Wang et al. 2004: Gaussian window 11x11 with sigma 1.5, K = (0.01, 0.03), range 255, only where the window fits;
    averaged over the three channels of RGB.

    Raises:
        ValueError: the shapes differ, or a side is below 11 px.
    """
    _check(images, target)
    if min(images.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least {_WINDOW} px, got {tuple(images.shape[-2:])}")
    x, y = images.double(), target.double()
    channels = x.shape[1]
    # One pass over all five moments. [B,5C,H,W] -> [B,5C,H-10,W-10]
    moments = _blur(torch.cat([x, y, x * x, y * y, x * y], dim=1)).split(channels, dim=1)
    mean_x, mean_y = moments[0], moments[1]
    var_x, var_y = moments[2] - mean_x**2, moments[3] - mean_y**2
    covariance = moments[4] - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(maps: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=maps.dtype, device=maps.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).expand(maps.shape[1], 1, 1, -1)
    maps = F.conv2d(maps, weights, groups=maps.shape[1])
    return F.conv2d(maps, weights.transpose(2, 3), groups=maps.shape[1])


def _check(images: Tensor, target: Tensor) -> None:
    if images.shape != target.shape:
        raise ValueError(f"images {tuple(images.shape)} and target {tuple(target.shape)} differ in shape")
    if images.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype} and {target.dtype}")
