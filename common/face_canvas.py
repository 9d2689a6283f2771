"""A small software renderer for the synthetic faces: soft masks from distances, layers of colour, value noise.

Everything is given in coordinates that do not depend on the resolution, so one scene is one picture at any size.
Distances are negative inside, as in signed distance fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Field: TypeAlias = NDArray[np.floating[Any]]
"""One value per pixel, ``[H, W]``."""

Color: TypeAlias = NDArray[np.float32]
"""Red, green and blue in [0, 1], ``[3, 1, 1]``."""

Layer: TypeAlias = NDArray[np.floating[Any]]
"""A colour per pixel, ``[3, H, W]``."""


class Draws:
    """Random numbers keyed on integers, from raw generator words: the same in every version of numpy."""

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest[:16], "little"))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def bell(self, spread: float) -> float:
        """Return a number near zero, of standard deviation ``spread / 2`` and never beyond ``1.5 * spread``."""
        return spread * (self.uniform() + self.uniform() + self.uniform() - 1.5)

    def chance(self, probability: float) -> bool:
        """Return True with ``probability``."""
        return self.uniform() < probability

    def choice(self, weights: Sequence[float]) -> int:
        """Return an index, drawn in proportion to its weight."""
        place = self.uniform(0, sum(weights))
        return next(i for i in range(len(weights)) if place < sum(weights[: i + 1]) or i == len(weights) - 1)

    def table(self, *shape: int) -> NDArray[np.float32]:
        """Return uniform numbers in [0, 1) in an array of ``shape``."""
        words = self._bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
        unit: NDArray[np.float32] = np.multiply(words, 2.0**-24, dtype=np.float64).astype(np.float32)
        return unit.reshape(shape)


def rgb(red: float, green: float, blue: float) -> Color:
    """Return a colour from values in 0..255."""
    return np.array([red, green, blue], dtype=np.float32).reshape(3, 1, 1) / np.float32(255)


def mix(first: Color, second: Color, amount: float) -> Color:
    """Return the colour ``amount`` of the way from ``first`` to ``second``."""
    return first + (second - first) * np.float32(amount)


def palette(colors: Sequence[Color], position: float) -> Color:
    """Return the colour at ``position`` in [0, 1] of a row of colours, between two neighbours where it falls so."""
    place = position * (len(colors) - 1)
    low = min(int(place), len(colors) - 2)
    return mix(colors[low], colors[low + 1], place - low)


def smoothstep(low: float, high: float, value: Field) -> Field:
    """Rise from 0 at ``low`` to 1 at ``high`` without a corner."""
    t = np.clip((value - low) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def bump(x: Field, y: Field, center: tuple[float, float], radii: tuple[float, float]) -> Field:
    """Return a Gaussian of height 1."""
    return np.exp(-(((x - center[0]) / radii[0]) ** 2) - ((y - center[1]) / radii[1]) ** 2)


def ellipse(x: Field, y: Field, center: tuple[float, float], radii: tuple[float, float]) -> Field:
    """Return the distance to an ellipse, exact for circles."""
    u, v = (x - center[0]) / radii[0], (y - center[1]) / radii[1]
    return (np.sqrt(u * u + v * v) - 1) * min(radii)


def noise_1d(table: Field, position: Field) -> Field:
    """Interpolate ``table`` [N] at ``position``, wrapping around: values in [0, 1], one feature per unit."""
    low = np.floor(position)
    t = position - low
    index = low.astype(np.int32) & (len(table) - 1)
    left = table[index]
    return left + (table[(index + 1) & (len(table) - 1)] - left) * t


def noise_2d(table: Field, x: Field, y: Field) -> Field:
    """Interpolate ``table`` [N, N], N a power of two, at (x, y), wrapping around: values in [0, 1]."""
    last = len(table) - 1
    left, top = np.floor(x), np.floor(y)
    u, v = x - left, y - top
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    column, row = left.astype(np.int32) & last, top.astype(np.int32) & last
    next_column, next_row = (column + 1) & last, (row + 1) & last
    upper = table[row, column] * (1 - u) + table[row, next_column] * u
    lower = table[next_row, column] * (1 - u) + table[next_row, next_column] * u
    return upper * (1 - v) + lower * v


@dataclass(frozen=True)
class Canvas:
    """Pixels ``[3, H, W]`` with the coordinates of their centres, and the width of one pixel in those coordinates.

    ``image_x`` and ``image_y`` run from -1 to 1 over the picture, y down; ``x`` and ``y`` are the same in the frame of
    the head: moved, turned and scaled with it.
    """

    pixels: Layer
    image_x: Field
    image_y: Field
    x: Field
    y: Field
    pixel: float
    frame: NDArray[np.float64]
    """The 2x3 matrix from head to image coordinates."""

    @classmethod
    def blank(cls, side: int, center: tuple[float, float], scale: float, roll: float) -> Canvas:
        """Return a black canvas of ``side`` pixels with the head at ``center``, turned by ``roll`` radians."""
        axis = ((np.arange(side, dtype=np.float32) + 0.5) * np.float32(2 / side)) - 1
        image_x, image_y = np.broadcast_to(axis, (side, side)), np.broadcast_to(axis[:, None], (side, side))
        cos, sin = np.cos(roll) * scale, np.sin(roll) * scale
        frame = np.array([[cos, -sin, center[0]], [sin, cos, center[1]]])
        dx, dy = image_x - np.float32(center[0]), image_y - np.float32(center[1])
        c, s = np.float32(np.cos(roll) / scale), np.float32(np.sin(roll) / scale)
        x, y = dx * c + dy * s, dy * c - dx * s
        return cls(np.zeros((3, side, side), np.float32), image_x, image_y, x, y, 2 / side / scale, frame)

    def window(self, center: tuple[float, float], radius: float) -> Canvas:
        """Return the part of the canvas around a point of the head; painting on it paints on the whole."""
        side = self.pixels.shape[-1]
        image_x, image_y = self.frame @ np.array([*center, 1.0])
        reach = radius * float(np.hypot(self.frame[0, 0], self.frame[1, 0]))
        rows = _span(image_y - reach, image_y + reach, side)
        columns = _span(image_x - reach, image_x + reach, side)
        return Canvas(
            self.pixels[:, rows, columns],
            self.image_x[rows, columns],
            self.image_y[rows, columns],
            self.x[rows, columns],
            self.y[rows, columns],
            self.pixel,
            self.frame,
        )

    def cover(self, distance: Field, softness: float = 0.0) -> Field:
        """Return how much of each pixel lies inside: 1 where ``distance`` is negative, 0 where it is positive."""
        return np.clip(0.5 - distance / np.float32(self.pixel + softness), 0, 1)

    def paint(self, mask: Field, color: Color | Layer) -> None:
        """Lay ``color`` over the pixels, as opaque as ``mask`` says."""
        self.pixels[...] += mask * (color - self.pixels)

    def shade(self, factor: Field) -> None:
        """Multiply the pixels by ``factor``."""
        self.pixels[...] *= factor


def _span(low: float, high: float, side: int) -> slice:
    start = int(np.clip(np.floor((low + 1) / 2 * side), 0, side - 1))
    return slice(start, int(np.clip(np.ceil((high + 1) / 2 * side), start + 1, side)))
