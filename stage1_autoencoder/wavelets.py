"""The two-dimensional wavelet transform that feeds the LiteVAE encoder.

Coefficients of level ``l`` come as 4 bands per image channel, in the order (LL, LH, HL, HH) of PyWavelets'
``(cA, (cH, cV, cD))``, band-major: ``[B, 4 * C, H / 2^l, W / 2^l]``. The orthonormal coefficients are divided by
``2^l`` (LiteVAE, arXiv 2405.14477), so that for the Haar wavelet LL is the mean of a block and stays in [-1, 1].
"""

from __future__ import annotations

from math import ceil
from typing import Any

import pywt
import torch
from torch import Tensor


def haar_bands(images: Tensor) -> Tensor:
    """One orthonormal Haar step: ``[B, C, H, W]`` -> ``[B, 4C, H/2, W/2]``, equal to PyWavelets' ``dwt2(x, "haar")``.

    Sums and differences of the four phases of a 2x2 block, in any float type; a test holds it to PyWavelets.
    """
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"the Haar transform halves both sides: {height}x{width} must be even")
    a, b = images[..., 0::2, 0::2], images[..., 0::2, 1::2]
    c, d = images[..., 1::2, 0::2], images[..., 1::2, 1::2]
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return torch.cat([top + bottom, top - bottom, left + right, left - right], dim=1) / 2


def inverse_haar_bands(bands: Tensor) -> Tensor:
    """Undo :func:`haar_bands`: orthonormal bands ``[B, 4C, h, w]`` -> ``[B, C, 2h, 2w]``, differentiable."""
    low, horizontal, vertical, diagonal = bands.chunk(4, dim=1)
    plus, minus = low + horizontal, low - horizontal
    left, right = vertical + diagonal, vertical - diagonal
    top = torch.stack([plus + left, plus - left], dim=-1).flatten(-2)  # [B, C, h, 2w], every upper row
    bottom = torch.stack([minus + right, minus - right], dim=-1).flatten(-2)
    return torch.stack([top, bottom], dim=-2).flatten(-3, -2) / 2


def wavelet_levels(images: Tensor, levels: int, wavelet: str = "haar") -> list[Tensor]:
    """Return the scaled bands of levels 1 to ``levels``, finest first: level ``l`` is ``[B, 4C, H/2^l, W/2^l]``.

    ``wavelet`` is any of PyWavelets' discrete families, through ptwt with periodic extension so that sizes halve
    exactly; ``haar`` takes the direct form. Runs in float32 outside autocast and without a gradient to the images: the
    encoder's input is data. Raises ``ValueError`` where the sides do not divide by ``2^levels``.
    """
    factor = 2**levels
    if images.shape[-2] % factor or images.shape[-1] % factor:
        height, width = images.shape[-2:]
        raise ValueError(f"{levels} wavelet levels need sides divisible by {factor}, got {height}x{width}")
    result: list[Tensor] = []
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        approximation = images.float()
        for level in range(1, levels + 1):
            bands = _bands(approximation, wavelet)
            approximation = bands[:, : images.shape[1]]
            result.append(bands / 2**level)
    return result


def _bands(images: Tensor, wavelet: str) -> Tensor:
    if wavelet in ("haar", "db1"):
        return haar_bands(images)
    import ptwt

    height, width = images.shape[-2] // 2, images.shape[-1] // 2
    # ptwt extends an image by no more than itself; for a longer filter it is repeated, which changes no coefficient.
    length = pywt.Wavelet(wavelet).dec_len
    images = images.repeat(1, 1, ceil(length / images.shape[-2]), ceil(length / images.shape[-1]))
    coefficients: Any = ptwt.wavedec2(images, wavelet, level=1, mode="periodic")
    low, details = coefficients
    # On a periodic image the coefficients repeat after half its side; ptwt returns repeats as well.
    return torch.cat([low, *details], dim=1)[..., :height, :width]
