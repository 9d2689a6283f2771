"""A learned weight for every noise level (Karras et al. 2024, EDM2, arXiv 2312.02696, after Kendall et al. 2018).

Training at many noise levels is a multi-task problem. With u(sigma) the logarithm of the task's variance, the loss
``L / e^u + u`` is least at ``u = ln E[L]``, so every level's loss, and its gradient, is brought to the same size as
training goes on. A fixed weight on L cancels out: it only adds its logarithm to u.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config


class UncertaintyConfig(Config):
    """The function u(sigma) that is learned beside the network; sampling does not use it."""

    channels: int = Field(128, ge=1)
    """Fourier features; 128 is EDM2's."""


class Uncertainty(nn.Module):
    """u as a linear function of random Fourier features of the noise label, zero at first.

    The features are ``sqrt(2) cos(2 pi (f c_noise + phase))`` with f from a standard normal and the phase uniform
    (EDM2's), drawn once from the global generator and saved with the weights.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, config: UncertaintyConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(config.channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(config.channels))
        self.weight = nn.Parameter(torch.zeros(config.channels))

    def forward(self, noise_label: Tensor) -> Tensor:
        """Return u, ``[B]`` float32, at ``noise_label [B]``."""
        angles = noise_label.float()[:, None] * self.frequencies + self.phases  # [B, channels]
        features = math.sqrt(2) * angles.cos()
        return (features * self.weight).sum(1) / math.sqrt(self.config.channels)


def uncertain_loss(loss: Tensor, u: Tensor) -> Tensor:
    """Return ``loss / e^u + u`` for ``loss [B]`` and ``u [B]`` per sample, the loss of EDM2."""
    return loss * (-u).exp() + u
