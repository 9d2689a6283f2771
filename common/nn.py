"""Building blocks of both stages: group normalisation at any width, the residual block, self-attention.

The residual block is the one of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, appendix A), without its resampling.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def group_norm(channels: int, max_groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with the most groups, up to ``max_groups``, that divide ``channels`` and hold at least 4 channels each.

    With 128 channels and more this is the field's GroupNorm(32); narrower layers, where 32 groups would leave one or
    two channels to a group or not divide, get fewer.
    """
    groups = max(1, min(max_groups, channels // 4))
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels, eps=1e-6)


SMALL_MAP = 1024
"""Sites from which PyTorch's channels-last group normalisation takes its fast way on a CPU."""


class GroupNorm(nn.GroupNorm):
    """PyTorch's, computed in float32 where its kernel for half precision is many times slower.

    That is on a CPU with channels last: on maps of fewer than 1024 sites (measured: 5 to 7 times), and with a gradient
    (2 to 6 times, of nearly all shapes). Without one, larger maps are 1.4 to 18 times faster as they come. On other
    devices, whose kernels return a plain layout, channels last is restored for the convolution that follows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x [B, C, ...]`` normalised, in its own type."""
        if x.device.type != "cpu":
            kept = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
            return super().forward(x).contiguous(memory_format=kept)
        slow_size = torch.is_grad_enabled() or x.shape[2:].numel() < SMALL_MAP
        slow = x.dtype != torch.float32 and not x.is_contiguous() and slow_size
        return super().forward(x.float()).to(x.dtype) if slow else super().forward(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def zero_init(module: M) -> M:
    """Set every parameter of ``module`` to zero, so that the branch it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def fast_layout(x: Tensor) -> Tensor:
    """Return ``x [B, C, H, W]`` in the memory layout in which an encoder computes fastest without a gradient.

    On a CPU that is channels last; the layers that follow keep it, so a network calls this once, on its input. Measured
    there on 3x3 convolutions: 5 to 60 % faster, the most with few channels and in bfloat16. Decoders gained nothing;
    with a gradient bfloat16 got slower; and other devices' group normalisation would undo the layout.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last)


def silu_of_new(x: Tensor) -> Tensor:
    """Return SiLU of a tensor that nobody else holds: written over it where no gradient will ask for it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def add_to_new(x: Tensor, branch: Tensor) -> Tensor:
    """Return ``x + branch``, written over ``branch``, which nobody else holds, where no gradient will ask for it."""
    in_place = not torch.is_grad_enabled() and x.dtype == branch.dtype
    return branch.add_(x) if in_place else x + branch


def in_layout_of(x: Tensor, weight: Tensor) -> Tensor:
    """Return a channels-last ``weight`` as it is for a channels-last ``x``, and else contiguous.

    A convolution is done channels last where either of the two is.
    """
    return weight if x.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose weight is always channels last in memory, and a contiguous tensor to everybody else.

    It is kept as ``[out_channels, kernel height * width, in_channels]``: as a strided weight of the usual shape it
    would be copied back and forth by PyTorch's fused Adam (on a CPU, 7 % of a training step of our UNets). A state dict
    has it in the usual shape. An input that is not channels last is convolved as it is.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.weight = nn.Parameter(_kept(self.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W]`` -> ``[B, out_channels, H', W']``, in the memory layout of ``x``."""
        return self._conv_forward(x, in_layout_of(x, self._usual(self.weight)), self.bias)

    def _usual(self, weight: Tensor) -> Tensor:
        """Return the kept weight as ``[out_channels, in_channels, kernel height, width]``, channels last."""
        return weight.unflatten(1, self.kernel_size).permute(0, 3, 1, 2)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._usual(destination[f"{prefix}weight"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if (weight := state_dict.get(f"{prefix}weight")) is not None and weight.ndim == 4:
            state_dict[f"{prefix}weight"] = _kept(weight)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _kept(weight: Tensor) -> Tensor:
    """Return a weight of the usual shape as :class:`ChannelsLastConv2d` keeps it."""
    return weight.flatten(2).transpose(1, 2).contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the scaled dot-product attention of ``q``, ``k`` and ``v``, each ``[B, heads, N, c]``, in their type.

    In training on a CPU heads of up to 64 channels are computed in float32: with its backward pass bfloat16 takes up to
    13 times as long there on small maps (16 to 64 sites) and about as long on large ones. Wide heads it makes faster.
    """
    narrow = q.shape[-1] <= 64
    if narrow and q.device.type == "cpu" and torch.is_grad_enabled() and q.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class ResBlock(nn.Module):
    """GN, SiLU, 3x3, GN, SiLU, dropout, 3x3, plus the input (through a 1x1 where the widths differ).

    With ``embedding_channels`` the second normalisation is scaled and shifted by a linear map of a conditioning vector
    (ADM's adaptive group normalisation). ADM's SiLU before that map is the same for all blocks, so it is the caller's:
    ``embedding`` has passed it.

    Shapes: ``x [B, in_channels, H, W]``, ``embedding [B, embedding_channels]`` -> ``[B, out_channels, H, W]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        embedding_channels: int | None = None,
        zero_last: bool = False,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.conv2 = zero_init(conv2) if zero_last else conv2
        self.skip = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)
        self.modulation = None if embedding_channels is None else nn.Linear(embedding_channels, 2 * out_channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Return the block's output; ``embedding`` is required exactly where the block was built for one."""
        assert (embedding is None) == (self.modulation is None), "an embedding goes with embedding_channels"
        h = self.conv1(silu_of_new(self.norm1(x)))
        h = self.norm2(h)
        if self.modulation is not None and embedding is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        h = self.conv2(self.dropout(silu_of_new(h)))
        return add_to_new(self.skip(x), h)


class SelfAttention(nn.Module):
    """Residual self-attention over all sites of a feature map, by scaled dot-product attention.

    ``head_channels=None`` is one head over all channels, as in the Stable Diffusion autoencoder.
    Shape: ``[B, channels, H, W]`` in and out.
    """

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int | None = None,
        zero_last: bool = False,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        head_channels = head_channels or channels
        if channels % head_channels:
            raise ValueError(f"{channels} channels do not divide into heads of {head_channels}")
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        out = conv(channels, channels, 1)
        self.out = zero_init(out) if zero_last else out

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus what attention adds to it."""
        height, width = x.shape[-2:]
        qkv = rearrange(self.qkv(self.norm(x)), "b (n heads c) h w -> n b heads (h w) c", n=3, heads=self.heads)
        if qkv.stride(-1) != 1:  # the fused kernels take channels that lie side by side, and nothing else
            qkv = qkv.contiguous()
        attended = attention(*qkv)  # [B, heads, H*W, c]
        attended = rearrange(attended, "b heads (h w) c -> b (heads c) h w", h=height, w=width)
        return add_to_new(x, self.out(attended))
