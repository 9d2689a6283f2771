"""The convolutional encoder of Stable Diffusion's KL autoencoder (Rombach et al. 2022, arXiv 2112.10752).

At the default width and multipliers, with 4 latent channels under a KL bottleneck, it has that model's 34,163,592
parameters.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from ..common.nn import ResBlock, SelfAttention, fast_layout, group_norm


class KLEncoderConfig(Config):
    """The convolutional encoder: one entry of ``multipliers`` per resolution, each but the last halving the sides."""

    kind: Literal["kl"] = "kl"
    width: int = Field(128, ge=4)
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4, 4), min_length=2, max_length=6)
    num_res_blocks: int = Field(2, ge=1)
    attention: bool = True
    """Self-attention between the two middle blocks."""
    quant_conv: bool = False
    """A 1x1 convolution on the features at the end, as in Stable Diffusion; Flux and ours do without."""
    dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return int(2 ** (len(self.multipliers) - 1))


def require_divisible(images: Tensor, factor: int) -> None:
    """Raise ``ValueError`` unless both sides of ``images`` divide by the downsampling ``factor``."""
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"downsampling by {factor} needs sides divisible by it, got {height}x{width}")


class Downsample(nn.Module):
    """A strided 3x3 convolution that pads right and bottom only, as the original does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, H/2, W/2]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class KLEncoder(nn.Module):
    """Images ``[B, 3, H, W]`` in [-1, 1] -> features ``[B, out_channels, H / f, W / f]``."""

    def __init__(self, config: KLEncoderConfig, out_channels: int) -> None:
        super().__init__()
        self.config = config
        channels = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.num_res_blocks):
                layers.append(ResBlock(channels, config.width * multiplier, dropout=config.dropout))
                channels = config.width * multiplier
            if level < len(config.multipliers) - 1:
                layers.append(Downsample(channels))
        layers.append(ResBlock(channels, channels, dropout=config.dropout))
        if config.attention:
            layers.append(SelfAttention(channels))
        layers.append(ResBlock(channels, channels, dropout=config.dropout))
        layers += [group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.quant_conv = nn.Conv2d(out_channels, out_channels, 1) if config.quant_conv else None

    def forward(self, images: Tensor) -> Tensor:
        """Return the bottleneck's input. Raises ``ValueError`` where the sides do not divide."""
        require_divisible(images, self.config.downsampling)
        features = self.layers(fast_layout(images))
        return features if self.quant_conv is None else self.quant_conv(features)
