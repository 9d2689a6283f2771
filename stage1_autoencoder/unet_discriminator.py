"""U-Net GAN's discriminator (Schönfeld et al. 2020, arXiv 2002.12655): one logit per pixel and one per image."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..common.config import Config
from .edge_padding import crop_padding, next_multiple, pad_edges

UNET_WIDTHS = {"narrow": 16, "half": 32, "full": 64}


class UNetDiscriminatorConfig(Config):
    """U-Net GAN's discriminator (Schönfeld et al. 2020, arXiv 2002.12655), which LiteVAE takes up."""

    kind: Literal["unet"] = "unet"
    width: Literal["narrow", "half", "full"] = "full"
    """Channels at image resolution: 16, 32 or 64. Neither paper on autoencoders says."""
    levels: int = Field(4, ge=2, le=6)
    """Times the sides are halved. Sides that do not divide by ``2^levels`` are padded inside."""


class _SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, under spectral norm, is computed in float32 whatever autocast is active.

    In half precision PyTorch's power iteration mixes types (an error on some versions and devices) and its estimate of
    the norm is off by as much as the weights' rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class _SpectralLinear(nn.Linear):
    """The same for a dense layer."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return F.linear(x, weight, self.bias)


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Module:
    return spectral_norm(_SpectralConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))


class DownBlock(nn.Module):
    """BigGAN's residual block of a discriminator: two spectrally normalised convolutions, then averaging by two."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(in_channels, out_channels), _conv(out_channels, out_channels)
        self.skip = _conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` -> ``[B, out, H/2, W/2]``."""
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return F.avg_pool2d(h + self.skip(x), 2)


class UpBlock(nn.Module):
    """Doubling, joined with the skip of that resolution, and a residual pair of convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels + skip_channels, out_channels)
        self.conv2 = _conv(out_channels, out_channels)
        self.skip = _conv(in_channels + skip_channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``[B, in, H, W]`` and ``[B, skip, 2H, 2W]`` -> ``[B, out, 2H, 2W]``."""
        x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1)
        h = self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2))
        return h + self.skip(x)


class UNetDiscriminator(nn.Module):
    """Judges the image as a whole at its bottleneck and every pixel at its output: two logit maps.

    Sides that do not divide by ``2^levels`` are padded by repeating the border; the pixels' logits are cropped back.
    """

    def __init__(self, config: UNetDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = UNET_WIDTHS[config.width]
        widths = [width * min(2**level, 8) for level in range(config.levels + 1)]
        self.stem = _conv(3, widths[0])
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in itertools.pairwise(widths))
        self.whole = spectral_norm(_SpectralLinear(widths[-1], 1))
        self.up = nn.ModuleList(UpBlock(b, a, a) for a, b in reversed(list(itertools.pairwise(widths))))
        self.pixels = _conv(widths[0], 1, 1)

    def forward(self, images: Tensor, parts: int = 1) -> list[Tensor]:
        """Return ``[per-pixel logits [B, 1, H, W], whole-image logits [B, 1, 1, 1]]``; no image affects another."""
        height, width = images.shape[-2:]
        factor = 2**self.config.levels
        h = self.stem(pad_edges(images, next_multiple(height, factor), next_multiple(width, factor)))
        skips = []
        for block in self.down:
            skips.append(h)
            h = block(h)
        whole = self.whole(F.leaky_relu(h, 0.2).mean(dim=(2, 3)))[:, :, None, None]
        for block in self.up:
            h = block(h, skips.pop())
        return [crop_padding(self.pixels(F.leaky_relu(h, 0.2)), height, width), whole]
