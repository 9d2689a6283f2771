"""The latent cache on disk: sharded safetensors, and a manifest that is written last and vouches for all of it.

::

    CACHE/manifest.json            what was encoded by what, shape, exact whole-set statistics, SHA-256 of every shard
    CACHE/shard-00000.safetensors  mean, std, flip_mean, flip_std [N, C, h, w] as there are; index, label [N]
    CACHE/partial/                 while it is being written: a record per finished shard, rows not yet in a shard

The posterior is kept, not one draw of it: :func:`training_latents` draws anew at every step. A cache without a manifest
is unfinished; :class:`~wavelatent.common.latent_cache_writer.CacheWriter` goes on with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import WavelatentError
from .files import sha256_file
from .latents import Posterior
from .ordering import step_indices
from .randomness import generator

MANIFEST = "manifest.json"
PARTIAL = "partial"

CacheDtype = Literal["float32", "float16"]


class _Record(BaseModel):
    """Part of a manifest: immutable, and a later version may add fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class AutoencoderRecord(_Record):
    """The autoencoder that encoded the cache: what identifies its weights, where it was, and how it was run.

    ``mixed_precision`` is the precision it ran in. ``tile`` is the side in pixels of the tiles that it encoded in, None
    for whole images: the same weights give other latents in tiles.
    """

    fingerprint: str
    path: str
    mixed_precision: str = "no"
    tile: int | None = None

    @model_serializer(mode="wrap")
    def _without_absent_tile(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``tile`` out where there is none, as caches and plans did before there were tiles."""
        content: dict[str, Any] = serialise(self)
        return content if self.tile is not None else {k: v for k, v in content.items() if k != "tile"}


class DataRecord(_Record):
    """The images that were encoded; ``num_classes`` is 0 without labels."""

    fingerprint: str
    spec: str
    transform: dict[str, Any]
    num_classes: int = 0


class Statistics(_Record):
    """Of every channel over all sites of all images, mirror images included where they are cached.

    ``mean`` and ``std`` are those of the sampled latent, ``min`` and ``max`` those of the posterior's mean.
    """

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]


class ShardRecord(_Record):
    """One shard: its file name in the cache, how many images it holds, the SHA-256 of its bytes."""

    file: str
    count: int
    sha256: str


class Manifest(_Record):
    """``manifest.json``; ``shape`` is that of one latent, ``[C, h, w]``."""

    format: Literal[1] = 1
    autoencoder: AutoencoderRecord
    data: DataRecord
    shape: tuple[int, int, int]
    dtype: CacheDtype
    count: int
    flips: bool
    posterior: Literal["mean_std", "deterministic"]
    stats: Statistics
    shards: list[ShardRecord]
    sha256: str = ""
    """SHA-256 of the manifest itself without this field, so that an edited one is noticed. Empty: not checked."""

    def sealed(self) -> Manifest:
        """Return the same manifest with its own hash filled in."""
        return self.model_copy(update={"sha256": _hash_without_seal(self.model_dump(mode="json"))})


def _hash_without_seal(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CacheBatch:
    """Rows of a cache in float32: ``index [B]`` and ``labels [B]`` int64, posteriors ``[B, C, h, w]``.

    ``flip_posterior`` is that of the mirrored images, where the cache has them.
    """

    posterior: Posterior
    flip_posterior: Posterior | None
    labels: Tensor | None
    index: Tensor


class LatentCache:
    """A finished cache, memory-mapped: reading 64 random latents takes well under a millisecond.

    Make one with :meth:`open`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = [_map_shard(path / shard.file, shard.count, manifest) for shard in manifest.shards]
        self._starts = np.cumsum([0, *(shard.count for shard in manifest.shards)])

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        verify: bool = True,
        autoencoder_fingerprint: str | None = None,
        data_fingerprint: str | None = None,
    ) -> LatentCache:
        """Open a finished cache and check it.

        Args:
            path: the cache's folder.
            verify: hash every shard against the manifest. Without it only names, sizes and shapes are checked.
            autoencoder_fingerprint: refuse a cache that another autoencoder encoded.
            data_fingerprint: refuse a cache of other images.

        Raises:
            WavelatentError: naming the file or the input that does not match, and what to do.
        """
        path = Path(path)
        manifest, sealed = _read_manifest(path)
        remedy = "run encode again with another --out, or with --overwrite"
        for name, recorded, given in [
            ("autoencoder", manifest.autoencoder.fingerprint, autoencoder_fingerprint),
            ("data", manifest.data.fingerprint, data_fingerprint),
        ]:
            if given is not None and given != recorded:
                raise WavelatentError(
                    f"{path} was encoded from another {name}: its {name} fingerprint is {recorded[:12]}, "
                    f"the given one's is {given[:12]}; {remedy}"
                )
        if not sealed:
            raise WavelatentError(f"{path / MANIFEST} does not have the SHA-256 that it records of itself; {remedy}")
        for shard in manifest.shards:
            file = path / shard.file
            if not file.is_file():
                raise WavelatentError(f"{file} is missing from the cache; {remedy}")
            if verify and sha256_file(file) != shard.sha256:
                raise WavelatentError(f"{file} does not have the SHA-256 that {MANIFEST} records; {remedy}")
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one latent, ``(C, h, w)``."""
        return self.manifest.shape

    @property
    def num_classes(self) -> int:
        """How many classes the labels count, 0 without labels."""
        recorded = self.manifest.data.num_classes
        if not recorded and "label" in self._shards[0]:  # written by another program
            return max(int(shard["label"].max()) for shard in self._shards) + 1
        return recorded

    def read(self, indices: Sequence[int] | np.ndarray) -> CacheBatch:
        """Return the rows at positions ``indices`` (0 to ``len - 1``, in any order, repeats allowed)."""
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of a cache of {len(self)}")
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(owners, kind="stable")
        chosen: dict[str, list[Tensor]] = {name: [] for name in self._shards[0]}
        for owner in np.unique(owners):
            rows = torch.from_numpy(positions[order][owners[order] == owner] - self._starts[owner])
            for name, tensor in self._shards[owner].items():
                chosen[name].append(tensor[rows])
        back = torch.from_numpy(np.argsort(order))
        columns = {name: torch.cat(parts)[back] for name, parts in chosen.items() if parts}
        mean = columns["mean"]
        return CacheBatch(
            posterior=Posterior(mean.float(), _as_float(columns.get("std"))),
            flip_posterior=Posterior(columns["flip_mean"].float(), _as_float(columns.get("flip_std")))
            if self.manifest.flips
            else None,
            labels=columns.get("label"),
            index=columns["index"],
        )


def training_latents(
    cache: LatentCache, *, batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ``(raw latents [B, C, h, w], labels [B] | None)`` for ever, one batch per training step.

    Which images are in step ``s`` follows :func:`step_indices`; the draw from each posterior, and where the cache has
    mirror images the choice of side, follow (seed, image, s) alone. So a resume, or another number of processes with
    the same global batch, sees the same latents. ``batch_size`` is per rank.
    """
    step = start_step
    while True:
        positions = step_indices(len(cache), batch_size, seed, step, rank, world_size)
        yield draw_latents(cache.read(positions), seed, step)
        step += 1


