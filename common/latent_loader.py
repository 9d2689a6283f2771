"""From a latent cache to the batches of training: which images, a new draw of each, and all of it ahead of its use.

Every batch is a function of its step, so several threads may each make another one::

    latents = TrainingLatents(cache, batch_size=64, seed=0)
    with prefetched(latents.batch, start=step) as batches:
        raw, labels = next(batches)
        ...
        batches.waited  # seconds
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import UsageError
from .latent_cache import LatentCache
from .ordering import step_indices

T = TypeVar("T")

_SPLITMIX_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_SPLITMIX_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class TrainingLatents:
    """Batches of raw latents from a cache, one per step.

    Which images are in step ``s`` follows :func:`~wavelatent.common.ordering.step_indices`; the draw from each
    posterior, and where the cache has mirror images the choice of side, follow (seed, image, s) alone. So a resume, or
    another number of processes with the same global batch, sees the same latents. Only the chosen side is read.

    Draws are made on the CPU, straight from the mapped file: that is fast enough, and the same for every device. In one
    second of its own time, a core (AVX-512, shared with other work) made so many latents from a cache in memory with
    standard deviations and mirror images:

    ============= ========= ========= ===================
    shape, dtype  batch 64  batch 256 ms for batch of 256
    ============= ========= ========= ===================
    4x16x16 fp32  52,000    50,000    5
    4x32x32 fp32  30,000    33,000    8
    4x32x32 fp16  23,000    24,000    11
    32x32x32 fp32 7,700     5,400     47
    32x32x32 fp16 4,800     3,800     67
    ============= ========= ========= ===================

    One thread of :func:`prefetched` is enough while a batch takes less than half a step; else take as many threads as
    bring it there (a batch of 256 of 32x32x32 in steps of 30 ms: four), and a core that nothing else wants for each.
    Reading both sides and seeding a generator of PyTorch's for every image took 1.2 (smallest shape) to 4.7 times as
    long. From a disk the limit is the disk: only the chosen rows are read, and all of a batch are asked for at once.

    Args:
        cache: what to draw from.
        batch_size: per process.
        seed: the run's.
        rank: this process.
        world_size: how many processes share the global batch.
        held_out: how many images never to give, see :func:`held_out_positions`.
        pin_memory: put the latents into page-locked memory, from which a GPU copies without being waited for.

    Raises :class:`UsageError` where nothing is left to train on.
    """

    def __init__(
        self,
        cache: LatentCache,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        held_out: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.cache, self.batch_size, self.seed = cache, batch_size, seed
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        if not held_out < len(cache):
            raise UsageError(f"{held_out} of the {len(cache)} latents in {cache.path} cannot be held out: take fewer")
        self._given = (
            np.setdiff1d(np.arange(len(cache)), held_out_positions(len(cache), held_out)) if held_out else None
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Return raw latents ``[B, C, h, w]`` float32 and labels ``[B]`` int64, or None without, of ``step``."""
        count = len(self.cache) if self._given is None else len(self._given)
        positions = step_indices(count, self.batch_size, self.seed, step, self.rank, self.world_size)
        return self.draw(positions if self._given is None else self._given[positions], step)

    def draw(self, positions: NDArray[np.int64], step: int) -> tuple[Tensor, Tensor | None]:
        """Return what :meth:`batch` does, of the images at ``positions`` in the cache."""
        rows, manifest = self.cache.rows(positions), self.cache.manifest
        index = np.array([shard.tensors["index"][row] for shard, row in rows], dtype=np.int64)
        flipped = mirrored(self.seed, index, step) if manifest.flips else np.zeros(len(rows), np.bool_)
        sides = ["flip_" if flip else "" for flip in flipped]
        for (shard, row), side in zip(rows, sides, strict=True):
            for name in ("mean", "std") if manifest.posterior == "mean_std" else ("mean",):
                shard.will_need(side + name, row)
        raw = torch.empty(len(rows), *manifest.shape, pin_memory=self.pin_memory)
        noise = KeyedNoise(self.seed, raw[0].numel())
        for latent, (shard, row), side, image in zip(raw.numpy(), rows, sides, index.tolist(), strict=True):
            mean = shard.tensors[f"{side}mean"][row]
            if manifest.posterior == "deterministic":
                latent[...] = mean
                continue
            np.multiply(noise(image, step).reshape(latent.shape), shard.tensors[f"{side}std"][row], out=latent)
            np.add(latent, mean, out=latent)
        if not self.cache.labelled:
            return raw, None
        return raw, torch.tensor([int(shard.tensors["label"][row]) for shard, row in rows])


