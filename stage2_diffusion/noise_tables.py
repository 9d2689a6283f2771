"""Discrete noise schedules, as the noise levels that a diffusion of 1000 steps passes through.

A schedule is its variances beta_t; the share of data left at step t is ``alpha_bar_t``, the product of ``1 - beta`` up
to t, and the noise level in the variance-exploding frame is ``sqrt((1 - alpha_bar) / alpha_bar)``. Adding one costs a
function and a line in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000
"""Of every schedule here, as published: the betas belong to this number."""

MAX_BETA = 0.999
"""Where Nichol & Dhariwal cap beta."""

Schedule = Literal["ldm_linear", "linear", "cosine"]


def ldm_linear_betas() -> Tensor:
    """Return LDM's betas ``[1000]``, linear in their square root (Rombach et al. 2022, arXiv 2112.10752).

    0.0015 to 0.0195 are those of its face models; the noise levels are 0.039 to 84.
    """
    return torch.linspace(math.sqrt(0.0015), math.sqrt(0.0195), STEPS, dtype=torch.float64) ** 2


def linear_betas() -> Tensor:
    """Return DDPM's betas ``[1000]`` (Ho et al. 2020, section 4); the noise levels are 0.010 to 157."""
    return torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """Return the cosine schedule's betas ``[1000]`` (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17).

    The noise levels are 0.0064 to 20,000: only the cap on beta keeps the last from being infinite.
    """
    offset = 0.008
    times = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
    signal = ((times + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=MAX_BETA)


NOISE_TABLES: dict[Schedule, Callable[[], Tensor]] = {
    "ldm_linear": ldm_linear_betas,
    "linear": linear_betas,
    "cosine": cosine_betas,
}


def alphas_cumprod(schedule: Schedule) -> Tensor:
    """Return alpha_bar of a schedule, ``[1000]`` float64, falling."""
    return (1 - NOISE_TABLES[schedule]()).cumprod(0)


def table_sigmas(schedule: Schedule, limit: float = math.inf) -> Tensor:
    """Return the noise levels of a schedule that are no higher than ``limit``: ``[<= 1000]`` float64, rising."""
    alpha_bar = alphas_cumprod(schedule)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    return sigmas[sigmas <= limit]
