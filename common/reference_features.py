"""The reference side of FID, KID, precision and recall: extracted once, kept in the user's cache.

An entry belongs to exact content: the data's fingerprint (which includes crop and resize), the network's weights and
the seed that orders the images. Images are taken in that order, in parts, so that a stopped extraction goes on where
it was and a larger reference starts from a smaller one. What is used is mapped from a file: memory does not grow with
the number of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import Stopped, UsageError
from .feature_distances import FeatureStatistics
from .feature_store import FeatureStore
from .images import ImageData, iterate_batches, to_uint8
from .randomness import generator
from .reference_cache import PART, FeatureNetwork, ReferenceCache
from .runtime import StopRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """A reference's features ``[N, dim]``, their statistics, and the fingerprint of what they were taken from.

    Statistics that somebody else computed come without features: N is 0 then.
    """

    features: Tensor
    statistics: FeatureStatistics
    fingerprint: str

    @classmethod
    def of(cls, store: FeatureStore, fingerprint: str) -> Reference:
        """Return the reference that ``store`` holds."""
        return cls(store.features, store.statistics, fingerprint)

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
        raise_if_stopped(stop)


def raise_if_stopped(stop: StopRequest | None) -> None:
    """Raise :class:`Stopped` where ``stop`` asks for it."""
    if stop is not None and stop.reason:
        raise Stopped(
            f"evaluate stopped by {stop.reason}; what is known of the reference is kept: run the same command again"
        )


def reference_features(
    data: ImageData,
    extractor: FeatureNetwork,
    *,
    num: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    stop: StopRequest | None = None,
) -> Reference:
    """Return the features of the first ``num`` images of ``data`` in the order of ``seed``, from the cache if there.

    Processes that extract the same at once share the work.

    Raises:
        UsageError: there are not so many.
        Stopped: ``stop`` asks for it; what has been extracted is kept, as after any other end.
    """
    cache = ReferenceCache(data.fingerprint(), extractor, seed)
    indices = choose_images(len(data), num, seed)
    parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
    with (
        FeatureStore(extractor.dim) as store,
        tqdm(total=len(indices), desc=f"{extractor.name}, reference", unit="img", leave=False) as progress,
    ):

        def part(number: int) -> Tensor:
            return _part(cache, number, data, extractor, parts[number], batch_size, progress, stop)

        with closing(cache.claim(range(len(parts)), lambda: raise_if_stopped(stop))) as claimed:
            for number in claimed:
                part(number)
        for number in range(len(parts)):
            features = part(number)
            store.append(features, range(len(store), len(store) + len(features)))
            progress.update(max(0, len(store) - progress.n))  # what others have extracted
        return Reference.of(store, data.fingerprint())


def _part(
    cache: ReferenceCache,
    number: int,
    data: ImageData,
    extractor: FeatureNetwork,
    indices: list[int],
    batch_size: int,
    progress: tqdm,
    stop: StopRequest | None,
) -> Tensor:
    features = cache.load(number)[: len(indices)]
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
