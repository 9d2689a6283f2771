"""Magnitude-preserving layers of EDM2 (Karras et al. 2024, arXiv 2312.02696), written from the paper's equations.

The *magnitude* of a tensor is the root of the mean of its squares. Every operation here is scaled such that inputs of
magnitude one give an output of magnitude one, in expectation over independent values, so that no normalisation layer
is needed to keep a deep network in range. "Eq." is an equation of that paper.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..common.nn import attention, in_layout_of

SILU_MAGNITUDE = 0.596
"""Magnitude of SiLU of a standard normal variable (eq. 81)."""


def mp_silu(x: Tensor) -> Tensor:
    """Return SiLU of ``x``, of magnitude one where ``x`` is standard normal (eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Return ``(1 - balance) * a + balance * b`` at the magnitude of its independent, equally large terms (eq. 88)."""
    norm = math.hypot(1 - balance, balance)
    return torch.lerp(a, b.to(a.dtype), balance) / norm


def mp_cat(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Concatenate along dimension 1 such that ``b`` contributes ``balance`` and ``a`` the rest (eq. 103).

    What a layer makes of a concatenation it owes to each part in proportion to the square root of that part's channels;
    the scaling here replaces that by ``1 - balance`` to ``balance`` and keeps the magnitude of the whole.
    """
    channels_a, channels_b = a.shape[1], b.shape[1]
    whole = math.sqrt((channels_a + channels_b) / ((1 - balance) ** 2 + balance**2))
    scale_a, scale_b = whole * (1 - balance) / math.sqrt(channels_a), whole * balance / math.sqrt(channels_b)
    return torch.cat([scale_a * a, scale_b * b], dim=1)


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-4) -> Tensor:
    """Return ``x`` scaled to magnitude one over dimension ``dim``, at each site by itself (eq. 30).

    ``eps`` is added to the magnitude, which is computed in float32.
    """
    magnitude = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32) / math.sqrt(x.shape[dim])
    return x / (magnitude + eps).to(x.dtype)


class MPLayer(nn.Module):
    """A weight ``[out, in, ...]`` without bias, of which only the directions of its outputs' vectors matter.

    The forward pass divides the weight by the norm of each output's vector (eq. 47), so that independent inputs of
    magnitude one give outputs of magnitude one. `after_step` also sets the stored weight's magnitude to one ("forced
    weight normalisation"): otherwise it would grow with every update, since the gradient is perpendicular to it, and
    the effective learning rate would decay with it.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.after_step()

    @property
    def unit_weight(self) -> Tensor:
        """The weight with a norm of one per output, like the stored weight ``[out, in, ...]``."""
        norm = torch.linalg.vector_norm(self.weight, dim=tuple(range(1, self.weight.ndim)), keepdim=True)
        return self.weight / norm.clamp_min(1e-6)

    @torch.no_grad()
    def after_step(self) -> None:
        """Set the magnitude of each output's stored vector to one: its norm to the root of the fan-in."""
        self.weight.copy_(self.unit_weight * math.sqrt(self.weight[0].numel()))


class MPLinear(MPLayer):
    """``[B, in_channels] -> [B, out_channels]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(out_channels, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of ``x``."""
        return F.linear(x, self.unit_weight)


class MPConv(MPLayer):
    """``[B, in_channels, h, w] -> [B, out_channels, h, w]``, with an odd kernel and zeros beyond the border.

    The zeros cost magnitude there: with a 3x3 kernel a value on an edge has 2/3 of the variance.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(self.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``."""
        return F.conv2d(x, in_layout_of(x, self.unit_weight), padding=self.weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """Random Fourier features of the noise label, ``[B] -> [B, channels]`` (eqs. 75 and 76).

    Each is ``sqrt(2) * cos(2 pi (f * label + p))`` with a normal frequency and a uniform phase, drawn once, when the
    module is built, and kept with its state.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise_label: Tensor) -> Tensor:
        """Return the features of ``noise_label [B]``, in float32."""
        angles = noise_label.float()[:, None] * self.frequencies + self.phases  # [B, channels]
        return math.sqrt(2) * angles.cos()


class MPAttention(nn.Module):
    """Residual cosine self-attention over all sites, ``[B, channels, h, w]`` in and out.

    Queries, keys and values are normalised per head, so that the logits are ``sqrt(head_channels)`` times a cosine and
    cannot grow in training. Averaging over sites is the one step that loses magnitude: with ``balance`` 0.3 the output
    has at least 0.92 of the input's.
    """

    def __init__(self, channels: int, *, head_channels: int, balance: float) -> None:
        super().__init__()
        self.heads, self.balance = channels // head_channels, balance
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.out = MPConv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` mixed with what attention makes of it."""
        height, width = x.shape[-2:]
        qkv = rearrange(self.qkv(x), "b (n heads c) h w -> n b heads (h w) c", n=3, heads=self.heads)
        if qkv.stride(-1) != 1:  # the fused kernels take channels that lie side by side, and nothing else
            qkv = qkv.contiguous()
        attended = attention(*pixel_norm(qkv, dim=-1))  # [B, heads, h*w, c]
        attended = rearrange(attended, "b heads (h w) c -> b (heads c) h w", h=height, w=width)
        return mp_sum(x, self.out(attended), self.balance)
