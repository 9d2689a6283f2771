"""The patch discriminator of pix2pix (Isola et al. 2017, arXiv 1611.07004): one logit per overlapping patch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from ..common.nn import group_norm
from .edge_padding import pad_edges


class PatchGANConfig(Config):
    """The patch discriminator of pix2pix (Isola et al. 2017, arXiv 1611.07004) that VQGAN and Stable Diffusion use."""

    kind: Literal["patchgan"] = "patchgan"
    width: int = Field(64, ge=8)
    layers: int = Field(3, ge=1, le=5)
    """Strided layers; 3 sees patches of 70 pixels."""


class PatchGAN(nn.Module):
    """Strided 4x4 convolutions that judge overlapping patches: one logit map.

    Group normalisation instead of the original's batch normalisation: a batch here mixes real images and
    reconstructions, whose joint statistics would tell the two apart, and differs between numbers of processes.
    Images too small for a single patch are padded by repeating their border.
    """

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.layers + 1):
            out = config.width * min(2**layer, 8)
            stride = 2 if layer < config.layers else 1
            layers += [nn.Conv2d(channels, out, 4, stride=stride, padding=1), group_norm(out), nn.LeakyReLU(0.2)]
            channels = out
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, parts: int = 1) -> list[Tensor]:
        """Return ``[logits [B, 1, h, w]]``; no image affects another."""
        # The two last layers take one site each off what the strided ones leave, and one must remain.
        smallest = 3 * 2**self.config.layers
        return [self.layers(pad_edges(images, smallest, smallest))]
