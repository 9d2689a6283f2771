"""The convolutional decoder: any width, GroupNorm or self-modulated convolution, pixels or wavelet bands as output.

At width ``full`` and downsampling 8 from 4 channels with GroupNorm it is Stable Diffusion's (49,490,179 parameters).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from ..common.nn import ResBlock, SelfAttention, group_norm
from .smc import SMCResBlock
from .wavelets import inverse_haar_bands

WIDTHS = {"tiny": 16, "narrow": 32, "half": 64, "full": 128}
MULTIPLIERS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)}
"""By downsampling, from the image's resolution to the latents': 4, 8, 16 and 32 as in latent diffusion's autoencoders
(Rombach et al. 2022, arXiv 2112.10752); 2 is ours."""


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
    output: Literal["pixels", "wavelet"] = "pixels"
    """``wavelet``: the last convolution gives the 12 Haar bands of the image at half its resolution, scaled as the
    encoder's (LL is a block mean), and the image is their inverse transform. The level at the image's resolution falls
    away with its blocks and its upsampling; every other resolution keeps its width, so at downsampling 8 the
    multipliers 1, 2, 4, 4 become 2, 4, 4. This form of the output is ours."""
    post_quant_conv: bool = False
    """A 1x1 convolution on the latents first, as in Stable Diffusion. LiteVAE does without: it reports rFID 2.04 with
    the 1x1 convolutions around the latents and 0.87 without."""


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
        if downsampling not in MULTIPLIERS:
            raise ValueError(
                f"the decoder has no multipliers for downsampling {downsampling}, only {list(MULTIPLIERS)}"
            )
        self.config = config
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if config.post_quant_conv else None
        wavelet = config.output == "wavelet"
        widths = [WIDTHS[config.width] * multiplier for multiplier in MULTIPLIERS[downsampling][wavelet:]]
        block = partial(SMCResBlock if config.norm == "smc" else ResBlock, dropout=config.dropout)
        channels = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, channels, 3, padding=1), block(channels, channels)]
        if config.attention:
            layers.append(SelfAttention(channels))
        layers.append(block(channels, channels))
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                layers.append(block(channels, width))
                channels = width
            if level > 0:
                layers.append(Upsample(channels))
        if config.norm == "group":
            layers.append(group_norm(channels))
        layers += [nn.SiLU(), nn.Conv2d(channels, 4 * 3 if wavelet else 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution, where the adaptive weight compares gradients."""
        return self.layers[-1].get_parameter("weight")

    def forward(self, latents: Tensor) -> Tensor:
        """Return the images; with the wavelet output they are float32 under autocast too."""
        h = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        h = self.layers(h)
        # The bands are half the orthonormal coefficients; sums and differences of float32 stay so under autocast.
        return h if self.config.output == "pixels" else inverse_haar_bands(2 * h.float())
