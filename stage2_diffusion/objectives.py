"""Training objectives: how noise levels are drawn and how the network's output becomes a denoised estimate.

Every objective gives one denoiser ``denoise(x, sigma, labels)``; they differ in scalings, loss weight, the distribution
of noise levels, and the range of levels to sample with. Adding one costs a config, a class and a line in each table.

All noise levels of an objective are multiplied by its *noise shift*. Averaging k neighbouring values of a latent whose
content they share leaves 1/sqrt(k) of the noise, so a latent of more values is less corrupted by the same sigma, and
noise of sqrt(number of values) keeps the difficulty the same (Hoogeboom et al. 2023, arXiv 2301.11093; Esser et al.
2024, arXiv 2403.03206, section 5.3.2, for height times width; counting the channels too is after Zheng et al. 2025,
arXiv 2510.11690).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field, TypeAdapter, model_validator
from torch import Tensor

from ..common.config import Config
from ..common.denoising import (
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    Preconditioning,
    VPreconditioning,
)
from .noise_tables import Schedule, table_sigmas
from .weighting import NetworkWeightingConfig, WeightingConfig, weighted

REFERENCE_SIZE = 32 * 32 * 4
"""Values of the latent that the default noise levels are for."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ObjectiveSettings(Config):
    """What every objective has."""

    noise_shift: Literal["auto"] | Positive = "auto"
    """Factor on all noise levels; ``auto``: sqrt(values of a latent / ``reference_size``), but no less than 1.

    1 is no shift. That ``auto`` only ever raises the levels is ours: see ``results/stage-two``."""
    reference_size: int = Field(REFERENCE_SIZE, ge=1)
    """Channels times height times width of the latents for which the other settings are meant."""
    weighting: WeightingConfig = NetworkWeightingConfig()
    """How much the error at each noise level counts."""

    def shift_for(self, latent_size: int) -> float:
        """Return the factor on all noise levels for latents of ``latent_size`` values."""
        if self.noise_shift == "auto":
            return max(1.0, math.sqrt(latent_size / self.reference_size))
        return self.noise_shift


class EDMConfig(ObjectiveSettings):
    """EDM (Karras et al. 2022, arXiv 2206.00364) for latents whitened to unit variance, hence ``sigma_data = 1``.

    The published settings are for data of standard deviation 0.5; multiplying data and noise by 2 adds ln 2 = 0.69 to
    ``p_mean`` and changes nothing else. EDM's pixels (-1.2, 1.2) become (-0.5, 1.2) here, EDM2's 64x64x4 latents
    (-0.4, 1.0) become (0.3, 1.0), and scaling the noise with the square root of the number of latent values takes the
    latter to -0.4 at 32x32x4. The default is that mean with EDM's wider spread: a choice, not a published setting.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: Positive = 1.0
    """Standard deviation of the latents that the network sees."""
    p_mean: float = Field(-0.4, allow_inf_nan=False)
    """Mean of ln(sigma) in training, before the noise shift."""
    p_std: Positive = 1.2
    """Standard deviation of ln(sigma) in training."""
    sigma_min: Positive = 0.002
    """Lowest noise level of sampling, before the step to zero and the noise shift."""
    sigma_max: Positive = 80.0
    """Highest noise level of sampling, before the noise shift."""

    @model_validator(mode="after")
    def _check(self) -> EDMConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


class FlowConfig(ObjectiveSettings):
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003) between data at t = 0 and noise at t = 1.

    The noise level t / (1 - t) of pure noise is infinite, so sampling starts at ``t_max`` and ends with a step from
    ``t_min``. The defaults (ours) are noise levels 0.002 to 99, about the range of EDM. Stopping short of t = 1 costs
    what is left of the data at ``t_max``, a hundredth of the noise, which the start of sampling lacks; going closer
    costs grids that are even in a power or the logarithm of sigma the steps that they spend out there. The step from
    ``t_min`` leaves an error of the order of 0.002.
    """

    kind: Literal["flow"] = "flow"
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """Training times. ``logit_normal`` (Esser et al. 2024, arXiv 2403.03206, section 3.1): a lognormal sigma.
    ``uniform``: between ``t_min`` and ``t_max``, the original."""
    logit_mean: float = Field(0.0, allow_inf_nan=False)
    """Mean of ln(t / (1 - t)), for ``logit_normal``."""
    logit_std: Positive = 1.0
    """Standard deviation of ln(t / (1 - t)), for ``logit_normal``."""
    t_min: float = Field(0.002, gt=0, lt=1)
    """Lowest time, before the noise shift."""
    t_max: float = Field(0.99, gt=0, lt=1)
    """Highest time, before the noise shift."""

    @model_validator(mode="after")
    def _check(self) -> FlowConfig:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min {self.t_min} must be below t_max {self.t_max}")
        return self


