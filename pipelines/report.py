"""``report``: finished runs side by side, as one HTML page that needs nothing but itself, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_atomically
from .pages import render
from .report_figures import Figure, curve_figures, interval_figures
from .report_health import LEVELS, Health, health_link, health_of, health_record, health_rows, side_by_side
from .report_latents import Latents, distinct_latents, latent_record, latents_of
from .report_metrics import (
    Cell,
    evaluation_notes,
    footnotes,
    metric_rows,
    metric_tables,
    protocol_of,
    protocol_table,
    summary,
)
from .report_paths import shorten
from .report_pictures import data_uri
from .report_reconstructions import reconstruction_strips, worst_strips
from .report_runs import Run, Variant, by_run, read_variants
from .report_samples import sample_sheets
from .report_tables import (
    COST_HEAD,
    COST_NUMBERS,
    command_of,
    cost_rows,
    progress_table,
    sampling_flops,
    setting_table,
    versions,
)

STAGES = {1: "Stage 1: autoencoder", 2: "Stage 2: diffusion"}


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "Variants side by side",
    notes: Sequence[str] = (),
    data: str | None = None,
    max_bad_fraction: float = 0.01,
    commands: Sequence[str] = (),
) -> Path:
    """Write ``out/index.html`` and ``out/report.json`` about ``runs``; return the path of the page.

    A stage-2 run and the stage-1 run that it names are one variant. What is missing is stated, never filled in. Of
    absolute paths the page shows the last folders only: it can be passed on.

    Args:
        runs: run folders of either stage, and folders of samples, which are shown with the run they are of.
        out: folder for the report; an earlier one there is replaced.
        title: heading of the page.
        notes: sentences of the caller's own, put first into the summary.
        data: DATA whose images are reconstructed; without it, the grids that training saved are shown.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        commands: command lines that make it all again, where there are better ones than the runs recorded.

    Raises:
        UsageError: one of ``runs`` is neither, or there are none.
    """
    variants = read_variants(runs)
    names = [variant.name for variant in variants]
    rows = metric_rows(variants)
    latents = {variant.name: latents_of(variant) for variant in variants}
    health = side_by_side({variant.name: health_of(variant) for variant in variants})
    lines = [*notes, *summary(variants, rows)]
    by_stage = {stage: _runs_by_name(variants, stage) for stage in STAGES}
    sheets, same_seeds = sample_sheets(variants)
    page = render(
        "report.html.j2",
        title=title,
        summary=lines,
        names=names,
        metrics=metric_tables(rows),
        rows=list(zip(variants, rows, strict=True)),
        intervals=_with_uris(interval_figures(names, rows)),
        warnings=evaluation_notes(variants),
        footnotes=footnotes(variants, rows),
        protocols=[(heading, protocol_table(variants, stage)) for stage, heading in STAGES.items()],
        reconstructions=reconstruction_strips(variants, data, max_bad_fraction),
        worst=worst_strips(variants),
        samples=sheets,
        same_seeds=same_seeds,
        curves=[(STAGES[stage], _with_uris(curve_figures(found))) for stage, found in by_stage.items()],
        progress=progress_table(by_stage[2]),
        objectives=len({str(run.config.get("objective")) for run in by_stage[2].values()}),
        latents=[(name, item, _uri(item.figure)) for name, item in distinct_latents(variants, latents).items()],
        health={name: (found, health_link(found, out)) for name, found in health.items() if found},
        undiagnosed=[name for name, found in health.items() if not found],
        health_rows=health_rows(health),
        levels=LEVELS,
        settings=[(STAGES[stage], len(found), setting_table(variants, stage)) for stage, found in by_stage.items()],
        cost_head=COST_HEAD,
        cost_numbers=COST_NUMBERS,
        costs=cost_rows(variants),
        commands=list(commands) or _commands(variants),
        versions=versions(variants),
    )
    record = _record(title, lines, variants, rows, latents, health)
    write_atomically(out / "report.json", json.dumps(record, indent=2) + "\n")
    write_atomically(out / "index.html", shorten(page, _known_paths(variants, out, data)))
    return out / "index.html"


def _runs_by_name(variants: Sequence[Variant], stage: int) -> dict[str, Run]:
    """Return the runs of one stage by the names of the variants that share them."""
    found = {name: variant.stage(stage) for name, variant in by_run(variants, stage).items()}
    return {name: run for name, run in found.items() if run is not None}


def _with_uris(figures: Iterable[Figure]) -> list[tuple[Figure, str]]:
    return [(figure, data_uri(figure.png)) for figure in figures]


def _uri(figure: Figure | None) -> str | None:
    return None if figure is None else data_uri(figure.png)


def _commands(variants: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(line for variant in variants for run in variant.runs if (line := command_of(run))))


def _known_paths(variants: Sequence[Variant], out: Path, data: str | None) -> list[Path]:
    """Return the paths that the page may speak of."""
    found = [out, *([] if data is None else [Path(data)])]
    for variant in variants:
        for run in variant.runs:
            found += [run.path, run.path.resolve(), *run.sample_folders]
            found += [Path(run.inputs[key]["path"]) for key in ("latents", "autoencoder") if key in run.inputs]
            found += [Path(run.inputs["data"]["spec"])]
            protocol = protocol_of(run)
            found += [Path(protocol["reference"])] if protocol.get("reference") else []
    return found


def _record(
    title: str,
    lines: Sequence[str],
    variants: Sequence[Variant],
    rows: Sequence[Mapping[str, Cell]],
    latents: Mapping[str, Latents | None],
    health: Mapping[str, Health | None],
) -> dict[str, Any]:
    """Return the numbers of the page as plain JSON values."""
    return {
        "title": title,
        "summary": list(lines),
        "variants": [
            {
                "name": variant.name,
                "notes": variant.notes,
                "runs": [_run_record(run) for run in variant.runs],
                "metrics": {key: cell.value for key, cell in row.items() if cell.value is not None},
                "intervals": {key: list(cell.interval) for key, cell in row.items() if cell.interval},
                "extrapolated": {key: cell.extrapolated for key, cell in row.items() if cell.extrapolated is not None},
                "not_computed": {key: cell.not_computed for key, cell in row.items() if cell.not_computed},
                "not_comparable": {key: cell.not_comparable for key, cell in row.items() if cell.not_comparable},
                "latents": latent_record(latents[variant.name]),
                "health": health_record(health[variant.name]),
                "sampling_flops": sampling_flops(variant),
            }
            for variant, row in zip(variants, rows, strict=True)
        ],
    }


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "stage": run.stage,
        "state": run.status.get("state"),
        "parameters": run.parameters,
        "flops": run.flops,
        "peak_memory_bytes": run.status.get("peak_memory_bytes"),
        "last": run.curves[-1] if run.curves else {},
        "best": run.best,
        "protocol": (run.evaluation or {}).get("protocol"),
    }
