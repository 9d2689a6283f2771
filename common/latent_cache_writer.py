"""Writing a latent cache: by shards, from any number of processes, resumable after being killed anywhere.

Shard ``k`` holds images ``k * shard_size`` onwards, a fixed range, so processes that take different shards never encode
an image twice. A shard is written whole or not at all and then recorded in ``CACHE/partial/``; the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save
from torch import Tensor

from .errors import Diverged, UsageError, WavelatentError
from .files import sha256_file, write_atomically
from .latent_cache import (
    MANIFEST,
    PARTIAL,
    AutoencoderRecord,
    CacheDtype,
    DataRecord,
    Manifest,
    ShardRecord,
    Statistics,
    map_tensors,
)
from .latents import LatentStatistics, Posterior

PLAN = "plan.json"
SHARD_BYTES = 64 * 2**20
MAX_SHARD_SIZE = 4096
STATISTICS_CHUNK = 512


class CachePlan(BaseModel):
    """Everything that makes an unfinished cache the same cache when the command is run again."""

    model_config = ConfigDict(frozen=True)

    autoencoder: AutoencoderRecord
    data: DataRecord
    shape: tuple[int, int, int]
    count: int
    dtype: CacheDtype = "float32"
    flips: bool = False
    shard_size: int

    @property
    def num_shards(self) -> int:
        """How many shards the images fill."""
        return math.ceil(self.count / self.shard_size)


def default_shard_size(shape: tuple[int, int, int], dtype: CacheDtype, flips: bool) -> int:
    """Return how many posteriors make a shard of at most 64 MiB (and at most 4096 of them)."""
    bytes_each = math.prod(shape) * (2 if dtype == "float16" else 4) * (4 if flips else 2)
    return max(1, min(MAX_SHARD_SIZE, SHARD_BYTES // bytes_each))


def require_cache_folder(path: Path) -> None:
    """Raise :class:`UsageError` unless ``path`` is a cache, finished or not, what is left of one, or free for one."""
    if path.is_file():
        raise UsageError(f"{path} is a file; --out takes a folder")
    manifest, plan = path / MANIFEST, path / PARTIAL / PLAN
    if manifest.exists():
        ours = _has_keys(manifest, Manifest)
    else:
        ours = _has_keys(plan, CachePlan) or all(_is_ours(entry) for entry in _entries(path))
    if not ours:
        raise UsageError(f"{path} is not empty and not a latent cache; give another --out")


def _has_keys(file: Path, model: type[BaseModel]) -> bool:
    """Tell whether ``file`` is a JSON object that has what ``model`` cannot do without."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    return isinstance(content, dict) and required <= content.keys()


def _entries(path: Path) -> list[Path]:
    """Return what lies in the folder ``path`` and in its ``partial/``."""
    top = list(path.iterdir()) if path.is_dir() else []
    return [entry for each in top for entry in (each.iterdir() if each.is_dir() and each.name == PARTIAL else [each])]


def _is_ours(entry: Path) -> bool:
    return any(fnmatch(entry.name, pattern) for pattern in (PLAN, "shard-*.json", "shard-*.safetensors", ".*.tmp"))


