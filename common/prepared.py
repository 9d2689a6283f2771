"""Prepared folders: images decoded, cropped and resized once, as memory-mapped uint8 shards with a manifest.

On disk::

    manifest.json           written last: a folder without it is not a data set
    progress.json           while `prepare` is on its way, what is finished
    images-00000.npy        uint8 [N, size, size, 3]
    labels-00000.npy        int64 [N], where the data has classes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UsageError, WavelatentError
from .files import open_atomically, sha256_file, write_atomically
from .image_sources import SkippedFile, content_fingerprint

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
SHARDS = ("images-*.npy", "labels-*.npy")
TEMPORARY = tuple(f".{name}.*" for name in (MANIFEST, PROGRESS, *SHARDS))
"""Patterns of what a killed process may leave behind."""

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A part of the manifest; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(Record):
    """One pair of array files; ``sha256`` is of the whole files."""

    file: str
    count: int
    sha256: str
    label_file: str | None = None
    label_sha256: str | None = None


class Manifest(Record):
    """What a prepared folder holds and how it was made. ``request`` is what `prepare` was asked for."""

    format: Literal[1] = 1
    spec: str
    transform: dict[str, object]
    count: int
    num_classes: int
    class_names: list[str]
    skipped: list[SkippedFile]
    fingerprint: str
    request: dict[str, object]
    shards: list[Shard]

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return int(str(self.transform["size"]))


class Progress(Record):
    """The finished shards of a `prepare` that has not reached its end, and how many source images they used up."""

    request: dict[str, object]
    class_names: list[str]
    consumed: int = 0
    skipped: list[SkippedFile] = []
    shards: list[Shard] = []


class PreparedFolder:
    """A prepared folder opened for reading, 0.05 ms per image.

    Raises `WavelatentError` when the folder is unfinished, or a file is missing or of the wrong length. The contents of
    the files are compared with their checksums by `verify`, which reads all of them.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.spec = str(root)
        self.manifest = read_manifest(self.root)
        self.transform = self.manifest.transform
        self.size = self.manifest.size
        self.num_classes = self.manifest.num_classes
        self.class_names = self.manifest.class_names
        self.skipped = self.manifest.skipped
        self._images = [self._open_shard(shard) for shard in self.manifest.shards]
        self._labels = [self._open_labels(shard) for shard in self.manifest.shards] if self.num_classes else None
        self._starts = np.cumsum([0] + [shard.count for shard in self.manifest.shards])

    def __reduce__(self) -> tuple[type[PreparedFolder], tuple[Path]]:
        """Pickle the place: a worker process that is not forked opens the files itself instead of getting a copy."""
        return type(self), (self.root,)

    def __len__(self) -> int:
        return self.manifest.count

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 ``[size, size, 3]``."""
        shard, row = self._locate(index)
        return np.array(self._images[shard][row])

    def label(self, index: int) -> int | None:
        """Return the class of image ``index``, or None where the data has no classes."""
        if self._labels is None:
            return None
        shard, row = self._locate(index)
        return int(self._labels[shard][row])

    def name(self, index: int) -> str:
        """Return the file and the row of image ``index``: what it was called before is not kept."""
        shard, row = self._locate(index)
        return f"{self.manifest.shards[shard].file}[{row}]"

    def fingerprint(self) -> str:
        """Return the sha256 over the pixels' checksums, the labels and the transform."""
        return self.manifest.fingerprint

    def verify(self) -> None:
        """Compare every file with its checksum. Raises `WavelatentError` naming the first that differs."""
        for shard in self.manifest.shards:
            for file, expected in ((shard.file, shard.sha256), (shard.label_file, shard.label_sha256)):
                if file is not None and _sha256(self.root / file) != expected:
                    raise WavelatentError(f"{self.root / file} is damaged: run prepare again with --overwrite")

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _open_shard(self, shard: Shard) -> NDArray[np.uint8]:
        return _open_array(self.root / shard.file, (shard.count, self.size, self.size, 3), mmap_mode="r")

    def _open_labels(self, shard: Shard) -> NDArray[np.int64]:
        assert shard.label_file is not None, f"{shard.file} has no labels in a data set with classes"
        return _open_array(self.root / shard.label_file, (shard.count,), mmap_mode=None)


def is_prepared(root: Path) -> bool:
    """Tell whether ``root`` is a prepared folder, finished or not."""
    return (root / MANIFEST).is_file() or (root / PROGRESS).is_file()


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of a prepared folder. Raises `WavelatentError` when there is none or it is not one."""
    if not (root / MANIFEST).is_file():
        raise WavelatentError(f"{root} is unfinished: run the same prepare command again")
    return read_record(Manifest, root / MANIFEST)


def read_record(model: type[R], path: Path) -> R:
    """Read a manifest or progress file. Raises `WavelatentError` when it is damaged or of another kind."""
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise WavelatentError(f"{path} is not the manifest of a prepared folder: {where}: {first['msg']}") from None


def write_record(path: Path, record: Record) -> None:
    """Write a manifest or progress file, whole or not at all."""
    write_atomically(path, record.model_dump_json(indent=1) + "\n")


def write_shard(root: Path, number: int, images: Sequence[NDArray[np.uint8]], labels: Sequence[int] | None) -> Shard:
    """Write shard ``number``, each file whole or not at all, and return its manifest entry."""
    file, label_file = f"images-{number:05d}.npy", f"labels-{number:05d}.npy"
    sha256 = _write_array(root / file, np.stack(images))
    if labels is None:
        return Shard(file=file, count=len(images), sha256=sha256)
    label_sha256 = _write_array(root / label_file, np.array(labels, dtype=np.int64))
    return Shard(file=file, count=len(images), sha256=sha256, label_file=label_file, label_sha256=label_sha256)


def prepared_fingerprint(shards: Sequence[Shard], transform: dict[str, object]) -> str:
    """Return the fingerprint of a prepared folder's content, wherever it lies."""
    sums = [digest for shard in shards for digest in (shard.sha256, shard.label_sha256) if digest is not None]
    return content_fingerprint((bytes.fromhex(digest) for digest in sums), None, transform)


def _write_array(path: Path, array: NDArray) -> str:
    with open_atomically(path) as file:
        np.save(file, array, allow_pickle=False)
    return sha256_file(path)


def _sha256(path: Path) -> str:
    """Return the sha256 hex of a file. Raises `WavelatentError` when it is missing."""
    try:
        return sha256_file(path)
    except FileNotFoundError:
        raise WavelatentError(f"{path} is missing: run prepare again with --overwrite") from None


def _open_array(path: Path, shape: tuple[int, ...], mmap_mode: Literal["r"] | None) -> NDArray:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise WavelatentError(f"{path} is missing: run prepare again with --overwrite") from None
    except (ValueError, EOFError) as error:
        raise WavelatentError(f"{path} is damaged ({error}): run prepare again with --overwrite") from None
    if array.shape != shape:
        raise WavelatentError(f"{path} holds {array.shape}, not {shape}: run prepare again with --overwrite")
    return array


def require_size(data: PreparedFolder, size: int | None) -> None:
    """Raise `UsageError` when a prepared folder is asked for images of another size than it holds."""
    if size is not None and size != data.size:
        raise UsageError(
            f"{data.spec} was prepared at {data.size} pixels, not {size}: run `wavelatent prepare` on "
            f"{data.manifest.spec} with --size {size}"
        )
