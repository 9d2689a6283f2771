"""The figures of a study as text: what its page and its Markdown summary both say, each written once."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .ablate_tables import signed
from .comparison import flatten, plain
from .metric_columns import METRICS
from .report_tables import duration, short_count
from .study_config import StudyConfig
from .study_design import Variant
from .study_findings import Analysis, Bounds, Contrast, Effect, Interaction, Predictor, Summary
from .study_records import CellRecord

NONE = "–"
AT_THIS_SCALE = "at this scale"
EXPECTED = {"better": "better", "worse": "worse", "no_worse": "no worse"}


@dataclass(frozen=True)
class Table:
    """A table of text; ``text_columns`` are those that are not figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class ClaimRow:
    """A claim, the verdict, and per comparison what was expected, what came out and of how much."""

    name: str
    statement: str
    verdict: str
    reason: str
    comparisons: Sequence[str]
    effects: Sequence[str]
    seeds: str
    images: str


@dataclass(frozen=True)
class MetricCell:
    """One metric of one variant: mean and deviation, and per seed the value with its interval over images."""

    text: str
    seeds: Sequence[str]


@dataclass(frozen=True)
class EffectCell:
    """One effect: estimate and interval, and whether it is for the better, for the worse, or neither for sure."""

    text: str
    interval: str = ""
    better: bool | None = None


def claim_rows(config: StudyConfig, analysis: Analysis, records: Sequence[CellRecord]) -> list[ClaimRow]:
    """Return a row per claim, in the order of the configuration."""
    rows = []
    for claim in analysis.claims:
        several = len(claim.parts) > 1
        comparisons, effects = [], []
        for part in claim.parts:
            margin = f" than by {margin_text(part.effect, part.margin)}" if part.margin else ""
            outcome = f": {part.verdict}" if several else ""
            label = METRICS[part.effect.metric].label
            what = f"{label}, {effect_label(part.effect)}"
            comparisons.append(f"{what}; expected {EXPECTED[part.expect]}{margin}{outcome}")
            effects.append(effect_text(part.effect, part.effect.simultaneous))
        rows.append(
            ClaimRow(
                claim.name,
                claim.statement,
                claim.verdict,
                claim.reason,
                comparisons,
                effects,
                _each_once(", ".join(map(str, part.effect.seeds)) or "none" for part in claim.parts),
                _each_once(images_of(config, records, part.effect.metric) for part in claim.parts),
            )
        )
    return rows


def effect_label(effect: Effect) -> str:
    """Return ``bottleneck bounded against kl``, and at which levels of others."""
    at = ", ".join(
        f"{factor} {level}" + (f" against {effect.against_at[factor]}" if factor in effect.against_at else "")
        for factor, level in effect.at.items()
    )
    return f"{effect.factor} {effect.level} against {effect.against}" + (f" (at {at})" if at else "")


def effect_text(contrast: Contrast, bounds: Bounds | None) -> str:
    """Return an effect on its scale, ``×0.91 [0.80, 1.03]`` or ``+0.52 [+0.10, +0.94]``; else why there is none."""
    if contrast.estimate is None:
        return contrast.reason or NONE
    interval = f" {interval_text(contrast, bounds)}" if bounds else f" ({contrast.reason})" if contrast.reason else ""
    return _on_scale(contrast, contrast.estimate) + interval


def interval_text(contrast: Contrast, bounds: Bounds | None) -> str:
    """Return the bounds of an effect in brackets; empty where there are none."""
    if bounds is None:
        return ""
    digits = METRICS[contrast.metric].digits
    texts = [f"{bound:.3g}" if contrast.scale == "ratio" else signed(bound, digits) for bound in bounds]
    return f"[{', '.join(texts)}]"


def _on_scale(contrast: Contrast, value: float) -> str:
    return f"×{value:.3g}" if contrast.scale == "ratio" else signed(value, METRICS[contrast.metric].digits)


def margin_text(effect: Effect, margin: float) -> str:
    """Return a margin in the unit of its metric."""
    return f"{100 * margin:g} %" if effect.scale == "ratio" else f"{margin:g}"


def is_better(contrast: Contrast, bounds: Bounds | None) -> bool | None:
    """Return whether ``bounds`` are wholly on the better side of no effect, or on the worse; None is neither."""
    if bounds is None:
        return None
    none = 1 if contrast.scale == "ratio" else 0
    if bounds[0] <= none <= bounds[1]:
        return None
    return (bounds[0] > none) == METRICS[contrast.metric].higher_is_better


