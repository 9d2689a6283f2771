"""The figures of a study as text: what its page and its Markdown summary both say, each written once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .ablate_tables import signed
from .metric_columns import METRICS, OF_VARIANTS, Column
from .report_tables import duration, short_count
from .study_claims import figure
from .study_config import StudyConfig
from .study_design import Variant
from .study_findings import Analysis, Bounds, Contrast, Effect, Interaction, Part, Predictor, Summary
from .study_records import CellRecord

NONE = "–"
EXPECTED = {"better": "better", "worse": "worse", "no_worse": "no worse"}


@dataclass(frozen=True)
class Table:
    """A table of text; ``text_columns`` are those that are not figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class PartRow:
    """One comparison of a claim: of what, what was expected, what came out, and its own verdict."""

    what: str
    expected: str
    effect: str
    verdict: str


@dataclass(frozen=True)
class ClaimRow:
    """A claim, the verdict on it and why, its comparisons, and what they rest on."""

    name: str
    statement: str
    verdict: str
    reason: str
    parts: Sequence[PartRow]
    seeds: str
    images: str


@dataclass(frozen=True)
class MetricCell:
    """One metric of one variant: mean and deviation, of how many seeds if not all, and each with its interval."""

    text: str
    lacking: str
    seeds: Sequence[str]


@dataclass(frozen=True)
class EffectCell:
    """One effect: estimate and interval, whether it is for the better, for the worse, or neither for sure; else why."""

    text: str
    interval: str = ""
    better: bool | None = None
    why: str = ""


def claim_rows(config: StudyConfig, analysis: Analysis, records: Sequence[CellRecord]) -> list[ClaimRow]:
    """Return a row per claim, in the order of the configuration."""
    return [
        ClaimRow(
            claim.name,
            claim.statement,
            claim.verdict,
            claim.reason,
            [_part_row(part) for part in claim.parts],
            _each_once(", ".join(map(str, part.effect.seeds)) or "none" for part in claim.parts),
            _each_once(images_of(config, records, part.effect.metric) for part in claim.parts),
        )
        for claim in analysis.claims
    ]


def _part_row(part: Part) -> PartRow:
    effect = part.effect
    margin = f" than by {100 * part.margin:g} %" if effect.scale == "ratio" else f" than by {part.margin:g}"
    return PartRow(
        f"{METRICS[effect.metric].label}, {effect_label(effect)}",
        EXPECTED[part.expect] + margin * (part.margin > 0),
        effect_text(effect, effect.simultaneous),
        part.verdict,
    )


def effect_label(effect: Effect) -> str:
    """Return ``bottleneck bounded against kl``, and at which levels of others."""
    at = ", ".join(
        f"{factor} {level}" + (f" against {effect.against_at[factor]}" if factor in effect.against_at else "")
        for factor, level in effect.at.items()
    )
    return f"{effect.factor} {effect.level} against {effect.against}" + (f" (at {at})" if at else "")


def effect_text(contrast: Contrast, bounds: Bounds | None) -> str:
    """Return an effect as ``×0.912 [0.801, 1.034]`` or ``+0.52 [+0.10, +0.94]``; else why there is none."""
    if contrast.estimate is None:
        return contrast.reason or NONE
    interval = f" {interval_text(contrast, bounds)}" if bounds else f" ({contrast.reason})" if contrast.reason else ""
    return figure(contrast, contrast.estimate) + interval


def interval_text(contrast: Contrast, bounds: Bounds | None) -> str:
    """Return the bounds of an effect in brackets; empty where there are none."""
    if bounds is None:
        return ""
    return f"[{', '.join(figure(contrast, bound).removeprefix('×') for bound in bounds)}]"


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
    counts: list[int | None] = [*sorted(found)] or [config.evaluation.num_reconstructions]
    return " or ".join("all" if count is None else f"{count:,}" for count in counts) + " reconstructions"


def _reconstructions(record: CellRecord) -> int | None:
    found = record.protocol.get("reconstruction")
    return found.get("num_samples") if isinstance(found, Mapping) else None


def shown_metrics(analysis: Analysis, stage: int | None = None, columns: Mapping[str, Column] = METRICS) -> list[str]:
    """Return the metrics that any variant has, of one stage or of both; those of the samples first."""
    return [
        name
        for name, column in columns.items()
        if stage in (None, column.stage) and any(name in variant for variant in analysis.variants.values())
    ]


