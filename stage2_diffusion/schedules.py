"""Grids of noise levels for sampling, ``[steps + 1]``: float64, strictly falling, the last level zero.

The first level is ``sigma_max`` and, from two steps on, the last above zero ``sigma_min``, both exactly. All raise
``ValueError`` unless ``steps >= 1`` and ``0 < sigma_min < sigma_max``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .objectives import Objective
from .sampling import Sampling


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return EDM's grid, evenly spaced in ``sigma^(1/rho)`` (Karras et al. 2022, equation 5, and its defaults)."""
    _check(steps, sigma_min, sigma_max)
    if rho <= 0:
        raise ValueError(f"rho must be above 0, not {rho}")
    roots = _falling(steps, sigma_min ** (1 / rho), sigma_max ** (1 / rho))
    return _with_ends(roots**rho, sigma_min, sigma_max)


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Return the grid evenly spaced in ``ln(sigma)``, the limit of `karras_sigmas` at large ``rho``."""
    _check(steps, sigma_min, sigma_max)
    logarithms = _falling(steps, math.log(sigma_min), math.log(sigma_max))
    return _with_ends(logarithms.exp(), sigma_min, sigma_max)


def uniform_sigmas(steps: int, objective: Objective) -> Tensor:
    """Return the grid evenly spaced in the objective's own time; for EDM that is `exponential_sigmas`."""
    _check(steps, objective.sigma_min, objective.sigma_max)
    return _with_ends(objective.sigma_at(_falling(steps, 0.0, 1.0)), objective.sigma_min, objective.sigma_max)


def shifted_sigmas(steps: int, objective: Objective, shift: float) -> Tensor:
    """Return `uniform_sigmas` moved by the shift of Stable Diffusion 3 (Esser et al. 2024, section 5.3.2).

    There ``t' = shift t / (1 + (shift - 1) t)``, which in our noise levels ``sigma = t / (1 - t)`` is ``shift sigma``.
    A finite range would be left by that, so the map is applied to the fraction of the range that t has covered (ours):
    ``(sigma' - min) / (max - sigma') = shift (sigma - min) / (max - sigma)``. It keeps both ends and order, and is
    ``shift sigma`` in between where the range is wide.
    """
    if shift <= 0:
        raise ValueError(f"the shift must be above 0, not {shift}")
    low, high = objective.sigma_min, objective.sigma_max
    sigmas = uniform_sigmas(steps, objective)[:-1]
    above, below = shift * (sigmas - low), high - sigmas
    return _with_ends((above * high + below * low) / (above + below), low, high)


def sampling_sigmas(sampling: Sampling, objective: Objective) -> Tensor:
    """Return the noise levels that ``sampling`` asks for over the objective's range, ``[steps + 1]``."""
    low, high = objective.sigma_min, objective.sigma_max
    if sampling.grid == "karras":
        return karras_sigmas(sampling.steps, low, high, sampling.rho)
    if sampling.grid == "exponential":
        return exponential_sigmas(sampling.steps, low, high)
    if sampling.grid == "uniform":
        return uniform_sigmas(sampling.steps, objective)
    assert sampling.grid == "shifted", sampling.grid
    return shifted_sigmas(sampling.steps, objective, sampling.grid_shift)


def _check(steps: int, sigma_min: float, sigma_max: float) -> None:
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"give noise levels 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")


def _falling(steps: int, low: float, high: float) -> Tensor:
    """Return ``steps`` evenly spaced values from ``high`` down to ``low``; of one step, ``high``."""
    return torch.linspace(high, low, steps, dtype=torch.float64)


def _with_ends(levels: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Return the levels with both ends free of rounding, and a final zero."""
    sigmas = torch.cat([levels.double(), levels.new_zeros(1, dtype=torch.float64)])
    sigmas[-2], sigmas[0] = sigma_min, sigma_max  # in this order: of one step, the level is sigma_max
    return sigmas
