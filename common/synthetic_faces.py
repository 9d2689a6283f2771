"""Procedural faces, drawn at any size from their index alone: data that needs no download and no licence."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .image_sources import SkippedFile

DEFAULT_COUNT = 10_000
DEFAULT_SIZE = 64
VERSION = 0
CLASS_NAMES = ["a", "b"]


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
        grid = np.mgrid[: self.size, : self.size].sum(0)[..., None]
        return (grid * (np.array([3, 5, 7]) + index) % 256).astype(np.uint8)

    def label(self, index: int) -> int:
        """Return the class of face ``index``."""
        return index % 2

    def identity(self) -> str:
        """Return what tells one version of the generator from another."""
        return f"{self.count} faces, version {VERSION}"

    def fingerprint(self) -> str:
        """Return the sha256 over the generator's version, the count and the size."""
        return hashlib.sha256(json.dumps([self.identity(), self.transform]).encode()).hexdigest()
