"""Randomness as a function of a key, so that a resume, a batch size or a number of processes cannot change it.

Training noise is keyed on (seed, rank, step, stream); a sampled image on its own seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key_seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends on every part of ``key`` and nothing else."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a fresh generator whose state depends on every part of ``key`` and nothing else."""
    return torch.Generator(device=device).manual_seed(key_seed(*key))


def image_noise(seeds: Sequence[int], shape: Sequence[int], stream: int | str = 0) -> Tensor:
    """Return standard normal noise ``[len(seeds), *shape]``, row ``i`` drawn from ``seeds[i]`` and ``stream`` alone.

    Drawn on the CPU, whose generator is the same on every machine.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator("image", seed, stream)) for seed in seeds])
