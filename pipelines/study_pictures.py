"""What a study's page draws from the folders of its cells: curves, latents, samples and reconstructions.

Where a folder is gone, what it would show is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.checkpoints import read_json
from ..common.errors import UsageError, WavelatentError
from ..common.latent_cache import MANIFEST as LATENTS_MANIFEST
from ..common.latent_cache import LatentCache
from ..stage1_autoencoder.health_measures import whitened
from ..stage1_autoencoder.health_spectrum import dct_power, radial_bins, radial_mean
from ..stage2_diffusion.sampling import Sampling
from . import report_runs
from .report_figures import TITLES, Figure
from .report_health import FOLDERS, RECORD
from .report_latents import draw_latents
from .report_runs import Run
from .sample_folder import MANIFEST, SampleWriter
from .sample_images import ImageSampler, SampleOptions
from .study_config import StudyEvaluationConfig
from .study_plots import Points, Style, curves
from .study_records import CellRecord

SHOWN = 8
"""Samples of every variant: as many as fit side by side on a telephone."""
SAMPLES = "samples-shown"
"""Folder in a stage-two run of samples that were drawn for the page, where there were none."""
STAGE_TWO_CURVES = ("loss/denoising", "validation/loss", "quick_fid", "quick_kid")


@dataclass(frozen=True)
class CellRuns:
    """A finished cell and its run folders, as far as they are there; cells that share an autoencoder share its run."""

    record: CellRecord
    first: Run | None
    second: Run | None


def read_cells(folder: Path, records: Sequence[CellRecord]) -> list[CellRuns]:
    """Read the runs of every cell in the study's ``folder``, which may have moved since they were trained."""
    found: dict[str, Run | None] = {}

    def read(record: CellRecord, stage: str) -> Run | None:
        name = record.folders.get(stage)
        if name is not None and name not in found:
            try:
                found[name] = Run.read(folder / name)
            except (UsageError, WavelatentError):
                found[name] = None
        return None if name is None else found[name]

    return [
        CellRuns(record, read(record, "autoencoder"), _on_its_latents(read(record, "diffusion"), record, folder))
        for record in records
    ]


def _on_its_latents(run: Run | None, record: CellRecord, folder: Path) -> Run | None:
    """Return a run of stage two with the cache that lies in the study's ``folder``, where one does, as its input."""
    path = folder / record.folders.get("latents", "")
    if run is None or not (path / LATENTS_MANIFEST).is_file():
        return run
    return replace(run, inputs={**run.inputs, "latents": {**run.inputs["latents"], "path": str(path)}})


def shown_variants(cells: Sequence[CellRuns]) -> tuple[int | None, list[report_runs.Variant]]:
    """Return every variant's cell at the first seed at which most have one and still most their weights; and the seed.

    A study may have gone on from cells of which only the measurements and logs were kept.
    """
    by_seed: dict[int, list[CellRuns]] = {}
    for cell in cells:
        if cell.record.failed is None and (cell.first is not None or cell.second is not None):
            by_seed.setdefault(cell.record.seed, []).append(cell)
    if not by_seed:
        return None, []
    seed = max(by_seed, key=lambda seed: (len(by_seed[seed]), sum(map(_has_weights, by_seed[seed]))))
    return seed, [report_runs.Variant(cell.first, cell.second, cell.record.variant) for cell in by_seed[seed]]


def _has_weights(cell: CellRuns) -> bool:
    return cell.second is not None and (cell.second.path / "model" / "model.safetensors").is_file()


def with_samples(
    variants: Sequence[report_runs.Variant], seed: int, evaluation: StudyEvaluationConfig, device: str
) -> list[report_runs.Variant]:
    """Draw the first samples that were evaluated, where a run has none on disk; return the variants with theirs.

    Where they cannot be drawn, because there is no model any more, the page shows the last grid of the training.

    Args:
        variants: each at one seed of the study.
        seed: that seed, which decides the noise of the samples.
        evaluation: how they were drawn.
        device: where to draw them.
    """
    sampling = Sampling(sampler=evaluation.sampler, steps=evaluation.steps, grid=evaluation.grid)
    options = SampleOptions(sampling, pass_rows=evaluation.pass_rows)
    first = seed * evaluation.num_samples
    seeds = range(first, first + min(SHOWN, evaluation.num_samples))
    return [replace(variant, second=_with_samples(variant, seeds, options, device)) for variant in variants]


def _with_samples(variant: report_runs.Variant, seeds: range, options: SampleOptions, device: str) -> Run | None:
    run = variant.second
    if run is None or any(folder.name != SAMPLES for folder in run.sample_folders):
        return run
    autoencoder = None if variant.first is None else str(variant.first.path)
    try:
        sampler = ImageSampler(run.path, options, device=device, autoencoder=autoencoder)
        writer = SampleWriter(run.path / SAMPLES, sampler.protocol())
        writer.open(overwrite=_of_other_weights(writer))
        if missing := writer.missing(seeds):
            writer.write(missing, sampler.draw(missing))
    except WavelatentError:
        return run
    return replace(run, sample_folders=(run.path / SAMPLES,))


