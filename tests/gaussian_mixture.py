"""Data whose best denoiser is known: every value is drawn from one mixture of two Gaussians, on its own."""

import math

import torch

WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.2, 0.6), (0.25, 0.4)
MEAN = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
STD = math.sqrt(sum(w * (s**2 + m**2) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)) - MEAN**2)
SKEWNESS = (
    sum(w * ((m - MEAN) ** 3 + 3 * (m - MEAN) * s**2) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)) / STD**3
)


def denoise(x, sigma, labels=None):
    """E[clean | x]: each component's posterior mean, weighted with how likely x comes from that component."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    weights, means, stds = (torch.tensor(v, dtype=x.dtype) for v in (WEIGHTS, MEANS, STDS))
    x, noise = x[..., None], sigma[..., None] ** 2
    variance = stds**2 + noise
    likely = (weights.log() - variance.log() / 2 - (x - means) ** 2 / (2 * variance)).softmax(dim=-1)
    return (likely * (stds**2 * x + noise * means) / variance).sum(dim=-1)


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_from(seed, shape):
    return lambda step: normal(shape, 1000 * seed + step)
