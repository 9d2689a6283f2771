"""Guidance: pure functions that turn denoisers into a guided denoiser, which any sampler takes.

All are one extrapolation from a worse denoiser through a better one, ``D = D_worse + weight (D_better - D_worse)``.
Weight 1 is no guidance and returns the better denoiser itself; 0 is the worse one. (Ho & Salimans write the weight as
1 + w.)

An interval ``(low, high]`` of noise levels limits guidance to it (Kynkäänniemi et al. 2024, arXiv 2404.07724);
elsewhere the better denoiser acts alone and the worse one is not called.

The two outputs come from two calls, not from one of twice the batch: that needs no more memory than sampling without
guidance and no more than the `Denoise` contract. It costs nothing once a batch keeps the device busy: with a small UNet
on one CPU core two calls took 1.4 times as long as one of twice the batch at 1 image, 1.3 at 4, 1.0 at 16 and 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.denoising import Denoise, expand_like

Interval = tuple[float, float]


def classifier_free(denoise: Denoise, weight: float, interval: Interval | None = None) -> Denoise:
    """Return classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): from no class towards the class.

    The unconditional output is that of ``labels=None``; ``ValueError`` where the guided denoiser is called so.
    """

    def unconditional(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        if labels is None:
            raise ValueError("classifier-free guidance needs labels")
        return denoise(x, sigma, None)

    return _extrapolated(denoise, unconditional, weight, interval)


def autoguidance(denoise: Denoise, weaker: Denoise, weight: float, interval: Interval | None = None) -> Denoise:
    """Return autoguidance (Karras et al. 2024, arXiv 2406.02507): away from a weaker model.

    The weaker model is a smaller or less trained one of the same task; it sees the same labels, which may be None.
    """
    return _extrapolated(denoise, weaker, weight, interval)


def _extrapolated(better: Denoise, worse: Denoise, weight: float, interval: Interval | None) -> Denoise:
    if weight == 1:
        return better

    def guided(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        denoised = better(x, sigma, labels)
        if interval is None:
            return torch.lerp(worse(x, sigma, labels), denoised, weight)
        low, high = interval
        inside = (sigma > low) & (sigma <= high)
        if not inside.any():
            return denoised
        return torch.where(
            expand_like(inside, denoised), torch.lerp(worse(x, sigma, labels), denoised, weight), denoised
        )

    return guided