def draw_latents(batch: CacheBatch, seed: int, step: int) -> tuple[Tensor, Tensor | None]:
    """Draw raw latents ``[B, C, h, w]`` from the posteriors (of either side, by a coin toss), each image by its own."""
    generators = [generator("posterior", seed, index, step) for index in batch.index.tolist()]
    posterior = batch.posterior
    if batch.flip_posterior is not None:
        mirrored = torch.stack([torch.rand((), generator=g) for g in generators]) < 0.5
        posterior = _choose(mirrored, batch.flip_posterior, posterior)
    return posterior.sample(generators), batch.labels


def _choose(first: Tensor, yes: Posterior, no: Posterior) -> Posterior:
    """Take ``yes`` where ``first [B]`` holds and ``no`` elsewhere."""
    where = first[:, None, None, None]
    chosen = Posterior(torch.where(where, yes.mean, no.mean))
    if yes.std is None or no.std is None:
        return chosen
    return replace(chosen, std=torch.where(where, yes.std, no.std))


def _read_manifest(path: Path) -> tuple[Manifest, bool]:
    """Read ``path``'s manifest; the flag says that its own hash, where it has one, is right."""
    file = path / MANIFEST
    if not file.is_file():
        unfinished = " (unfinished)" if (path / PARTIAL).is_dir() else ""
        raise WavelatentError(
            f"{path} is not a latent cache{unfinished}: no {MANIFEST}; make it with encode --out {path}"
        )
    remedy = "the cache was damaged or edited: run encode again with --overwrite"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(content)
    except (ValueError, ValidationError) as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else "not valid JSON"
        raise WavelatentError(f"{file} cannot be read ({where}); {remedy}") from error
    if manifest.count != sum(shard.count for shard in manifest.shards) or manifest.count == 0:
        raise WavelatentError(f"{file} counts {manifest.count} latents and its shards do not add up to it; {remedy}")
    return manifest, manifest.sha256 in ("", _hash_without_seal(content))


def _map_shard(file: Path, count: int, manifest: Manifest) -> dict[str, Tensor]:
    """Map a shard's tensors into memory (nothing is read until it is used) and check their names and shapes."""
    tensors = map_tensors(file)
    latents = ["mean", "flip_mean"] if manifest.flips else ["mean"]
    if manifest.posterior == "mean_std":
        latents += [name.replace("mean", "std") for name in latents]
    expected: dict[str, tuple[int, ...]] = {"index": (count,), **dict.fromkeys(latents, (count, *manifest.shape))}
    if manifest.data.num_classes or "label" in tensors:
        expected["label"] = (count,)
    for name, shape in expected.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise WavelatentError(f"{file} has no {name} of shape {list(shape)}; run encode again with --overwrite")
    return {name: tensors[name] for name in expected}


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory, privately. Raises :class:`WavelatentError` naming a file that is not one."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise WavelatentError(f"{file} cannot be read ({error}); run encode again with --overwrite") from error


def _as_float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
