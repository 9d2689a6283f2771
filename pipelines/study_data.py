"""The images of a study: brought to one size in its folder where the configuration asks for it, then opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError
from ..common.hf_data import HubImages
from ..common.image_folders import FolderImages
from ..common.image_sources import SkippedFile
from ..common.images import ImageData, open_data
from ..common.prepared import MANIFEST, is_prepared, read_manifest
from ..common.synthetic_faces import SyntheticFaces
from .prepare import prepare
from .study_config import StudyConfig

NOISE_IMAGES = 64


class NoiseImages:
    """A data set of one image of noise, many times."""

    def __init__(self, size: int, count: int = NOISE_IMAGES, num_classes: int = 0) -> None:
        self.spec, self.size, self.count = "noise", size, count
        self.transform: dict[str, object] = {"size": size}
        self.num_classes = num_classes
        self.class_names = [str(number) for number in range(num_classes)]
        self.skipped: list[SkippedFile] = []
        self._image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return the image."""
        return self._image

    def label(self, index: int) -> int | None:
        """Return a class, where there are any."""
        return index % self.num_classes if self.num_classes else None

    def fingerprint(self) -> str:
        """Return what no other data has."""
        return "noise"


class UnpreparedImages(NoiseImages):
    """Stands for data that is not prepared yet: its size, its classes, and about how many images there are."""

    def __init__(self, spec: str, size: int) -> None:
        source = _source(spec, size)
        super().__init__(size, len(source), len(source.class_names))
        self.spec = spec

    def fingerprint(self) -> str:
        """Return a name that cells do not get once the data is prepared."""
        return f"unprepared {self.spec} at {self.size}"


def _source(spec: str, size: int) -> SyntheticFaces | HubImages | FolderImages:
    if spec.partition(":")[0] == "synthetic":
        return SyntheticFaces.from_spec(spec, size)
    return HubImages(spec) if spec.startswith("hf:") else FolderImages(spec)


@dataclass(frozen=True)
class StudyData:
    """What all cells are trained on and measured on."""

    train: ImageData
    validation: ImageData

    def __post_init__(self) -> None:
        if self.train.size != self.validation.size:
            raise UsageError(
                f"the training images are {self.train.size} px and those to measure on {self.validation.size} px: "
                "set data.size"
            )

    @property
    def is_prepared(self) -> bool:
        """Whether these are the images themselves, and not what stands for them."""
        return not any(isinstance(data, UnpreparedImages) for data in (self.train, self.validation))


def prepare_study_data(config: StudyConfig, out: Path) -> None:
    """Prepare below ``out`` what is not there yet. Errors and stops are those of :func:`prepare`."""
    for name, spec in _specs(config).items():
        if _is_brought_to_size(config, spec) and not _is_there(config, out, name, spec):
            prepare(spec, _size(config), out / "data" / name)


def require_data(config: StudyConfig) -> None:
    """Raise :class:`UsageError` where the configuration names no images."""
    if config.data.train is None:
        raise UsageError("data.train: the study names no images: give --data, and --eval-data for those to measure on")


def _specs(config: StudyConfig) -> dict[str, str]:
    """Return the data sets by the name of their folder; one that is both is prepared once."""
    assert config.data.train is not None, "seen to by require_data"
    validation = config.data.validation
    return {"train": config.data.train, **({} if validation is None else {"validation": validation})}


def _is_brought_to_size(config: StudyConfig, spec: str) -> bool:
    """Return whether the study prepares the images itself."""
    return config.data.size is not None and not is_prepared(Path(spec))


def _is_there(config: StudyConfig, out: Path, name: str, spec: str) -> bool:
    """Return whether the data was prepared before.

    Under the name that it had then the source itself need no longer be there; under another it is known by its files.
    Raises :class:`UsageError` where the folder holds other images: cells would be measured on the one and the other.
    """
    folder, size = out / "data" / name, _size(config)
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    before = manifest.request.get("data")
    if manifest.size == size and (before == spec or manifest.request.get("files") == _source(spec, size).identity()):
        return True
    raise UsageError(
        f"{folder} holds {before} at {manifest.size} px, not {spec} at {size} px: give another --out for other images"
    )


def _size(config: StudyConfig) -> int:
    assert config.data.size is not None, "asked where data is to be prepared"
    return config.data.size


def open_study_data(config: StudyConfig, out: Path, *, prepared: bool = True) -> StudyData:
    """Open the data as the cells see it; where it is not ``prepared`` yet, something of its size.

    Raises :class:`UsageError` where there is no such data, or other images were prepared in ``out``.
    """
    require_data(config)

    def opened(name: str, spec: str) -> ImageData:
        if _is_brought_to_size(config, spec):
            if _is_there(config, out, name, spec):
                return open_data(str(out / "data" / name))
            if not prepared:
                return UnpreparedImages(spec, _size(config))
        return open_data(spec, size=config.data.size)

    data = {name: opened(name, spec) for name, spec in _specs(config).items()}
    return StudyData(data["train"], data.get("validation", data["train"]))
