"""Bottlenecks: what turns encoder features into latents, and the penalties that shape them.

Each is told apart by ``kind``, says how many feature channels it needs, and returns a posterior and its named
penalties. A penalty's weight stands beside it in the bottleneck's config and carries the penalty's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from ..common.latents import Posterior

LOGVAR_RANGE = (-30.0, 20.0)
"""The clamp of Stable Diffusion's log-variance."""


@dataclass(frozen=True)
class Bottlenecked:
    """A posterior over raw latents, and scalar penalties by name."""

    posterior: Posterior
    penalties: dict[str, Tensor]


class KLConfig(Config):
    """A diagonal Gaussian posterior pulled towards N(0, 1): Stable Diffusion's."""

    kind: Literal["kl"] = "kl"
    kl_weight: float = Field(1e-6, ge=0)
    reduction: Literal["sum", "mean"] = "sum"
    """``sum``: summed over the latent and divided by the number of image values, so that the published weight (1e-6,
    beside losses summed over the image) keeps its meaning beside losses that are means over the image.
    ``mean``: the mean over latent elements."""

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {"kl": self.kl_weight}


class PlainConfig(Config):
    """The encoder's output as it is: an autoencoder with no constraint on its latents."""

    kind: Literal["plain"] = "plain"

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {}


class BoundedConfig(Config):
    """Latents inside [-bound, bound], with their per-channel mean and variance pulled to 0 and 1.

    The statistics are of the whole batch over all processes; with gradient accumulation, of each micro-step's batch.
    """

    kind: Literal["bounded"] = "bounded"
    activation: Literal["tanh", "clamp"] = "tanh"
    """``tanh``: ``bound * tanh(h / bound)``. ``clamp``: with the gradient of the identity (straight-through)."""
    bound: float = Field(3.0, gt=0)
    """A variable inside [-1, 1] has variance 1 only if it is +-1 everywhere; 3 leaves room for a bell."""
    mean_weight: float = Field(0.1, ge=0)
    variance_weight: float = Field(0.1, ge=0)

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {"latent_mean": self.mean_weight, "latent_variance": self.variance_weight}


BottleneckConfig = Annotated[KLConfig | PlainConfig | BoundedConfig, Field(discriminator="kind")]


def kl_to_standard_normal(posterior: Posterior) -> Tensor:
    """Return KL(q || N(0, 1)) of each image, summed over its latent: ``[B]`` (closed form)."""
    assert posterior.std is not None, "a deterministic posterior has no finite KL"
    variance = posterior.std.square()
    elements = 0.5 * (posterior.mean.square() + variance - 1 - variance.log())
    return elements.flatten(1).sum(dim=1)


class KLBottleneck(nn.Module):
    """Features ``[B, 2C, h, w]`` (mean, log-variance) -> a Gaussian posterior over ``[B, C, h, w]``."""

    def __init__(self, config: KLConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = 2 * channels
        # Image values (three channels) that one latent value stands for.
        self._image_values_per_latent_value = 3 * downsampling**2 / channels

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the posterior and its penalty ``kl``."""
        mean, logvar = features.float().chunk(2, dim=1)
        posterior = Posterior(mean, torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)))
        kl = kl_to_standard_normal(posterior).mean() / mean[0].numel()
        if self.config.reduction == "sum":
            kl = kl / self._image_values_per_latent_value
        return Bottlenecked(posterior, {"kl": kl})


class PlainBottleneck(nn.Module):
    """Features ``[B, C, h, w]`` are the latents."""

    def __init__(self, config: PlainConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.feature_channels = channels

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the deterministic posterior; there is no penalty."""
        return Bottlenecked(Posterior(features.float()), {})


class BoundedBottleneck(nn.Module):
    """Features ``[B, C, h, w]`` -> latents of the same shape, every value inside [-bound, bound]."""

    def __init__(self, config: BoundedConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = channels

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the deterministic posterior and the penalties ``latent_mean`` and ``latent_variance``.

        Both are means over channels: of the squared mean, and of ``(variance - 1)^2``; the statistics are those of the
        whole global batch, over images, sites and processes.
        """
        bound, features = self.config.bound, features.float()
        if self.config.activation == "tanh":
            latents = bound * torch.tanh(features / bound)
        else:
            latents = features.clamp(-bound, bound).detach() + (features - features.detach())
        mean, variance = global_moments(latents)
        penalties = {"latent_mean": mean.square().mean(), "latent_variance": (variance - 1).square().mean()}
        return Bottlenecked(Posterior(latents), penalties)


def global_moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance ``[C]`` of every channel of ``[B, C, h, w]`` over the batches of all processes.

    Differentiable: with gradients averaged over processes, as DistributedDataParallel does, the result is the gradient
    of the statistic of the global batch.
    """
    sums = torch.stack([latents.mean(dim=(0, 2, 3)), latents.square().mean(dim=(0, 2, 3))])  # [2, C]
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
        from torch.distributed.nn.functional import all_reduce

        sums = all_reduce(sums) / torch.distributed.get_world_size()
    mean, square = sums
    return mean, square - mean.square()


Bottleneck = KLBottleneck | PlainBottleneck | BoundedBottleneck

BOTTLENECKS: dict[str, type[nn.Module]] = {
    "kl": KLBottleneck,
    "plain": PlainBottleneck,
    "bounded": BoundedBottleneck,
}
