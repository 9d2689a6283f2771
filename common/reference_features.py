"""The reference side of FID, KID, precision and recall: extracted once, kept in the user's cache.

An entry belongs to exact content: the data's fingerprint (which includes crop and resize), the network's weights and
the seed that orders the images. Images are taken in that order, in parts, so that a stopped extraction goes on where
it was and a larger reference starts from a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import Stopped, UsageError, WavelatentError
from .feature_distances import FeatureStatistics
from .images import ImageData, iterate_batches, to_uint8
from .inception import InceptionFeatures
from .randomness import generator
from .reference_cache import PART, ReferenceCache
from .runtime import StopRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """A reference's features ``[N, dim]``, their statistics, and the fingerprint of what they were taken from."""

    features: Tensor
    statistics: FeatureStatistics
    fingerprint: str

    def __len__(self) -> int:
        return len(self.features)


def choose_images(count: int, num: int | None, seed: int) -> list[int]:
    """Return the first ``num`` (None: all) of ``count`` images in an order drawn from ``seed``.

    Raises:
        UsageError: there are not so many.
    """
    if num is not None and not 1 <= num <= count:
        raise UsageError(f"asked for {num} images of {count}: ask for 1 to {count}")
    order = torch.randperm(count, generator=generator("evaluation order", seed))
    return order[:num].tolist()


def uint8_batches(data: ImageData, batch_size: int, indices: Sequence[int]) -> Iterator[Tensor]:
    """Yield the images at ``indices`` as uint8 ``[B,3,H,W]``."""
    for batch in iterate_batches(data, batch_size, indices=indices):
        yield to_uint8(batch.images)


def stoppable(batches: Iterable[T], stop: StopRequest | None) -> Iterator[T]:
    """Yield ``batches``; raise :class:`Stopped` when one has been used and ``stop`` asks for it."""
    for batch in batches:
        yield batch
        if stop is not None and stop.reason:
            raise Stopped(
                f"evaluate stopped by {stop.reason}; what is known of the reference is kept: run the same command again"
            )


def reference_features(
    data: ImageData,
    extractor: InceptionFeatures,
    *,
    num: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    stop: StopRequest | None = None,
) -> Reference:
    """Return the features of the first ``num`` images of ``data`` in the order of ``seed``, from the cache if there.

    Raises:
        UsageError: there are not so many.
        Stopped: ``stop`` asks for it; what has been extracted is kept, as after any other end.
    """
    cache = ReferenceCache(data.fingerprint(), extractor, seed)
    indices = choose_images(len(data), num, seed)
    parts = []
    with tqdm(total=len(indices), desc="Inception, reference", unit="img", leave=False) as progress:
        for number, start in enumerate(range(0, len(indices), PART)):
            wanted = indices[start : start + PART]
            parts.append(_part(cache, number, data, extractor, wanted, batch_size, progress, stop))
    features = torch.cat(parts)
    statistics = _statistics(cache.folder / f"statistics-{len(features)}.safetensors", features, cache.identity)
    return Reference(features, statistics, data.fingerprint())


def _part(
    cache: ReferenceCache,
    number: int,
    data: ImageData,
    extractor: InceptionFeatures,
    indices: list[int],
    batch_size: int,
    progress: tqdm,
    stop: StopRequest | None,
) -> Tensor:
    features = cache.load(number)[: len(indices)]
    progress.update(len(features))
    if len(features) == len(indices):
        return features
    rows = [features]
    try:
        for batch in stoppable(uint8_batches(data, batch_size, indices[len(features) :]), stop):
            rows.append(extractor(batch))
            progress.update(len(batch))
    finally:
        features = torch.cat(rows)
        cache.store(number, features)
    return features


def _statistics(path: Path, features: Tensor, identity: dict[str, str]) -> FeatureStatistics:
    if path.is_file():
        with suppress(WavelatentError):
            return FeatureStatistics.load(path, identity)
    statistics = FeatureStatistics.of(features)
    with suppress(OSError):
        statistics.save(path, identity)
    return statistics
