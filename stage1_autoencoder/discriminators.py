"""Discriminators: images ``[B, 3, H, W]`` -> a list of logit maps, each ``[B, 1, h, w]``; positive means real."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..common.config import Config
from ..common.nn import group_norm

UNET_WIDTHS = {"narrow": 16, "half": 32, "full": 64}


class UNetDiscriminatorConfig(Config):
    """U-Net GAN's discriminator (Schönfeld et al. 2020, arXiv 2002.12655), which LiteVAE takes up."""

    kind: Literal["unet"] = "unet"
    width: Literal["narrow", "half", "full"] = "full"
    """Channels at image resolution: 16, 32 or 64. Neither paper on autoencoders says."""
    levels: int = Field(4, ge=2, le=6)
    """Times the sides are halved; the image must divide by ``2^levels``."""


class PatchGANConfig(Config):
    """The patch discriminator of pix2pix (Isola et al. 2017, arXiv 1611.07004) that VQGAN and Stable Diffusion use."""

    kind: Literal["patchgan"] = "patchgan"
    width: int = Field(64, ge=8)
    layers: int = Field(3, ge=1, le=5)
    """Strided layers; 3 sees patches of 70 pixels."""


DiscriminatorConfig = Annotated[UNetDiscriminatorConfig | PatchGANConfig, Field(discriminator="kind")]


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Module:
    return spectral_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))


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
    """Judges the image as a whole at its bottleneck and every pixel at its output: two logit maps."""

    def __init__(self, config: UNetDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = UNET_WIDTHS[config.width]
        widths = [width * min(2**level, 8) for level in range(config.levels + 1)]
        self.stem = _conv(3, widths[0])
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in itertools.pairwise(widths))
        self.whole = spectral_norm(nn.Linear(widths[-1], 1))
        self.up = nn.ModuleList(UpBlock(b, a, a) for a, b in reversed(list(itertools.pairwise(widths))))
        self.pixels = _conv(widths[0], 1, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return ``[per-pixel logits [B, 1, H, W], whole-image logits [B, 1, 1, 1]]``."""
        factor = 2**self.config.levels
        height, width = images.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"the UNet discriminator halves the sides {self.config.levels} times and cannot take {height}x{width}; "
                "lower objective.adversarial.discriminator.levels"
            )
        h = self.stem(images)
        skips = []
        for block in self.down:
            skips.append(h)
            h = block(h)
        whole = self.whole(F.leaky_relu(h, 0.2).mean(dim=(2, 3)))[:, :, None, None]
        for block in self.up:
            h = block(h, skips.pop())
        return [self.pixels(F.leaky_relu(h, 0.2)), whole]


class PatchGAN(nn.Module):
    """Strided 4x4 convolutions that judge overlapping patches: one logit map.

    Group normalisation instead of the original's batch normalisation: a batch here mixes real images and
    reconstructions, whose joint statistics would tell the two apart, and differs between numbers of processes.
    """

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        channels = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.layers + 1):
            out = config.width * min(2**layer, 8)
            stride = 2 if layer < config.layers else 1
            layers += [nn.Conv2d(channels, out, 4, stride=stride, padding=1), group_norm(out), nn.LeakyReLU(0.2)]
            channels = out
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return ``[logits [B, 1, h, w]]``."""
        return [self.layers(images)]


DISCRIMINATORS: dict[str, type[nn.Module]] = {"unet": UNetDiscriminator, "patchgan": PatchGAN}