def held_out_positions(count: int, held_out: int) -> NDArray[np.int64]:
    """Return the positions ``[held_out]``, rising, of the images that training never sees, in a cache of ``count``.

    They are the last of a fixed permutation of the cache: the same for runs of every seed, so that their validation
    losses can be compared, and more of them include fewer.
    """
    assert 0 <= held_out <= count, f"{held_out} of {count}"
    order = np.argsort(_philox("held out").random_raw(count), kind="stable")
    return np.sort(order[count - held_out :]).astype(np.int64, copy=False)


def mirrored(seed: int, index: NDArray[np.int64], step: int) -> NDArray[np.bool_]:
    """Toss a fair coin for every image of ``index [B]``, a function of (seed, image, step) alone; ``[B]`` bool.

    The highest bit of output number ``index`` of SplitMix64 (Steele, Lea and Flood 2014) from a hash of (seed, step).
    """
    start = np.frombuffer(_digest("mirror", seed, step), "<u8", count=1)
    z = start + (index.astype(np.uint64) + np.uint64(1)) * _SPLITMIX_GAMMA  # modulo 2^64
    z = (z ^ (z >> np.uint64(30))) * _SPLITMIX_FACTORS[0]
    z = (z ^ (z >> np.uint64(27))) * _SPLITMIX_FACTORS[1]
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(63)).astype(np.bool_)


class KeyedNoise:
    """Standard normal noise of ``count`` numbers as a function of (seed, image, step).

    The bits are Philox 4x64's (Salmon et al. 2011), a counter-based generator: its key is a hash of the seed, and image
    and step are two words of its counter, so nothing is seeded per image. The numbers are Box and Muller's (1958), at
    most 6.8 in size. numpy promises the same bits in every version, as it does not for its normal numbers; what is left
    to differ between machines is the last bits of logarithm and cosine.

    Not to be shared by threads.
    """

    def __init__(self, seed: int, count: int) -> None:
        self._bits = _philox("posterior", seed)
        self._state = self._bits.state
        self._noise = np.empty((2, (count + 1) // 2), dtype=np.float32)
        self._radius, self._angle = np.empty_like(self._noise)
        self._count = count

    def __call__(self, image: int, step: int) -> NDArray[np.float32]:
        """Return the noise ``[count]`` of ``image`` in ``step``; the next call writes over it."""
        self._state["state"]["counter"][:] = (0, image, step, 0)
        self._bits.state = self._state
        words = self._bits.random_raw(len(self._radius)).astype("<u8", copy=False).view("<u4")
        radius, angle = self._radius, self._angle
        np.add(words[0::2], np.float32(0.5), out=radius, dtype=np.float32, casting="unsafe")  # in (0, 2^32]
        np.multiply(radius, np.float32(2**-32), out=radius)
        np.sqrt(np.multiply(np.log(radius, out=radius), np.float32(-2), out=radius), out=radius)
        np.multiply(words[1::2], np.float32(2**-31 * np.pi), out=angle, dtype=np.float32, casting="unsafe")
        np.cos(angle, out=self._noise[0])
        np.sin(angle, out=self._noise[1])
        np.multiply(self._noise, radius, out=self._noise)
        return self._noise.reshape(-1)[: self._count]


def _digest(*key: int | str) -> bytes:
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def _philox(*key: int | str) -> np.random.Philox:
    return np.random.Philox(key=np.frombuffer(_digest(*key), "<u8", count=2))


class Prefetched(Iterator[T], Generic[T]):
    """``make(start)``, ``make(start + 1)``, ... for ever, each made by another thread before it is asked for.

    Where ``make`` raises, so does :func:`next`, then and ever after. Open one with :func:`prefetched`.
    """

    def __init__(self, make: Callable[[int], T], start: int, depth: int, pool: ThreadPoolExecutor) -> None:
        self._make, self._pool = make, pool
        self._pending: deque[Future[T]] = deque(pool.submit(make, start + k) for k in range(depth))
        self._next = start + depth
        self.waited = 0.0
        """Seconds that the caller has waited for items."""

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            item = self._pending[0].result()
        finally:
            self.waited += time.perf_counter() - start
        self._pending.popleft()
        self._pending.append(self._pool.submit(self._make, self._next))
        self._next += 1
        return item


@contextmanager
def prefetched(make: Callable[[int], T], start: int, *, depth: int = 2, threads: int = 1) -> Iterator[Prefetched[T]]:
    """Open an iterator over ``make(start)``, ``make(start + 1)``, ..., in this order; its threads end with the block.

    Args:
        make: called in another thread; with ``threads`` above 1 several calls run at once.
        start: its first argument.
        depth: how many items are ready or being made while the caller uses one.
        threads: how many are made at once, at most ``depth``.
    """
    assert 1 <= threads <= depth, f"{threads} threads for {depth} items"
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        yield Prefetched(make, start, depth, pool)
    finally:
        pool.shutdown(cancel_futures=True)
