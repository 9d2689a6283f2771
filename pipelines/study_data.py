"""The images of a study: brought to one size in its folder where the configuration asks for it, then opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UsageError
from ..common.images import ImageData, open_data
from ..common.prepared import MANIFEST, is_prepared, read_manifest
from .prepare import prepare
from .study_config import StudyConfig


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


def prepare_study_data(config: StudyConfig, out: Path) -> None:
    """Prepare below ``out`` what is not there yet. Errors and stops are those of :func:`prepare`."""
    for name, spec in _specs(config).items():
        if _is_to_be_prepared(config, out, name, spec):
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


def _is_to_be_prepared(config: StudyConfig, out: Path, name: str, spec: str) -> bool:
    """Return whether the images have still to be brought to ``data.size``."""
    return config.data.size is not None and not is_prepared(Path(spec)) and not _is_there(config, out, name, spec)


def _is_there(config: StudyConfig, out: Path, name: str, spec: str) -> bool:
    """Return whether the data was prepared before: the source itself need no longer be there."""
    if not (out / "data" / name / MANIFEST).is_file():
        return False
    manifest = read_manifest(out / "data" / name)
    return manifest.request.get("data") == spec and manifest.size == config.data.size


def _size(config: StudyConfig) -> int:
    assert config.data.size is not None, "asked where data is to be prepared"
    return config.data.size


def open_study_data(config: StudyConfig, out: Path, *, prepared: bool = True) -> StudyData:
    """Open the data as the cells see it; where it is not ``prepared`` yet, something of its size."""
    require_data(config)

    def opened(name: str, spec: str) -> ImageData:
        if config.data.size is not None and _is_there(config, out, name, spec):
            return open_data(str(out / "data" / name))
        if not prepared and _is_to_be_prepared(config, out, name, spec):
            from .study_estimate import UnpreparedImages

            return UnpreparedImages(spec, _size(config))
        return open_data(spec, size=config.data.size)

    data = {name: opened(name, spec) for name, spec in _specs(config).items()}
    return StudyData(data["train"], data.get("validation", data["train"]))
