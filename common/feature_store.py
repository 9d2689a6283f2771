"""Features of any number of images: on disk as float32 rows, read through a mapping, so that memory does not grow."""

from __future__ import annotations

import mmap
import tempfile
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .feature_distances import FeatureStatistics

_BLOCK = 1024
"""Rows copied at a time: 8 MiB of Inception features."""


class FeatureStore:
    """Rows of features, each with its image's index: repeated ones are dropped, and the order is that of the index.

    The batches that several processes padded, or that a resumed extraction repeats, may be appended as they come, in
    any order. Memory holds the statistics and about a hundred bytes an image; the rows are in a file without a name in
    the system's folder for such (``TMPDIR``), gone with the store and after any crash.

    Args:
        dim: the number of features.

    Attributes:
        statistics: count, mean and covariance of the rows, gathered in the order in which they came.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.statistics = FeatureStatistics(dim)
        self._file = _open()
        self._indices: list[int] = []
        self._known: set[int] = set()

    def __len__(self) -> int:
        return len(self._indices)

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, features: Tensor, indices: Sequence[int] | Tensor) -> None:
        """Add rows ``[B, dim]`` of the images at ``indices`` ``[B]``; of a known index the first row stays."""
        assert features.shape == (len(indices), self.dim), f"{tuple(features.shape)} of {len(indices)} x {self.dim}"
        rows, new = [], []
        for row, index in enumerate(indices.tolist() if isinstance(indices, Tensor) else indices):
            if index not in self._known:
                self._known.add(index)
                rows.append(row)
                new.append(index)
        if not rows:
            return
        chosen = features.detach().to("cpu", torch.float32)[rows]
        self._file.write(_bytes(chosen))
        self._indices += new
        self.statistics.update(chosen)

    @property
    def indices(self) -> list[int]:
        """The indices of the images, ascending: those of the rows of :attr:`features`."""
        return sorted(self._indices)

    @property
    def features(self) -> Tensor:
        """All rows so far ``[N, dim]`` float32, by ascending index: a read-only mapping of the file.

        It stays valid whatever happens to the store. Where rows came out of order, the file is written anew once.
        """
        if any(after < before for before, after in zip(self._indices, self._indices[1:], strict=False)):
            self._sort()
        return self._mapped()

    def close(self) -> None:
        """Close the file, which is gone when the last tensor of :attr:`features` is."""
        self._file.close()

    def _mapped(self) -> Tensor:
        if not self._indices:
            return torch.empty(0, self.dim)
        self._file.flush()
        mapping = mmap.mmap(self._file.fileno(), len(self) * self.dim * 4, access=mmap.ACCESS_READ)
        rows = np.frombuffer(mapping, "<f4").reshape(len(self), self.dim)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to them
            return torch.from_numpy(rows)

    def _sort(self) -> None:
        rows, order = self._mapped(), torch.tensor(self._indices).argsort()
        ordered = _open()
        for block in order.split(_BLOCK):
            ordered.write(_bytes(rows[block]))
        self._file.close()
        self._file, self._indices = ordered, self.indices


def _open() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _bytes(rows: Tensor) -> bytes:
    return rows.numpy().astype("<f4", copy=False).tobytes()
