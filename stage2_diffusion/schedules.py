"""Grids of noise levels for sampling: float64, strictly falling, ending in zero."""

from __future__ import annotations

import torch
from torch import Tensor


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return EDM's grid (Karras et al. 2022, equation 5) with a final zero, ``[steps + 1]``.

    The levels are evenly spaced in ``sigma^(1/rho)``. The defaults are the paper's. ``ValueError`` unless
    ``steps >= 1`` and ``0 < sigma_min < sigma_max``.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"give noise levels 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])
