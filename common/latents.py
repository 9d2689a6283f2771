"""What the two stages exchange: a posterior over latents, exact statistics of a whole set, and the whitening.

*Raw* latents are what the encoder said; *latents* are raw latents after :class:`Whitening`, what the denoiser sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

MIN_RELATIVE_SCALE = 1e-4
"""Smallest scale of a channel against the largest under ``channel`` whitening: our choice, below any in use."""


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over raw latents, or a point where the encoder is deterministic.

    Attributes:
        mean: ``[B, C, h, w]``.
        std: standard deviation, of the same shape, or ``None`` for a deterministic encoder.
    """

    mean: Tensor
    std: Tensor | None = None

    @property
    def deterministic(self) -> bool:
        """Whether there is nothing to draw: the latent is ``mean``."""
        return self.std is None

    def mode(self) -> Tensor:
        """Return the most likely raw latents ``[B, C, h, w]``."""
        return self.mean

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draw raw latents ``[B, C, h, w]``.

        Args:
            generator: one for the batch, or one per image, which makes a draw independent of the batch it is in.
                Noise is drawn on the generator's device and then moved.
        """
        if self.std is None:
            return self.mean
        if generator is None or isinstance(generator, torch.Generator):
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        else:
            assert len(generator) == len(self.mean), f"{len(generator)} generators for {len(self.mean)} images"
            shape, dtype = self.mean.shape[1:], self.mean.dtype
            noise = torch.stack([torch.randn(shape, generator=g, device=g.device, dtype=dtype) for g in generator])
        return self.mean + self.std * noise.to(self.mean.device)


class LatentStatistics:
    """Exact mean, standard deviation and range of every channel over any number of batches.

    Accumulated in float64 by the pairwise update of Chan, Golub and LeVeque (1983), which, unlike a sum of squares,
    does not cancel when the mean is large against the spread. Of a posterior, ``mean`` and ``std`` are those of the
    sampled latent, ``Var[z] = Var[mean] + E[std^2]``, and ``min`` and ``max`` are those of its mean, since a draw has
    no bounds.
    """

    def __init__(self, num_channels: int) -> None:
        self.count = 0  # sites seen, per channel
        self._mean = torch.zeros(num_channels, dtype=torch.float64)
        self._squares = torch.zeros(num_channels, dtype=torch.float64)  # sum of squared deviations from the mean
        self._min = torch.full((num_channels,), math.inf, dtype=torch.float64)
        self._max = torch.full((num_channels,), -math.inf, dtype=torch.float64)

    def update(self, latents: Tensor | Posterior) -> None:
        """Add raw latents ``[B, C, h, w]``, or the posterior over them."""
        posterior = latents if isinstance(latents, Posterior) else Posterior(latents)
        if posterior.mean.numel() == 0:
            return
        mean = _by_channel(posterior.mean)
        batch = LatentStatistics(len(mean))
        batch.count = mean.shape[1]
        batch._mean = mean.mean(dim=1)
        batch._squares = (mean - batch._mean[:, None]).square().sum(dim=1)
        if posterior.std is not None:
            batch._squares += _by_channel(posterior.std).square().sum(dim=1)
        batch._min, batch._max = mean.amin(dim=1), mean.amax(dim=1)
        self.merge(batch)

    def merge(self, other: LatentStatistics) -> None:
        """Add everything that ``other`` has seen."""
        assert len(other._mean) == len(self._mean), f"{len(other._mean)} channels merged into {len(self._mean)}"
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other._mean - self._mean
        self._squares += other._squares + delta.square() * (self.count * other.count / total)
        self._mean += delta * (other.count / total)
        self._min, self._max = torch.minimum(self._min, other._min), torch.maximum(self._max, other._max)
        self.count = total

    @property
    def mean(self) -> list[float]:
        """Mean of every channel."""
        return self._mean.tolist()

    @property
    def std(self) -> list[float]:
        """Standard deviation of every channel (of the population: divided by the count)."""
        return (self._squares / max(self.count, 1)).sqrt().tolist()

    @property
    def min(self) -> list[float]:
        """Smallest value of every channel."""
        return self._min.tolist()

    @property
    def max(self) -> list[float]:
        """Largest value of every channel."""
        return self._max.tolist()

    def as_dict(self) -> dict[str, list[float]]:
        """Return the statistics as a latent cache's manifest records them."""
        return {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}


def _by_channel(x: Tensor) -> Tensor:
    """``[B, C, h, w]`` -> float64 ``[C, B*h*w]``, on the CPU."""
    return x.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)


class Whitening(nn.Module):
    """The invertible map from raw latents to the zero-mean, unit-variance latents that a denoiser is trained on.

    ``latents = (raw - shift) / scale`` with

    - ``none``: shift 0, scale 1;
    - ``scalar``: one shift and one scale, the mean and standard deviation over all channels together (what Stable
      Diffusion's 0.18215 stands for);
    - ``channel``: one of each per channel, where the scale is at least `MIN_RELATIVE_SCALE` of the largest. A channel
      that is all but constant would otherwise have its rounding errors blown up to unit variance, for the denoiser to
      learn; so it stays all but constant, and what the denoiser gets wrong in it stays small in the raw latents.

    Where every channel is constant, the scale is 1.

    The two are buffers, so they travel with whatever model contains this module.

    Args:
        kind: which of the three.
        mean: mean of every channel of the raw latents over the whole set, ``[C]``.
        std: standard deviation of the same, ``[C]``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, kind: Literal["none", "scalar", "channel"], mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
    ) -> None:
        super().__init__()
        self.kind = kind
        shift = torch.as_tensor(mean, dtype=torch.float64)
        scale = torch.as_tensor(std, dtype=torch.float64)
        if shift.ndim != 1 or shift.shape != scale.shape:
            raise ValueError(f"whitening needs one mean and one std per channel, not {shift.shape} and {scale.shape}")
        if not (shift.isfinite().all() and scale.isfinite().all() and (scale >= 0).all()):
            raise ValueError(f"the latent statistics are not usable: mean {shift.tolist()}, std {scale.tolist()}")
        if kind == "none":
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        elif kind == "scalar":
            overall = shift.mean()
            variance = scale.square().mean() + (shift - overall).square().mean()  # law of total variance
            shift, scale = overall.expand_as(shift), variance.sqrt().expand_as(scale)
        elif kind != "channel":
            raise ValueError(f"whitening is none, scalar or channel, not {kind!r}")
        largest = scale.amax()
        scale = scale.clamp(min=MIN_RELATIVE_SCALE * largest) if largest > 0 else torch.ones_like(scale)
        self.register_buffer("shift", shift.float().reshape(1, -1, 1, 1).clone())
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1).clone())

    @classmethod
    def from_statistics(
        cls, kind: Literal["none", "scalar", "channel"], stats: Mapping[str, Sequence[float]]
    ) -> Whitening:
        """Build it from ``{"mean": [C], "std": [C], ...}``, the ``stats`` of a latent cache's manifest."""
        return cls(kind, stats["mean"], stats["std"])

    def forward(self, raw: Tensor) -> Tensor:
        """Map raw latents ``[B, C, h, w]`` to whitened ones."""
        return (raw - self.shift) / self.scale

    def inverse(self, latents: Tensor) -> Tensor:
        """Map whitened latents ``[B, C, h, w]`` back to raw ones, as the decoder takes them."""
        return latents * self.scale + self.shift
