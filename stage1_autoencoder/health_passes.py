"""What the sections of the latent health report that run the autoencoder share: passes, whitening and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..common.errors import WavelatentError
from ..common.image_metrics import psnr
from ..common.images import to_uint8
from ..common.latents import LatentStatistics, Posterior, Whitening
from ..common.precision import full_float32
from ..common.runtime import MixedPrecision, autocast
from .health import LatentData, Level

Lpips = Callable[[Tensor, Tensor], Tensor]
"""Images ``[B, 3, H, W]`` in [-1, 1] twice -> distances ``[B]``."""

LPIPS_MISSING = " LPIPS was not measured: its weights are not here."
"""What a text ends in then."""


class Coder(Protocol):
    """What these sections need of an autoencoder, which is in evaluation mode."""

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior over raw latents of images ``[B, 3, H, W]`` in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return images from raw latents ``[B, C, h, w]``."""
        ...


REFUSALS = (WavelatentError, ValueError, RuntimeError)
"""What an autoencoder raises that cannot take images of another size or shape than those it was given."""


class NotFinite(ArithmeticError):  # noqa: N818 - a finding, not a mistake; none of REFUSALS
    """What an autoencoder made is not finite: 8 bits would show it as black, and every figure of it would be NaN."""


@dataclass(frozen=True)
class Passes:
    """Runs an autoencoder on tensors on the CPU, in batches, without gradients; results are float32 on the CPU.

    Attributes:
        autoencoder: in evaluation mode, on any device.
        batch_size: images or latents in a pass.
        precision: ``no`` is float32 proper, without TF32; otherwise what autocast runs in.
    """

    autoencoder: Coder
    batch_size: int
    precision: MixedPrecision = "no"

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is; the CPU where it has no parameters."""
        is_module = isinstance(self.autoencoder, nn.Module)
        parameter = next(self.autoencoder.parameters(), None) if is_module else None  # type: ignore[attr-defined]
        return torch.device("cpu") if parameter is None else parameter.device

    def encode(self, images: Tensor) -> Tensor:
        """Return the modes of the posteriors, raw latents ``[N, C, h, w]``. Raises :class:`NotFinite`."""
        return self._run(lambda batch: self.autoencoder.encode(batch).mode(), images, "latents")

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[N, 3, H, W]``, not clamped. Raises :class:`NotFinite`."""
        return self._run(self.autoencoder.decode, latents, "decoded images")

    @torch.no_grad()
    def _run(self, run: Callable[[Tensor], Tensor], x: Tensor, what: str) -> Tensor:
        device = self.device
        with full_float32(device) if self.precision == "no" else autocast(device, self.precision):
            made = torch.cat([run(part.to(device)).float().cpu() for part in x.split(self.batch_size)])
        if broken := int((~made.isfinite().flatten(1).all(dim=1)).sum()):
            raise NotFinite(f"{broken} of {len(made)} {what} are not finite")
        return made


def subset(data: LatentData, count: int) -> LatentData:
    """Return ``count`` of the images, evenly spread over them all, or all where there are no more."""
    if len(data.images) <= count:
        return data
    index = torch.linspace(0, len(data.images) - 1, count).round().long()
    std = None if data.std is None else data.std[index]
    return replace(data, images=data.images[index], mean=data.mean[index], std=std, drawn=data.drawn[index])


def whitening_of(data: LatentData) -> Whitening:
    """Return the whitening per channel that stage two would train behind: of sampled latents, over all images."""
    statistics = LatentStatistics(data.mean.shape[1])
    statistics.update(Posterior(data.mean, data.std))
    return Whitening("channel", statistics.mean, statistics.std)


def factor_of(data: LatentData) -> int:
    """Return the downsampling: pixels per latent site, along one side."""
    return data.images.shape[-1] // data.mean.shape[-1]


def mean_psnr(images: Tensor, target: Tensor) -> float:
    """Return the mean PSNR in dB of images in [-1, 1], rounded to 8 bits as they are saved."""
    return psnr(to_uint8(images), to_uint8(target)).mean().item()


def mean_lpips(lpips: Lpips | None, images: Tensor, target: Tensor, batch_size: int) -> float | None:
    """Return the mean LPIPS of images, clamped to [-1, 1]; None without ``lpips``, or where it finds them too small."""
    if lpips is None or min(images.shape[-2:]) < getattr(lpips, "min_size", 1):
        return None
    device = getattr(lpips, "device", torch.device("cpu"))
    parts = zip(images.clamp(-1, 1).split(batch_size), target.split(batch_size), strict=True)
    with torch.no_grad():
        return torch.cat([lpips(x.to(device), y.to(device)).float().cpu() for x, y in parts]).mean().item()


def image_spread(images: Tensor) -> float:
    """Return the standard deviation of the values of images about each colour's mean."""
    return images.sub(images.mean(dim=(0, 2, 3), keepdim=True)).square().mean().sqrt().item()


def root_mean_square(x: Tensor) -> float:
    """Return the root of the mean square of all values."""
    return x.double().square().mean().sqrt().item()


def ratio(value: float, unit: float) -> float | None:
    """Return ``value / unit``; None where the unit is zero, as for images of one colour."""
    return value / unit if unit > 0 else None


def graded(value: float | None, note: float, fault: float) -> Level:
    """Return the level of a value of which more is worse."""
    if value is None or value <= note:
        return "ok"
    return "note" if value <= fault else "fault"
