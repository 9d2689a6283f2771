"""Perturbations of the latents before the decoder, in training only: the decoder learns to bear what stage two errs.

Each is told apart by ``kind``; a model applies its list in order. Randomness is that of PyTorch's global generators,
and processes need not draw alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..common.config import Config

Perturb = Callable[..., tuple[Tensor, Tensor]]
"""Latents, images, config, probability -> latents and target images."""


class ScheduleConfig(Config):
    """The shares of the training in which a perturbation acts; the default is all of it."""

    start: float = Field(0.0, ge=0, le=1)
    ramp: float = Field(0.0, ge=0, le=1)
    """From ``start`` on, the factor rises linearly from 0 to 1 over this share."""
    end: float = Field(1.0, ge=0, le=1)
    """From here on the factor is 0; 1 never ends."""

    @model_validator(mode="after")
    def _in_order(self) -> ScheduleConfig:
        if self.end <= self.start:
            raise ValueError(f"end {self.end:g} must come after start {self.start:g}")
        return self

    def factor(self, progress: float) -> float:
        """Return the factor in [0, 1] of the probability at ``progress``, the share of the training that is done."""
        if progress < self.start or (self.end < 1 and progress >= self.end):
            return 0.0
        return min(1.0, (progress - self.start) / self.ramp) if self.ramp > 0 else 1.0


class PerturbationSettings(Config):
    """What every perturbation has."""

    probability: float = Field(1.0, ge=0, le=1)
    """The chance that an image's latent is perturbed."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Its factor multiplies the probability."""


class GaussianConfig(PerturbationSettings):
    """Independent Gaussian noise on every value."""

    kind: Literal["gaussian"] = "gaussian"
    std: float = Field(0.1, ge=0)
    """Its standard deviation, in units of the raw latents."""


def gaussian(latents: Tensor, config: GaussianConfig) -> Tensor:
    """``[B, C, h, w]`` -> the same with noise."""
    return latents + config.std * torch.randn_like(latents)


def per_image(perturb: Callable[..., Tensor]) -> Perturb:
    """Apply ``perturb(latents, config)``, which keeps the shape, to each image with its probability."""

    def apply(latents: Tensor, images: Tensor, config: Config, probability: float) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(len(latents), 1, 1, 1, device=latents.device) < probability
        return torch.where(chosen, perturb(latents, config), latents), images

    return apply


PerturbationConfig = Annotated[GaussianConfig, Field()]

PERTURBATIONS: dict[str, Perturb] = {"gaussian": per_image(gaussian)}


class Perturbations(nn.Module):
    """Applies a list of perturbations in order in ``train()``; the identity in ``eval()``.

    Attributes:
        progress: share of the training that is done, in [0, 1], for the schedules; the trainer sets it.
    """

    def __init__(self, configs: Sequence[PerturbationConfig]) -> None:
        super().__init__()
        self.configs = tuple(configs)
        self.progress = 1.0

    def forward(self, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the perturbed latents and the images that the decoder is to make of them."""
        if self.training:
            for config in self.configs:
                probability = config.probability * config.schedule.factor(self.progress)
                if probability > 0:
                    latents, images = PERTURBATIONS[config.kind](latents, images, config, probability)
        return latents, images