class CacheWriter:
    """Writes one cache, from one process or several.

    In each process::

        writer = CacheWriter(path, plan)
        for number in writer.unfinished(rank, world_size):
            for batch in (the images writer.remaining(number)):
                writer.add(number, index, posterior, flip_posterior, labels)

    and when every process is through, one of them calls :meth:`finish`. To stop in the middle of a shard, call
    :meth:`save_rows`.

    Raises:
        UsageError: where there is no image, or ``path`` is the folder of something else.
        WavelatentError: where ``path`` holds an unfinished cache of another plan, naming what differs.
    """

    def __init__(self, path: Path, plan: CachePlan) -> None:
        if plan.count < 1:
            raise UsageError(f"there is no image to encode in {plan.data.spec}")
        require_cache_folder(path)
        self.path = path
        self.plan = plan
        self._rows: dict[str, list[Tensor]] = {}
        file = path / PARTIAL / PLAN
        if file.exists():
            self._check_same(json.loads(file.read_text(encoding="utf-8")))
        else:
            write_atomically(file, plan.model_dump_json(indent=2))

    def _check_same(self, begun: dict[str, Any]) -> None:
        given = self.plan.model_dump(mode="json")
        for record in (begun, given):  # where the inputs lie may change; what they are may not
            record["autoencoder"].pop("path", None)
            record["data"].pop("spec", None)
        differing = [key for key in given if begun.get(key) != given[key]]
        if differing:
            raise WavelatentError(
                f"{self.path} holds an unfinished cache with another {', '.join(differing)}; "
                "give the former options, another --out, or --overwrite to start again"
            )

    @staticmethod
    def clear(path: Path) -> None:
        """Remove a cache, finished or not, and nothing else that is in the folder. Raises as `require_cache_folder`."""
        require_cache_folder(path)
        (path / MANIFEST).unlink(missing_ok=True)  # first: what is left after a crash is no cache
        for file in [*path.glob("shard-*.safetensors"), *path.glob(".*.tmp")]:
            file.unlink()
        shutil.rmtree(path / PARTIAL, ignore_errors=True)

    def unfinished(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the numbers of this process's shards that are still to be written; a damaged one is among them."""
        return [number for number in range(rank, self.plan.num_shards, world_size) if not self._intact(number)]

    @property
    def num_missing(self) -> int:
        """How many shards of all processes have not been recorded as written."""
        return sum(not self._record(number).exists() for number in range(self.plan.num_shards))

    def remaining(self, number: int) -> range:
        """Return the images that shard ``number`` still needs, after the rows that a stopped command left for it."""
        start = number * self.plan.shard_size
        self._rows = {}
        if (file := self._rows_file(number)).exists():
            try:
                self._rows = {name: [tensor] for name, tensor in map_tensors(file).items()}
            except WavelatentError:
                file.unlink()  # damaged: encode its images again
        return range(start + self._num_rows, start + self._shard_count(number))

    def add(
        self,
        number: int,
        index: Tensor,
        posterior: Posterior,
        flip_posterior: Posterior | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Add the posteriors of images ``index [B]`` to shard ``number``, which is written when it is full.

        Raises:
            Diverged: at a latent that is not finite.
            WavelatentError: at one that does not fit in the cache's ``dtype``.
        """
        assert (flip_posterior is not None) == self.plan.flips, "mirror images go with flips"
        assert (labels is not None) == (self.plan.data.num_classes > 0), "labels go with num_classes"
        assert posterior.mean.shape[1:] == self.plan.shape, f"{posterior.mean.shape} in a cache of {self.plan.shape}"
        rows = {"index": index, "label": labels, "mean": posterior.mean, "std": posterior.std}
        if flip_posterior is not None:
            rows |= {"flip_mean": flip_posterior.mean, "flip_std": flip_posterior.std}
        for name, tensor in rows.items():
            if tensor is not None:
                stored = tensor.cpu() if tensor.ndim == 1 else self._stored(name, tensor, index)
                self._rows.setdefault(name, []).append(stored)
        if self._num_rows == self._shard_count(number):
            self._write_shard(number)

    def save_rows(self, number: int) -> None:
        """Keep what has been added to the unfinished shard ``number``, for the next run of the command."""
        if self._rows:
            write_atomically(self._rows_file(number), save(self._columns()))

    def finish(self) -> Manifest:
        """Check every shard, compute the statistics of the whole set from them, and write the manifest."""
        plan = self.plan
        statistics = LatentStatistics(plan.shape[0])
        shards: list[ShardRecord] = []
        indices: list[Tensor] = []
        posteriors: set[Literal["mean_std", "deterministic"]] = set()
        for number in range(plan.num_shards):
            if not self._intact(number):
                raise WavelatentError(f"{self.path}: shard {number} is missing or damaged; run the same command again")
            shards.append(ShardRecord.model_validate_json(self._record(number).read_text(encoding="utf-8")))
            tensors = map_tensors(self._shard_file(number))
            indices.append(tensors["index"])
            posteriors.add("mean_std" if "std" in tensors else "deterministic")
            _add_statistics(statistics, tensors)
        assert torch.cat(indices).unique().numel() == plan.count, "an image was encoded twice"
        assert len(posteriors) == 1, "some shards have a std and some have none"
        manifest = Manifest(
            autoencoder=plan.autoencoder,
            data=plan.data,
            shape=plan.shape,
            dtype=plan.dtype,
            count=plan.count,
            flips=plan.flips,
            posterior=posteriors.pop(),
            stats=Statistics(**statistics.as_dict()),
            shards=shards,
        ).sealed()
        write_atomically(self.path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        shutil.rmtree(self.path / PARTIAL)
        for file in self.path.glob(".shard-*.tmp"):  # left by a process that was killed
            file.unlink()
        return manifest

    @property
    def _num_rows(self) -> int:
        return sum(len(index) for index in self._rows.get("index", []))

    def _shard_count(self, number: int) -> int:
        return min(self.plan.shard_size, self.plan.count - number * self.plan.shard_size)

    def _shard_file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def _record(self, number: int) -> Path:
        return self.path / PARTIAL / f"shard-{number:05d}.json"

    def _rows_file(self, number: int) -> Path:
        return self.path / PARTIAL / f"shard-{number:05d}.rows.safetensors"

    def _intact(self, number: int) -> bool:
        record, file = self._record(number), self._shard_file(number)
        if not (record.exists() and file.exists()):
            return False
        return sha256_file(file) == json.loads(record.read_text(encoding="utf-8"))["sha256"]

    def _columns(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts).contiguous() for name, parts in self._rows.items()}

    def _write_shard(self, number: int) -> None:
        content = save(self._columns())
        file = self._shard_file(number)
        write_atomically(file, content)
        record = ShardRecord(
            file=file.name, count=self._shard_count(number), sha256=hashlib.sha256(content).hexdigest()
        )
        write_atomically(self._record(number), record.model_dump_json())
        self._rows_file(number).unlink(missing_ok=True)
        self._rows = {}

    def _stored(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Return ``x [B, C, h, w]`` in the cache's dtype, checked."""
        dtype = torch.float16 if self.plan.dtype == "float16" else torch.float32
        stored = x.detach().to("cpu", dtype)
        bad = (~stored.isfinite()).flatten(1).any(dim=1)
        if bad.any():
            image = int(index[bad.nonzero()[0, 0]])
            if x[bad.to(x.device)].isfinite().all():
                largest = x.abs().max().item()
                raise WavelatentError(
                    f"the {name} of image {image} does not fit in float16 (largest value {largest:.4g}, limit 65504); "
                    "encode with --dtype float32"
                )
            raise Diverged(
                f"the autoencoder's {name} of image {image} is not finite: its training diverged, "
                "or it needs --mixed-precision no"
            )
        return stored


def _add_statistics(statistics: LatentStatistics, tensors: dict[str, Tensor]) -> None:
    """Add a shard's posteriors, of both sides where there are two, a few at a time to bound the memory."""
    for side in ("", "flip_"):
        if f"{side}mean" in tensors:
            means = tensors[f"{side}mean"].split(STATISTICS_CHUNK)
            stds = tensors[f"{side}std"].split(STATISTICS_CHUNK) if f"{side}std" in tensors else [None] * len(means)
            for mean, std in zip(means, stds, strict=True):
                statistics.update(Posterior(mean, std))