def metric_cells(
    config: StudyConfig,
    variants: Sequence[Variant],
    analysis: Analysis,
    records: Sequence[CellRecord],
    metrics: Sequence[str],
) -> dict[str, list[MetricCell]]:
    """Return per variant a cell for every one of ``metrics``."""
    intervals = {(record.variant, record.seed): record.intervals for record in records}
    cells: dict[str, list[MetricCell]] = {}
    for variant in variants:
        found = analysis.variants.get(variant.name, {})
        cells[variant.name] = [
            MetricCell(
                summary_text(metric, found.get(metric)),
                lacking_text(config, found.get(metric)),
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


def lacking_text(config: StudyConfig, summary: Summary | None) -> str:
    """Return ``2 of 3 seeds`` where a cell failed, is not finished or was not measured; else nothing."""
    if summary is None or len(summary.seeds) == len(config.seeds):
        return ""
    return f"{len(summary.seeds)} of {len(config.seeds)} seeds"


def _number(metric: str, value: float) -> str:
    return f"{value:.{OF_VARIANTS[metric].digits}f}"


def _bounds(metric: str, intervals: Mapping[str, Sequence[float]]) -> str:
    return f" [{', '.join(_number(metric, bound) for bound in intervals[metric])}]" if metric in intervals else ""


def distinct_effects(effects: Sequence[Effect]) -> list[Effect]:
    """Return the effects without those that a claim restricts to levels at which there are no other pairs anyway.

    What is left of two that are the mean over the same pairs has the interval of both.
    """
    found: dict[tuple[str, str, tuple[tuple[str, str], ...]], Effect] = {}
    for effect in effects:
        first = found.setdefault((effect.factor, effect.metric, effect.contexts), effect)
        if first.simultaneous is None and effect.simultaneous is not None:
            found[effect.factor, effect.metric, effect.contexts] = replace(first, simultaneous=effect.simultaneous)
    return list(found.values())


def effect_rows(effects: Sequence[Effect], metrics: Sequence[str]) -> dict[str, list[tuple[str, list[EffectCell]]]]:
    """Return, by factor, what each level does against another: a label and a cell for every one of ``metrics``."""
    rows: dict[str, dict[str, dict[str, Effect]]] = {}
    for effect in distinct_effects(effects):
        rows.setdefault(effect.factor, {}).setdefault(effect_label(effect), {})[effect.metric] = effect
    return {
        factor: [
            (label.removeprefix(f"{factor} "), [_effect_cell(of.get(metric)) for metric in metrics])
            for label, of in labels.items()
        ]
        for factor, labels in rows.items()
    }


def _effect_cell(contrast: Contrast | None) -> EffectCell:
    if contrast is None:
        return EffectCell(NONE)
    why = contrast.reason or ""
    if contrast.estimate is None or is_empty(contrast):
        return EffectCell(NONE, why=why)
    better = is_better(contrast, contrast.interval)
    return EffectCell(figure(contrast, contrast.estimate), interval_text(contrast, contrast.interval), better, why)


def is_empty(contrast: Contrast) -> bool:
    """Return whether both sides are one measurement: of variants that share their autoencoders, of these."""
    return contrast.interval is not None and contrast.interval[0] == contrast.interval[1]


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
            METRICS[one.figure].label if one.figure in METRICS else one.figure.replace(".", ": ", 1).replace("_", " "),
            METRICS[one.metric].label,
            signed(one.rho, 2),
            p_text(one.p),
            NONE if one.adjusted is None else p_text(one.adjusted),
            str(one.variants),
        ]
        for one in predictors
    ]
    return Table(("figure", "against", "ρ", "p", "p, adjusted", "variants"), rows, text_columns=2)


def p_text(p: float) -> str:
    """Return a p-value; a small one by its order."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


OF_AUTOENCODER = {
    "autoencoder_seconds": "stage one",
    "reconstruction_seconds": "its evaluation",
    "health_seconds": "latent health",
    "encoding_seconds": "latents",
}
"""Wall times that cells with the same autoencoder share."""
SECONDS = {**OF_AUTOENCODER, "diffusion_seconds": "stage two", "generation_seconds": "its evaluation"}


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


def _each_once(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
