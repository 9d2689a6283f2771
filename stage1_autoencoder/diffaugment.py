"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): random, differentiable changes to all that a discriminator sees.

Both the real images and the reconstructions are changed, in the discriminator's step and in the autoencoder's, so that
the discriminator cannot learn the training images by heart and the autoencoder does not learn the changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Policy = Literal["color", "translation", "cutout"]


def diff_augment(images: Tensor, policies: Sequence[Policy], parts: int = 1) -> Tensor:
    """Apply the policies in order to images ``[B, 3, H, W]`` in [-1, 1]; each image has draws of its own.

    The draws come from PyTorch's global generator. What leaves the image is replaced by 0, a middle grey.

    - ``color``: brightness plus U(-0.5, 0.5), saturation times U(0, 2), contrast times U(0.5, 1.5); not clamped.
    - ``translation``: by whole pixels, up to an eighth of each side, zeros moving in.
    - ``cutout``: a rectangle of half the sides, its centre anywhere in the image, set to zero.

    Args:
        images: the batch.
        policies: none of them is the identity.
        parts: equal parts of the batch, one after the other, that share their draws: the i-th image of each is changed
            alike. Here reconstruction ``i`` belongs to image ``i``: were they shifted and cut differently, a loss that
            compares their logits site by site would compare different places, and any loss would see the draws'
            difference as noise. The paper draws separately, having no pairs; that two are drawn alike is ours.

    Raises:
        KeyError: there is no such policy.
    """
    count, remainder = divmod(len(images), parts)
    assert remainder == 0, f"{len(images)} images do not make {parts} equal parts"
    for policy in policies:
        images = _POLICIES[policy](images, _Draws(count, parts, images))
    return images


class _Draws:
    """Random numbers ``[B, 1, 1, 1]``, one per image and the same in each part, where and as precise as the images."""

    def __init__(self, count: int, parts: int, images: Tensor) -> None:
        self.shape, self.parts, self.images = (count, 1, 1, 1), parts, images

    def uniform(self, low: float, high: float) -> Tensor:
        draws = torch.rand(self.shape, device=self.images.device).mul_(high - low).add_(low)
        return draws.to(self.images.dtype).repeat(self.parts, 1, 1, 1)

    def integer(self, low: int, high: int) -> Tensor:
        """Return integers of ``low .. high``, both included."""
        return torch.randint(low, high + 1, self.shape, device=self.images.device).repeat(self.parts, 1, 1, 1)


def _color(images: Tensor, draws: _Draws) -> Tensor:
    images = images + draws.uniform(-0.5, 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * draws.uniform(0.0, 2.0)
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return level + (images - level) * draws.uniform(0.5, 1.5)


def _translation(images: Tensor, draws: _Draws) -> Tensor:
    for dim in (2, 3):
        size = images.shape[dim]
        limit = round(size / 8)
        source = _positions(images, dim) - draws.integer(-limit, limit)  # the pixel that comes to each position
        inside = (source >= 0) & (source < size)
        images = images.take_along_dim(source.clamp(0, size - 1), dim) * inside
    return images


def _cutout(images: Tensor, draws: _Draws) -> Tensor:
    cut = torch.ones((), dtype=torch.bool, device=images.device)
    for dim in (2, 3):
        size = images.shape[dim]
        length = round(size / 2)
        offset = _positions(images, dim) - draws.integer(0, size - 1) + length // 2
        cut = cut & (offset >= 0) & (offset < length)
    return images * ~cut


def _positions(images: Tensor, dim: int) -> Tensor:
    """Return ``0 .. size - 1`` along ``dim`` (2 or 3), shaped to broadcast against the images."""
    positions = torch.arange(images.shape[dim], device=images.device)
    return positions[:, None] if dim == 2 else positions[None, :]


_POLICIES: dict[Policy, Callable[[Tensor, _Draws], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
