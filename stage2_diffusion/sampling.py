"""How samples are drawn from a trained model: everything that decides them but the model, the seeds and the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..common.errors import UsageError
from .samplers import SAMPLERS

Grid = Literal["karras", "exponential", "uniform", "shifted"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
WITH_ETA = ("ddim", "dpmpp_2m_sde")
"""Samplers that take ``eta``."""


@dataclass(frozen=True)
class Sampling:
    """Sampler, noise levels and guidance. Raises :class:`UsageError` for what does not go together.

    Noise levels are the model's own, which its objective has multiplied by its noise shift.

    Attributes:
        sampler: a name in :data:`SAMPLERS`.
        steps: noise levels above zero; Heun calls the denoiser twice for each but the last.
        grid: how the levels are spaced, see :mod:`.schedules`.
        rho: exponent of the ``karras`` grid.
        grid_shift: factor on the levels of the ``shifted`` grid, which keeps its ends.
        eta: how much noise ``ddim`` (0 to 1) and ``dpmpp_2m_sde`` (0 up) draw anew; None is the sampler's own default.
        churn: S_churn of ``heun`` (EDM, algorithm 2), acting between ``churn_min`` and ``churn_max`` with
            ``churn_noise``, the paper's S_min, S_max and S_noise.
        guidance: weight of classifier-free guidance, or of autoguidance where a weaker model is given; 1 is none.
        guidance_interval: noise levels (low, high] within which guidance acts; None is all.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 20
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
        for name in ("rho", "grid_shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} {getattr(self, name)}: give a number above 0")
        self._check_noise()
        if not 0 <= self.guidance < math.inf:
            raise UsageError(f"guidance {self.guidance}: give a weight of at least 0; 1 is none")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise UsageError(f"guidance interval ({low}, {high}]: give noise levels 0 <= low < high")
        self._check_unused()

    def _check_noise(self) -> None:
        if self.eta is not None and not 0 <= self.eta < math.inf:
            raise UsageError(f"eta {self.eta}: give a number of at least 0; 0 draws no noise")
        if self.eta is not None and self.sampler == "ddim" and self.eta > 1:
            raise UsageError(f"eta {self.eta}: ddim draws a share of the noise anew, give a number between 0 and 1")
        if not 0 <= self.churn < math.inf:
            raise UsageError(f"churn {self.churn}: give a number of at least 0; 0 is none")
        if not 0 <= self.churn_min <= self.churn_max:
            raise UsageError(f"churn between {self.churn_min} and {self.churn_max}: give noise levels 0 <= min <= max")
        if not 0 < self.churn_noise < math.inf:
            raise UsageError(f"churn_noise {self.churn_noise}: give a number above 0; 1 adds the exact noise")

    def _check_unused(self) -> None:
        """Refuse what was given but would not act, so that nobody believes in its effect."""
        unused = {
            "eta": self.eta is not None and self.sampler not in WITH_ETA,
            "churn": self.churn != 0 and self.sampler != "heun",
            "rho": self.rho != Sampling.rho and self.grid != "karras",
            "churn_min": self.churn_min != 0 and self.churn == 0,
            "churn_max": self.churn_max != math.inf and self.churn == 0,
            "churn_noise": self.churn_noise != 1 and self.churn == 0,
            "grid_shift": self.grid_shift != Sampling.grid_shift and self.grid != "shifted",
            "guidance_interval": self.guidance_interval is not None and self.guidance == 1,
        }
        needs = {"eta": f"sampler {' or '.join(WITH_ETA)}", "churn": "sampler heun"}
        needs |= dict.fromkeys(("churn_min", "churn_max", "churn_noise"), "a churn above 0")
        needs |= {"rho": "grid karras", "grid_shift": "grid shifted", "guidance_interval": "a guidance other than 1"}
        for name, is_unused in unused.items():
            if is_unused:
                raise UsageError(
                    f"{name} {getattr(self, name)} has no effect here: leave it out, or take {needs[name]}"
                )

    def sampler_options(self) -> dict[str, float]:
        """Return the keyword arguments that the sampler takes besides the denoiser, the start and the grid."""
        if self.sampler == "heun":
            return {name: getattr(self, name) for name in ("churn", "churn_min", "churn_max", "churn_noise")}
        return {} if self.eta is None else {"eta": self.eta}


DEFAULT_SAMPLING = Sampling()
"""20 steps of DPM-Solver++ 2M on EDM's grid, without guidance."""
