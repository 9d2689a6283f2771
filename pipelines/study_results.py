"""What a study's folders say once cells are done: a record per cell, and the setting that all of them share.

Neither names a path of the machine: data goes by its fingerprint, folders are relative to the study's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ..common.checkpoints import read_json
from ..common.evaluation import Result
from ..common.images import ImageData
from .sample_sources import describe_seeds
from .study_cells import FINAL_STATES, StudyCell, Task, Workbench, encoding_seconds
from .study_config import StudyConfig
from .study_design import Variant
from .study_networks import Networks
from .study_records import CellRecord

PATHS = {"path", "reference", "run", "guide", "samples"}
"""Entries of an evaluation's protocol that say where something lay when it was measured."""


def state_of(cell: StudyCell, bench: Workbench) -> str:
    """Return how far a cell is: that of stage two, or of stage one where that is not finished."""
    first = bench.state(cell.autoencoder)
    return bench.state(cell.diffusion) if first in FINAL_STATES else first


def record_of(cell: StudyCell, bench: Workbench, root: Path, networks: Networks) -> CellRecord | None:
    """Return what is known of a cell that is finished or has failed; None of any other."""
    if state_of(cell, bench) not in FINAL_STATES:
        return None
    first, second = cell.autoencoder, cell.diffusion
    folders = {"autoencoder": first.folder, "latents": first.latents, "diffusion": second.folder}
    known: dict[str, Any] = {
        "variant": cell.variant.name,
        "levels": cell.variant.levels,
        "seed": cell.seed,
        "failed": bench.failure(second),
        "folders": {name: folder.relative_to(root).as_posix() for name, folder in folders.items()},
    }
    health = bench.health(first.folder)
    results = {"reconstruction": bench.reconstruction(first.folder), "generation": bench.generation(second)}
    measured = {name: result for name, result in results.items() if result is not None}
    return CellRecord(
        **known,
        metrics={name: value for result in measured.values() for name, value in result.metrics.items()},
        intervals={name: value for result in measured.values() for name, value in result.intervals.items()},
        health=health_figures(health),
        verdicts=health_verdicts(health),
        cost=_cost(first, second, measured, health, networks),
        protocol={name: without_paths(result.protocol) for name, result in measured.items()},
    )


def health_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a health report as ``section.figure``; of one per channel, the mean over the channels."""
    figures = {}
    for section, content in record.get("sections", {}).items():
        for name, value in content["figures"].items():
            values = [item for item in (value if isinstance(value, list) else [value]) if _is_number(item)]
            counted = name.startswith("images") or name.endswith("_images")  # how many were looked at
            if values and not counted and name != "seconds":
                figures[f"{section}.{name}"] = math.fsum(values) / len(values)
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def health_verdicts(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return ``section: name`` of the verdicts that are faults or notes."""
    return tuple(
        f"{section}: {verdict['name']}"
        for section, content in record.get("sections", {}).items()
        for verdict in content["verdicts"]
        if verdict["level"] != "ok"
    )


def without_paths(protocol: Any) -> Any:
    """Return a protocol without what says where something lay."""
    if not isinstance(protocol, Mapping):
        return protocol
    return {name: without_paths(value) for name, value in protocol.items() if name not in PATHS}


def setting_of(
    cells: Sequence[StudyCell],
    records: Sequence[CellRecord],
    bench: Workbench,
    networks: Mapping[str, Networks],
    mixed_precision: str,
) -> dict[str, Any]:
    """Return what is the same for all cells, and what of it is not and ought to be known.

    ``protocol`` has what both evaluations of every record agree in; ``environments`` every machine and set of versions
    that a run was trained on. ``unfinished`` are the cells that there is no record of yet.
    """
    recorded = {(record.variant, record.seed) for record in records}
    variants = {cell.variant.name: cell.variant for cell in cells}
    folders = sorted({task.folder for cell in cells for task in (cell.autoencoder, cell.diffusion)})
    environments = [found for folder in folders if (found := read_json(folder / "environment.json"))]
    return {
        "seeds": list(bench.config.seeds),
        "sample_seeds": {str(seed): describe_seeds(bench.seeds(seed)) for seed in bench.config.seeds},
        "images_seen": _by_stage(variants.values(), lambda train: train.images_at(train.steps)),
        "steps": _by_stage(variants.values(), lambda train: train.steps),
        "mixed_precision": mixed_precision,
        "flips": bench.config.flips,
        "data": {
            "train": _described(bench.data.train),
            "validation": _described(bench.data.validation),
            "validation_is_train": bench.data.validation.fingerprint() == bench.data.train.fingerprint(),
            "num_reconstructions": bench.num_reconstructions,
            "num_health_images": bench.num_health,
        },
        "protocol": {
            name: _shared([record.protocol[name] for record in records if name in record.protocol])
            for name in ("reconstruction", "generation")
        },
        "networks": {name: found.as_dict() for name, found in networks.items()},
        "environments": _distinct(
            {name: environment.get(name) for name in ("versions", "hardware", "processes")}
            for environment in environments
        ),
        "git_commits": sorted({commit for each in environments if (commit := each.get("git_commit"))}),
        "unfinished": [
            {"variant": cell.variant.name, "seed": cell.seed, "state": state_of(cell, bench)}
            for cell in cells
            if (cell.variant.name, cell.seed) not in recorded
        ],
    }  # fmt: skip


def public_config(config: StudyConfig) -> dict[str, Any]:
    """Return the configuration as plain values; of a data set that is a folder, its name alone."""
    content = config.model_dump(mode="json")
    for name in ("train", "validation"):
        spec = content["data"][name]
        if spec is not None and not spec.startswith(("synthetic", "hf:")):
            content["data"][name] = PurePath(spec).name
    return content


def last_logged(run: Path) -> dict[str, Any]:
    """Return the last whole line of a run's log; empty where there is none."""
    log = run / "metrics.jsonl"
    for line in reversed(log.read_text(encoding="utf-8").splitlines() if log.is_file() else []):
        try:
            return json.loads(line)
        except ValueError:  # cut short by a crash
            continue
    return {}


def _cost(
    first: Task, second: Task, measured: Mapping[str, Result], health: Mapping[str, Any], networks: Networks
) -> dict[str, float]:
    return {
        "autoencoder_seconds": last_logged(first.folder).get("seconds", 0.0),
        "encoding_seconds": encoding_seconds(first.folder),
        "diffusion_seconds": last_logged(second.folder).get("seconds", 0.0),
        **{f"{name}_seconds": result.seconds for name, result in measured.items()},
        "health_seconds": health.get("seconds", 0.0),
        "autoencoder_parameters": networks.autoencoder_parameters,
        "denoiser_parameters": networks.denoiser_parameters,
    }


def _described(data: ImageData) -> dict[str, Any]:
    transform = {name: data.transform.get(name) for name in ("crop", "filter")}
    return {"count": len(data), "size": data.size, "fingerprint": data.fingerprint(), **transform}


def _by_stage(variants: Iterable[Variant], figure: Any) -> dict[str, Any]:
    """Return a figure of both stages' training: one number, or by variant where they differ."""
    found: dict[str, Any] = {}
    by_name = {variant.name: variant.recipe for variant in variants}
    for stage in ("autoencoder", "diffusion"):
        values = {name: figure(getattr(recipe, stage).train) for name, recipe in by_name.items()}
        found[stage] = next(iter(values.values())) if len(set(values.values())) == 1 else values
    return found


def _shared(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries that are the same in all of ``contents``."""
    first, *others = contents or [{}]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _distinct(contents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(content, sort_keys=True) for content in contents)]
