"""The summary of a study in Markdown, fit for a README: question, verdicts, variants, effects, how to run it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .ablate_tables import grid
from .metric_columns import BESIDE, OF_VARIANTS
from .study_analysis import power_in_words
from .study_checks import check_table, checks_in_words
from .study_config import StudyConfig
from .study_design import Variant
from .study_findings import Analysis, Summary
from .study_records import CellRecord
from .study_tables import (
    EffectCell,
    Table,
    claim_rows,
    effect_rows,
    interaction_rows,
    lacking_text,
    predictor_table,
    shown_metrics,
    summary_text,
)
from .study_text import (
    AT_THIS_SCALE,
    BIAS_IN_WORDS,
    changed_line,
    command_line,
    cost_lines,
    missing_lines,
    protocol_lines,
    verdict_line,
)
from .study_variant_tables import level_table

VALUES = ("kid_mean", "fid", "rfid", "rfid_extrapolated", "psnr", "lpips")
EFFECTS = ("kid_mean", "fid", "rfid")
"""Metrics of the summary's tables; the page has them all."""
SHOWN_PREDICTORS, ADJUSTED = 5, 0.05


def markdown(
    config: StudyConfig,
    variants: Sequence[Variant],
    records: Sequence[CellRecord],
    analysis: Analysis,
    setting: Mapping[str, Any],
) -> str:
    """Return the summary."""
    there = shown_metrics(analysis, columns=OF_VARIANTS)
    checks = check_table(config, analysis, records)
    parts = [
        f"# {config.title}",
        config.question,
        verdict_line(config, variants, analysis, records),
        changed_line(setting),
        verdict_table(config, analysis, records),
        *([checks_in_words(config), _plain_grid(checks)] if checks.rows else []),
        "## Variants",
        "Mean ± standard deviation over seeds." + f" {BIAS_IN_WORDS}" * any(name in there for name in BESIDE),
        value_table(config, variants, analysis, [name for name in VALUES if name in there]),
        "What each variant changes:",
        _plain_grid(level_table(config, variants)),
        "## Effects",
        "Ratios, with 95 % intervals that are not corrected for their number; ×0.9 of KID, FID or rFID is 10 % lower, "
        "which is better. In bold: intervals that leave out no effect.",
        effect_table(analysis, [name for name in EFFECTS if name in there]),
        *_with_heading("## Interactions", *_interactions(analysis, [name for name in EFFECTS if name in there])),
        *_with_heading("## Does anything predict the samples?", *_predictors(analysis)),
        "## Protocol",
        _listed(protocol_lines(config, variants, setting)),
        analysis.rule,
        power_in_words(config, variants),
        _listed([*cost_lines(records), *missing_lines(config, variants, analysis, records, setting)]),
        "## Run it again",
        f"```bash\n{command_line(config, setting)}\n```",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.replace("<", "&lt;")  # what a configuration says is text, not a tag


def verdict_table(config: StudyConfig, analysis: Analysis, records: Sequence[CellRecord]) -> str:
    """Return a row per claim: the verdict, the effects with the intervals that decided it, seeds and images."""
    if not analysis.claims:
        return ""
    rows = [["claim", f"verdict {AT_THIS_SCALE}", "effect [simultaneous interval]", "seeds", "images per cell"]]
    for claim in claim_rows(config, analysis, records):
        told = "; ".join(f"{part.what}: {part.effect}" for part in claim.parts)
        rows.append([" ".join(claim.statement.split()), f"**{claim.verdict}**", told, claim.seeds, claim.images])
    return grid(rows)


def value_table(config: StudyConfig, variants: Sequence[Variant], analysis: Analysis, metrics: Sequence[str]) -> str:
    """Return a row per variant with mean and deviation of every metric, and over how many seeds where not all."""
    rows = [["variant", *(OF_VARIANTS[name].heading for name in metrics)]]
    for variant in variants:
        found = analysis.variants.get(variant.name, {})
        lacking = {lacking_text(config, found[name]) for name in metrics if name in found}
        alike = next(iter(lacking)) if len(lacking) == 1 else ""
        cells = [_value(config, name, found.get(name), alike) for name in metrics]
        rows.append([variant.name + (f" ({alike})" if alike else ""), *cells])
    return grid(rows)


def _value(config: StudyConfig, metric: str, summary: Summary | None, known: str) -> str:
    lacking = lacking_text(config, summary).removeprefix(known)
    return summary_text(metric, summary) + (f" ({lacking})" if lacking else "")


def effect_table(analysis: Analysis, metrics: Sequence[str]) -> str:
    """Return a row per level that is held against another."""
    rows = [["factor", "levels", *(OF_VARIANTS[name].label for name in metrics)]]
    for factor, effects in effect_rows(analysis.effects, metrics).items():
        rows += [[factor, label, *map(_effect, cells)] for label, cells in effects]
    return grid(rows)


def _effect(cell: EffectCell) -> str:
    text = f"{cell.text} {cell.interval}".strip()
    return text if cell.better is None else f"**{text}**"


def _interactions(analysis: Analysis, metrics: Sequence[str]) -> list[str]:
    """Return what the interactions are, and a row for each."""
    rows = [[label, *map(_effect, cells)] for label, cells in interaction_rows(analysis.interactions, metrics)]
    if not rows:
        return []
    return [
        "What two levels together do beyond what each does alone, as a ratio; 95 % each, exploratory.",
        grid([["levels", *(OF_VARIANTS[name].label for name in metrics)], *rows]),
    ]


def _predictors(analysis: Analysis) -> list[str]:
    """Return how many rank correlations there are, and the surest of them."""
    deciding = [one for one in analysis.predictors if one.adjusted is not None]
    found = sum(one.adjusted < ADJUSTED for one in deciding if one.adjusted is not None)
    tables = [predictor_table(deciding[:SHOWN_PREDICTORS]), predictor_table(analysis.rfid_against_gfid)]
    if not any(table.rows for table in tables):
        return []
    told = (
        f"{found} of {len(deciding)} figures of the latent health report go with KID across variants with a corrected "
        f"p-value below {ADJUSTED:g} (Spearman, Holm); below are the surest, and rFID. Exploratory: the page has all."
    )
    return [told, *(_plain_grid(table) for table in tables if table.rows)]


def _with_heading(heading: str, *parts: str) -> list[str]:
    return [heading, *parts] if parts else []


def _plain_grid(table: Table) -> str:
    return grid([table.head, *table.rows])


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
