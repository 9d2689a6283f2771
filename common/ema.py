"""Exponential moving average of a model's weights, with a half-life in images and a ramp-up.

The half-life in images keeps the average's meaning when the batch size changes; the ramp-up (Karras et al. 2022,
arXiv 2206.00364, appendix F.2) keeps early averages from remembering the initialisation.
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from .config import Config

M = TypeVar("M", bound=nn.Module)


class EMAConfig(Config):
    """How long the average remembers."""

    half_life_images: float = Field(10_000, gt=0)
    """Images after which a weight's share of the average has halved."""
    rampup_ratio: float = Field(0.05, gt=0)
    """The half-life is at most this share of the images seen so far."""


class EMA(Generic[M]):
    """Keeps ``model``, an averaged copy that never requires a gradient; buffers are copied, not averaged."""

    def __init__(self, model: M, config: EMAConfig) -> None:
        self.config = config
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)

    def decay(self, images_seen: int, batch_images: int) -> float:
        """Return the share of the old average that a step of ``batch_images`` keeps."""
        half_life = min(self.config.half_life_images, images_seen * self.config.rampup_ratio)
        return 0.5 ** (batch_images / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_images: int) -> None:
        """Fold the weights of ``model`` in, after a step of ``batch_images`` images, ``images_seen`` in all."""
        weight = 1 - self.decay(images_seen, batch_images)
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
