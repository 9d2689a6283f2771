"""Full float32 for what is a measurement, whatever faster arithmetic the rest of the program runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Run the block in float32 proper: no autocast on ``device``, and no TF32.

    On GPUs that have TF32, PyTorch uses it for convolutions unless told otherwise; it keeps 10 of float32's 23 bits.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
