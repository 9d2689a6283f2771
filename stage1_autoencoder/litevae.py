"""The LiteVAE encoder (Sadat et al. 2024, arXiv 2405.14477, section 4 and appendix): wavelets first, small nets after.

Each wavelet level goes through its own extraction net; the features are brought to the resolution of the coarsest
level, concatenated, and an aggregation net turns them into the bottleneck's input.
"""

from __future__ import annotations

import difflib
from functools import partial
from typing import Literal

import pywt
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..common.config import Config
from ..common.nn import ResBlock, fast_layout
from .wavelets import wavelet_levels

Size = Literal["s", "b", "m", "l"]

BAND_CHANNELS = 12
"""LL, LH, HL and HH of three image channels."""

# size -> (width, multipliers) of the extraction nets and of the aggregation net (the paper's table of configurations)
SIZES: dict[Size, tuple[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]] = {
    "s": ((16, (1, 2, 2)), (16, (1, 2, 2))),
    "b": ((32, (1, 2, 3)), (32, (1, 2, 3))),
    "m": ((64, (1, 2, 4)), (32, (1, 2, 3))),
    "l": ((64, (1, 2, 4)), (64, (1, 2, 4))),
}


class LiteVAEConfig(Config):
    """The wavelet encoder: its size, its levels (downsampling 2, 4 or 8) and its wavelet."""

    kind: Literal["litevae"] = "litevae"
    size: Size = "b"
    levels: int = Field(3, ge=1, le=3)
    wavelet: str = "haar"
    """Any discrete family of PyWavelets; the paper uses Haar."""
    num_res_blocks: int = Field(2, ge=1)
    """Residual blocks per width. The paper does not say; 2 is the only count that gives its four parameter counts."""
    shared_extraction: bool = False
    """One extraction net, with the same weights, for every level, where the paper has a net for each."""
    dropout: float = Field(0.0, ge=0, lt=1)

    @field_validator("wavelet")
    @classmethod
    def _known(cls, name: str) -> str:
        known = pywt.wavelist(kind="discrete")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"unknown wavelet{f'; did you mean {nearest[0]!r}?' if nearest else ''}")
        return name

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return int(2**self.levels)


class FlatUNet(nn.Module):
    """A UNet of residual blocks without resampling, attention or time: ``[B, in, h, w]`` -> ``[B, out, h, w]``.

    A skip is stored after each block of the first half and concatenated to the input of one block of the mirrored
    second half, last first. (The paper stores one after the stem too; with as many blocks on both sides none takes it.)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int,
        multipliers: tuple[int, ...],
        num_res_blocks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        channels, skips = width, []
        self.down = nn.ModuleList()
        for multiplier in multipliers:
            for _ in range(num_res_blocks):
                self.down.append(ResBlock(channels, width * multiplier, dropout=dropout))
                channels = width * multiplier
                skips.append(channels)
        self.middle = nn.Sequential(*(ResBlock(channels, channels, dropout=dropout) for _ in range(2)))
        self.up = nn.ModuleList()
        for multiplier in reversed(multipliers):
            for _ in range(num_res_blocks):
                self.up.append(ResBlock(channels + skips.pop(), width * multiplier, dropout=dropout))
                channels = width * multiplier
        self.out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features; height and width stay."""
        h = self.stem(fast_layout(x))
        skips = []
        for block in self.down:
            h = block(h)
            skips.append(h)
        h = self.middle(h)
        for block in self.up:
            h = torch.cat([h, skips.pop()], dim=1)  # by its old name the narrower map would stay in memory
            h = block(h)
        return self.out(h)


class LiteVAEEncoder(nn.Module):
    """Images ``[B, 3, H, W]`` in [-1, 1] -> features ``[B, out_channels, H / 2^levels, W / 2^levels]``."""

    def __init__(self, config: LiteVAEConfig, out_channels: int) -> None:
        super().__init__()
        self.config = config
        (width, multipliers), (agg_width, agg_multipliers) = SIZES[config.size]
        net = partial(FlatUNet, num_res_blocks=config.num_res_blocks, dropout=config.dropout)
        self.extract = nn.ModuleList(
            net(BAND_CHANNELS, BAND_CHANNELS, width=width, multipliers=multipliers)
            for _ in range(1 if config.shared_extraction else config.levels)
        )
        self.aggregate = net(BAND_CHANNELS * config.levels, out_channels, width=agg_width, multipliers=agg_multipliers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the bottleneck's input. Raises ``ValueError`` where the sides do not divide."""
        levels = wavelet_levels(images, self.config.levels, self.config.wavelet)
        height, width = levels[-1].shape[-2:]
        # The paper does not name the resampling; it has no parameters (their counts leave no room), so: area averaging.
        nets = [self.extract[0]] * len(levels) if self.config.shared_extraction else self.extract
        features = [F.adaptive_avg_pool2d(net(bands), (height, width)) for net, bands in zip(nets, levels, strict=True)]
        return self.aggregate(torch.cat(features, dim=1))
