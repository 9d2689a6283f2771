"""What many images give (features, figures), made by all processes in equal shares and known to all of them afterwards.

No process waits at a collective while another works for long, and none waits there for one that has failed: before
every collective the processes agree that all of them have come so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import cache as cache_calls
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import WavelatentError
from .feature_store import FeatureStore
from .images import ImageData, read_batch, to_uint8
from .reference_cache import PART, FeatureNetwork, ReferenceCache
from .reference_features import Reference, choose_images, raise_if_stopped, stoppable
from .runtime import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

LOOK_IN_SECONDS = 5.0
"""How long processes wait at a time for one that works alone: a backend's patience is counted in minutes."""


def in_agreement(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return what ``work`` returns in this process; where it fails in any process, all of them raise.

    Every process must come here; ``work`` itself must not communicate.

    Raises:
        WavelatentError: in every process the same, one line: the failure of the first process that has one, of its
            kind where that is a :class:`WavelatentError`.
    """
    from accelerate.utils import gather_object

    result: T | None = None
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:  # of any kind: whoever raises it alone leaves the others waiting
        cause = error
    failures = gather_object([None if cause is None else (_kind(cause), _one_line(cause))])
    for process, failure in enumerate(failures):
        if failure is not None:
            kind, line = failure
            where = f" (process {process} of {len(failures)})" if len(failures) > 1 else ""
            raise kind(f"{line}{where}") from cause
    return cast(T, result)


def _kind(error: Exception) -> type[WavelatentError]:
    return type(error) if isinstance(error, WavelatentError) else WavelatentError


def by_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return in every process what ``work`` returns in the main one, which alone does it, however long it takes.

    The others look in every few seconds, since a backend gives up on a collective that lasts for minutes. What it
    returns is pickled.

    Raises:
        WavelatentError: as :func:`in_agreement`.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    if accelerator.num_processes == 1:
        return in_agreement(accelerator, work)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if accelerator.is_main_process else None
        while not any(gather_object([future is not None and bool(wait([future], LOOK_IN_SECONDS).done)])):
            pass
        result = in_agreement(accelerator, lambda: None if future is None else future.result())
    return cast(T, broadcast_object_list([result])[0])


def known_to_any(accelerator: Accelerator, known: Mapping[str, str]) -> dict[str, str]:
    """Return in every process what any of them knows, by name; where several know one, the first process counts."""
    from accelerate.utils import gather_object

    return {name: value for each in reversed(gather_object([dict(known)])) for name, value in each.items()}


def require_same(accelerator: Accelerator, what: str, value: object) -> None:
    """Refuse to go on where ``value`` is not the same everywhere: processes on several machines see files of their own.

    Raises:
        WavelatentError: in every process, naming ``what``.
    """
    from accelerate.utils import gather_object

    first, *others = gather_object([value])
    if differing := [process for process, other in enumerate(others, start=1) if other != first]:
        raise WavelatentError(
            f"{what} is not the same in process 0 and in process {differing[0]}: give all of them the same files"
        )


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
    extractor: FeatureNetwork,
    images: Callable[[range], Tensor],
    count: int,
    batch_size: int,
    label: str,
    stop: StopRequest | None = None,
) -> Tensor:
    """Return the features ``[count, dim]`` float32 of images 0 to ``count - 1``, the same in every process.

    ``images`` makes those of a range of numbers, uint8 ``[B,3,H,W]``, in whichever process they fall to. The main
    process shows its progress as ``label`` on stderr.

    Raises:
        Stopped: in every process, where ``stop`` asks one of them for it.
        WavelatentError: in every process, where one of them failed.
    """
    nothing = torch.empty(0, extractor.dim)
    with _progress(accelerator, count, label) as bar:
        work = _Work(lambda numbers: extractor(images(numbers)), nothing, batch_size, bar, stop)
        return work.shared(accelerator, range(count))


def shared_rows(
    accelerator: Accelerator,
    make: Callable[[range], Tensor],
    count: int,
    width: int,
    batch_size: int,
    label: str,
    stop: StopRequest | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """Yield the rows ``[n, width]`` float64 that ``make`` gives for the numbers 0 to ``count - 1``, with their numbers.

    They come in order, about :data:`PART` at a time, each once and the same in every process. ``make`` takes a range of
    numbers, in whichever process they fall to; ``batch_size`` of them, or fewer at the end.

    Raises:
        Stopped: in every process, where ``stop`` asks one of them for it.
        WavelatentError: in every process, where one of them failed.
    """
    together = batch_size * accelerator.num_processes
    size = math.ceil(PART / together) * together  # no batch is cut, and no process left without one, before the end
    with _progress(accelerator, count, label) as bar:
        work = _Work(make, torch.empty(0, width, dtype=torch.float64), batch_size, bar, stop)
        for start in range(0, count, size):
            numbers = range(start, min(start + size, count))
            yield numbers, work.shared(accelerator, numbers)


@dataclass(frozen=True)
class _Work:
    """What every process does with its share of the numbers; ``nothing`` is the rows of no number."""

    make: Callable[[range], Tensor]
    nothing: Tensor
    batch_size: int
    bar: tqdm
    stop: StopRequest | None

    def shared(self, accelerator: Accelerator, numbers: range) -> Tensor:
        """Return the rows of ``numbers``, the same in every process."""
        shares = Shares.equal(len(numbers), self.batch_size, accelerator.num_processes)
        mine = [numbers[part.start : part.stop] for part in shares.of(accelerator.process_index)]
        rows = in_agreement(accelerator, lambda: self._own(mine, accelerator.num_processes))
        return shares.gather(accelerator, rows)

    def _own(self, batches: list[range], processes: int) -> Tensor:
        rows = [self.nothing]
        for batch in stoppable(batches, self.stop):
            try:
                rows.append(self.make(batch))
            except torch.OutOfMemoryError as error:
                raise WavelatentError(f"out of memory: lower the batch size of {self.batch_size}") from error
            self.bar.update(min(len(batch) * processes, (self.bar.total or 0) - self.bar.n))
        return torch.cat(rows)


def _progress(accelerator: Accelerator, count: int, label: str) -> tqdm:
    return tqdm(total=count, desc=label, unit="img", leave=False, disable=not accelerator.is_main_process)


def shared_reference(
    accelerator: Accelerator,
    extractor: FeatureNetwork,
    cache: ReferenceCache,
    open_images: Callable[[], ImageData],
    count: int,
    batch_size: int,
    stop: StopRequest | None = None,
) -> Reference:
    """Return the features of the first ``count`` images in the order of ``cache``, the same in every process.

    What the main process finds in ``cache`` counts, and it alone writes there, part by part; they are shared with
    whoever else extracts the same at once. ``open_images`` is called, in every process, only where a part is missing.

    Raises:
        WavelatentError: in every process, where one of them failed.
    """

    @cache_calls
    def opened() -> tuple[ImageData, list[int]]:
        data = in_agreement(accelerator, open_images)
        return data, in_agreement(accelerator, lambda: choose_images(len(data), count, cache.seed))

    def extract(first: int, last: int) -> Tensor:
        data, order = opened()
        chosen = order[first:last]

        def pixels(numbers: range) -> Tensor:
            return to_uint8(read_batch(data, chosen[numbers.start : numbers.stop]).images)

        label = f"{extractor.name}, reference"
        return shared_features(accelerator, extractor, pixels, len(chosen), batch_size, label, stop)

    def rows(part: int) -> Tensor:
        first, last = part * PART, min((part + 1) * PART, count)
        known = _known_to_main(accelerator, cache, part)[: last - first]
        if len(known) == last - first:
            return known
        whole = torch.cat([known, extract(first + len(known), last)])
        in_agreement(accelerator, lambda: cache.store(part, whole) if accelerator.is_main_process else None)
        return whole

    parts = range(math.ceil(count / PART))
    with closing(cache.claim(parts, lambda: raise_if_stopped(stop))) as claimed:
        while (part := by_main(accelerator, lambda: next(claimed, None))) is not None:
            rows(part)
    with FeatureStore(extractor.dim) as store:
        for part in parts:
            found = rows(part)
            in_agreement(accelerator, partial(store.append, found, range(len(store), len(store) + len(found))))
        return in_agreement(accelerator, lambda: Reference.of(store, cache.identity["data"]))


def _known_to_main(accelerator: Accelerator, cache: ReferenceCache, part: int) -> Tensor:
    """Return the rows of a part that the main process finds in its cache, in every process."""
    nothing = torch.empty(0, cache.dim)
    found = in_agreement(accelerator, lambda: cache.load(part) if accelerator.is_main_process else nothing)
    length = int(from_main(accelerator, torch.tensor(len(found))))
    if not length:
        return nothing
    return from_main(accelerator, found if accelerator.is_main_process else torch.empty(length, cache.dim))
