"""A folder of samples: ``<seed, 6 digits>.png`` and the record of how they were made; and what is made from them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..common.errors import UsageError, WavelatentError
from ..common.files import open_atomically, write_atomically
from ..common.images import save_grid, save_png, to_float

MANIFEST = "samples.json"
CONTACT_SHEET = "contact-sheet.png"
CONTACT_SHEET_IMAGES = 64
MADE_FROM_SAMPLES = (CONTACT_SHEET, "metrics.json")
"""What ``sample`` and ``evaluate`` put beside them."""
WRITERS = 4
"""Threads that compress and write PNG files."""
NOT_COMPARED = ("run", "guide", "guide_ema", "guided_by")
"""Parts of the record that others decide: a run may have moved, its weights count."""

_SEED = re.compile(r"\d{6,}\.png")


class SampleWriter:
    """Reads and writes a folder of samples that were all made as ``record`` says.

    Several processes may write different seeds of one folder at once.
    """

    def __init__(self, out: Path, record: dict[str, Any]) -> None:
        self.out, self.record = out, record

    def check(self, overwrite: bool) -> None:
        """Raise :class:`UsageError` where the folder holds samples made otherwise, or is none of samples."""
        manifest = self.out / MANIFEST
        if manifest.exists():
            if overwrite:
                return
            try:
                recorded = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError as error:
                raise WavelatentError(f"{manifest} is damaged: give --overwrite to start again") from error
            differing = [
                name for name, value in self.record.items() if name not in NOT_COMPARED and recorded.get(name) != value
            ]
            if differing:
                raise UsageError(
                    f"{self.out} holds samples made with another {', '.join(differing)}; "
                    "give another --out, or --overwrite to start again"
                )
        elif self.out.is_file() or (self.out.is_dir() and any(self._visible())):
            raise UsageError(f"{self.out} is not an empty folder nor one of samples; give another --out")

    def open(self, overwrite: bool) -> None:
        """Write the record; with ``overwrite`` remove the samples that are there, and what was made from them."""
        if overwrite and (self.out / MANIFEST).exists():
            for path in self._visible():
                if is_sample(path) or path.name in MADE_FROM_SAMPLES or path.name.startswith("interpolate-"):
                    path.unlink()
            (self.out / MANIFEST).unlink()
        write_atomically(self.out / MANIFEST, json.dumps(self.record, indent=2) + "\n")

    def path(self, seed: int) -> Path:
        """Return where the image of ``seed`` belongs."""
        return self.out / f"{seed:06d}.png"

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Return the seeds that have no image yet, in their order."""
        return [seed for seed in seeds if not self.path(seed).exists()]

    def write(self, seeds: Sequence[int], images: Tensor) -> None:
        """Write images uint8 ``[len(seeds), 3, H, W]``, each whole or not at all. Raises :class:`WavelatentError`."""
        self._write({self.path(seed): image for seed, image in zip(seeds, images, strict=True)})

    def read(self, seed: int) -> NDArray[np.uint8]:
        """Return the image of ``seed``, uint8 ``[H, W, 3]``. Raises :class:`WavelatentError`."""
        try:
            with Image.open(self.path(seed)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise WavelatentError(f"{self.path(seed)} cannot be read ({error}): remove it and draw it again") from error

    def save_contact_sheet(self, path: Path, seeds: Sequence[int]) -> None:
        """Write the first :data:`CONTACT_SHEET_IMAGES` of ``seeds`` as one nearly square PNG."""
        shown = [torch.from_numpy(self.read(seed).copy()) for seed in seeds[:CONTACT_SHEET_IMAGES]]
        images = to_float(torch.stack(shown)).permute(0, 3, 1, 2)
        with _said(path):
            save_grid(path, images, columns=int(np.ceil(np.sqrt(len(shown)))))

    def save_interpolation(self, seed_pair: tuple[int, int], images: Tensor) -> list[str]:
        """Write images uint8 ``[points, 3, H, W]`` and a strip of them; return the names of the files."""
        stem = f"interpolate-{seed_pair[0]}-{seed_pair[1]}"
        names = [f"{stem}-{number}.png" for number in range(len(images))]
        for path in self.out.glob(f"{stem}-*.png"):
            if path.name not in names:  # of an earlier one with more points
                path.unlink()
        self._write({self.out / name: image for name, image in zip(names, images, strict=True)})
        save_grid(self.out / f"{stem}.png", to_float(images), columns=len(images))
        return [*names, f"{stem}.png"]

    def save_npz(self, path: Path, seeds: Sequence[int], labels: Tensor | None) -> None:
        """Write the images of ``seeds``, in that order, as ADM's evaluation reads them, whole or not at all.

        ``arr_0`` is uint8 ``[N, H, W, 3]`` and ``arr_1``, where there are ``labels [N]``, int64 ``[N]`` (Dhariwal and
        Nichol 2021, arXiv 2105.05233). One image is in memory at a time. Raises :class:`WavelatentError` for images
        that cannot be read or are not of one size.
        """
        shape = self.read(seeds[0]).shape
        with _said(path), open_atomically(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            with _open_array(archive, "arr_0", np.dtype(np.uint8), (len(seeds), *shape)) as array:
                for seed in seeds:
                    image = self.read(seed)
                    if image.shape != shape:
                        raise WavelatentError(f"{self.path(seed)} is not of the size of {self.path(seeds[0]).name}")
                    array.write(image.tobytes())
            if labels is not None:
                with _open_array(archive, "arr_1", np.dtype(np.int64), (len(seeds),)) as array:
                    array.write(labels.to(torch.int64).numpy().tobytes())

    def _write(self, images: dict[Path, Tensor]) -> None:
        """Write images uint8 ``[3, H, W]``; in threads, as most of the time goes to waiting for the disk."""

        def write(path: Path, image: Tensor) -> None:
            with _said(path):
                save_png(path, image.permute(1, 2, 0).numpy())

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, images.keys(), images.values()))

    def _visible(self) -> list[Path]:
        """Return what is in the folder besides files that are being written."""
        return [path for path in self.out.iterdir() if not path.name.startswith(".")]


def is_sample(path: Path) -> bool:
    """Return whether ``path`` is named as the image of a seed."""
    return _SEED.fullmatch(path.name) is not None


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Run the block, which writes ``path``, and say what to do where the disk does not take it."""
    try:
        yield
    except OSError as error:
        raise WavelatentError(
            f"{path} cannot be written ({error.strerror or error}): what is written stays; see to the disk and run the "
            "same command again"
        ) from error


def _open_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
    """Return an array of the archive whose header is written and whose values are to follow, in C order."""
    entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: equal images make equal files
    array = archive.open(entry, "w", force_zip64=True)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(array, header)
    return array
