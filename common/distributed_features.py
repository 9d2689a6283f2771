"""Features of many images, extracted by all processes in equal shares and known to every one of them afterwards.

No process waits at a collective while another works for long, and none waits there for one that has failed: before
every collective the processes agree that all of them have come so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as cache_calls
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import WavelatentError
from .feature_distances import FeatureStatistics
from .images import ImageData, read_batch, to_uint8
from .inception import InceptionFeatures
from .reference_cache import PART, ReferenceCache
from .reference_features import Reference, choose_images

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def in_agreement(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return what ``work`` returns in this process; where it fails in any process, all of them raise.

    Every process must come here; ``work`` itself must not communicate.

    Raises:
        WavelatentError: in every process the same, one line: the failure of the first process that has one.
    """
    from accelerate.utils import gather_object

    result: T | None = None
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:  # of any kind: whoever raises it alone leaves the others waiting
        cause = error
    failures = gather_object([None if cause is None else _one_line(cause)])
    for process, failure in enumerate(failures):
        if failure is not None:
            where = f" (process {process} of {len(failures)})" if len(failures) > 1 else ""
            raise WavelatentError(f"{failure}{where}") from cause
    return cast(T, result)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, WavelatentError) else f"{type(error).__name__}: {text}"


def from_main(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Return the main process's ``tensor``, on the CPU, in every process. They must be of one shape and type."""
    from accelerate.utils import broadcast

    return broadcast(tensor.to(accelerator.device)).cpu()


@dataclass(frozen=True)
class Shares:
    """``count`` rows in batches of ``batch_size``, which ``processes`` take in turn: no share is a batch larger."""

    count: int
    batch_size: int
    processes: int

    @classmethod
    def equal(cls, count: int, batch_size: int, processes: int) -> Shares:
        """Share out in batches of ``batch_size``, or smaller ones where these would leave a process without.

        While they are not smaller, a row is in the same batch, and so the same to the last bit, for any number of
        processes.
        """
        return cls(count, min(batch_size, math.ceil(count / processes)), processes)

    def of(self, process: int) -> list[range]:
        """Return the batches of one process."""
        starts = range(process * self.batch_size, self.count, self.processes * self.batch_size)
        return [range(start, min(start + self.batch_size, self.count)) for start in starts]

    def gather(self, accelerator: Accelerator, rows: Tensor) -> Tensor:
        """Return all rows ``[count, dim]``, on the CPU and in order, from each process's own ``[n, dim]``."""
        rounds = math.ceil(self.count / (self.batch_size * self.processes))
        padded = rows.new_zeros(rounds * self.batch_size, rows.shape[1])
        padded[: len(rows)] = rows
        gathered = accelerator.gather(padded.to(accelerator.device)).cpu()
        in_turn = gathered.view(self.processes, rounds, self.batch_size, rows.shape[1]).transpose(0, 1)
        return in_turn.reshape(-1, rows.shape[1])[: self.count]


def shared_features(
    accelerator: Accelerator,
    extractor: InceptionFeatures,
    images: Callable[[range], Tensor],
    count: int,
    batch_size: int,
    label: str,
) -> Tensor:
    """Return the features ``[count, dim]`` float32 of images 0 to ``count - 1``, the same in every process.

    ``images`` makes those of a range of numbers, uint8 ``[B,3,H,W]``, in whichever process they fall to. The main
    process shows its progress as ``label`` on stderr.

    Raises:
        WavelatentError: in every process, where one of them failed.
    """
    shares = Shares.equal(count, batch_size, accelerator.num_processes)

    def extract() -> Tensor:
        batches = shares.of(accelerator.process_index)
        with tqdm(batches, label, unit="batch", leave=False, disable=not accelerator.is_main_process) as bar:
            return torch.cat([torch.empty(0, extractor.dim), *(extractor(images(numbers)) for numbers in bar)])

    return shares.gather(accelerator, in_agreement(accelerator, extract))


def shared_reference(
    accelerator: Accelerator,
    extractor: InceptionFeatures,
    cache: ReferenceCache,
    open_images: Callable[[], ImageData],
    count: int,
    batch_size: int,
) -> Reference:
    """Return the features of the first ``count`` images in the order of ``cache``, the same in every process.

    What the main process finds in ``cache`` counts, and it alone writes there, part by part. ``open_images`` is called,
    in every process, only where something is missing.

    Raises:
        WavelatentError: in every process, where one of them failed.
    """

    @cache_calls
    def opened() -> tuple[ImageData, list[int]]:
        data = in_agreement(accelerator, open_images)
        return data, in_agreement(accelerator, lambda: choose_images(len(data), count, cache.seed))

    def extract(first: int, stop: int) -> Tensor:
        data, order = opened()
        chosen = order[first:stop]

        def pixels(numbers: range) -> Tensor:
            return to_uint8(read_batch(data, chosen[numbers.start : numbers.stop]).images)

        return shared_features(accelerator, extractor, pixels, len(chosen), batch_size, "Inception, reference")

    def rows(part: int) -> Tensor:
        first, stop = part * PART, min((part + 1) * PART, count)
        known = _known_to_main(accelerator, cache, part)[: stop - first]
        if len(known) == stop - first:
            return known
        whole = torch.cat([known, extract(first + len(known), stop)])
        in_agreement(accelerator, lambda: cache.store(part, whole) if accelerator.is_main_process else None)
        return whole

    features = torch.cat([rows(part) for part in range(math.ceil(count / PART))])
    statistics = in_agreement(accelerator, lambda: FeatureStatistics.of(features))
    return Reference(features, statistics, cache.identity["data"])


def _known_to_main(accelerator: Accelerator, cache: ReferenceCache, part: int) -> Tensor:
    """Return the rows of a part that the main process finds in its cache, in every process."""
    nothing = torch.empty(0, cache.dim)
    found = in_agreement(accelerator, lambda: cache.load(part) if accelerator.is_main_process else nothing)
    length = int(from_main(accelerator, torch.tensor(len(found))))
    if not length:
        return nothing
    return from_main(accelerator, found if accelerator.is_main_process else torch.empty(length, cache.dim))
