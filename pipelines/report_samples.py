"""The samples of a report: sheets of the same seeds, one per folder of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.checkpoints import read_json
from .report_metrics import protocol_of
from .report_pictures import Picture, Pixels, last_grid, read_pixels, tile, untile
from .report_runs import Run, Variant
from .sample_folder import MANIFEST, is_sample

SAMPLES = 16
COLUMNS = 4
"""Of a sheet: four times four are large enough to see on a telephone, and two sheets fit side by side elsewhere."""
WIDEST = 800


@dataclass(frozen=True)
class SampleSet:
    """Images by seed, or the files that they are in, and how they were drawn; without images, why there are none."""

    name: str
    source: str
    images: Mapping[int, Path | Pixels]

    def image(self, seed: int) -> Pixels | None:
        """Return the image of ``seed``; None where it cannot be read."""
        found = self.images[seed]
        return read_pixels(found) if isinstance(found, Path) else found


def sample_sheets(
    variants: Sequence[Variant], *, count: int = SAMPLES, columns: int = COLUMNS, widest: int = WIDEST
) -> tuple[list[Picture], bool]:
    """Return a sheet per set of samples, and whether all show the same seeds: where they share none, each its own.

    A sheet has at most ``count`` images in rows of ``columns``, and is at most ``widest`` pixels wide.
    """
    sets = [found for variant in variants for found in sample_sets(variant)]
    with_images = [found for found in sets if found.images]
    shared = _read_shared(with_images, count)
    sheets = []
    for found in sets:
        if not found.images:
            sheets.append(Picture(found.name, missing=found.source))
            continue
        seeds, images = shared[id(found)] if shared else _read(found, sorted(found.images), count)
        if not images:
            sheets.append(Picture(found.name, missing="none of the samples can be read"))
            continue
        alt = f"{len(images)} images sampled from {found.name}"
        sheets.append(Picture.of(found.name, f"{_seeds(seeds)}; {found.source}", tile(images, columns), alt, widest))
    return sheets, bool(shared) or not with_images


def _read_shared(sets: Sequence[SampleSet], count: int) -> dict[int, tuple[list[int], list[Pixels]]]:
    """Return per set the lowest seeds that all have and whose images can all be read; empty where there are none."""
    common = sorted(set.intersection(*(set(found.images) for found in sets))) if sets else []
    seeds: list[int] = []
    rows: list[list[Pixels]] = []
    for seed in common:
        images = [image for found in sets if (image := found.image(seed)) is not None]
        if len(images) == len(sets):
            seeds.append(seed)
            rows.append(images)
        if len(seeds) == count:
            break
    if not seeds:
        return {}
    return {id(found): (seeds, [row[number] for row in rows]) for number, found in enumerate(sets)}


def _read(found: SampleSet, seeds: Sequence[int], count: int) -> tuple[list[int], list[Pixels]]:
    readable = [(seed, image) for seed in seeds[: 2 * count] if (image := found.image(seed)) is not None][:count]
    return [seed for seed, _ in readable], [image for _, image in readable]


def _seeds(seeds: Sequence[int]) -> str:
    whole = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"seeds {seeds[0]}-{seeds[-1]}" if whole else f"seeds {', '.join(map(str, seeds))}"


def sample_sets(variant: Variant) -> list[SampleSet]:
    """Return the variant's folders of samples, the evaluated one first, else the last grid that the training saved."""
    run = variant.second
    if run is None:
        return [SampleSet(variant.name, "there is no stage-2 run", {})]
    evaluated = (protocol_of(run).get("samples") or {}).get("path")
    folders = ([] if evaluated is None else [Path(evaluated)]) + list(run.sample_folders)
    found = []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        record = read_json(folder / MANIFEST)
        images: dict[int, Path | Pixels] = {int(p.stem): p for p in folder.glob("*.png") if is_sample(p)}
        if record and images:
            how = ", as evaluated" if evaluated is not None and folder == Path(evaluated) else f", in {folder.name}"
            found.append(SampleSet(variant.name, f"{_drawn(record)}{how}", images))
    return found or [_trained(variant.name, run)]


def _drawn(record: Mapping[str, Any]) -> str:
    """Say how samples were drawn, from what ``sample`` recorded."""
    parts = [f"{record.get('sampler')}, {record.get('steps')} steps"]
    if record.get("guidance", 1) != 1:
        parts.append(f"guidance {record['guidance']:g}{' by another run' if record.get('guide_sha256') else ''}")
    if isinstance(record.get("ema"), int | float | str):
        parts.append(f"EMA {record['ema']}")
    return ", ".join(parts)


def _trained(name: str, run: Run) -> SampleSet:
    if (found := last_grid(run)) is None:
        return SampleSet(name, f"{run.path} saved no sample grids", {})
    step, grid = found
    train = run.config["train"]
    count = min(train["num_samples"], SAMPLES)
    cells = untile(grid, math.isqrt(train["num_samples"] - 1) + 1, count)
    source = f"{train['sample_steps']} steps, by the averaged weights at training step {step:,}"
    return SampleSet(name, source, dict(enumerate(cells)))
