"""Perturbations of the latents before the decoder, in training only: the decoder learns to bear what stage two errs.

Each is told apart by ``kind``; a model applies its list in order.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config


class GaussianConfig(Config):
    """Independent Gaussian noise on every value."""

    kind: Literal["gaussian"] = "gaussian"
    std: float = Field(0.1, ge=0)
    """Its standard deviation, in units of the raw latents."""
    probability: float = Field(1.0, ge=0, le=1)
    """The chance that an image's latent is perturbed."""


PerturbationConfig = Annotated[GaussianConfig, Field()]


class GaussianPerturbation(nn.Module):
    """Adds Gaussian noise to ``[B, C, h, w]`` in ``train()``; the identity in ``eval()``."""

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, latents: Tensor) -> Tensor:
        """Return the perturbed latents."""
        if not self.training:
            return latents
        chosen = torch.rand(len(latents), 1, 1, 1, device=latents.device) < self.config.probability
        return latents + chosen * self.config.std * torch.randn_like(latents)


PERTURBATIONS: dict[str, type[nn.Module]] = {"gaussian": GaussianPerturbation}