def images_of(config: StudyConfig, records: Sequence[CellRecord], metric: str) -> str:
    """Return how many images a metric of each cell is over."""
    if METRICS[metric].stage == 2:
        return f"{config.evaluation.num_samples:,} samples"
    found = {found for record in records if (found := _reconstructions(record)) is not None}
    counts = sorted(found) or [config.evaluation.num_reconstructions]
    return " or ".join("all" if count is None else f"{count:,}" for count in counts) + " reconstructions"


def _reconstructions(record: CellRecord) -> int | None:
    found = record.protocol.get("reconstruction")
    return found.get("num_samples") if isinstance(found, Mapping) else None


def shown_metrics(analysis: Analysis, stage: int | None = None) -> list[str]:
    """Return the metrics that any variant has, of one stage or of both; those of the samples first."""
    return [
        name
        for name, column in METRICS.items()
        if stage in (None, column.stage) and any(name in variant for variant in analysis.variants.values())
    ]


def metric_cells(
    variants: Sequence[Variant], analysis: Analysis, records: Sequence[CellRecord], metrics: Sequence[str]
) -> dict[str, list[MetricCell]]:
    """Return per variant a cell for every one of ``metrics``."""
    intervals = {(record.variant, record.seed): record.intervals for record in records}
    cells: dict[str, list[MetricCell]] = {}
    for variant in variants:
        found = analysis.variants.get(variant.name, {})
        cells[variant.name] = [
            MetricCell(
                summary_text(metric, found.get(metric)),
                [
                    f"seed {seed}: {_number(metric, value)}{_bounds(metric, intervals.get((variant.name, seed), {}))}"
                    for seed, value in zip(found[metric].seeds, found[metric].values, strict=True)
                ]
                if metric in found
                else [],
            )
            for metric in metrics
        ]
    return cells


def summary_text(metric: str, summary: Summary | None) -> str:
    """Return ``mean ± s.d.``, the mean alone of one seed, or a dash."""
    if summary is None:
        return NONE
    spread = "" if summary.std is None else f" ± {_number(metric, summary.std)}"
    return _number(metric, summary.mean) + spread


def _number(metric: str, value: float) -> str:
    return f"{value:.{METRICS[metric].digits}f}"


def _bounds(metric: str, intervals: Mapping[str, Sequence[float]]) -> str:
    return f" [{', '.join(_number(metric, bound) for bound in intervals[metric])}]" if metric in intervals else ""


def effect_rows(effects: Sequence[Effect], metrics: Sequence[str]) -> dict[str, list[tuple[str, list[EffectCell]]]]:
    """Return, by factor, what each level does against another: a label and a cell for every one of ``metrics``."""
    rows: dict[str, dict[str, dict[str, Effect]]] = {}
    for effect in effects:
        rows.setdefault(effect.factor, {}).setdefault(effect_label(effect), {})[effect.metric] = effect
    return {
        factor: [
            (label.removeprefix(f"{factor} "), [_effect_cell(of.get(metric)) for metric in metrics])
            for label, of in labels.items()
        ]
        for factor, labels in rows.items()
    }


def _effect_cell(contrast: Contrast | None) -> EffectCell:
    if contrast is None or contrast.estimate is None:
        return EffectCell(NONE, contrast.reason or "" if contrast else "")
    interval = interval_text(contrast, contrast.interval) or contrast.reason or ""
    return EffectCell(_on_scale(contrast, contrast.estimate), interval, is_better(contrast, contrast.interval))


def interaction_rows(interactions: Sequence[Interaction], metrics: Sequence[str]) -> list[tuple[str, list[EffectCell]]]:
    """Return how far two levels together do other than each alone says: a label and a cell for every metric."""
    rows: dict[str, dict[str, Interaction]] = {}
    for one in interactions:
        label = " with ".join(f"{factor} {level}" for factor, level in zip(one.factors, one.levels, strict=True))
        rows.setdefault(label, {})[one.metric] = one
    return [(label, [_effect_cell(of.get(metric)) for metric in metrics]) for label, of in rows.items()]


def predictor_table(predictors: Sequence[Predictor]) -> Table:
    """Return rank correlations with metrics of the samples, surest first."""
    rows = [
        [
            f"{METRICS[one.figure].label if one.figure in METRICS else one.figure.replace('_', ' ')}",
            METRICS[one.metric].label,
            signed(one.rho, 2),
            p_text(one.p),
            p_text(one.adjusted),
            str(one.variants),
        ]
        for one in predictors
    ]
    return Table(("figure", "against", "ρ", "p", "p, adjusted", "variants"), rows, text_columns=2)


