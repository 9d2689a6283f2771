"""What an autoencoder is trained for: named terms, each with its weight, in one place.

A term has the same name in the configuration, in the log (``loss/<name>``, unweighted) and in tables.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..common.config import Config
from ..common.lpips_metric import PerceptualDistance
from .adversarial import AdversarialConfig
from .losses import (
    HighPassConfig,
    LowPassConfig,
    WaveletCharbonnierConfig,
    high_pass_l1,
    l1,
    l2,
    low_pass_l2,
    wavelet_charbonnier,
)
from .vgg_features import VGGFeatureDistance, VGGFeaturesConfig

Distance = Callable[[Tensor, Tensor], Tensor]
"""Images and target ``[B, 3, H, W]`` -> ``[B]``."""


class LPIPSConfig(Config):
    """The perceptual term (Zhang et al. 2018, arXiv 1801.03924)."""

    weight: float = Field(1.0, ge=0)
    """0 leaves the term and its network out."""
    net: Literal["vgg", "alex"] = "vgg"
    share: float = Field(1.0, gt=0, le=1)
    """Share of each batch it is computed on: an unbiased estimate at a fraction of the cost, which is all VGG."""


class ObjectiveConfig(Config):
    """Weights of the terms; a weight of 0 leaves a term out. The bottleneck's penalties carry theirs themselves."""

    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(0.0, ge=0)
    charbonnier: WaveletCharbonnierConfig = WaveletCharbonnierConfig()
    """On the high-frequency wavelet bands."""
    high_pass: HighPassConfig = HighPassConfig()
    """L1 on what a Gaussian leaves over."""
    low_pass: LowPassConfig = LowPassConfig()
    """L2 on what a Gaussian lets through."""
    lpips: LPIPSConfig = LPIPSConfig()
    vgg_features: VGGFeaturesConfig = VGGFeaturesConfig()
    adversarial: AdversarialConfig | None = None

    @property
    def reconstruction_weights(self) -> dict[str, float]:
        """Weights of the reconstruction terms that are not 0, by name."""
        weights = {
            "l1": self.l1_weight,
            "l2": self.l2_weight,
            "charbonnier": self.charbonnier.weight,
            "high_pass": self.high_pass.weight,
            "low_pass": self.low_pass.weight,
            "lpips": self.lpips.weight,
            "vgg_features": self.vgg_features.weight,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}


def reconstruction_distances(config: ObjectiveConfig, device: torch.device) -> dict[str, Distance]:
    """Return the distance of every reconstruction term that has a weight, by name; networks are on ``device``.

    Raises :class:`~wavelatent.common.errors.WavelatentError` where a network's weights cannot be had.
    """
    known: dict[str, Callable[[], Distance]] = {
        "l1": lambda: l1,
        "l2": lambda: l2,
        "charbonnier": lambda: (
            lambda x, y: wavelet_charbonnier(x, y, epsilon=config.charbonnier.epsilon, levels=config.charbonnier.levels)
        ),
        "high_pass": lambda: lambda x, y: high_pass_l1(x, y, sigma=config.high_pass.sigma),
        "low_pass": lambda: lambda x, y: low_pass_l2(x, y, sigma=config.low_pass.sigma),
        "lpips": lambda: on_share(PerceptualDistance(config.lpips.net).to(device), config.lpips.share),
        "vgg_features": lambda: on_share(
            VGGFeatureDistance(config.vgg_features.layers).to(device), config.vgg_features.share
        ),
    }
    return {name: known[name]() for name in config.reconstruction_weights}


def on_share(distance: Distance, share: float) -> Distance:
    """Return ``distance`` computed on the first ``share`` of a batch only, ``[ceil(share * B)]``."""

    def partial(images: Tensor, target: Tensor) -> Tensor:
        count = math.ceil(share * len(images))
        return distance(images[:count], target[:count])

    return partial


def weighted_total(terms: Mapping[str, Tensor], weights: Mapping[str, float | Tensor]) -> Tensor:
    """Return the sum of the terms times their weights. Raises ``KeyError`` for a term without a weight."""
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def check_losses(names: Iterable[str], config: ObjectiveConfig, where: str) -> None:
    """Raise ``ValueError`` for a name that is no term of the objective, or one that has no weight in it."""
    has_weight = [*config.reconstruction_weights, *(["adversarial"] if config.adversarial else [])]
    for name in names:
        if name not in has_weight:
            nearest = difflib.get_close_matches(name, has_weight, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"with a weight: {', '.join(has_weight)}"
            raise ValueError(f"{where}: {name!r} is no loss that has a weight in objective; {hint}")


def health(images: Tensor, target: Tensor, raw: Tensor) -> dict[str, Tensor]:
    """Return what tells a healthy run: PSNR in dB, and the scale and extremes of the raw latents."""
    mse = (images.float().clamp(-1, 1) - target).square().flatten(1).mean(dim=1)
    return {
        "psnr": (10 * torch.log10(4 / mse.clamp_min(1e-10))).mean(),
        "latent/mean": raw.mean(),
        "latent/std": raw.std(),
        "latent/max_abs": raw.abs().max(),
    }
