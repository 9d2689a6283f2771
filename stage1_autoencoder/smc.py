"""Self-modulated convolution (LiteVAE, arXiv 2405.14477, section 4): feature balance without a normalisation layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-8


class SelfModulatedConv2d(nn.Module):
    """A convolution whose weight is scaled per input map and brought to unit norm per output map.

    ``w'[o, i, k] = gain * s[i] * w[o, i, k] / sqrt(sum_{i,k} (s[i] * w[o, i, k])^2 + eps)``, with one learnable scale
    ``s[i]`` for each input map (initially 1) and a plain bias. The learnable gain is one number per layer, initially 1:
    a map of unit variance then keeps its variance.
    Shape: ``[B, in_channels, H, W]`` -> ``[B, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.scale = nn.Parameter(torch.ones(in_channels))
        self.gain = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.padding = kernel_size // 2

    def modulated_weight(self) -> Tensor:
        """Return the weight that is applied, without the gain: each output map's kernel has unit norm."""
        weight = self.weight * self.scale[:, None, None]
        return weight * torch.rsqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True) + EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved map."""
        return F.conv2d(x, self.gain * self.modulated_weight(), self.bias, padding=self.padding)


class SMCResBlock(nn.Module):
    """SiLU, SMC, SiLU, dropout, SMC, plus the input (through a plain 1x1 where the widths differ); no norm layer.

    Shape: ``[B, in_channels, H, W]`` -> ``[B, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = SelfModulatedConv2d(in_channels, out_channels)
        self.conv2 = SelfModulatedConv2d(out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = self.conv1(F.silu(x))
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x) + h
