"""Encoded images on their way to becoming training data, wherever they lie, and the bad ones among them.

A source (an image folder, a column of a `datasets` table) hands out the bytes of its files. `CheckedImages` decodes
every one of them before training starts, so that a damaged file is found in the first minute and not in the last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .errors import UsageError, WavelatentError
from .transforms import BadImageError, ImageTransform, decode
from .worker_processes import CONTEXT, leave_signals_to_parent, started

T = TypeVar("T")
NAMED_FILES = 3
"""How many bad files an error message names; the manifest lists them all."""


@dataclass(frozen=True)
class SkippedFile:
    """A file left out of the data, and why."""

    path: str
    reason: str


class EncodedImages(Protocol):
    """Image files that are not decoded yet, in a fixed order."""

    spec: str
    class_names: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what the file is called in messages."""

    def payload(self, index: int) -> bytes:
        """Return the file's bytes. Raises `OSError` or `BadImageError`."""

    def label(self, index: int) -> int | None:
        """Return the class number, or None where the data has no classes."""

    def identity(self) -> str:
        """Return a digest that changes when the list of files does, cheap enough to take every time."""


@dataclass(frozen=True)
class Decoded:
    """One file's way through the transform: ``image`` uint8 ``[size, size, 3]``, or None and a ``skipped`` record."""

    image: NDArray[np.uint8] | None
    label: int | None
    skipped: SkippedFile | None


def decode_item(source: EncodedImages, transform: ImageTransform, index: int) -> Decoded:
    """Read, decode and transform file ``index``; a bad one comes back as a `SkippedFile`."""
    try:
        return Decoded(transform(decode(_payload(source, index))), source.label(index), None)
    except BadImageError as error:
        return Decoded(None, None, SkippedFile(source.name(index), str(error)))


def require_few_bad(spec: str, skipped: Sequence[SkippedFile], total: int, max_bad_fraction: float) -> None:
    """Raise `WavelatentError`, naming the first bad files, when more than ``max_bad_fraction`` of ``total`` are bad."""
    if len(skipped) <= max_bad_fraction * total:
        return
    named = "; ".join(f"{file.path}: {file.reason}" for file in skipped[:NAMED_FILES])
    more = f"; and {len(skipped) - NAMED_FILES} more" if len(skipped) > NAMED_FILES else ""
    raise WavelatentError(
        f"{len(skipped)} of {total} images of {spec} cannot be used, more than the {max_bad_fraction:.2%} allowed "
        f"({named}{more}): repair or remove them, or raise --max-bad-fraction"
    )


