"""The ``.npz`` files of ADM's evaluation (Dhariwal and Nichol 2021, arXiv 2105.05233): images, or statistics of them.

``arr_0`` is uint8 ``[N, H, W, 3]``; a reference may hold ``mu`` and ``sigma`` too, the mean and covariance of the
Inception features of a set that may be larger than its images, or nothing else. The images are read through a mapping
of the file, so that memory does not grow with their number; a compressed array is unpacked into a file that has no
name, and is gone with the process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import zipfile
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import UsageError, WavelatentError
from .feature_distances import FeatureStatistics
from .files import sha256_file
from .image_sources import SkippedFile

SUFFIX = ".npz"
_LOCAL_HEADER = 30
_ROWS = 256


class GivenStatistics(FeatureStatistics):
    """Mean ``[dim]`` and covariance ``[dim, dim]`` that were computed elsewhere, of an unknown number of images."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.count = 0
        self._mean, self._covariance = mean.double(), covariance.double()

    @property
    def mean(self) -> Tensor:
        """The mean ``[dim]``."""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """The covariance ``[dim, dim]``."""
        return self._covariance


class NpzFile:
    """What an ``.npz`` of ADM's evaluation holds.

    Attributes:
        images: uint8 ``[N, H, W, 3]``, or None where there is no ``arr_0``.
        statistics: of the features of the reference, or None where there is no ``mu`` and ``sigma``.

    Raises:
        UsageError: there is no such file.
        WavelatentError: it is no such file, or holds neither.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
            self.images = _array(path, "arr_0") if "arr_0" in names else None
            self.statistics = self._statistics() if {"mu", "sigma"} <= names else None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise WavelatentError(f"{path} cannot be read as .npz ({error}): write it with numpy.savez") from error
        if self.images is None and self.statistics is None:
            raise WavelatentError(f"{path} holds neither arr_0 (images) nor mu and sigma (statistics)")
        if self.images is not None:
            _check_images(path, self.images)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return sha256_file(self.path)

    def _statistics(self) -> GivenStatistics:
        mean, covariance = (torch.from_numpy(np.array(_array(self.path, name))) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
        return GivenStatistics(mean, covariance)


class NpzImages:
    """The images of an ``.npz`` as a data set, taken as they are: nothing crops or resizes them.

    Raises:
        UsageError: they are not square, or not of ``size``.
    """

    num_classes = 0

    def __init__(self, file: NpzFile, size: int | None = None) -> None:
        assert file.images is not None, "seen to by the caller"
        self._file, self._images = file, file.images
        height, width = self._images.shape[1:3]
        if height != width or size not in (None, height):
            raise UsageError(f"{file.path} holds images of {width}x{height} px: they are not resized; leave out --size")
        self.spec, self.size = str(file.path), int(height)
        self.transform: dict[str, object] = {"crop": None, "filter": None, "size": self.size}
        self.class_names: list[str] = []
        self.skipped: list[SkippedFile] = []

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 ``[size, size, 3]``."""
        return np.array(self._images[index])

    def name(self, index: int) -> str:
        """Return the row of image ``index``, which has no other name."""
        return f"arr_0[{index}]"

    def label(self, index: int) -> int | None:
        """Return None: the classes that the file may hold play no part here."""
        return None

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self._images.shape, self.transform]).encode())
        for start in range(0, len(self), _ROWS):
            digest.update(self._images[start : start + _ROWS].tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return the sha256 over the pixels; what else is in the file does not matter."""
        return self._fingerprint


def is_npz(spec: str | Path) -> bool:
    """Return whether ``spec`` names an ``.npz``."""
    return Path(spec).suffix.lower() == SUFFIX


def _check_images(path: Path, images: NDArray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise WavelatentError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3]: convert the images"
        )


def _array(path: Path, name: str) -> NDArray:
    """Return an array of the archive, mapped."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            with archive.open(entry) as packed, tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
                unpacked.seek(0)
                return _mapped(unpacked)
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        name_length, extra_length = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:])
        file.seek(entry.header_offset + _LOCAL_HEADER + name_length + extra_length)
        return _mapped(file)


def _mapped(file: IO[bytes]) -> NDArray:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")