def p_text(p: float) -> str:
    """Return a p-value; a small one by its order."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def level_table(config: StudyConfig, variants: Sequence[Variant]) -> Table:
    """Return the level of every factor that each variant has; the first, which is the base, in brackets."""
    base = {factor: next(iter(levels)) for factor, levels in config.factors.items()}
    rows = [
        [variant.name, *(f"({level})" if level == base[f] else level for f, level in variant.levels.items())]
        for variant in variants
    ]
    return Table(("variant", *config.factors), rows, text_columns=1 + len(config.factors))


def recipe_tables(variants: Sequence[Variant]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """Return the settings of both stages: those in which variants differ, a value of each; and the others."""
    recipes = [flatten(variant.recipe.model_dump(mode="json")) for variant in variants]
    names = [name for name in dict.fromkeys(name for recipe in recipes for name in recipe) if not _is_seed(name)]
    rows = [(name, [plain(recipe[name]) if name in recipe else NONE for recipe in recipes]) for name in names]
    return (
        [(name, values) for name, values in rows if len(set(values)) > 1],
        [(name, values[:1]) for name, values in rows if len(set(values)) == 1],
    )


def _is_seed(name: str) -> bool:
    return name.rpartition(".")[2] == "seed"


SECONDS = {"autoencoder_seconds": "stage one", "diffusion_seconds": "stage two", "evaluation_seconds": "evaluation"}


def cost_table(records: Sequence[CellRecord]) -> Table:
    """Return the wall time of every cell, and its other costs: parameters."""
    others = list(dict.fromkeys(key for record in records for key in record.cost if key not in SECONDS))
    head = ["cell", *SECONDS.values(), *(key.replace("_", " ") for key in others)]
    rows = [
        [
            f"{record.variant}, seed {record.seed}",
            *(duration(record.cost[key]) if key in record.cost else NONE for key in SECONDS),
            *(short_count(record.cost[key]) if key in record.cost else NONE for key in others),
        ]
        for record in records
    ]
    return Table(head, rows)


def total_seconds(records: Sequence[CellRecord]) -> dict[str, float]:
    """Return the wall time of each part of the study; an autoencoder that cells share counts once."""
    total = dict.fromkeys(SECONDS, 0.0)
    seen = set()
    for record in records:
        autoencoder = record.folders.get("autoencoder", f"{record.variant}, seed {record.seed}")
        for key in SECONDS:
            if key != "autoencoder_seconds" or autoencoder not in seen:
                total[key] += record.cost.get(key, 0.0)
        seen.add(autoencoder)
    return total


def cost_lines(records: Sequence[CellRecord]) -> list[str]:
    """Say what the study took, in all and by stage, and a cell of it."""
    if not any(record.cost for record in records):
        return []
    total = total_seconds(records)
    parts = ", ".join(f"{SECONDS[key]} {duration(seconds)}" for key, seconds in total.items())
    whole = [sum(record.cost.get(key, 0.0) for key in SECONDS) for record in records if record.cost]
    autoencoders = {record.folders.get("autoencoder", f"{record.variant}, {record.seed}") for record in records}
    return [
        f"{duration(sum(total.values()))} of wall time in all: {parts}.",
        f"{len(records)} cells with {len(autoencoders)} autoencoders; a cell took {duration(statistics.median(whole))} "
        "with its autoencoder (the median).",
    ]


def missing_lines(
    config: StudyConfig, variants: Sequence[Variant], analysis: Analysis, records: Sequence[CellRecord]
) -> list[str]:
    """Say what was left out or failed, and why."""
    there = {(record.variant, record.seed) for record in records}
    absent = [f"{v.name}, seed {seed}" for v in variants for seed in config.seeds if (v.name, seed) not in there]
    lines = [f"{record.variant}, seed {record.seed}: {record.failed}." for record in records if record.failed]
    if absent:
        lines.append(f"Not finished when this was written, and left out: {'; '.join(absent)}.")
    metrics = [name for name in METRICS if any(name in record.metrics for record in records)]
    for metric in metrics:
        lacking = [f"{r.variant}, seed {r.seed}" for r in records if not r.failed and metric not in r.metrics]
        if lacking:
            lines.append(f"{METRICS[metric].label} was not computed of {'; '.join(lacking)}.")
    return [*lines, *analysis.notes]


def _each_once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def setting_rows(setting: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the runner recorded of where and on what it ran, without the command lines."""
    flat = flatten({key: value for key, value in setting.items() if not key.startswith("command")})
    return [(name, plain(value)) for name, value in flat.items()]
