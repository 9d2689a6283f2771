"""Equivariance: the decoder gets a scaled or turned latent and is to make the scaled or turned image (EQ-VAE).

Kouzelis et al. 2025, arXiv 2502.09509. What is transformed is the latent alone, not the encoder's input, so both the
encoder and the decoder learn to treat the latent as a picture. The shape changes: one transform is drawn for a batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .perturbation_settings import PerturbationSettings


class EquivarianceSettings(PerturbationSettings):
    """What both have."""

    probability: float = Field(0.5, ge=0, le=1)
    """The chance that a batch is transformed: one draw for all of it. The default is ours."""


class ScaleEquivarianceConfig(EquivarianceSettings):
    """Latent and image are scaled down by the same factor."""

    kind: Literal["scale_equivariance"] = "scale_equivariance"
    min_scale: float = Field(0.25, gt=0, lt=1)
    """The longer side of the latent becomes a whole number of sites, drawn uniformly from those with a factor in
    [min_scale, 1); the default is ours. Losses that need a smallest image size need it of the scaled images too."""


class RotationEquivarianceConfig(EquivarianceSettings):
    """Latent and image are turned by 90, 180 or 270 degrees, each as likely."""

    kind: Literal["rotation_equivariance"] = "rotation_equivariance"


def scale_equivariance(latents: Tensor, images: Tensor, config: ScaleEquivarianceConfig) -> tuple[Tensor, Tensor]:
    """Return latents ``[B, C, h', w']`` and images of the size that the decoder makes of them.

    A latent that has no smaller size of at least ``min_scale`` stays as it is, and so does its image. Both are resized
    by bilinear interpolation with antialiasing, which leaves values where they are. (Area interpolation rounds its
    windows to whole values, which moves the latent against the image where the factor is not 1/2, 1/3, ...)
    """
    height, width = latents.shape[-2:]
    longest = max(height, width)
    smallest = max(1, math.ceil(config.min_scale * longest))
    if smallest == longest:
        return latents, images
    drawn = int(torch.randint(smallest, longest, ()))
    size = (max(1, round(height * drawn / longest)), max(1, round(width * drawn / longest)))
    factor = images.shape[-2] // height
    assert images.shape[-2:] == (factor * height, factor * width), f"{images.shape} is no multiple of {latents.shape}"
    return _resize(latents, size), _resize(images, (factor * size[0], factor * size[1]))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def rotation_equivariance(latents: Tensor, images: Tensor, config: RotationEquivarianceConfig) -> tuple[Tensor, Tensor]:
    """Return latents and images turned alike; by an odd number of quarter turns, height and width change places."""
    turns = int(torch.randint(1, 4, ()))
    return torch.rot90(latents, turns, (-2, -1)), torch.rot90(images, turns, (-2, -1))
