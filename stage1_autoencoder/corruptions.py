"""Perturbations that add noise to latents or set a part of them to zero; the image they stand for stays the same.

Each is a function of latents ``[B, C, h, w]`` and its config, and differentiable to the latents. Standard deviations
are in units of the raw latents. The masks do not scale up what they keep: a decoder in use sees latents at their own
scale, and is to infer what is missing, not to keep an expectation.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .perturbation_settings import PerturbationSettings


class GaussianConfig(PerturbationSettings):
    """Independent Gaussian noise on every value."""

    kind: Literal["gaussian"] = "gaussian"
    std: float = Field(0.1, ge=0)


class UniformGaussianConfig(PerturbationSettings):
    """Gaussian noise whose standard deviation is drawn per image, uniformly in [0, max_std].

    The decoder meets every strength. Noise of a drawn strength is RAE's (arXiv 2510.11690), there from a half-normal
    distribution; the uniform one is ours.
    """

    kind: Literal["uniform_gaussian"] = "uniform_gaussian"
    max_std: float = Field(0.5, ge=0)


class InterpolativeConfig(PerturbationSettings):
    """``(1 - tau) z + tau gamma eps`` with ``tau ~ U(0, 1)`` per image and ``eps ~ N(0, 1)``: l-DeTok's.

    Latent Denoising Makes Good Tokenizers, arXiv 2507.15856. At tau = 1 nothing of the latent is left, whatever its
    scale; noise that is only added can be outgrown by larger latents.
    """

    kind: Literal["interpolative"] = "interpolative"
    gamma: float = Field(3.0, ge=0)
    """The paper's default, for latents of about unit variance."""


class SpatialDropoutConfig(PerturbationSettings):
    """Whole sites, all channels of them, set to zero (not the whole channels that PyTorch's `Dropout2d` drops)."""

    kind: Literal["spatial_dropout"] = "spatial_dropout"
    rate: float = Field(0.1, ge=0, le=1)
    """The chance of a site."""


class ChannelDropoutConfig(PerturbationSettings):
    """Whole channels set to zero, drawn per image (Tompson et al. 2015, arXiv 1411.4280, without the rescaling)."""

    kind: Literal["channel_dropout"] = "channel_dropout"
    rate: float = Field(0.1, ge=0, le=1)
    """The chance of a channel."""


class PrefixMaskConfig(PerturbationSettings):
    """Only the first k channels are kept, k drawn per image, uniformly in [min_channels, C].

    Nested dropout (Rippel et al. 2014, arXiv 1402.0915) orders the channels by importance; there k is geometric.
    """

    kind: Literal["prefix_mask"] = "prefix_mask"
    min_channels: int = Field(1, ge=1)
    """At most the number of latent channels."""


def gaussian(latents: Tensor, config: GaussianConfig) -> Tensor:
    """Return ``z + std eps``."""
    return latents + config.std * torch.randn_like(latents)


def uniform_gaussian(latents: Tensor, config: UniformGaussianConfig) -> Tensor:
    """Return ``z + sigma eps``."""
    return latents + config.max_std * _uniform(latents) * torch.randn_like(latents)


def interpolative(latents: Tensor, config: InterpolativeConfig) -> Tensor:
    """Return ``(1 - tau) z + tau gamma eps``."""
    return torch.lerp(latents, config.gamma * torch.randn_like(latents), _uniform(latents))


def spatial_dropout(latents: Tensor, config: SpatialDropoutConfig) -> Tensor:
    """Return the latents with some sites zero."""
    return latents * (torch.rand_like(latents[:, :1]) >= config.rate)


def channel_dropout(latents: Tensor, config: ChannelDropoutConfig) -> Tensor:
    """Return the latents with some channels zero."""
    return latents * (torch.rand_like(latents[:, :, :1, :1]) >= config.rate)


def prefix_mask(latents: Tensor, config: PrefixMaskConfig) -> Tensor:
    """Return the latents with all but the first channels zero."""
    batch, channels = latents.shape[:2]
    assert config.min_channels <= channels, f"{config.min_channels} of {channels} channels"  # the model's config checks
    kept = torch.randint(config.min_channels, channels + 1, (batch, 1, 1, 1), device=latents.device)
    return latents * (torch.arange(channels, device=latents.device).view(1, -1, 1, 1) < kept)


def _uniform(latents: Tensor) -> Tensor:
    """Return one number in [0, 1) per image: ``[B, 1, 1, 1]``."""
    return torch.rand_like(latents[:, :1, :1, :1])
