"""Local jitter: latent sites take each other's values, so that a decoder cannot lean on where exactly a value stands.

Two sites are within a radius r where neither their rows nor their columns differ by more than r. Both modes are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .perturbation_settings import PerturbationSettings


class LocalJitterConfig(PerturbationSettings):
    """Sites, all channels of them together, are moved by a few sites."""

    kind: Literal["local_jitter"] = "local_jitter"
    mode: Literal["shift", "swap"] = "shift"
    """``shift``: a site takes the value of another within ``radius``, chosen uniformly; values may come twice or go.
    ``swap``: two sites exchange their values; every value stays, once."""
    radius: int = Field(1, ge=1)
    rate: float = Field(0.1, ge=0, le=1)
    """The chance that a site takes another's value. Under ``swap``, sites at the border may find no partner, and with
    an even radius one of each tile's: there it is a little less."""


def local_jitter(latents: Tensor, config: LocalJitterConfig) -> Tensor:
    """``[B, C, h, w]`` -> the same with sites moved; differentiable to the latents."""
    batch, channels, height, width = latents.shape
    draw = shift_sources if config.mode == "shift" else swap_sources
    sources = draw(batch, height, width, config.radius, config.rate, latents.device)
    index = sources[:, None].expand(-1, channels, -1)
    return latents.flatten(2).gather(2, index).view_as(latents)


def shift_sources(
    batch: int, height: int, width: int, radius: int, rate: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Return, for every site, the site ``[B, h * w]`` (in raster order) whose value it takes.

    With probability ``rate`` that is another one of the sites within ``radius`` that lie on the map, each as likely.
    """
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    top, left = (rows - radius).clamp_min(0), (columns - radius).clamp_min(0)
    window_height = (rows + radius).clamp_max(height - 1) - top + 1
    window_width = (columns + radius).clamp_max(width - 1) - left + 1
    count = window_height * window_width  # [h, w]: sites in each site's window, itself among them
    own = (rows - top) * window_width + (columns - left)
    chosen = (torch.rand(batch, height, width, device=device) * (count - 1)).long()
    chosen = (chosen + (chosen >= own)) % count  # skips the site itself; on a map of one site there is no other
    sources = (top + chosen // window_width) * width + left + chosen % window_width
    moves = torch.rand(batch, height, width, device=device) < rate
    return torch.where(moves, sources, rows * width + columns).flatten(1)


def swap_sources(
    batch: int, height: int, width: int, radius: int, rate: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Return, for every site, the site ``[B, h * w]`` (in raster order) whose value it takes: a permutation.

    The map is cut into tiles of side ``radius + 1``, so that all sites of a tile are within the radius, from an origin
    drawn per image. The sites of a tile are paired at random, and each pair is exchanged with probability ``rate``.
    """
    side = radius + 1
    row, column = (torch.randint(side, (batch, 1), device=device) for _ in range(2))
    tile_rows = (row + torch.arange(height, device=device)) // side  # [B, h]
    tile_columns = (column + torch.arange(width, device=device)) // side  # [B, w]
    tiles = (tile_rows[:, :, None] * (width // side + 2) + tile_columns[:, None, :]).flatten(1)  # [B, h * w]
    # All sites tile by tile, in random order inside each; neighbours at an even distance from the tile's first pair up.
    order = torch.rand(tiles.shape, device=device).argsort(dim=1)
    order = order.gather(1, tiles.gather(1, order).argsort(dim=1, stable=True))
    tiles = tiles.gather(1, order)
    position = torch.arange(height * width, device=device).expand_as(tiles)
    first = torch.searchsorted(tiles, tiles)
    partner = first + ((position - first) ^ 1)
    partner = torch.where(partner < height * width, partner, position)
    paired = tiles.gather(1, partner) == tiles
    draw = torch.rand(tiles.shape, device=device).gather(1, torch.minimum(position, partner))  # one for both of a pair
    partner = torch.where(paired & (draw < rate), partner, position)
    return torch.empty_like(order).scatter(1, order, order.gather(1, partner))
