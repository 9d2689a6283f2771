"""The pictures of a report: reconstructions and samples as arrays, and arrays as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..common.errors import WavelatentError
from ..common.images import open_data, read_batch, to_uint8
from ..common.reference_features import choose_images
from .report_runs import Run, Variant

Pixels = NDArray[np.uint8]
"""``[H, W, 3]``."""

GAP = 2
"""White pixels between the images of the trainers' grids, and of ours."""
RECONSTRUCTIONS = 8
SAMPLES = 16


@dataclass(frozen=True)
class Reconstruction:
    """A row of originals and the row of their reconstructions, and where each is from; without rows, why."""

    originals: Pixels | None
    reconstructions: Pixels | None
    source: str
    model: str = ""


@dataclass(frozen=True)
class Samples:
    """Images by seed, or why there are none."""

    images: dict[int, Pixels]
    source: str


def data_uri(png: bytes) -> str:
    """Return PNG bytes as the value of an ``src``."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def to_png(pixels: Pixels) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def tile(images: Sequence[Pixels], columns: int) -> Pixels:
    """Return images of one size in rows of ``columns``, the gaps white."""
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    shape = (rows * (height + GAP) - GAP, min(columns, len(images)) * (width + GAP) - GAP, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = (position // columns) * (height + GAP), (position % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def untile(grid: Pixels, columns: int, count: int) -> list[Pixels]:
    """Return the first ``count`` images of a grid that the trainers saved with ``columns`` square images per row."""
    side = (grid.shape[1] + GAP) // columns - GAP
    places = [divmod(number, columns) for number in range(count)]
    corners = [(row * (side + GAP), column * (side + GAP)) for row, column in places]
    return [grid[top : top + side, left : left + side] for top, left in corners]


def reconstruction(variant: Variant, data: str | None, max_bad_fraction: float = 0.01) -> Reconstruction:
    """Reconstruct images of ``data`` with the variant's autoencoder, or take the last grid that its training saved."""
    if variant.first is None:
        return Reconstruction(None, None, "there is no stage-1 run")
    if data is not None:
        return _reconstruct(variant, variant.first, data, max_bad_fraction)
    found = _last_grid(variant.first)
    if found is None:
        return Reconstruction(None, None, f"{variant.first.path} saved no sample grids; give the report data")
    step, grid = found
    side = (grid.shape[0] - GAP) // 2
    return Reconstruction(
        grid[:side], grid[side + GAP :], "from the training set", f"by the averaged weights at step {step:,}"
    )


def _reconstruct(variant: Variant, run: Run, data: str, max_bad_fraction: float) -> Reconstruction:
    autoencoder = variant.autoencoder
    if autoencoder is None:
        return Reconstruction(None, None, f"the model of {run.path} cannot be loaded")
    try:
        size = int(run.inputs["data"]["transform"]["size"])
        images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
        chosen = choose_images(len(images), min(RECONSTRUCTIONS, len(images)), seed=0)
        originals = read_batch(images, chosen).images
        with torch.no_grad():
            decoded = autoencoder.decode(autoencoder.encode(originals).mode())
    except (WavelatentError, ValueError) as error:
        return Reconstruction(None, None, f"{data} cannot be reconstructed: {error}")
    rows = [
        tile([image.permute(1, 2, 0).numpy() for image in to_uint8(batch)], len(chosen))
        for batch in (originals, decoded)
    ]
    return Reconstruction(rows[0], rows[1], f"from {data}", "through the posterior's mode")


def samples(variant: Variant) -> Samples:
    """Return samples by seed: from the folder that was evaluated, else the last grid that the training saved."""
    run = variant.second
    if run is None:
        return Samples({}, "there is no stage-2 run")
    protocol = (run.evaluation or {}).get("protocol", {})
    folder = (protocol.get("samples") or {}).get("path")
    if folder is not None and (images := _sample_folder(Path(folder))):
        return Samples(images, f"{protocol.get('sampler')}, {protocol.get('steps')} steps, as evaluated")
    if (found := _last_grid(run)) is None:
        return Samples({}, f"{run.path} saved no sample grids")
    step, grid = found
    train = run.config["train"]
    count = min(train["num_samples"], SAMPLES)
    cells = untile(grid, math.isqrt(train["num_samples"] - 1) + 1, count)
    source = f"Heun, {train['sample_steps']} steps, by the averaged weights at training step {step:,}"
    return Samples(dict(enumerate(cells)), source)


def _sample_folder(folder: Path) -> dict[int, Pixels]:
    """Return the images of the lowest seeds in a folder that ``sample`` wrote; empty where it is gone."""
    if not (folder / "samples.json").is_file():
        return {}
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdigit()), key=lambda path: int(path.stem))
    images = {int(path.stem): _open(path) for path in paths[:SAMPLES]}
    return {seed: image for seed, image in images.items() if image is not None}


def _last_grid(run: Run) -> tuple[int, Pixels] | None:
    grids = [path for path in (run.path / "samples").glob("step-*.png") if path.stem.rpartition("-")[2].isdigit()]
    for path in sorted(grids, key=lambda path: -int(path.stem.rpartition("-")[2])):
        if (grid := _open(path)) is not None:
            return int(path.stem.rpartition("-")[2]), grid
    return None


def _open(path: Path) -> Pixels | None:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return None
