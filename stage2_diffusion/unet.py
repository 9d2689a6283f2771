"""The UNet denoiser on latents, after ADM (Dhariwal & Nichol 2021, arXiv 2105.05233) and LDM (Rombach et al. 2022).

It is the raw network F of EDM: it sees an input scaled to unit variance and a noise label of order one, and knows
nothing of noise levels, objectives or whitening.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common.nn import ChannelsLastConv2d as Conv
from ..common.nn import ResBlock, SelfAttention, group_norm, zero_init
from .unet_layout import UNetLayout


class UNetConfig(UNetLayout):
    """Widths, depth and attention of the UNet; the channels of its input follow from the latents."""

    kind: Literal["unet"] = "unet"
    embedding_channels: int | None = Field(None, gt=0)
    """Width of the noise and class embedding; None is 4 times ``channels``, as in ADM."""


class UNet(nn.Module):
    """Residual UNet with skip connections from every block, conditioned on a noise label and optionally a class.

    Shapes: ``x [B, in_channels, h, w]``, ``noise_label [B]``, ``labels [B] int64`` or None -> like ``x``. ``h`` and
    ``w`` must divide by 2 to the number of levels less one (`check_size`). With ``num_classes > 0``, ``labels=None``
    asks for the unconditional output, which has an embedding of its own.

    """

    channels_last: bool = True
    """Keep feature maps channels last, in which convolutions are fastest on a CPU (forwards, 1 to 35 %) and on a
    GPU's matrix units."""
    gradient_checkpointing: bool = False
    """In training, keep only each block's input and compute the rest of it again in the backward pass."""

    def __init__(self, config: UNetConfig, in_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        embedding = config.embedding_channels or 4 * config.channels
        widths = config.widths

        self.noise_embedding = NoiseEmbedding(config.channels, embedding)
        self.class_embedding = nn.Embedding(num_classes + 1, embedding) if num_classes else None

        self.stem = Conv(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        for level, level_width in enumerate(widths):
            if level > 0:
                self.down.append(Downsample(width))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.down.append(self._block(width, level_width, embedding, level in config.attention_levels))
                width = level_width
                skips.append(width)
        self.middle = nn.ModuleList(
            [self._block(width, width, embedding, attention=True), self._block(width, width, embedding, False)]
        )
        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                attention = level in config.attention_levels
                self.up.append(self._block(width + skips.pop(), level_width, embedding, attention))
                width = level_width
            if level > 0:
                self.up.append(Upsample(width))
        assert not skips, "every skip is used once"
        self.norm = group_norm(width)
        self.out = zero_init(Conv(width, in_channels, 3, padding=1))

    def _block(self, in_channels: int, out_channels: int, embedding: int, attention: bool) -> Block:
        head_channels = self.config.head_channels if attention else None
        return Block(in_channels, out_channels, embedding, dropout=self.config.dropout, head_channels=head_channels)

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError``, with the fix, where feature maps of this size cannot be halved often enough."""
        self.config.check_size(height, width)

    def forward(self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the raw network output F, shaped like ``x``."""
        self.check_size(*x.shape[-2:])
        embedding = F.silu(self._embed(noise_label, labels))  # [B, embedding], as every block takes it
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        h = self.stem(x.contiguous(memory_format=layout))  # [B, channels, h, w]
        skips = [h]
        for layer in self.down:
            h = self._apply_layer(layer, h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = self._apply_layer(layer, h, embedding)
        for layer in self.up:
            if isinstance(layer, Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._apply_layer(layer, h, embedding)
        return self.out(F.silu(self.norm(h)))  # [B, in_channels, h, w]

    def after_step(self) -> None:
        """Do nothing: what a denoiser does to its weights after every optimiser step."""

    def _apply_layer(self, layer: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and isinstance(layer, Block):
            result: Tensor = checkpoint(layer, h, embedding, use_reentrant=False)
            return result
        return layer(h, embedding)

    def _embed(self, noise_label: Tensor, labels: Tensor | None) -> Tensor:
        embedding = self.noise_embedding(noise_label)
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError(
                    "this network was built without classes: pass labels=None, or build it with num_classes"
                )
            return embedding
        if labels is None:
            labels = torch.full(noise_label.shape, self.num_classes, device=noise_label.device)
        return embedding + self.class_embedding(labels)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of the noise label, then a two-layer network: ``[B] -> [B, out_channels]``.

    The label is of order one (EDM: ln(sigma) / 4, about -1.5 to 1.1), so the frequencies run geometrically from 0.25 to
    32 radians per unit: from a nearly linear ramp to a resolution of a few percent of sigma.
    """

    frequencies: Tensor

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.25), math.log(32), channels // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 * (channels // 2), out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels)
        )

    def forward(self, noise_label: Tensor) -> Tensor:
        """Return the embedding of ``noise_label [B]``."""
        angles = noise_label.float()[:, None] * self.frequencies  # [B, channels // 2]
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))


class Block(nn.Module):
    """A residual block modulated by the embedding, then self-attention where ``head_channels`` is given."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int, *, dropout: float, head_channels: int | None
    ) -> None:
        super().__init__()
        self.residual = ResBlock(
            in_channels, out_channels, dropout=dropout, embedding_channels=embedding, zero_last=True, conv=Conv
        )
        attend = head_channels is not None
        attention = (
            SelfAttention(out_channels, head_channels=head_channels, zero_last=True, conv=Conv) if attend else None
        )
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, in_channels, h, w]`` -> ``[B, out_channels, h, w]``."""
        h = self.residual(x, embedding)
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Module):
    """Half the height and width, by a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, C, h/2, w/2]``; the embedding is not used."""
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width, by nearest neighbours and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, C, 2h, 2w]``; the embedding is not used."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
