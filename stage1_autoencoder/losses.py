"""Losses of stage one as pure functions that return one value per image, ``[B]``; weights live in the objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def l1(images: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over channels and pixels of ``[B, 3, H, W]``."""
    return (images.float() - target.float()).abs().flatten(1).mean(dim=1)


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """``-D(fake)``, the mean over sites of each logit map and over maps."""
    return -_mean_over_maps(fake)


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """``(relu(1 - D(real)) + relu(1 + D(fake))) / 2``, the mean over sites of each logit map and over maps."""
    on_real = _mean_over_maps([F.relu(1 - logits.float()) for logits in real])
    on_fake = _mean_over_maps([F.relu(1 + logits.float()) for logits in fake])
    return (on_real + on_fake) / 2


def _mean_over_maps(maps: Sequence[Tensor]) -> Tensor:
    return torch.stack([logits.float().flatten(1).mean(dim=1) for logits in maps]).mean(dim=0)
