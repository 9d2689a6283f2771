"""The convolutional decoder, at any width, with group normalisation or self-modulated convolution.

At width ``full`` and downsampling 8 from 4 channels with GroupNorm it is Stable Diffusion's (49,490,179 parameters).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from ..common.nn import ResBlock, SelfAttention, group_norm
from .smc import SMCResBlock

WIDTHS = {"tiny": 16, "narrow": 32, "half": 64, "full": 128}
MULTIPLIERS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4)}


class ConvDecoderConfig(Config):
    """The decoder's width, its residual blocks and what balances its features."""

    kind: Literal["conv"] = "conv"
    width: Literal["tiny", "narrow", "half", "full"] = "full"
    """Channels at image resolution: 16, 32, 64 or 128."""
    num_res_blocks: int = Field(2, ge=1)
    """Residual blocks per resolution; the decoder has one more, as in Stable Diffusion."""
    norm: Literal["group", "smc"] = "group"
    attention: bool = True
    """Self-attention between the two middle blocks."""
    dropout: float = Field(0.0, ge=0, lt=1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, 2H, 2W]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ConvDecoder(nn.Module):
    """Latents ``[B, latent_channels, h, w]`` -> images ``[B, 3, h * f, w * f]``, not clamped.

    With ``norm="smc"`` the residual blocks hold no norm layer and neither does the output; the middle attention keeps
    its own, which the paper leaves open.
    """

    def __init__(self, config: ConvDecoderConfig, latent_channels: int, downsampling: int) -> None:
        super().__init__()
        self.config = config
        width, multipliers = WIDTHS[config.width], MULTIPLIERS[downsampling]
        block = SMCResBlock if config.norm == "smc" else ResBlock
        channels = width * multipliers[-1]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, channels, 3, padding=1)]
        layers.append(block(channels, channels, dropout=config.dropout))
        if config.attention:
            layers.append(SelfAttention(channels))
        layers.append(block(channels, channels, dropout=config.dropout))
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(config.num_res_blocks + 1):
                layers.append(block(channels, width * multiplier, dropout=config.dropout))
                channels = width * multiplier
            if level > 0:
                layers.append(Upsample(channels))
        if config.norm == "group":
            layers.append(group_norm(channels))
        layers += [nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the images."""
        return self.layers(latents)
