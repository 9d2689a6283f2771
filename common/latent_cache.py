"""The latent cache on disk: sharded safetensors, and a manifest that is written last and vouches for all of it.

::

    CACHE/manifest.json            what was encoded by what, shape, exact whole-set statistics, SHA-256 of every shard
    CACHE/shard-00000.safetensors  mean, std, flip_mean, flip_std [N, C, h, w] as there are; index, label [N]
    CACHE/partial/                 while it is being written: a record per finished shard, rows not yet in a shard

The posterior is kept, not one draw of it: :class:`~wavelatent.common.latent_loader.TrainingLatents` draws anew at every
step. A cache without a manifest is unfinished; :class:`~wavelatent.common.latent_cache_writer.CacheWriter` goes on with
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import WavelatentError
from .latents import Posterior
from .mapped_tensors import MappedTensors, allow_open_files
from .verification import first_mismatch

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

    Only the rows that are asked for are read, and what was read can be dropped again by the system, so a cache may be
    larger than the memory, on any setting of overcommit. Threads may read at the same time. Every shard is one open
    file.

    Make one with :meth:`open`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        allow_open_files(len(manifest.shards))
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
            verify: check every shard's SHA-256 against the manifest. The first time all are hashed, several at once (as
                fast as the disk gives them, or 1.8 GB/s a core); later only those that were touched since, see
                :mod:`~wavelatent.common.verification`. Without it only names, sizes and shapes are checked.
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
        if verify and (wrong := first_mismatch(path, {shard.file: shard.sha256 for shard in manifest.shards})):
            raise WavelatentError(f"{path / wrong} does not have the SHA-256 that {MANIFEST} records; {remedy}")
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
        if not recorded and "label" in self._shards[0].tensors:  # written by another program
            return max(int(shard.tensors["label"].max()) for shard in self._shards) + 1
        return recorded

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return "label" in self._shards[0].tensors

    def rows(self, positions: Sequence[int] | NDArray[np.int64]) -> list[tuple[MappedTensors, int]]:
        """Return where the rows at ``positions`` are: the shard, and the row in it. Reads nothing.

        Positions are 0 to ``len - 1``, in any order, repeats allowed; others raise :class:`IndexError`.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"positions {wanted.min()} to {wanted.max()} of a cache of {len(self)}")
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        rows = wanted - self._starts[owners]
        return [(self._shards[owner], row) for owner, row in zip(owners.tolist(), rows.tolist(), strict=True)]

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> CacheBatch:
        """Return copies of the rows at positions ``indices``; see :meth:`rows`."""
        rows = self.rows(indices)
        manifest = self.manifest
        sides = ["", "flip_"] if manifest.flips else [""]
        posteriors = [
            Posterior(
                _copy(rows, f"{side}mean", manifest.shape),
                _copy(rows, f"{side}std", manifest.shape) if manifest.posterior == "mean_std" else None,
            )
            for side in sides
        ]
        return CacheBatch(
            posterior=posteriors[0],
            flip_posterior=posteriors[1] if manifest.flips else None,
            labels=_copy(rows, "label") if self.labelled else None,
            index=_copy(rows, "index"),
        )


def _copy(rows: list[tuple[MappedTensors, int]], name: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Return the ``rows`` of the tensor ``name``: latents of ``shape`` in float32, numbers of images in int64."""
    if shape:
        for shard, row in rows:
            shard.will_need(name, row)
    copied = np.empty((len(rows), *shape), np.float32 if shape else np.int64)
    for place, (shard, row) in enumerate(rows):
        copied[place] = shard.tensors[name][row]
    return torch.from_numpy(copied)


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


def _map_shard(file: Path, count: int, manifest: Manifest) -> MappedTensors:
    """Map a shard's tensors into memory (nothing is read until it is used) and check their names and shapes."""
    shard = MappedTensors(file)
    latents = ["mean", "flip_mean"] if manifest.flips else ["mean"]
    if manifest.posterior == "mean_std":
        latents += [name.replace("mean", "std") for name in latents]
    expected: dict[str, tuple[int, ...]] = {"index": (count,), **dict.fromkeys(latents, (count, *manifest.shape))}
    if manifest.data.num_classes or "label" in shard.tensors:
        expected["label"] = (count,)
    for name, shape in expected.items():
        if name not in shard.tensors or shard.tensors[name].shape != shape:
            raise WavelatentError(f"{file} has no {name} of shape {list(shape)}; run encode again with --overwrite")
    return shard


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory, privately. Raises :class:`WavelatentError` naming a file that is not one."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise WavelatentError(f"{file} cannot be read ({error}); run encode again with --overwrite") from error
