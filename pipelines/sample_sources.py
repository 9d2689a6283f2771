"""Where the samples of an evaluation come from: a folder of images, an ``.npz``, or a run that draws them in memory."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..common.adm_npz import NpzFile, is_npz
from ..common.errors import UsageError, WavelatentError
from ..common.files import sha256_file
from ..common.image_folders import IMAGE_EXTENSIONS
from .sample_folder import MANIFEST, is_sample
from .sample_images import DEFAULT_OPTIONS, ImageSampler, SampleOptions, whole_passes

LOSSLESS = frozenset({".bmp", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff"})


_MODES = {"P": " (a palette)", "PA": " (a palette)", "RGBA": " (alpha)", "LA": " (alpha)", "1": " (black and white)"}
UNKNOWN_SAMPLING = {"sampler": None, "steps": None, "ema": None}
_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "JPEG2000", "GIF", "AVIF"})
"""Formats that Pillow may find in a file whatever its ending says; a GIF's palette loses colours."""


class SampleSource(ABC):
    """A known number of samples of one size, what they are, and the samples themselves, by number.

    Attributes:
        size: width and height in pixels.
    """

    size: tuple[int, int]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def identity(self) -> str:
        """Return what tells a process that another one has other samples; cheaper than to read them."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Return what identifies the samples."""

    @abstractmethod
    def images(self, numbers: range) -> Tensor:
        """Return the samples of these numbers as uint8 ``[B,3,H,W]``, the same whatever else is asked for."""

    def whole_batch(self, batch_size: int) -> int:
        """Return how many images at a time are best asked for: no fewer than ``batch_size``."""
        return batch_size

    def notes(self) -> list[str]:
        """Return what a reader of the figures must know of the samples."""
        return []


def open_samples(samples: Path, num: int | None) -> SampleSource:
    """Return the first ``num`` (None: all) samples of a folder or an ``.npz``, with the errors of their classes."""
    return SampleArray(samples, num) if is_npz(samples) else SampleFolder(samples, num)


