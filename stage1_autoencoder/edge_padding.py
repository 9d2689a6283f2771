"""Images of any size for networks that take only some: their border repeated outwards, and what came of it cropped."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_edges(images: Tensor, height: int, width: int) -> Tensor:
    """Repeat the border pixels of ``[B, C, H, W]`` outwards to ``[B, C, height, width]``.

    The image stays in the middle; of an odd difference the larger half goes below and to the right. Sides that are
    long enough already are left alone. Repeated pixels, not zeros: a black frame would be an edge that no image has.
    """
    rows, columns = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
    if rows == columns == 0:
        return images
    top, left = rows // 2, columns // 2
    return F.pad(images, (left, columns - left, top, rows - top), mode="replicate")


def crop_padding(maps: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`pad_edges` on a map of the padded size: ``[B, C, H', W']`` -> ``[B, C, height, width]``."""
    top, left = (maps.shape[-2] - height) // 2, (maps.shape[-1] - width) // 2
    return maps[..., top : top + height, left : left + width]


def next_multiple(size: int, factor: int) -> int:
    """Return the smallest multiple of ``factor`` that is not below ``size``."""
    return -(-size // factor) * factor
