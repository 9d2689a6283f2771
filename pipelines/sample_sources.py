"""Where the samples of an evaluation come from: a folder of images, or a run that draws them in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..common.errors import UsageError, WavelatentError
from ..common.files import sha256_file
from ..common.image_folders import IMAGE_EXTENSIONS
from .sample_folder import MANIFEST, is_sample
from .sample_images import DEFAULT_OPTIONS, ImageSampler, SampleOptions, batches

LOSSLESS = frozenset({".bmp", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff"})


class SampleSource(Protocol):
    """A known number of samples, what they are, and the samples themselves."""

    def __len__(self) -> int: ...

    def protocol(self) -> dict[str, Any]:
        """Return what identifies the samples."""

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield them as uint8 ``[B,3,H,W]``."""


class SampleFolder:
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

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield them as uint8 ``[B,3,H,W]``."""
        for start in range(0, len(self.paths), batch_size):
            pixels = [self._read(path) for path in self.paths[start : start + batch_size]]
            yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def _read(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.size != self.size:
                    raise WavelatentError(
                        f"{path} is {image.width}x{image.height}, {self.paths[0].name} {self.size[0]}x{self.size[1]}: "
                        "samples must be of one size"
                    )
                if image.mode not in {"RGB", "L"}:
                    raise WavelatentError(f"{path} has mode {image.mode}: save the samples as 8-bit RGB")
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise WavelatentError(f"{path} cannot be read ({error}): draw it again") from error


class RunSamples:
    """Samples drawn from a stage-two run, one per seed, by the very function that ``sample`` writes its images with."""

    def __init__(
        self,
        run: Path,
        seeds: Sequence[int],
        options: SampleOptions = DEFAULT_OPTIONS,
        *,
        device: str | torch.device = "auto",
    ) -> None:
        self.seeds = seeds
        self._sampler = ImageSampler(run, options, device=device)

    def __len__(self) -> int:
        return len(self.seeds)

    def protocol(self) -> dict[str, Any]:
        """Return what decides the images: the run's weights, the sampler and the seeds."""
        return {**self._sampler.protocol(), "seeds": describe_seeds(self.seeds)}

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield them as uint8 ``[B,3,H,W]``."""
        for _, images in batches(self._sampler, self.seeds, batch_size):
            yield images


def _sampling_record(folder: Path) -> dict[str, Any]:
    """Return what ``sample`` wrote beside its images; nothing for images that came from elsewhere."""
    unknown = {"sampler": None, "steps": None, "ema": None}
    try:
        return {**unknown, **json.loads((folder / MANIFEST).read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return unknown
    except ValueError as error:
        raise WavelatentError(f"{folder / MANIFEST} is damaged: draw the samples again") from error


def describe_seeds(seeds: Sequence[int]) -> str:
    """Return seeds as ``first-last`` where they are consecutive, else listed."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _images(root: Path) -> list[Path]:
    if (root / MANIFEST).is_file():
        return sorted((path for path in root.iterdir() if is_sample(path)), key=lambda path: int(path.stem))
    return sorted(path for path in root.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix.lower() in IMAGE_EXTENSIONS
