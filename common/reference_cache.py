"""The features of reference images on disk: extracted once per content, network and order, by whoever needs them first.

Rows are kept in files of :data:`PART`; each may hold only its first rows. Files are written whole or not at all, so any
number of processes may read and write at once. Those that need the same rows at once share the parts among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .claims import claim, try_lock
from .files import write_atomically
from .metric_weights import cache_folder

PART = 1000


class FeatureNetwork(Protocol):
    """What extracts features, and what makes two networks' features the same."""

    name: str
    dim: int
    weights_sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``[B, dim]`` float32 on the CPU of uint8 images ``[B,3,H,W]``."""


class ReferenceCache:
    """The features of one data set, in the order that ``seed`` gives its images, in the user's cache.

    Args:
        data_fingerprint: of the images; it includes their crop and resize.
        network: what extracts the features.
        seed: of :func:`.reference_features.choose_images`.
    """

    def __init__(self, data_fingerprint: str, network: FeatureNetwork, seed: int = 0) -> None:
        self.identity = {
            "data": data_fingerprint,
            "features": f"{network.name}/{network.dim}",
            "weights": network.weights_sha256,
            "seed": str(seed),
        }
        self.seed, self.dim = seed, network.dim
        fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.folder = cache_folder() / "reference-features" / fingerprint[:32]

    def claim(self, parts: Iterable[int], check: Callable[[], None]) -> Generator[int, None, None]:
        """Yield every part once, by :func:`.claims.claim`; what of it is there by then need not be extracted.

        None, where the cache cannot be written or knows no locks, and no more after one that could not be stored, as on
        a full disk: nothing can be shared by it then.
        """
        if not self._can_lock():
            return
        with closing(claim(parts, lambda part: self.folder / f".part-{part:05d}.lock", check)) as claimed:
            for part in claimed:
                yield part
                if not self._path(part).is_file():
                    return

    def _can_lock(self) -> bool:
        try:
            with try_lock(self.folder / ".lock"):
                return True
        except (OSError, NotImplementedError):
            return False

    def load(self, part: int) -> Tensor:
        """Return the rows of part ``part`` that are there, ``[n, dim]`` with ``0 <= n <= PART``."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with suppress(SafetensorError, OSError, KeyError):
            features = load_file(self._path(part))["features"]
            if features.ndim == 2 and features.shape[1] == self.dim:
                return features
        return torch.empty(0, self.dim)

    def store(self, part: int, features: Tensor) -> None:
        """Keep the first rows ``[n, dim]`` of part ``part``; a cache that cannot be written costs time only."""
        from safetensors.torch import save

        with suppress(OSError):
            write_atomically(self._path(part), save({"features": features.contiguous()}))

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.safetensors"