def _of_other_weights(writer: SampleWriter) -> bool:
    try:
        writer.check(overwrite=False)
    except UsageError:
        return (writer.out / MANIFEST).exists()
    return False


def own_autoencoders(cells: Sequence[CellRuns]) -> list[CellRuns]:
    """Return the cells without those whose autoencoder an earlier one has."""
    first: dict[Any, CellRuns] = {}
    for cell in cells:
        first.setdefault(cell.record.folders.get("autoencoder", id(cell)), cell)
    return list(first.values())


def stage_one_curves(cells: Sequence[CellRuns], looks: Mapping[str, Style]) -> list[Figure]:
    """Return a plot of PSNR and of every loss that the autoencoders logged; a shared one is its first variant's."""
    runs = [(cell.record.variant, cell.first) for cell in own_autoencoders(cells) if cell.first is not None]
    logged = dict.fromkeys(name for _, run in runs for line in run.curves for name in line if name.startswith("loss/"))
    return _curves(runs, ["psnr", *sorted(logged, key=lambda name: (name != "loss/total", name))], looks)


def stage_two_curves(cells: Sequence[CellRuns], looks: Mapping[str, Style]) -> list[Figure]:
    """Return plots of the denoisers' losses, and of quick figures where training measured any."""
    runs = [(cell.record.variant, cell.second) for cell in cells if cell.second is not None]
    return _curves(runs, STAGE_TWO_CURVES, looks)


def _curves(runs: Sequence[tuple[str, Run]], names: Sequence[str], looks: Mapping[str, Style]) -> list[Figure]:
    figures = []
    for name in names:
        lines: dict[str, list[Points]] = {}
        for variant, run in runs:
            if points := run.logged(name):
                lines.setdefault(variant, []).append(points)
        if lines:
            figures.append(curves(TITLES.get(name, name), lines, looks, log="" if name == "psnr" else "y"))
    return figures


def spectra(cells: Sequence[CellRuns], looks: Mapping[str, Style]) -> Figure | None:
    """Return the radial spectra of the whitened latents, as the health reports have them, beside that of the images.

    Where a cell has no health report, its spectrum is computed from latents of its cache.
    """
    lines: dict[str, list[Points]] = {}
    images: Points = []
    for cell in own_autoencoders(cells):
        figures = _health_figures(cell.first, "spectrum")
        points = _shares(figures.get("frequencies"), figures.get("power")) or _from_cache(cell.second)
        if points:
            lines.setdefault(cell.record.variant, []).append(points)
        images = images or _shares(figures.get("frequencies"), figures.get("image_power"))
    if not lines:
        return None
    return curves(
        "Power by spatial frequency, normalised",
        lines,
        looks,
        ("cycles per latent site", "share of power"),
        log="xy",
        reference=("images", images) if images else None,
    )


def _health_figures(run: Run | None, section: str) -> dict[str, Any]:
    return {} if run is None else health_sections(run.path).get(section, {}).get("figures", {})


def health_sections(run: Path) -> dict[str, Any]:
    """Return the sections of the health report in a run folder; empty where there is none."""
    found = (read_json(run / name / RECORD).get("sections") for name in FOLDERS)
    return next((sections for sections in found if sections), {})


def health_levels(run: Path) -> dict[str, str]:
    """Return the level of every finding of the health report in a run folder, by ``section: name``."""
    return {
        f"{section}: {verdict['name']}": verdict["level"]
        for section, content in health_sections(run).items()
        for verdict in content.get("verdicts", [])
    }


def _shares(frequencies: Sequence[float] | None, power: Sequence[float | None] | None) -> Points:
    if not frequencies or not power or None in power or not (total := sum(p for p in power if p)):
        return []
    return [(f, p / total) for f, p in zip(frequencies, power, strict=True) if p is not None]


def _from_cache(run: Run | None) -> Points:
    if run is None:
        return []
    try:
        latents = draw_latents(LatentCache.open(run.inputs["latents"]["path"], verify=False))
    except (WavelatentError, KeyError):
        return []
    return radial_power(latents)


@torch.no_grad()
def radial_power(latents: Tensor) -> Points:
    """Return ``(frequency, share of power)`` of latents ``[N, C, h, w]``, as the health report's section has them."""
    height, width = latents.shape[2:]
    bins, frequencies = radial_bins(height, width)
    power = radial_mean(dct_power(whitened(latents), height, width).mean(dim=0), bins, len(frequencies))
    return _shares(frequencies.tolist(), power.tolist())
