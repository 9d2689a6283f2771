"""Encoding and decoding in tiles, for images that do not fit in memory.

A tile is a square of latent sites and the pixels they stand for. How the tiles are put together depends on the network,
and encoder and decoder may differ:

- *exact*, where every output depends on a bounded neighbourhood (convolutions alone, such as the SMC decoder without
  attention): each tile is read with a margin of the receptive radius, which is cropped from the result. That equals the
  result without tiles up to rounding.
- *blended*, everywhere else: neighbouring tiles overlap by a quarter of their side, and linear ramps that sum to 1
  weight their results. That is an approximation. It holds for attention, for padding that wraps around the image (the
  periodic extension of wavelets longer than Haar's), and for every network with GroupNorm, attention or not: its mean
  and variance are those of the whole map, which no tile knows. (Exact tiles would need one pass over all tiles for the
  statistics of each of the dozens of layers, so there are none.)

The zero padding of the network's convolutions falls on the image's border and, in the exact regime, nowhere else; in
the blended regime it also falls on the inner borders of a tile, where its weight is least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.errors import UsageError
from ..common.latents import Posterior
from .autoencoder import Autoencoder

MIN_SITES = 4
"""Least side of a tile in latent sites, so that a quarter of it is an overlap: our choice."""

PROBE_SITES = 65
"""Length of the strip that the receptive radius is measured on; a radius of half of it or more counts as unbounded."""


class TiledAutoencoder(nn.Module):
    """An autoencoder that never sees more than a tile: same interface, same weights, same fingerprint.

    For inference; the autoencoder must be in ``eval()``. Peak memory is that of the full-sized input and output and of
    one pass over a tile of ``tile`` pixels, in the exact regime with its margin on both sides.

    Args:
        autoencoder: the autoencoder to run.
        tile: side of the square that one pass contributes, in pixels, a multiple of the autoencoder's downsampling.
            A side of the image that is no longer is not divided.

    Raises:
        UsageError: ``tile`` is no such multiple, or too small.
    """

    def __init__(self, autoencoder: Autoencoder, tile: int) -> None:
        super().__init__()
        assert not autoencoder.training, "tiles are for inference: call eval() first"
        factor = autoencoder.downsampling
        if tile % factor or tile < MIN_SITES * factor:
            nearest = max(MIN_SITES, round(tile / factor)) * factor
            raise UsageError(
                f"--tile {tile}: give a multiple of the autoencoder's downsampling factor {factor}, of at least "
                f"{MIN_SITES * factor} px, such as {nearest}"
            )
        self.autoencoder = autoencoder
        self.tile = tile
        self.downsampling = factor
        self.latent_channels = autoencoder.latent_channels

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of images ``[B, 3, H, W]``; a standard deviation is put together as the mean is.

        Raises ``ValueError`` where the sides do not divide by the downsampling.
        """
        height, width = images.shape[-2:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(f"sides must divide by the downsampling {self.downsampling}, got {height}x{width}")
        stacked = self._assemble(self._encode_stacked, images, self.encode_margin, self.downsampling, 1)
        mean, std = stacked[:, : self.latent_channels], stacked[:, self.latent_channels :]
        return Posterior(mean, std if std.shape[1] else None)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]`` from raw latents, as :meth:`Autoencoder.decode` does."""
        return self._assemble(self.autoencoder.decode, latents, self.decode_margin, 1, self.downsampling)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return ``(C, h, w)`` for square images of ``size``, as :meth:`Autoencoder.latent_shape` does."""
        return self.autoencoder.latent_shape(size)

    def fingerprint(self) -> str:
        """Return the autoencoder's: blended latents differ from untiled ones, so keep ``tile`` beside it."""
        return self.autoencoder.fingerprint()

    @cached_property
    def encode_margin(self) -> int | None:
        """Receptive radius of encoding in latent sites; None where it is unbounded and tiles are blended."""
        return self._margin(self._encode_stacked, self.autoencoder.encoder, 3, self.downsampling, 1)

    @cached_property
    def decode_margin(self) -> int | None:
        """Receptive radius of decoding in latent sites; None where it is unbounded and tiles are blended."""
        network = self.autoencoder.decoder
        return self._margin(self.autoencoder.decode, network, self.latent_channels, 1, self.downsampling)

    def describe(self, *directions: Literal["encode", "decode"]) -> str:
        """Return one line for the log: the regime of each direction, and the pixels of its margin or overlap."""
        parts = []
        for direction in directions:
            margin = self.encode_margin if direction == "encode" else self.decode_margin
            if margin is None:
                parts.append(f"{direction} blended over {self._overlap * self.downsampling} px")
            else:
                parts.append(f"{direction} exact with a margin of {margin * self.downsampling} px")
        return f"tiles of {self.tile} px: {', '.join(parts)}"

    @property
    def _overlap(self) -> int:
        return self.tile // self.downsampling // 4

    def _encode_stacked(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation, where there is one, along the channels."""
        posterior = self.autoencoder.encode(images)
        return posterior.mean if posterior.std is None else torch.cat([posterior.mean, posterior.std], dim=1)

    def _margin(
        self, run: Callable[[Tensor], Tensor], network: nn.Module, channels: int, scale_in: int, scale_out: int
    ) -> int | None:
        if any(isinstance(module, nn.GroupNorm) for module in network.modules()):
            return None  # known without a pass through what may be a large network
        like = next(network.parameters())
        return receptive_radius(run, like.new_zeros(channels), scale_in, scale_out)

    def _assemble(
        self, run: Callable[[Tensor], Tensor], x: Tensor, margin: int | None, scale_in: int, scale_out: int
    ) -> Tensor:
        """Run every tile of ``x`` and add the weighted results up; scales are pixels per latent site."""
        rows, columns = (self._spans(side // scale_in, margin, scale_out) for side in x.shape[-2:])
        if len(rows) == len(columns) == 1:
            return run(x)
        sides = (rows[-1].stop * scale_out, columns[-1].stop * scale_out)
        result: Tensor | None = None
        for row, column in itertools.product(rows, columns):
            piece = run(x[..., row.read(scale_in), column.read(scale_in)])
            if result is None:  # added up in float32 at least, whatever the precision of the network
                dtype = torch.promote_types(piece.dtype, torch.float32)
                result = piece.new_zeros(*piece.shape[:2], *sides, dtype=dtype)
            weights = (row.weights[:, None] * column.weights).to(result)
            kept = piece[..., row.crop(scale_out), column.crop(scale_out)]
            result[..., row.keep(scale_out), column.keep(scale_out)] += weights * kept
        assert result is not None, "there is always a first tile"
        return result.to(piece.dtype)

    def _spans(self, length: int, margin: int | None, scale: int) -> list[Span]:
        sites = self.tile // self.downsampling
        if margin is None:
            return blended_spans(length, sites, self._overlap, scale)
        return exact_spans(length, sites, margin, scale)


def tiled(autoencoder: Autoencoder, tile: int | None) -> Autoencoder | TiledAutoencoder:
    """Return ``autoencoder`` as it is, or in tiles of ``tile`` pixels where that is given."""
    return autoencoder if tile is None else TiledAutoencoder(autoencoder, tile)


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in latent sites.

    Attributes:
        start: first site of the result.
        stop: site after its last.
        before: sites read before the first, to be cropped.
        after: sites read after the last, to be cropped.
        weights: of the result, ``[(stop - start) * scale]`` at the output's scale.
    """

    start: int
    stop: int
    before: int
    after: int
    weights: Tensor

    def read(self, scale: int) -> slice:
        """Return what to read of the input."""
        return slice((self.start - self.before) * scale, (self.stop + self.after) * scale)

    def crop(self, scale: int) -> slice:
        """Return what to take of the network's output."""
        return slice(self.before * scale, (self.before + self.stop - self.start) * scale)

    def keep(self, scale: int) -> slice:
        """Return where it lies in the whole output."""
        return slice(self.start * scale, self.stop * scale)


def exact_spans(length: int, tile: int, margin: int, scale: int) -> list[Span]:
    """Divide ``length`` sites into tiles side by side, the last perhaps shorter, with margins within the image."""
    spans = []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        ones = torch.ones((stop - start) * scale)
        spans.append(Span(start, stop, min(margin, start), min(margin, length - stop), ones))
    return spans


def blended_spans(length: int, tile: int, overlap: int, scale: int) -> list[Span]:
    """Spread tiles of one size evenly over ``length`` sites, each overlapping the next by ``overlap`` at least.

    Weights rise and fall linearly over ``overlap`` sites at the borders inside the image, and where more than two tiles
    or more than the ramps overlap they are divided by their sum: at every position they sum to 1.
    """
    tile = min(tile, length)
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    starts = [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]
    ramp = (torch.arange(tile * scale) + 0.5) / (overlap * scale)
    weights, total = [], torch.zeros(length * scale)
    for start in starts:
        weight = torch.ones(tile * scale)
        if start > 0:
            weight = torch.minimum(weight, ramp)
        if start + tile < length:
            weight = torch.minimum(weight, ramp.flip(0))
        total[start * scale : (start + tile) * scale] += weight
        weights.append(weight)
    return [
        Span(start, start + tile, 0, 0, weight / total[start * scale : (start + tile) * scale])
        for start, weight in zip(starts, weights, strict=True)
    ]


@torch.no_grad()
def receptive_radius(
    run: Callable[[Tensor], Tensor], channel_values: Tensor, scale_in: int, scale_out: int
) -> int | None:
    """Return how many latent sites away an input can change the output, or None where that is not bounded.

    Measured, so that it needs no knowledge of the layers: one site of a strip of `PROBE_SITES` is NaN, and every output
    that depends on it, with whatever weight, becomes NaN. The site in the middle gives the radius, those at both ends
    show whether the network wraps around. Ours; sound for layers that pass NaN on, as arithmetic does, and that treat
    every site alike, as convolutions do.

    Args:
        run: the network, ``[B, C, h * scale_in, w * scale_in]`` -> ``[B, C', h * scale_out, w * scale_out]``.
        channel_values: ``[C]``, what the strip is filled with, on the network's device and of its type.
        scale_in: pixels per latent site of the input, along one axis.
        scale_out: the same of the output.
    """
    poisoned = (0, PROBE_SITES // 2, PROBE_SITES - 1)
    radius = 0
    for transpose in (False, True):
        strip = channel_values[:, None, None].repeat(len(poisoned), 1, scale_in, PROBE_SITES * scale_in)
        for image, site in zip(strip, poisoned, strict=True):
            image[..., site * scale_in : (site + 1) * scale_in] = math.nan
        output = run(strip.mT).mT if transpose else run(strip)
        reached = output.isnan().any(dim=1).any(dim=1).unflatten(-1, (PROBE_SITES, scale_out)).any(dim=-1)
        radius = max(radius, _farthest(reached, poisoned))
    return radius if radius < PROBE_SITES // 2 else None


def _farthest(reached: Tensor, sites: Sequence[int]) -> int:
    """Return the greatest distance from ``sites[i]`` at which ``reached[i]``, of ``[len(sites), length]``, holds.

    A network that loses a NaN on the way cannot be measured: the distance is the length then.
    """
    positions = torch.arange(reached.shape[1], device=reached.device)
    centres = torch.tensor(sites, device=reached.device)[:, None]
    if not reached.gather(1, centres).all():
        return reached.shape[1]
    return int((positions - centres).abs()[reached].max())
