"""Images of the Hugging Face hub, ``hf:NAME[:SPLIT]``, map-style or streamed, through `datasets`.

NAME may also be a local folder that `datasets` understands. The files' bytes are taken undecoded and go through the
same transform as those of an image folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import UsageError, WavelatentError
from .image_sources import Decoded, SkippedFile
from .transforms import BadImageError, ImageTransform, decode

LABEL_COLUMNS = ("label", "labels", "class", "class_label", "fine_label")
"""Names under which a data set may keep its classes, the first that is there and is a `ClassLabel` is taken."""


class HubImages:
    """The image column of a downloaded data set; an `EncodedImages`.

    Raises:
        UsageError: no such data set, split or image column, naming what there is.
        WavelatentError: the hub cannot be reached.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._table = _load(spec, streaming=False)
        self._columns = _Columns(spec, self._table.features)
        self.class_names = self._columns.class_names
        self._table = self._table.cast_column(self._columns.image, _undecoded())
        labels = list(self._table[self._columns.label]) if self._columns.label else []
        if all(map(_is_missing, labels)):
            self.class_names, labels = [], []
        self._labels = [_label(spec, row, label) for row, label in enumerate(labels)]

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """Return the row's number."""
        return f"row {index}"

    def payload(self, index: int) -> bytes:
        """Return the image file in row ``index``."""
        return _payload(self._table[index][self._columns.image])

    def label(self, index: int) -> int | None:
        """Return the class of row ``index``, or None where there is no class column."""
        return self._labels[index] if self._labels else None

    def identity(self) -> str:
        """Return what tells one version of the data set from another."""
        return f"{len(self._table)} rows, {self._table._fingerprint}"


class HubStream:
    """The image column of a data set that is read from the hub row by row; raises as `HubImages` does."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._rows = _load(spec, streaming=True)
        features = self._rows.features or self._rows._resolve_features().features
        self._columns = _Columns(spec, features)
        self.class_names = self._columns.class_names
        self._rows = self._rows.cast_column(self._columns.image, _undecoded())
        split = (self._rows.info.splits or {}).get(_parse(spec)[1])
        self.total: int | None = split.num_examples or None if split else None

    def decoded(self, transform: ImageTransform, start: int) -> Iterator[Decoded]:
        """Yield the rows from number ``start`` on, transformed."""
        for number, row in enumerate(self._rows.skip(start), start):
            try:
                image = transform(decode(_payload(row[self._columns.image])))
            except BadImageError as error:
                yield Decoded(None, None, SkippedFile(f"row {number}", str(error)))
            else:
                label = self._columns.label
                yield Decoded(image, _label(self.spec, number, row[label]) if label else None, None)


class _Columns:
    """Which columns hold the image and the class."""

    def __init__(self, spec: str, features: Mapping[str, Any]) -> None:
        from datasets import ClassLabel, Image

        images = [name for name, feature in features.items() if isinstance(feature, Image)]
        if not images:
            listing = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
            raise UsageError(f"{spec} has no image column; its columns are {listing}")
        self.image: str = "image" if "image" in images else images[0]
        classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        usable = [name for name in LABEL_COLUMNS if name in classes]
        self.label: str | None = usable[0] if usable else None
        self.class_names: list[str] = list(features[self.label].names) if self.label else []


def _is_missing(label: int | None) -> bool:
    """Return whether there is no class, which ``datasets`` also writes as -1."""
    return label is None or label < 0


def _label(spec: str, row: int, label: int | None) -> int:
    """Return the class. Raises :class:`WavelatentError` where there is none."""
    if label is None or label < 0:
        raise WavelatentError(
            f"{spec}: row {row} has no class: take a split in which all rows have one, or, without --streaming, none"
        )
    return int(label)


def _parse(spec: str) -> tuple[str, str]:
    name = spec.removeprefix("hf:")
    head, colon, tail = name.rpartition(":")
    if colon and "/" not in tail and "\\" not in tail:
        name, split = head, tail
    else:
        split = "train"
    if not name or not split:
        raise UsageError(f"{spec} is not hf:NAME[:SPLIT]")
    return name, split


def _load(spec: str, streaming: bool) -> Any:
    """Return the split as a `Dataset` or `IterableDataset`; every failure becomes one line."""
    import datasets

    name, split = _parse(spec)
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except ConnectionError as error:
        raise WavelatentError(
            f"cannot reach the Hugging Face hub for {name!r}, and there is no local copy: "
            "check the network, or give a folder that holds the images"
        ) from error
    except (FileNotFoundError, ValueError) as error:  # no such data set; no such split, with a list of what there is
        raise UsageError(f"cannot open {spec}: {_first_line(error)}") from error
    except Exception as error:  # huggingface_hub and the file readers each bring errors of their own
        raise WavelatentError(f"cannot load {spec}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _undecoded() -> Any:
    from datasets import Image

    return Image(decode=False)


def _payload(cell: Mapping[str, Any] | None) -> bytes:
    if cell is None:
        raise BadImageError("empty cell")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    from datasets.utils.file_utils import xopen

    with xopen(cell["path"], "rb") as file:  # a streamed one is a URL, or a file in an archive behind one
        return file.read()