class DiscreteConfig(ObjectiveSettings):
    """A discrete schedule: training draws one of its noise levels, each as often as any other.

    Levels above ``sigma_limit`` are left out, in training too: where the network predicts noise its error there is
    multiplied by sigma, and nothing of the data is left to see.
    """

    schedule: Schedule = "ldm_linear"
    """``ldm_linear`` (LDM's), ``linear`` (DDPM's) or ``cosine`` (Nichol & Dhariwal's)."""
    sigma_limit: float = Field(200.0, gt=1)
    """Highest level kept, before the noise shift. The default (ours) keeps all of LDM's and DDPM's schedules and drops
    the last 4 of the 1000 of the cosine one: 214, 321, 642 and 20,000."""


class EpsConfig(DiscreteConfig):
    """The network predicts the noise: DDPM (Ho et al. 2020, arXiv 2006.11239) and LDM."""

    kind: Literal["eps"] = "eps"


class VConfig(DiscreteConfig):
    """The network predicts v = alpha noise - beta data (Salimans & Ho 2022, arXiv 2202.00512)."""

    kind: Literal["v"] = "v"


ObjectiveConfig = Annotated[EDMConfig | FlowConfig | EpsConfig | VConfig, Field(discriminator="kind")]
"""Union of the objectives by ``kind``."""

OBJECTIVE_CONFIG: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)
"""Turns a plain dict into the config of its ``kind``, with ``validate_python``; a config it returns as it is."""


