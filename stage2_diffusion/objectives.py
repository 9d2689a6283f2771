"""Training objectives: how noise levels are drawn and how the network's output becomes a denoised estimate.

Every objective gives one denoiser ``denoise(x, sigma, labels)``; they differ in scalings, loss weight, the distribution
of noise levels, and the range of levels to sample with. Adding one costs a config, a class and a line in each table.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..common.config import Config
from ..common.denoising import EDMPreconditioning, Preconditioning


class EDMConfig(Config):
    """EDM (Karras et al. 2022, arXiv 2206.00364) for latents whitened to unit variance, hence ``sigma_data = 1``.

    The published settings are for data of standard deviation 0.5; multiplying data and noise by 2 adds ln 2 = 0.69 to
    ``p_mean`` and changes nothing else. EDM's pixels (-1.2, 1.2) become (-0.5, 1.2) here, EDM2's 64x64x4 latents
    (-0.4, 1.0) become (0.3, 1.0), and scaling the noise with the square root of the number of latent values takes the
    latter to -0.4 at 32x32x4. The default is that mean with EDM's wider spread: a choice, not a published setting.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(1.0, gt=0)
    """Standard deviation of the latents that the network sees."""
    p_mean: float = -0.4
    """Mean of ln(sigma) in training."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of ln(sigma) in training."""
    sigma_min: float = Field(0.002, gt=0)
    """Lowest noise level of sampling, before the step to zero."""
    sigma_max: float = Field(80.0, gt=0)
    """Highest noise level of sampling."""

    @model_validator(mode="after")
    def _check(self) -> EDMConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self


ObjectiveConfig = EDMConfig
"""Union of the objectives by ``kind``; so far of one."""


class Objective(Protocol):
    """What distinguishes one training objective from another."""

    @property
    def preconditioning(self) -> Preconditioning:
        """Scalings and loss weight as functions of the noise level."""
        ...

    sigma_min: float
    sigma_max: float

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` noise levels for training, ``[count]`` float32, on the generator's device."""
        ...


class EDM:
    """EDM: a lognormal distribution of noise levels."""

    def __init__(self, config: EDMConfig) -> None:
        self.config = config
        self.preconditioning = EDMPreconditioning(config.sigma_data)
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max

    def draw_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``exp(p_mean + p_std * standard normal)``, ``[count]``."""
        normal = torch.randn(count, generator=generator, device=generator.device)
        return (self.config.p_mean + self.config.p_std * normal).exp()


OBJECTIVES: dict[str, type[EDM]] = {"edm": EDM}


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective that ``config`` describes."""
    return OBJECTIVES[config.kind](config)
