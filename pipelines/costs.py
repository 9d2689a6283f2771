"""What a network costs: its parameters, and the operations of one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn, no_grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(compute: Callable[[], Tensor]) -> int:
    """Return the floating-point operations of one call; tensors without data do.

    A multiply-add is 2. Counted are convolutions, matrix products and attention, whatever kernel would run them.
    """
    # The counter does not know every fused attention kernel; the plain one is counted as the products it is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, no_grad():
        compute()
    return int(counter.get_total_flops())