def available_workers(limit: int = 8) -> int:
    """Return how many processes may decode at once: the cores this process may use, at most ``limit``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(limit, cores)


def ordered_map(function: Callable[[int], T], indices: Sequence[int], num_workers: int, chunk: int = 16) -> Iterator[T]:
    """Yield ``function(i)`` for each of ``indices``, in their order, computed by ``num_workers`` processes or here."""
    if num_workers == 0 or len(indices) <= chunk:
        yield from map(function, indices)
        return
    loader = DataLoader(
        _Mapped(function, indices),
        batch_size=chunk,
        collate_fn=list,
        num_workers=num_workers,
        multiprocessing_context=CONTEXT,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # of its own: the default draws from, and so changes, the global one
    )
    for results in started(loader):
        yield from results


class _Mapped(Dataset[T], Generic[T]):
    def __init__(self, function: Callable[[int], T], indices: Sequence[int]) -> None:
        self.function = function
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> T:
        return self.function(self.indices[position])


class CheckedImages:
    """The usable images of a source, each of them decoded once on opening.

    Args:
        source: the encoded images.
        size: side of the square images in pixels; None takes the shorter side that all files share.
        resize_filter: a name of `RESIZE_FILTERS`.
        max_bad_fraction: how many of the files, at most, may be unreadable or too small.

    Raises:
        WavelatentError: more than ``max_bad_fraction`` of the files are bad, or none is left.
        UsageError: an unknown filter, or no ``size`` for files that differ in theirs.
    """

    def __init__(
        self, source: EncodedImages, size: int | None, resize_filter: str = "lanczos", max_bad_fraction: float = 0.01
    ) -> None:
        self.source = source
        self.spec = source.spec
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        ImageTransform(size or 1, resize_filter)  # refuse a wrong name before an hour of decoding
        checks = list(self._check_all())
        self.size = size or _common_size(self.spec, [check.shorter_side for check in checks if check.shorter_side])
        self._transform = ImageTransform(self.size, resize_filter)
        self.transform = self._transform.record()
        reasons = [check.reason or _too_small(check.shorter_side, self.size) for check in checks]
        self.skipped = [SkippedFile(source.name(i), reason) for i, reason in enumerate(reasons) if reason]
        self._usable = np.array([i for i, reason in enumerate(reasons) if not reason], dtype=np.int64)
        require_few_bad(self.spec, self.skipped, len(checks), max_bad_fraction)
        if not len(self._usable):
            raise WavelatentError(f"no image of {self.spec} can be used at {self.size} pixels: choose a smaller --size")
        self._fingerprint = content_fingerprint(
            (checks[i].digest for i in self._usable), [self.label(i) for i in range(len(self))], self.transform
        )

    def __len__(self) -> int:
        return len(self._usable)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 ``[size, size, 3]``."""
        position = int(self._usable[index])
        try:
            return self._transform(decode(_payload(self.source, position)))
        except BadImageError as error:  # it was readable when the data was opened
            raise WavelatentError(f"{self.source.name(position)} changed during the run: {error}") from error

    def label(self, index: int) -> int | None:
        """Return the class of image ``index``, or None where the data has no classes."""
        return self.source.label(int(self._usable[index]))

    def name(self, index: int) -> str:
        """Return what image ``index`` is called, below the root of its data."""
        return self.source.name(int(self._usable[index]))

    def fingerprint(self) -> str:
        """Return the sha256 over the files' bytes, the labels and the transform; names and places do not matter."""
        return self._fingerprint

    def _check_all(self) -> Iterator[_Check]:
        workers = available_workers() if len(self.source) >= 256 else 0
        checks = ordered_map(partial(_check, self.source), range(len(self.source)), workers)
        return iter(tqdm(checks, total=len(self.source), desc=f"checking {self.spec}", unit="img", leave=False))


@dataclass(frozen=True)
class _Check:
    digest: bytes
    shorter_side: int | None
    reason: str | None


def _check(source: EncodedImages, index: int) -> _Check:
    try:
        payload = _payload(source, index)
        return _Check(hashlib.sha256(payload).digest(), min(decode(payload).size), None)
    except BadImageError as error:
        return _Check(b"", None, str(error))


def _payload(source: EncodedImages, index: int) -> bytes:
    try:
        return source.payload(index)
    except OSError as error:
        raise BadImageError(f"unreadable: {error.strerror or error}") from error


def _too_small(shorter_side: int | None, size: int) -> str | None:
    if shorter_side is not None and shorter_side < size:
        return f"shorter side of {shorter_side} pixels is smaller than {size}"
    return None


def _common_size(spec: str, sides: Sequence[int]) -> int:
    if not sides:
        raise WavelatentError(f"no image of {spec} can be read: name a folder of images")
    if min(sides) != max(sides):
        raise UsageError(f"images of {spec} have shorter sides from {min(sides)} to {max(sides)} pixels: name a --size")
    return sides[0]


def content_fingerprint(
    digests: Iterable[bytes], labels: Sequence[int | None] | NDArray[np.int64] | None, transform: dict[str, object]
) -> str:
    """Return the sha256 hex that stands for a data set's content: digests in order, labels, transform."""
    total = hashlib.sha256()
    for digest in digests:
        total.update(digest)
    total.update(json.dumps([None if labels is None else [_plain(label) for label in labels], transform]).encode())
    return total.hexdigest()


def _plain(label: int | np.int64 | None) -> int | None:
    return None if label is None else int(label)
