"""Bottlenecks: what turns encoder features into latents, and the penalties that shape them.

Each is told apart by ``kind``, says how many feature channels it needs, and returns a posterior, its named penalties
and what the log shows of the latents. A penalty's weight stands beside it in the bottleneck's config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..common.config import Config
from ..common.latents import Posterior
from .moments import global_covariance, global_moments, posterior_metrics, world_size

LOGVAR_RANGE = (-30.0, 20.0)
"""The clamp of Stable Diffusion's log-variance."""

SATURATED = 0.99
"""Share of the bound from which a tanh counts as saturated: its slope is below 0.02 there. Ours."""


@dataclass(frozen=True)
class Bottlenecked:
    """A posterior over raw latents, scalar penalties by name, and detached scalars for the log (``latent/...``).

    Every bottleneck logs what :func:`posterior_metrics` returns, and some a share of values of their own.
    """

    posterior: Posterior
    penalties: dict[str, Tensor]
    metrics: dict[str, Tensor]


class KLPenaltyConfig(Config):
    """The settings of the penalty ``kl``."""

    kl_weight: float = Field(1e-6, ge=0)
    reduction: Literal["sum", "mean"] = "sum"
    """``sum``: summed over the latent and divided by the number of image values, so that the published weight (1e-6,
    beside losses summed over the image) keeps its meaning beside losses that are means over the image.
    ``mean``: the mean over latent elements."""

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {"kl": self.kl_weight}


class KLConfig(KLPenaltyConfig):
    """A diagonal Gaussian posterior pulled towards N(0, 1): Stable Diffusion's."""

    kind: Literal["kl"] = "kl"


class FixedVarianceConfig(KLPenaltyConfig):
    """A Gaussian posterior of one constant standard deviation: a constant-variance VAE (arXiv 1903.12436).

    The KL penalty then is a pull of the mean to 0, and a constant.
    """

    kind: Literal["fixed_variance"] = "fixed_variance"
    std: float = Field(0.1, gt=0)
    """In units of the raw latents. The default is ours: the paper searched it per data set."""


class PlainConfig(Config):
    """The encoder's output as it is: an autoencoder with no constraint on its latents."""

    kind: Literal["plain"] = "plain"

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {}


class BoundedConfig(Config):
    """Latents inside [-bound, bound], with their per-channel mean and variance pulled to targets.

    The statistics are of the whole batch over all processes; with gradient accumulation, of each micro-step's batch.
    """

    kind: Literal["bounded"] = "bounded"
    activation: Literal["tanh", "clamp"] = "tanh"
    """``tanh``: ``bound * tanh(h / bound)``. ``clamp``: with the gradient of the identity (straight-through)."""
    bound: float = Field(3.0, gt=0)
    """A variable inside [-1, 1] has variance 1 only if it is +-1 everywhere; 3 leaves room for a bell."""
    mean: float = 0.0
    """Target of every channel's mean."""
    variance: float = Field(1.0, ge=0)
    """Target of every channel's variance; no more than ``bound^2 - mean^2``, which only +-bound reaches."""
    mean_weight: float = Field(0.1, ge=0)
    variance_weight: float = Field(0.1, ge=0)
    covariance_weight: float = Field(0.0, ge=0)
    """Of the penalty on the covariance between channels; 0 leaves it out."""

    @model_validator(mode="after")
    def _targets_can_be_met(self) -> BoundedConfig:
        largest = self.bound**2 - self.mean**2
        if largest < 0:
            raise ValueError(f"mean {self.mean:g} is outside [-{self.bound:g}, {self.bound:g}]: widen bound")
        if self.variance > largest:
            raise ValueError(
                f"within +-{self.bound:g}, at mean {self.mean:g}, the variance is {largest:g} at most: "
                "lower variance, or widen bound"
            )
        return self

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {
            "latent_mean": self.mean_weight,
            "latent_variance": self.variance_weight,
            "latent_covariance": self.covariance_weight,
        }


class BatchNormConfig(Config):
    """Latents of zero mean and unit variance in every channel, by batch normalisation without an affine map.

    Mean and variance are those of the whole batch over all processes in ``train()``, and running averages in
    ``eval()``. An average of weights (EMA) copies the running averages of the weights in training.
    """

    kind: Literal["batchnorm"] = "batchnorm"
    momentum: float = Field(0.1, gt=0, le=1)
    """The share of a batch in the running averages: PyTorch's default."""
    eps: float = Field(1e-5, gt=0)
    """Added to the variance."""

    @property
    def penalty_weights(self) -> dict[str, float]:
        """Weights by penalty name."""
        return {}


BottleneckConfig = Annotated[
    KLConfig | PlainConfig | BoundedConfig | BatchNormConfig | FixedVarianceConfig, Field(discriminator="kind")
]


def kl_to_standard_normal(posterior: Posterior) -> Tensor:
    """Return KL(q || N(0, 1)) of each image, summed over its latent: ``[B]`` (closed form)."""
    assert posterior.std is not None, "a deterministic posterior has no finite KL"
    variance = posterior.std.square()
    elements = 0.5 * (posterior.mean.square() + variance - 1 - variance.log())
    return elements.flatten(1).sum(dim=1)


def kl_penalty(posterior: Posterior, reduction: Literal["sum", "mean"], downsampling: int) -> Tensor:
    """Return the scalar penalty ``kl``, a mean over images, reduced as :class:`KLPenaltyConfig` says."""
    _, channels, height, width = posterior.mean.shape
    image_values = 3 * (height * downsampling) * (width * downsampling)
    count = image_values if reduction == "sum" else channels * height * width
    return kl_to_standard_normal(posterior).mean() / count


