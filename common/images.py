"""Images in and out: opening any data set, batches in order or for training, PNG files.

Everywhere in the package an image is float, ``[B, 3, H, W]``, in [-1, 1]; on disk it is uint8, and `to_float` and
`to_uint8` are exact inverses of each other on the 256 values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UsageError
from .files import open_atomically
from .image_folders import FolderImages
from .image_sources import CheckedImages, SkippedFile
from .ordering import step_flips, step_indices
from .prepared import PreparedFolder, is_prepared, require_size
from .worker_processes import CONTEXT, leave_signals_to_parent, started


@dataclass(frozen=True)
class Batch:
    """Images ``[B, 3, H, W]`` float32 in [-1, 1], labels ``[B]`` int64 or None, places in the data ``[B]`` int64."""

    images: Tensor
    labels: Tensor | None
    index: Tensor

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch on ``device``."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), labels, self.index)


class ImageData(Protocol):
    """A data set of square images of one size, in a fixed order."""

    spec: str
    size: int
    transform: dict[str, object]
    num_classes: int
    class_names: list[str]
    skipped: list[SkippedFile]

    def __len__(self) -> int: ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 ``[size, size, 3]``."""

    def label(self, index: int) -> int | None:
        """Return the class of image ``index`` in ``[0, num_classes)``, or None where there are no classes."""

    def fingerprint(self) -> str:
        """Return the sha256 hex of the content, the transform and the count: equal for equal data on any machine."""


def to_float(images: Tensor) -> Tensor:
    """Map uint8 {0..255} to float32 in [-1, 1], any shape."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map float in [-1, 1] to uint8, rounding to the nearest and clamping what lies outside, any shape."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def open_data(
    spec: str, *, size: int | None = None, resize_filter: str = "lanczos", max_bad_fraction: float = 0.01
) -> ImageData:
    """Open ``synthetic[:N]``, an image folder, a prepared folder, or ``hf:NAME[:SPLIT]``.

    Args:
        spec: the data, as on the command line.
        size: side of the images in pixels; None is the data's own (64 for ``synthetic``).
        resize_filter: for image folders and ``hf:``; the other two are not resized here.
        max_bad_fraction: how many unreadable or too small files of a folder or ``hf:`` may be skipped.

    Raises:
        UsageError: there is no such data, a name in it is unknown, or a prepared folder has another size.
        WavelatentError: too many files are bad, or a prepared folder is unfinished or damaged.
    """
    if spec == "synthetic" or spec.startswith("synthetic:"):
        from .synthetic_faces import SyntheticFaces

        return SyntheticFaces.from_spec(spec, size)
    if spec.startswith("hf:"):
        from .hf_data import HubImages

        return CheckedImages(HubImages(spec), size, resize_filter, max_bad_fraction)
    if is_prepared(Path(spec)):
        prepared = PreparedFolder(spec)
        require_size(prepared, size)
        return prepared
    return CheckedImages(FolderImages(spec), size, resize_filter, max_bad_fraction)


def read_batch(data: ImageData, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
    """Return the images at ``indices`` as one batch."""
    pixels = torch.from_numpy(np.stack([data.image(int(index)) for index in indices]))
    labels = [data.label(int(index)) for index in indices] if data.num_classes else None
    return Batch(
        images=to_float(pixels).permute(0, 3, 1, 2).contiguous(),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
        index=torch.as_tensor(np.asarray(indices, dtype=np.int64)),
    )


def iterate_batches(
    data: ImageData, batch_size: int, *, indices: Sequence[int] | None = None, num_workers: int = 0
) -> Iterator[Batch]:
    """Yield the data, or the images at ``indices``, in order, once; the last batch may be short."""
    chosen: Sequence[int] = range(len(data)) if indices is None else indices
    batches = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    yield from started(_loader(_InOrder(data, batches), range(len(batches)), num_workers))


def training_batches(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    flip: bool = True,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of steps ``start_step``, ``start_step + 1``, ... without end.

    What is in step ``s`` is a function of (seed, s) alone, see `ordering`; ``batch_size`` is per rank. With ``flip``
    half of the images are mirrored, decided per (seed, step, place in the global batch). ``num_workers`` processes
    prepare whole batches ahead; the batches are the same for any number.
    """
    steps = _TrainingSteps(data, batch_size, seed, rank, world_size, flip)
    yield from started(_loader(steps, count(start_step), num_workers))


class _InOrder(Dataset[Batch]):
    def __init__(self, data: ImageData, batches: list[Sequence[int]]) -> None:
        self.data = data
        self.batches = batches

    def __getitem__(self, number: int) -> Batch:
        return read_batch(self.data, self.batches[number])


@dataclass(frozen=True)
class _TrainingSteps(Dataset[Batch]):
    data: ImageData
    batch_size: int
    seed: int
    rank: int
    world_size: int
    flip: bool

    def __getitem__(self, step: int) -> Batch:
        place = (self.batch_size, self.seed, step, self.rank, self.world_size)
        batch = read_batch(self.data, step_indices(len(self.data), *place))
        if not self.flip:
            return batch
        mirrored = torch.from_numpy(step_flips(*place))[:, None, None, None]
        return Batch(torch.where(mirrored, batch.images.flip(-1), batch.images), batch.labels, batch.index)


def _loader(batches: Dataset[Batch], order: Iterable[int], num_workers: int) -> DataLoader[Batch]:
    return DataLoader(
        batches,
        batch_size=None,  # an item is a whole batch already
        sampler=order,
        collate_fn=_unchanged,
        num_workers=num_workers,
        multiprocessing_context=CONTEXT if num_workers else None,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # of its own: the default draws from, and so changes, the global one
    )


def _unchanged(batch: Any) -> Any:
    return batch


def save_png(path: str | Path, image: Tensor | NDArray[np.uint8]) -> None:
    """Write a tensor ``[3, H, W]`` in [-1, 1] or an array uint8 ``[H, W, 3]`` as PNG, whole or not at all."""
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image
    with open_atomically(Path(path)) as file:
        Image.fromarray(pixels).save(file, format="png")


def save_grid(path: str | Path, images: Tensor, columns: int, gap: int = 2) -> None:
    """Write images ``[N, 3, H, W]`` in [-1, 1] as one PNG, row by row, ``gap`` white pixels between them.

    Pixels with a value that is not finite, which would come out black and pass for a dark image, are magenta.
    """
    if not len(images):
        raise UsageError("a grid needs at least one image")
    number, channels, height, width = images.shape
    rows = -(-number // columns)
    canvas = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    magenta = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    for position, image in enumerate(images.detach().cpu().float()):
        image = torch.where(image.isfinite().all(0), image, magenta)
        top, left = (position // columns) * (height + gap), (position % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    save_png(path, canvas)
