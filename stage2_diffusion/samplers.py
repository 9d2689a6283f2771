"""Samplers: pure functions of a denoiser, a start at the first noise level, and a grid of noise levels.

    sampler(denoise, x, sigmas, labels=None, noise=None) -> x at the last noise level

``x [B, C, h, w]`` is at ``sigmas[0]`` (``sigmas[0] * standard normal`` plus what is negligible), ``sigmas [steps + 1]``
falls and ends in zero, and ``noise(step)`` returns the standard normal noise of a step, shaped like ``x``; the
deterministic samplers ignore it. Nothing here draws random numbers, so that image i can depend on its own seed alone.

The state keeps the type of ``x``; the coefficients are computed in float64. Adding a sampler costs one function and
one line in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ..common.denoising import Denoise

Noise = Callable[[int], Tensor]
Sampler = Callable[..., Tensor]


def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Euler's method on the probability flow ODE, dx/dsigma = (x - D(x; sigma)) / sigma. First order."""
    for sigma, sigma_next in _intervals(sigmas):
        x = x + (sigma_next - sigma) * _slope(denoise, x, sigma, labels)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    noise: Noise | None = None,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's method, the sampler of EDM (Karras et al. 2022, algorithms 1 and 2). Second order, two calls per step.

    ``churn`` and its bounds are the paper's S_churn, S_min, S_max and S_noise; 0 is the deterministic algorithm 1. As
    there, churn may raise a level above the first of the grid. The last step, to zero, is an Euler step.
    """
    steps = len(sigmas) - 1
    for step, (sigma, sigma_next) in enumerate(_intervals(sigmas)):
        if churn > 0 and churn_min <= sigma <= churn_max:
            raised = sigma * (1 + min(churn / steps, math.sqrt(2) - 1))
            x = x + churn_noise * math.sqrt(raised**2 - sigma**2) * _noise_of(noise, step, x)
            sigma = raised
        slope = _slope(denoise, x, sigma, labels)
        predicted = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + _slope(denoise, predicted, sigma_next, labels)) / 2
            x = x + (sigma_next - sigma) * slope
        else:
            x = predicted
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    noise: Noise | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, arXiv 2010.02502, equations 12 and 16) in the variance-exploding frame.

    ``x / sqrt(alpha_bar)`` of that paper is our ``x`` and ``sqrt((1 - alpha_bar) / alpha_bar)`` our sigma. ``eta = 0``
    is the deterministic sampler, in this frame the same as `euler`; ``eta = 1`` is ancestral sampling.
    """
    for step, (sigma, sigma_next) in enumerate(_intervals(sigmas)):
        denoised = denoise(x, x.new_full(x.shape[:1], sigma), labels)
        fresh = eta * sigma_next / sigma * math.sqrt(sigma**2 - sigma_next**2)  # the part of sigma_next drawn anew
        kept = math.sqrt(sigma_next**2 - fresh**2)
        x = denoised + kept / sigma * (x - denoised)
        if fresh > 0:
            x = x + fresh * _noise_of(noise, step, x)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Ancestral sampling: an Euler step below the next level, then fresh noise up to it. `ddim` with ``eta = 1``."""
    return ddim(denoise, x, sigmas, labels, noise, eta=1.0)


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, labels: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2). Second order, one call per step."""
    return dpmpp_2m_sde(denoise, x, sigmas, labels, noise, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    labels: Tensor | None = None,
    noise: Noise | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5), with its noise scaled by ``eta``; 0 is DPM-Solver++(2M).

    With lambda = -ln(sigma) and h the step in lambda, the linear part of the SDE is solved exactly and the denoiser is
    extrapolated linearly from the last two steps. The first step and the step to zero have no second point and are of
    first order.
    """
    previous: Tensor | None = None
    previous_h = math.nan
    for step, (sigma, sigma_next) in enumerate(_intervals(sigmas)):
        denoised = denoise(x, x.new_full(x.shape[:1], sigma), labels)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        target = denoised if previous is None else denoised + (denoised - previous) * h / (2 * previous_h)
        decay = sigma_next / sigma * math.exp(-eta * h)
        x = decay * x - math.expm1(-(1 + eta) * h) * target
        if eta > 0:
            x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * _noise_of(noise, step, x)
        previous, previous_h = denoised, h
    return x


SAMPLERS: dict[str, Sampler] = {
    "heun": heun,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


def _intervals(sigmas: Tensor) -> list[tuple[float, float]]:
    """Return the grid as pairs of neighbouring levels."""
    levels = sigmas.tolist()
    assert all(a > b >= 0 for a, b in pairwise(levels)), f"noise levels must fall: {levels}"
    return list(pairwise(levels))


def _slope(denoise: Denoise, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """Return dx/dsigma of the probability flow ODE at ``sigma > 0`` (EDM equations 1 and 3)."""
    return (x - denoise(x, x.new_full(x.shape[:1], sigma), labels)) / sigma


def _noise_of(noise: Noise | None, step: int, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("this sampler is stochastic: pass noise=, a function of the step that returns noise like x")
    return noise(step).to(x)
