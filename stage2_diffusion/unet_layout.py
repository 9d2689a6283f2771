"""What the configurations of all UNet denoisers have in common: widths, depth and attention."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..common.config import Config


class UNetLayout(Config):
    """Widths, depth and attention of a UNet; the channels of its input follow from the latents."""

    channels: int = Field(64, gt=0)
    """Width of the first level."""
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 3), min_length=1)
    """Width of each level, in units of ``channels``; every further level halves height and width."""
    num_res_blocks: int = Field(2, gt=0)
    """Residual blocks per level on the way down; one more on the way up."""
    attention_levels: tuple[int, ...] = (1, 2)
    """Levels with self-attention after every block, 0 being the latents' own resolution. LDM's "attention resolutions"
    (1, 2, 4) are the levels (0, 1, 2). The middle always has attention."""
    head_channels: int = Field(32, gt=0)
    """Channels per attention head."""
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> UNetLayout:
        levels = len(self.multipliers)
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels} must be among 0 to {levels - 1}")
        for level in {*self.attention_levels, levels - 1}:
            width = self.widths[level]
            if width % self.head_channels:
                raise ValueError(
                    f"head_channels {self.head_channels} must divide the {width} channels of level {level}"
                )
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError``, with the fix, where feature maps of this size cannot be halved often enough."""
        halvings = len(self.multipliers) - 1
        if height % 2**halvings or width % 2**halvings:
            raise ValueError(
                f"latents of {height}x{width} cannot be halved {halvings} times: give multipliers fewer entries than "
                f"{halvings + 1}, or latents whose height and width divide by {2**halvings}"
            )
