"""The pictures of a report: images as arrays, tiled and taken apart, and arrays as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .report_runs import Run

Pixels = NDArray[np.uint8]
"""``[H, W, 3]``."""

GAP = 2
"""White pixels between the images of the trainers' grids, and of ours."""
WIDEST = 1320
"""Pixels that a picture on the page has at most in a row: a quarter more than the page is wide."""
LARGEST_PNG = 250_000
"""Bytes above which a picture is embedded as JPEG, so that a page of ten variants stays below 10 MB."""
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Picture:
    """A picture of one variant on the page, or why there is none."""

    name: str
    source: str = ""
    uri: str | None = None
    alt: str = ""
    missing: str | None = None

    @classmethod
    def of(cls, name: str, source: str, pixels: Pixels, alt: str, widest: int = WIDEST) -> Picture:
        """Embed ``pixels``."""
        return cls(name, source, embed(pixels, widest), alt)


def data_uri(png: bytes) -> str:
    """Return PNG bytes as the value of an ``src``."""
    return _uri("png", png)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def embed(pixels: Pixels, widest: int = WIDEST) -> str:
    """Return an image as the value of an ``src``: at most ``widest`` pixels wide, as JPEG where PNG is too large."""
    image = Image.fromarray(pixels)
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    png = _encode(image, "png", optimize=True)
    if len(png) <= LARGEST_PNG:
        return data_uri(png)
    return _uri("jpeg", _encode(image, "jpeg", quality=JPEG_QUALITY, subsampling=0))


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def tile(images: Sequence[Pixels], columns: int) -> Pixels:
    """Return images of one size in rows of ``columns``, the gaps white."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    shape = (rows * (height + GAP) - GAP, min(columns, len(images)) * (width + GAP) - GAP, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = (position // columns) * (height + GAP), (position % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def untile(grid: Pixels, columns: int, count: int) -> list[Pixels]:
    """Return the first ``count`` images of a grid that the trainers saved with ``columns`` square images per row."""
    side = (grid.shape[1] + GAP) // columns - GAP
    places = [divmod(number, columns) for number in range(count)]
    corners = [(row * (side + GAP), column * (side + GAP)) for row, column in places]
    return [grid[top : top + side, left : left + side] for top, left in corners]


def last_grid(run: Run) -> tuple[int, Pixels] | None:
    """Return the step and the pixels of the newest readable grid that training saved."""
    grids = [path for path in (run.path / "samples").glob("step-*.png") if path.stem.rpartition("-")[2].isdigit()]
    for path in sorted(grids, key=lambda path: -int(path.stem.rpartition("-")[2])):
        if (grid := read_pixels(path)) is not None:
            return int(path.stem.rpartition("-")[2]), grid
    return None


def read_pixels(path: Path) -> Pixels | None:
    """Return an image file as RGB; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError):
        return None