class KLBottleneck(nn.Module):
    """Features ``[B, 2C, h, w]`` (mean, log-variance) -> a Gaussian posterior over ``[B, C, h, w]``."""

    def __init__(self, config: KLConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = 2 * channels
        self.downsampling = downsampling

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the posterior and its penalty ``kl``; logs ``latent/logvar_clamped``, the share at the clamp."""
        mean, logvar = features.float().chunk(2, dim=1)
        low, high = LOGVAR_RANGE
        posterior = Posterior(mean, torch.exp(0.5 * logvar.clamp(low, high)))
        penalties = {"kl": kl_penalty(posterior, self.config.reduction, self.downsampling)}
        clamped = ((logvar <= low) | (logvar >= high)).float().mean()
        return Bottlenecked(posterior, penalties, posterior_metrics(posterior) | {"latent/logvar_clamped": clamped})


class FixedVarianceBottleneck(nn.Module):
    """Features ``[B, C, h, w]`` are the means of a Gaussian posterior with a constant standard deviation."""

    def __init__(self, config: FixedVarianceConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = channels
        self.downsampling = downsampling

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the posterior and its penalty ``kl``."""
        mean = features.float()
        posterior = Posterior(mean, torch.full_like(mean, self.config.std))
        penalties = {"kl": kl_penalty(posterior, self.config.reduction, self.downsampling)}
        return Bottlenecked(posterior, penalties, posterior_metrics(posterior))


class PlainBottleneck(nn.Module):
    """Features ``[B, C, h, w]`` are the latents."""

    def __init__(self, config: PlainConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.feature_channels = channels

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the deterministic posterior; there is no penalty."""
        posterior = Posterior(features.float())
        return Bottlenecked(posterior, {}, posterior_metrics(posterior))


class BoundedBottleneck(nn.Module):
    """Features ``[B, C, h, w]`` -> latents of the same shape, every value inside [-bound, bound]."""

    def __init__(self, config: BoundedConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = channels

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the deterministic posterior, its penalties, and ``latent/saturation`` for the log.

        The saturation is the share of values at the bound (``clamp``), or at 0.99 of it or more (``tanh``).
        """
        bound, features = self.config.bound, features.float()
        if self.config.activation == "tanh":
            latents = bound * torch.tanh(features / bound)
            saturated = latents.abs() >= SATURATED * bound
        else:
            latents = features.clamp(-bound, bound).detach() + (features - features.detach())
            saturated = features.abs() >= bound
        posterior = Posterior(latents)
        metrics = posterior_metrics(posterior) | {"latent/saturation": saturated.float().mean()}
        return Bottlenecked(posterior, self._penalties(latents), metrics)

    def _penalties(self, latents: Tensor) -> dict[str, Tensor]:
        """Return the penalties on the channels' moments.

        - ``latent_mean``: the mean over channels of ``(mean - target)^2``;
        - ``latent_variance``: the mean over channels of ``(variance - target)^2``;
        - ``latent_covariance``, where it has a weight: the squares of the covariance matrix off its diagonal, summed
          and divided by the number of channels (VICReg, arXiv 2105.04906, with the population's covariance).

        The moments are those of the global batch over images, sites and processes; in ``eval()``, where processes may
        go their own ways, of this process's batch.
        """
        penalties = {}
        if self.config.covariance_weight > 0:
            mean, covariance = global_covariance(latents, across_processes=self.training)
            variance = covariance.diagonal()
            off_diagonal = covariance - covariance.diagonal().diag()
            penalties["latent_covariance"] = off_diagonal.square().sum() / len(covariance)
        else:
            mean, variance = global_moments(latents, across_processes=self.training)
        penalties["latent_mean"] = (mean - self.config.mean).square().mean()
        penalties["latent_variance"] = (variance - self.config.variance).square().mean()
        return penalties


class BatchNormBottleneck(nn.Module):
    """Features ``[B, C, h, w]`` -> latents of the same shape, normalised per channel.

    The buffers ``running_mean`` and ``running_variance`` (unbiased, as in PyTorch's `BatchNorm2d`) are saved with the
    model. PyTorch's own `SyncBatchNorm` works on GPUs only.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, config: BatchNormConfig, channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        self.feature_channels = channels
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, features: Tensor) -> Bottlenecked:
        """Return the deterministic posterior; there is no penalty. In ``train()`` the running averages move."""
        features = features.float()
        if self.training:
            mean, variance = global_moments(features)
            self._track(mean.detach(), variance.detach(), features[:, 0].numel())
        else:
            mean, variance = self.running_mean, self.running_variance
        latents = (features - mean[:, None, None]) * (variance[:, None, None] + self.config.eps).rsqrt()
        posterior = Posterior(latents)
        return Bottlenecked(posterior, {}, posterior_metrics(posterior))

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, local_count: int) -> None:
        count = local_count * world_size()
        self.running_mean.lerp_(mean, self.config.momentum)
        self.running_variance.lerp_(variance * (count / max(count - 1, 1)), self.config.momentum)


Bottleneck = KLBottleneck | PlainBottleneck | BoundedBottleneck | BatchNormBottleneck | FixedVarianceBottleneck

BOTTLENECKS: dict[str, type[nn.Module]] = {
    "kl": KLBottleneck,
    "plain": PlainBottleneck,
    "bounded": BoundedBottleneck,
    "batchnorm": BatchNormBottleneck,
    "fixed_variance": FixedVarianceBottleneck,
}
