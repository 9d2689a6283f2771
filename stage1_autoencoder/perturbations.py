"""Perturbations of the latents before the decoder, in training only: the decoder learns to bear what stage two errs.

Each is told apart by ``kind``; a model applies its list in order. Randomness is that of PyTorch's global generators,
and processes need not draw alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .corruptions import (
    ChannelDropoutConfig,
    GaussianConfig,
    InterpolativeConfig,
    PrefixMaskConfig,
    SpatialDropoutConfig,
    UniformGaussianConfig,
    channel_dropout,
    gaussian,
    interpolative,
    prefix_mask,
    spatial_dropout,
    uniform_gaussian,
)
from .equivariance import (
    RotationEquivarianceConfig,
    ScaleEquivarianceConfig,
    rotation_equivariance,
    scale_equivariance,
)
from .local_jitter import LocalJitterConfig, local_jitter

PerturbationConfig = Annotated[
    GaussianConfig
    | UniformGaussianConfig
    | InterpolativeConfig
    | SpatialDropoutConfig
    | ChannelDropoutConfig
    | PrefixMaskConfig
    | LocalJitterConfig
    | ScaleEquivarianceConfig
    | RotationEquivarianceConfig,
    Field(discriminator="kind"),
]

Perturb = Callable[[Tensor, Tensor, Any, float], tuple[Tensor, Tensor]]
"""Latents, images, the perturbation's config, a probability above 0 -> latents, and the images to be made of them."""


def per_image(change: Callable[[Tensor, Any], Tensor]) -> Perturb:
    """Return ``change(latents, config)``, which keeps the shape, applied to each image with the probability."""

    def perturb(latents: Tensor, images: Tensor, config: Any, probability: float) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(len(latents), 1, 1, 1, device=latents.device) < probability
        return torch.where(chosen, change(latents, config), latents), images

    return perturb


def per_batch(change: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]) -> Perturb:
    """Return ``change(latents, images, config)`` applied to the whole batch with the probability."""

    def perturb(latents: Tensor, images: Tensor, config: Any, probability: float) -> tuple[Tensor, Tensor]:
        if float(torch.rand(())) >= probability:  # drawn on the CPU: no device has to wait for it
            return latents, images
        return change(latents, images, config)

    return perturb


PERTURBATIONS: dict[str, Perturb] = {
    "gaussian": per_image(gaussian),
    "uniform_gaussian": per_image(uniform_gaussian),
    "interpolative": per_image(interpolative),
    "spatial_dropout": per_image(spatial_dropout),
    "channel_dropout": per_image(channel_dropout),
    "prefix_mask": per_image(prefix_mask),
    "local_jitter": per_image(local_jitter),
    "scale_equivariance": per_batch(scale_equivariance),
    "rotation_equivariance": per_batch(rotation_equivariance),
}


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
        """Return latents ``[B, C, h', w']`` and the images ``[B, 3, H', W']`` that the decoder is to make of them."""
        if self.training:
            for config in self.configs:
                probability = config.probability * config.schedule.factor(self.progress)
                if probability > 0:
                    latents, images = PERTURBATIONS[config.kind](latents, images, config, probability)
        return latents, images
