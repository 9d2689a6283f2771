"""What several sections of the latent health report share: usable data, whitening, dead channels, subsets and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..common.errors import WavelatentError
from .health import LatentData, Level

DEAD_SHARE = 1e-3
"""A channel is dead where its variance is below this part of an equal share of the total variance.

Ours: the deviation of a dead channel is then below 3 % of a typical one, and whitening would magnify what is left of
it, rounding and noise, more than thirtyfold.
"""


def usable(data: LatentData) -> LatentData:
    """Return the images whose latents are finite.

    Raises:
        WavelatentError: fewer than two are left; nothing can be said of how latents vary.
    """
    finite = finite_images(data)
    if finite.sum() < 2:
        raise WavelatentError(
            f"latent health needs at least 2 images with finite latents, got {int(finite.sum())} of {len(finite)}"
        )
    if finite.all():
        return data
    std = None if data.std is None else data.std[finite]
    return replace(data, images=data.images[finite], mean=data.mean[finite], std=std, drawn=data.drawn[finite])


def finite_images(data: LatentData) -> Tensor:
    """Return which images have finite latents only: bool ``[N]``."""
    tensors = [data.mean, data.drawn] + ([] if data.std is None else [data.std])
    return torch.stack([tensor.isfinite().flatten(1).all(dim=1) for tensor in tensors]).all(dim=0)


def every_nth(values: Tensor, most: int) -> Tensor:
    """Return at most ``most`` rows, evenly spread over all."""
    return values[:: -(-len(values) // most)]


def whitened(latents: Tensor) -> Tensor:
    """Return latents of zero mean and unit variance in every channel; a constant channel becomes zero."""
    mean = latents.mean(dim=(0, 2, 3), keepdim=True, dtype=torch.float64)
    centred = latents - mean.float()
    std = centred.double().square().mean(dim=(0, 2, 3), keepdim=True).sqrt().float()
    return torch.where(std > 0, centred / std, 0.0)


def channel_quantiles(latents: Tensor, probabilities: Tensor, most: int) -> tuple[Tensor, int]:
    """Return quantiles ``[probabilities, C]`` and the number of images that they are of.

    Images are thinned to at most ``most`` values of a channel (to one image, where that has more). Each quantile is the
    order statistic next to the probability; none is interpolated.
    """
    images = every_nth(latents, max(1, most // latents[0, 0].numel()))
    ordered = images.transpose(0, 1).flatten(1).sort(dim=1).values
    ranks = (probabilities.double() * (ordered.shape[1] - 1)).round().long()
    return ordered[:, ranks].T.double(), len(images)


def image_variance(mean: Tensor) -> Tensor:
    """Return how much every value varies from image to image: ``[C, h, w]`` of the posterior's mean, population's."""
    return mean.double().var(dim=0, correction=0)


def dead_channels(mean: Tensor) -> list[int]:
    """Return the channels that hardly vary from image to image, whatever pattern they have over sites."""
    variance = image_variance(mean).mean(dim=(1, 2))
    return positions(variance <= DEAD_SHARE * variance.mean())


def live_channels(mean: Tensor) -> list[int]:
    """Return the other channels; all of them where all are dead, so that there is something to measure."""
    dead = dead_channels(mean)
    return [channel for channel in range(mean.shape[1]) if channel not in dead] or dead


def positions(chosen: Tensor) -> list[int]:
    """Return where the bool ``[n]`` is true."""
    return [int(position) for position in chosen.nonzero()[:, 0]]


def level_of(value: float, note: float, fault: float) -> Level:
    """Return the level of a value that is the worse the larger it is."""
    if value > fault:
        return "fault"
    return "note" if value > note else "ok"


def plain(values: Tensor) -> list[float | int | None]:
    """Return ``[n]`` as a list for JSON, which knows no infinity and no NaN: None."""
    return [float(value) if value.isfinite() else None for value in values.double()]


def in_words(channels: Sequence[int]) -> str:
    """Return ``channel 3``, or ``channels 1, 2, 5``; of more than 12, the first ones and how many there are."""
    listed = ", ".join(map(str, channels[:12]))
    if len(channels) > 12:
        listed += f", ... ({len(channels)} of them)"
    return f"channel{'s' if len(channels) > 1 else ''} {listed}"