class SampleFolder(SampleSource):
    """The images directly in a folder, by name; the first ``num`` of them, or all.

    In a folder that ``sample`` wrote they are the images of seeds, by seed, and nothing else that it made there.

    Raises:
        UsageError: there is no such folder.
        WavelatentError: there are none or fewer than ``num``, or one is in a lossy format, whose artefacts move FID.
    """

    def __init__(self, root: Path, num: int | None) -> None:
        if not root.is_dir():
            raise UsageError(f"--samples {root}: there is no such folder")
        paths = _images(root)
        if lossy := [path for path in paths if path.suffix.lower() not in LOSSLESS]:
            raise WavelatentError(
                f"{lossy[0]} is in a lossy format ({len(lossy)} such files): its artefacts would change FID; "
                "save the samples as PNG"
            )
        if not paths or (num is not None and len(paths) < num):
            raise WavelatentError(
                f"{root} holds {len(paths)} images, {num or 'at least 1'} asked for: draw more samples"
            )
        self.root, self.paths = root, paths[:num]
        with Image.open(self.paths[0]) as first:
            self.size = first.size

    def __len__(self) -> int:
        return len(self.paths)

    def identity(self) -> str:
        """Return a digest of the files' names and sizes."""
        listing = "".join(f"{path.name}\0{path.stat().st_size}\n" for path in self.paths)
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def protocol(self) -> dict[str, Any]:
        """Return the folder, a fingerprint over the files' bytes, and how they were drawn where ``sample`` says so."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.name.encode() + bytes.fromhex(sha256_file(path)))
        seeds = [int(path.stem) for path in self.paths if path.stem.isdigit()]
        return {
            **_sampling_record(self.root),
            "seeds": describe_seeds(sorted(seeds)) if len(seeds) == len(self.paths) else None,
            "samples": {"path": str(self.root), "fingerprint": digest.hexdigest()},
        }

    def images(self, numbers: range) -> Tensor:
        """Return the samples of these numbers as uint8 ``[B,3,H,W]``. Raises :class:`WavelatentError`."""
        pixels = [self._read(path) for path in self.paths[numbers.start : numbers.stop]]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def notes(self) -> list[str]:
        """Flag grey images, of which the first is named."""
        grey = [path.name for path in self.paths if _mode(path) == "L"]
        return [f"grey-samples: {len(grey)} of the samples are grey ({grey[0]} is the first)"] if grey else []

    def _read(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.size != self.size:
                    raise WavelatentError(
                        f"{path} is {image.width}x{image.height}, {self.paths[0].name} {self.size[0]}x{self.size[1]}: "
                        "samples must be of one size"
                    )
                if image.format in _LOSSY or image.info.get("compression") == "jpeg":
                    raise WavelatentError(
                        f"{path} holds {image.format} data: its artefacts would change FID; draw the samples as PNG"
                    )
                if image.mode not in {"RGB", "L"}:
                    raise WavelatentError(
                        f"{path} has mode {image.mode}{_MODES.get(image.mode, '')}: save the samples as 8-bit RGB"
                    )
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise WavelatentError(f"{path} cannot be read ({error}): draw it again") from error


class SampleArray(SampleSource):
    """The images of an ``.npz`` as ADM's evaluation reads it (``arr_0``); the first ``num`` of them, or all.

    Raises:
        UsageError: there is no such file.
        WavelatentError: it holds no images, or fewer than ``num``.
    """

    def __init__(self, path: Path, num: int | None) -> None:
        self._file = NpzFile(path)
        if self._file.images is None:
            raise WavelatentError(f"{path} holds statistics and no images (arr_0): give it as --data, not as --samples")
        if num is not None and len(self._file.images) < num:
            raise WavelatentError(f"{path} holds {len(self._file.images)} images, {num} asked for: draw more samples")
        self._images = self._file.images[:num]
        height, width = self._images.shape[1:3]
        self.size = (width, height)

    def __len__(self) -> int:
        return len(self._images)

    def identity(self) -> str:
        """Return how many images there are and how large the file is."""
        return f"{len(self)} images, {self._file.path.stat().st_size} bytes"

    def protocol(self) -> dict[str, Any]:
        """Return the file and its fingerprint; it does not say how it was drawn."""
        samples = {"path": str(self._file.path), "fingerprint": self._file.fingerprint}
        return {**UNKNOWN_SAMPLING, "seeds": None, "samples": samples}

    def images(self, numbers: range) -> Tensor:
        """Return the samples of these numbers as uint8 ``[B,3,H,W]``."""
        return torch.from_numpy(np.array(self._images[numbers.start : numbers.stop])).permute(0, 3, 1, 2)


class RunSamples(SampleSource):
    """Samples drawn from a stage-two run, one per seed, by the very function that ``sample`` writes its images with."""

    def __init__(
        self,
        run: Path,
        seeds: Sequence[int],
        options: SampleOptions = DEFAULT_OPTIONS,
        *,
        device: str | torch.device = "auto",
        autoencoder: str | None = None,
    ) -> None:
        self.seeds = seeds
        self._sampler = ImageSampler(run, options, device=device, autoencoder=autoencoder)

    def __len__(self) -> int:
        return len(self.seeds)

    def identity(self) -> str:
        """Return the hashes of all weights that decide an image."""
        return self._sampler.identity()

    def protocol(self) -> dict[str, Any]:
        """Return what decides the images: the run's weights, the sampler and the seeds."""
        return {**self._sampler.protocol(), "seeds": describe_seeds(self.seeds)}

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        """Width and height in pixels, as they follow from the latents' and the autoencoder."""
        sampler = self._sampler
        height, width = (side * sampler.decoder.downsampling for side in sampler.model.latent_shape[1:])
        return width, height

    def whole_batch(self, batch_size: int) -> int:
        """Return a batch of whole passes: a part of one costs as much."""
        return whole_passes(batch_size, self._sampler.options.pass_rows)

    def images(self, numbers: range) -> Tensor:
        """Return the samples of these numbers as uint8 ``[B,3,H,W]``."""
        return self._sampler.draw(self.seeds[numbers.start : numbers.stop])


def _sampling_record(folder: Path) -> dict[str, Any]:
    """Return what ``sample`` wrote beside its images; nothing for images that came from elsewhere."""
    try:
        return {**UNKNOWN_SAMPLING, **json.loads((folder / MANIFEST).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return dict(UNKNOWN_SAMPLING)
    except ValueError as error:
        raise WavelatentError(f"{folder / MANIFEST} is damaged: draw the samples again") from error


def chosen_seeds(num: int | None, seeds: Sequence[int] | None, first: int) -> Sequence[int]:
    """Return the first ``num`` (None: all) of ``seeds``, or ``num`` of them from ``first`` on.

    Raises:
        UsageError: neither is given, or there are not so many.
    """
    if seeds is None and num is None:
        raise UsageError("--run needs --num N: how many samples to draw")
    chosen = range(first, first + (num or 0)) if seeds is None else seeds[:num]
    if not chosen or (num is not None and len(chosen) < num):
        raise UsageError(f"--num {num}: ask for at least 1 sample, and no more than there are seeds")
    return chosen


def describe_seeds(seeds: Sequence[int]) -> str:
    """Return seeds as ``first-last`` where they are consecutive, else listed."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def _images(root: Path) -> list[Path]:
    if (root / MANIFEST).is_file():
        return sorted((path for path in root.iterdir() if is_sample(path)), key=lambda path: int(path.stem))
    return sorted(path for path in root.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix.lower() in IMAGE_EXTENSIONS