class Objective(Protocol):
    """What distinguishes one training objective from another."""

    @property
    def config(self) -> ObjectiveConfig:
        """What it was built from."""
        ...

    @property
    def preconditioning(self) -> Preconditioning:
        """Scalings and loss weight as functions of the noise level."""
        ...

    noise_shift: float
    """The factor that is in all noise levels already; 1 is none."""
    sigma_min: float
    sigma_max: float

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` noise levels for training, ``[count]`` float32, on the generator's device."""
        ...

    def sigma_at(self, time: Tensor) -> Tensor:
        """Return the noise level at the objective's own time in [0, 1], shaped like ``time``, float64.

        It rises strictly from ``sigma_min`` at 0 to ``sigma_max`` at 1.
        """
        ...


class EDM:
    """EDM: a lognormal distribution of noise levels."""

    def __init__(self, config: EDMConfig, latent_size: int = REFERENCE_SIZE) -> None:
        self.config = config
        self.noise_shift = config.shift_for(latent_size)
        own = EDMPreconditioning(config.sigma_data, label_origin=self.noise_shift)
        self.preconditioning = weighted(own, config.weighting, config.sigma_data)
        self.sigma_min, self.sigma_max = self.noise_shift * config.sigma_min, self.noise_shift * config.sigma_max

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``shift * exp(p_mean + p_std * standard normal)``, ``[count]``."""
        return self.noise_shift * _lognormal(self.config.p_mean, self.config.p_std, count, generator)

    def sigma_at(self, time: Tensor) -> Tensor:
        """Return the level at ``time`` in [0, 1], which is linear in ln(sigma).

        EDM's own time is sigma itself, of which hardly any lies where pictures form; its network's label and its
        training distribution are in ln(sigma).
        """
        return _between(torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64), time)


class Flow:
    """Rectified flow: a straight path at constant speed from data to noise."""

    def __init__(self, config: FlowConfig, latent_size: int = REFERENCE_SIZE) -> None:
        self.config = config
        self.noise_shift = config.shift_for(latent_size)
        self.preconditioning = weighted(FlowPreconditioning(label_origin=self.noise_shift), config.weighting)
        self.sigma_min, self.sigma_max = self.sigma_at(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``shift * t / (1 - t)`` for times t drawn as the config says, ``[count]``."""
        config = self.config
        if config.times == "logit_normal":  # t / (1 - t) is the exponential of t's logit
            return self.noise_shift * _lognormal(config.logit_mean, config.logit_std, count, generator)
        uniform = torch.rand(count, generator=generator, device=generator.device)
        return self._sigma(config.t_min + (config.t_max - config.t_min) * uniform)

    def sigma_at(self, time: Tensor) -> Tensor:
        """Return the level at ``time`` in [0, 1], which is linear in t between ``t_min`` and ``t_max``."""
        time = time.double()
        return self._sigma(self.config.t_min * (1 - time) + self.config.t_max * time)

    def _sigma(self, t: Tensor) -> Tensor:
        """With the shift s this is SD3's timestep shift: sigma / (1 + sigma) = s t / (1 + (s - 1) t)."""
        return self.noise_shift * t / (1 - t)


class _Discrete:
    """The noise levels of a discrete schedule; what the network predicts is the preconditioning's."""

    def __init__(
        self, config: EpsConfig | VConfig, own: type[EpsPreconditioning] | type[VPreconditioning], latent_size: int
    ) -> None:
        self.config = config
        self.noise_shift = config.shift_for(latent_size)
        self.preconditioning = weighted(own(label_origin=self.noise_shift), config.weighting)
        self.sigmas = self.noise_shift * table_sigmas(config.schedule, config.sigma_limit)
        self._table = self.sigmas.float()
        self.sigma_min, self.sigma_max = self.sigmas[0].item(), self.sigmas[-1].item()

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` of the schedule's levels, each as likely as any other, ``[count]``."""
        index = torch.randint(len(self.sigmas), (count,), generator=generator, device=generator.device)
        if self._table.device != index.device:
            self._table = self.sigmas.float().to(index.device)  # once: a copy makes a GPU's queue wait
        return self._table[index]

    def sigma_at(self, time: Tensor) -> Tensor:
        """Return the level at ``time`` in [0, 1], the index over the last index, interpolated in ln(sigma)."""
        return _between(self.sigmas, time)


class Eps(_Discrete):
    """Prediction of the noise on a discrete schedule."""

    def __init__(self, config: EpsConfig, latent_size: int = REFERENCE_SIZE) -> None:
        super().__init__(config, EpsPreconditioning, latent_size)


class V(_Discrete):
    """Prediction of v on a discrete schedule."""

    def __init__(self, config: VConfig, latent_size: int = REFERENCE_SIZE) -> None:
        super().__init__(config, VPreconditioning, latent_size)


OBJECTIVES: dict[str, type[EDM] | type[Flow] | type[Eps] | type[V]] = {"edm": EDM, "flow": Flow, "eps": Eps, "v": V}


def build_objective(config: ObjectiveConfig, latent_size: int = REFERENCE_SIZE) -> Objective:
    """Return the objective that ``config`` describes, for latents of ``latent_size`` = C * h * w values."""
    return OBJECTIVES[config.kind](config, latent_size)  # type: ignore[arg-type]  # the class that kind names


def _lognormal(mean: float, std: float, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` values whose logarithm has a mean and a standard deviation, on the generator's device."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    return (mean + std * normal).exp()


def _between(sigmas: Tensor, time: Tensor) -> Tensor:
    """Return rising ``sigmas [n]`` at ``time * (n - 1)``, linear in ln(sigma) between them; exact at them. float64."""
    position = time.double() * (len(sigmas) - 1)
    below = position.floor().long().clamp(max=len(sigmas) - 2)
    share = position - below
    sigmas = sigmas.to(time.device)
    return sigmas[below] ** (1 - share) * sigmas[below + 1] ** share
