"""The reconstructions of a report: the same images through every autoencoder, and those that each did worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import WavelatentError
from ..common.images import open_data, read_batch, to_uint8
from ..common.reference_features import choose_images
from .report_pictures import GAP, Picture, Pixels, last_grid, read_pixels, tile
from .report_runs import Run, Variant, by_run

RECONSTRUCTIONS = 8
WORST = "worst-reconstructions.png"
"""The picture that ``evaluate reconstruction`` leaves beside its metrics."""
WORST_BY = {"lpips": "LPIPS", "psnr": "PSNR"}
"""The figure that chose the images in it: the first of these that was measured."""


@dataclass(frozen=True)
class Reconstruction:
    """A row of originals and the row of their reconstructions, and where each is from; without rows, why."""

    originals: Pixels | None
    reconstructions: Pixels | None
    source: str
    model: str = ""


def reconstruction_strips(
    variants: Sequence[Variant], data: str | None = None, max_bad_fraction: float = 0.01
) -> list[Picture]:
    """Return the rows of the section: originals once where they are the same, each variant's reconstructions.

    They are of images of ``data``, else those of the last grid that training saved.
    """
    strips: list[Picture] = []
    shown: Pixels | None = None
    for name, variant in by_run(variants, 1).items():
        row = reconstruction(variant, data, max_bad_fraction)
        if row.originals is None or row.reconstructions is None:
            strips.append(Picture(name, missing=row.source))
            continue
        if shown is None or shown.shape != row.originals.shape or (shown != row.originals).any():
            shown = row.originals
            strips.append(Picture.of("originals", row.source, shown, "Original images"))
        alt = f"The same images, encoded and decoded by {name}"
        strips.append(Picture.of(name, row.model, row.reconstructions, alt))
    return strips + _without_autoencoder(variants)


def _without_autoencoder(variants: Sequence[Variant]) -> list[Picture]:
    return [Picture(variant.name, missing="there is no stage-1 run") for variant in variants if variant.first is None]


def reconstruction(variant: Variant, data: str | None, max_bad_fraction: float = 0.01) -> Reconstruction:
    """Reconstruct images of ``data`` with the variant's autoencoder, or take the last grid that its training saved."""
    if variant.first is None:
        return Reconstruction(None, None, "there is no stage-1 run")
    if data is not None:
        return _reconstruct(variant, variant.first, data, max_bad_fraction)
    found = last_grid(variant.first)
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


def worst_strips(variants: Sequence[Variant]) -> list[Picture]:
    """Return the pictures of the worst reconstructions that ``evaluate`` left beside each autoencoder's metrics.

    Nothing is reconstructed here, and no picture of another folder is shown.
    """
    strips = []
    for name, variant in by_run(variants, 1).items():
        run = variant.first
        if run is None or run.evaluation is None:
            strips.append(Picture(name, missing="not measured"))
        elif (image := read_pixels(run.evaluation_folder / WORST)) is None:
            strips.append(Picture(name, missing=f"there is no {WORST} beside its metrics"))
        else:
            what = worst_caption(run.evaluation)
            alt = f"The images that {name} reconstructs worst, the originals above: {what}"
            strips.append(Picture.of(name, what, image, alt))
    return strips + _without_autoencoder(variants)


def worst_caption(evaluation: Mapping[str, Any]) -> str:
    """Return which images the worst ones are, and their figures, where the metrics list them."""
    listed = evaluation.get("worst", {})
    by = next((name for name in WORST_BY if listed.get(name)), None)
    if by is None:
        return "the worst first"
    images = [f"{image.get('name') or image['index']} ({image['value']:.3g})" for image in listed[by]]
    return f"by {WORST_BY[by]}: {', '.join(images)}"
