"""``report``: finished runs side by side, as one HTML page that needs nothing but itself, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_atomically
from .report_figures import Figure, Latents, curve_figures, latents_of
from .report_pictures import (
    Reconstruction,
    Samples,
    data_uri,
    reconstruction,
    samples,
    tile,
    to_png,
)
from .report_runs import Run, Variant, read_variants
from .report_tables import (
    METRICS,
    Cell,
    command_of,
    cost_rows,
    metric_rows,
    protocol_table,
    setting_table,
    summary,
)

COLUMNS = 8
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

    A stage-2 run and the stage-1 run that it names are one variant. What is missing is stated, never filled in.

    Args:
        runs: run folders of either stage.
        out: folder for the report; an earlier one there is replaced.
        title: heading of the page.
        notes: sentences of the caller's own, put first into the summary.
        data: DATA whose images are reconstructed; without it, the grids that training saved are shown.
        max_bad_fraction: how many unreadable or too small files of ``data`` may be skipped.
        commands: command lines that make it all again, where there are better ones than the runs recorded.

    Raises:
        UsageError: one of ``runs`` is not a run folder, or there are none.
    """
    variants = read_variants(runs)
    rows = metric_rows(variants)
    latents = {variant.name: latents_of(variant) for variant in variants}
    lines = [*notes, *summary(variants, rows)]
    page = _render(
        title=title,
        summary=lines,
        names=[variant.name for variant in variants],
        metrics=METRICS,
        rows=list(zip(variants, rows, strict=True)),
        footnotes=_footnotes(variants, rows),
        protocols=[(heading, protocol_table(variants, stage)) for stage, heading in STAGES.items()],
        reconstructions=_reconstruction_strips(variants, data, max_bad_fraction),
        samples=_sample_sheets(variants),
        curves=[(STAGES[stage], _figures(_runs_by_name(variants, stage))) for stage in STAGES],
        latents=[(name, found, _uri(found.figure)) for name, found in latents.items() if found],
        settings=[
            (heading, len(_runs_by_name(variants, stage)), setting_table(variants, stage))
            for stage, heading in STAGES.items()
        ],
        costs=cost_rows(variants),
        commands=list(commands) or _commands(variants),
        versions=_versions(variants),
    )
    record = _record(title, lines, variants, rows, latents)
    write_atomically(out / "report.json", json.dumps(record, indent=2) + "\n")
    write_atomically(out / "index.html", page)
    return out / "index.html"


def _render(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**values)


def _footnotes(variants: Sequence[Variant], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Return why figures are missing or must not be compared; what shares a reason shares a line."""
    reasons: dict[str, dict[str, list[str]]] = {}  # reason -> metric -> variants
    for variant, row in zip(variants, rows, strict=True):
        for metric in METRICS:
            cell = row[metric.key]
            for text in (cell.not_computed and f"not computed: {cell.not_computed}", cell.not_comparable):
                if text:
                    reasons.setdefault(text, {}).setdefault(metric.title, []).append(variant.name)
    lines = []
    for text, metrics in reasons.items():
        names = dict.fromkeys(name for found in metrics.values() for name in found)
        lines.append(f"{', '.join(names)} - {', '.join(metrics)}: {text}")
    return lines


def _reconstruction_strips(
    variants: Sequence[Variant], data: str | None, max_bad_fraction: float
) -> list[dict[str, str | None]]:
    """Return the rows of the section: originals once where they are the same, each variant's reconstructions."""
    strips: list[dict[str, str | None]] = []
    shown: bytes | None = None
    done: set[Path] = set()
    for variant in variants:
        if variant.first is not None and variant.first.path in done:
            continue
        done |= {variant.first.path} if variant.first else set()
        row: Reconstruction = reconstruction(variant, data, max_bad_fraction)
        if row.originals is None or row.reconstructions is None:
            strips.append({"name": variant.name, "missing": row.source, "uri": None, "alt": None})
            continue
        if (originals := to_png(row.originals)) != shown:
            shown = originals
            strips.append(_strip("originals", row.source, originals, "Original images"))
        alt = f"The same images, encoded and decoded by {variant.name}"
        strips.append(_strip(variant.name, row.model, to_png(row.reconstructions), alt))
    return strips


def _strip(name: str, source: str, png: bytes, alt: str) -> dict[str, str | None]:
    return {"name": name, "source": source, "missing": None, "uri": data_uri(png), "alt": alt}


def _sample_sheets(variants: Sequence[Variant]) -> list[dict[str, str | None]]:
    """Return one sheet per variant, of the seeds that all variants with samples have, else of its own."""
    found: dict[str, Samples] = {variant.name: samples(variant) for variant in variants}
    seeds = [set(item.images) for item in found.values() if item.images]
    common = set.intersection(*seeds) if seeds else set()
    sheets: list[dict[str, str | None]] = []
    for name, item in found.items():
        if not item.images:
            sheets.append({"name": name, "missing": item.source, "uri": None, "alt": None})
            continue
        chosen = sorted(common or item.images)
        png = to_png(tile([item.images[seed] for seed in chosen], COLUMNS))
        alt = f"{len(chosen)} images sampled from {name}"
        sheets.append(_strip(name, f"seeds {chosen[0]}-{chosen[-1]}; {item.source}", png, alt))
    return sheets


def _runs_by_name(variants: Sequence[Variant], stage: int) -> dict[str, Run]:
    """Return the runs of one stage by the variant they are shown under first."""
    runs: dict[Path, tuple[str, Run]] = {}
    for variant in variants:
        run = variant.first if stage == 1 else variant.second
        if run is not None:
            runs.setdefault(run.path, (variant.name, run))
    return dict(runs.values())


def _figures(runs: Mapping[str, Run]) -> list[tuple[Figure, str]]:
    return [(figure, data_uri(figure.png)) for figure in curve_figures(runs)]


def _uri(figure: Figure | None) -> str | None:
    return None if figure is None else data_uri(figure.png)


def _commands(variants: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(line for variant in variants for run in variant.runs if (line := command_of(run))))


def _versions(variants: Sequence[Variant]) -> str:
    """Return the software of the runs; several where they differ."""
    found = dict.fromkeys(
        ", ".join(
            [f"{name} {version}" for name, version in run.environment.get("versions", {}).items() if version]
            + ([f"commit {run.environment['git_commit']}"] if run.environment.get("git_commit") else [])
        )
        for variant in variants
        for run in variant.runs
    )
    return "; ".join(text for text in found if text)


def _record(
    title: str,
    lines: Sequence[str],
    variants: Sequence[Variant],
    rows: Sequence[Mapping[str, Cell]],
    latents: Mapping[str, Latents | None],
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
                "not_computed": {key: cell.not_computed for key, cell in row.items() if cell.not_computed},
                "not_comparable": {key: cell.not_comparable for key, cell in row.items() if cell.not_comparable},
                "latents": _latent_record(latents[variant.name]),
            }
            for variant, row in zip(variants, rows, strict=True)
        ],
    }


def _run_record(run: Run) -> dict[str, Any]:
    last = run.curves[-1] if run.curves else {}
    return {
        "path": str(run.path),
        "stage": run.stage,
        "state": run.status.get("state"),
        "parameters": run.parameters,
        "peak_memory_bytes": run.status.get("peak_memory_bytes"),
        "last": last,
        "protocol": (run.evaluation or {}).get("protocol"),
    }


def _latent_record(latents: Latents | None) -> dict[str, Any] | None:
    if latents is None:
        return None
    return {"channels": latents.channels, "saturated": latents.saturated, "note": latents.note}
