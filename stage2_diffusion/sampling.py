"""How samples are drawn from a trained model: everything that decides them but the model, the seeds and the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..common.errors import UsageError
from .samplers import SAMPLERS

Grid = Literal["karras", "exponential", "uniform", "shifted"]
GRIDS: tuple[Grid, ...] = get_args(Grid)


@dataclass(frozen=True)
class Sampling:
    """Sampler, noise levels and guidance. Raises :class:`UsageError` for what does not go together.

    Attributes:
        sampler: a name in :data:`SAMPLERS`.
        steps: noise levels above zero; Heun calls the denoiser twice for each but the last.
        grid: how the levels are spaced, see :mod:`.schedules`.
        rho: exponent of the ``karras`` grid.
        grid_shift: factor on the levels of the ``shifted`` grid.
        eta: share of the noise that ``ddim`` and ``dpmpp_2m_sde`` draw anew; None is the sampler's own default.
        churn: S_churn of ``heun`` (EDM, algorithm 2), acting between ``churn_min`` and ``churn_max`` with
            ``churn_noise``, the paper's S_min, S_max and S_noise.
        guidance: weight of classifier-free guidance, or of autoguidance where a weaker model is given; 1 is none.
        guidance_interval: noise levels (low, high] within which guidance acts; None is all.
    """

    sampler: str = "heun"
    steps: int = 32
    grid: Grid = "karras"
    rho: float = 7.0
    grid_shift: float = 1.0
    eta: float | None = None
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UsageError(f"--sampler {self.sampler}: unknown; choose one of {', '.join(SAMPLERS)}")
        if self.grid not in GRIDS:
            raise UsageError(f"--grid {self.grid}: unknown; choose one of {', '.join(GRIDS)}")
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: sampling needs at least 1 step")
