"""What an autoencoder is trained for: named terms, each with its weight and its start, in one place.

A term has the same name in the configuration's weight, in the log (``loss/<name>``, unweighted) and in tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..common.config import Config
from .discriminators import DiscriminatorConfig, UNetDiscriminatorConfig
from .losses import hinge_generator, l1

Distance = Callable[[Tensor, Tensor], Tensor]
"""Images and target ``[B, 3, H, W]`` -> ``[B]``."""


class LPIPSConfig(Config):
    """The perceptual term."""

    weight: float = Field(1.0, ge=0)
    """0 leaves the term and its network out."""
    net: Literal["vgg", "alex"] = "vgg"
    share: float = Field(1.0, gt=0, le=1)
    """Share of each batch it is computed on: an unbiased estimate at a fraction of the cost, which is all VGG."""


class AdversarialConfig(Config):
    """The hinge GAN term with a constant weight."""

    discriminator: DiscriminatorConfig = UNetDiscriminatorConfig()
    weight: float = Field(0.1, ge=0)
    """The papers' weights are not stated; 0.1 keeps the term below LPIPS."""
    start: int = Field(0, ge=0)
    """The first step with the term; before it the discriminator is neither trained nor asked."""


class ObjectiveConfig(Config):
    """Weights of the reconstruction terms; the bottleneck's penalties carry theirs in ``model.bottleneck``."""

    l1_weight: float = Field(1.0, ge=0)
    lpips: LPIPSConfig = LPIPSConfig()
    adversarial: AdversarialConfig | None = None


def reconstruction_terms(
    config: ObjectiveConfig, images: Tensor, target: Tensor, perceptual: Distance | None
) -> dict[str, Tensor]:
    """Return the scalar terms ``l1`` and, given its network, ``lpips``: unweighted means over the batch."""
    terms = {"l1": l1(images, target).mean()}
    if perceptual is not None:
        count = math.ceil(config.lpips.share * len(images))
        terms["lpips"] = perceptual(images[:count], target[:count]).mean()
    return terms


def adversarial_term(fake: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the scalar term ``adversarial`` of the generator."""
    return {"adversarial": hinge_generator(fake).mean()}


def term_weights(config: ObjectiveConfig, penalty_weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of every term the configuration knows, by name."""
    weights = {"l1": config.l1_weight, "lpips": config.lpips.weight, **penalty_weights}
    if config.adversarial is not None:
        weights["adversarial"] = config.adversarial.weight
    return weights


def weighted_total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the sum of the terms times their weights. Raises ``KeyError`` for a term without a weight."""
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
