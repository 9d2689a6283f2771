"""Which images make up training step ``s``: a pure function of (seed, s), so a resume cannot change it.

Epoch ``e`` is a permutation keyed on (seed, e). The epochs are laid end to end and cut into global batches, so a batch
may straddle two epochs and every image is used exactly once in each. A global batch is cut into one piece per rank:
the pieces of all ranks, joined, are what a single process with the whole batch would have seen.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def step_indices(
    count: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return the indices ``[batch_size]`` int64, each in ``[0, count)``, that ``rank`` trains on in ``step``.

    ``batch_size`` is per rank. A data set smaller than the global batch is repeated, epoch after epoch.
    """
    assert count > 0, "no images to draw from"
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    positions = _positions(batch_size, step, rank, world_size)
    epochs, offsets = np.divmod(positions, count)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = epoch_order(count, seed, int(epoch))[offsets[chosen]]
    return indices


def step_flips(batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.bool_]:
    """Return a fair coin ``[batch_size]`` bool for each place of the batch, keyed on (seed, step, global position)."""
    coins = _random_bits(batch_size * world_size, "flip", seed, step) >> np.uint64(63)
    return coins[rank * batch_size : (rank + 1) * batch_size].astype(np.bool_)


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the permutation ``[count]`` of epoch ``epoch``; read-only, as it is cached."""
    order = np.argsort(_random_bits(count, "order", seed, epoch), kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def _positions(batch_size: int, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the places of this rank's images in the endless row of epochs."""
    start = (step * world_size + rank) * batch_size
    return np.arange(start, start + batch_size, dtype=np.int64)


def _random_bits(count: int, *key: int | str) -> NDArray[np.uint64]:
    """Return raw 64-bit words from a generator keyed on ``key``.

    Raw words, because numpy promises the same stream for a bit generator in every version, but not for the
    distributions and permutations built on it.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)
