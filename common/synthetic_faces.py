"""Procedural faces, drawn at any size from their index alone: data that needs no download and no licence."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .face_looks import CLASS_NAMES, draw_look
from .face_painter import paint_face
from .image_sources import SkippedFile

DEFAULT_COUNT = 10_000
DEFAULT_SIZE = 64
VERSION = 1
"""Goes into the fingerprint: raise it with every change that a pixel could show."""


class SyntheticFaces:
    """The first ``count`` synthetic faces at ``size`` pixels."""

    def __init__(self, count: int = DEFAULT_COUNT, size: int = DEFAULT_SIZE, spec: str | None = None) -> None:
        self.spec = spec or f"synthetic:{count}"
        self.count = count
        self.size = size
        self.transform: dict[str, object] = {"crop": "none", "filter": "none", "size": size, "generator": VERSION}
        self.class_names = list(CLASS_NAMES)
        self.num_classes = len(CLASS_NAMES)
        self.skipped: list[SkippedFile] = []

    @classmethod
    def from_spec(cls, spec: str, size: int | None = None) -> SyntheticFaces:
        """Open ``synthetic`` or ``synthetic:N``. Raises `UsageError` when N is not a positive number."""
        _, _, number = spec.partition(":")
        if (number and not (number.isdecimal() and int(number) > 0)) or spec.endswith(":"):
            raise UsageError(f"{spec}: expected synthetic or synthetic:N with N at least 1")
        return cls(int(number or DEFAULT_COUNT), DEFAULT_SIZE if size is None else size, spec)

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return face ``index`` as uint8 ``[size, size, 3]``."""
        if not 0 <= index < self.count:
            raise IndexError(f"face {index} of {self.count}")
        multiple = _supersampling(self.size)
        drawn = paint_face(draw_look(index), self.size * multiple)
        mean = drawn.reshape(3, self.size, multiple, self.size, multiple).mean(axis=(2, 4))
        return np.rint(mean.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)

    def label(self, index: int) -> int:
        """Return the class of face ``index``."""
        return draw_look(index).style

    def identity(self) -> str:
        """Return what tells one version of the generator from another."""
        return f"{self.count} faces, version {VERSION}"

    def fingerprint(self) -> str:
        """Return the sha256 over the generator's version, the count and the size."""
        return hashlib.sha256(json.dumps([self.identity(), self.transform]).encode()).hexdigest()


def _supersampling(size: int) -> int:
    """Return how many times larger a face is drawn before it is averaged down.

    At least twice, and to at least 128 pixels, below 256; from there on the soft edges of the painter are enough.
    """
    return 1 if size >= 256 else max(2, math.ceil(128 / size))
