"""What the cells of a study say: from records to effects, rank correlations and verdicts; see ``docs/study.md``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .ablate_statistics import Spread
from .study_claims import make_claims, rule_in_words
from .study_config import StudyConfig
from .study_design import Variant
from .study_effects import MetricTable, claimed_effects, make_effects, make_interactions, make_tables, tables_beside
from .study_findings import Analysis, Summary
from .study_predictors import health_predictors, reconstructions_as_predictors
from .study_records import CellRecord
from .study_statistics import detectable_effect, uneven_spread

SCATTERS = (0.03, 0.05, 0.1)
"""Scatters of KID between seeds, as shares of it, that :func:`power_in_words` speaks of."""
UNEVEN = 0.05
"""Probability of noting a variant of uneven spread where all are alike."""
NAMED_SWAPS = 6
"""Pairs of variants that are named where rFID and rFID∞ order them differently; of others there is the number."""


def analyse(config: StudyConfig, variants: Sequence[Variant], records: Sequence[CellRecord]) -> Analysis:
    """Return what the records say, of all cells or of those that are there yet."""
    names = [variant.name for variant in variants]
    tables, beside = make_tables(config, variants, records), tables_beside(config, variants, records)
    effects = make_effects(config, variants, tables)
    predictors, about_health = health_predictors(names, tables, records)
    reconstructions, about_reconstructions = reconstructions_as_predictors(names, tables, records)
    notes = [
        *_notes_on_cells(config, names, records),
        *_notes_on_tables(tables.values()),
        *(note for table in tables.values() if config.rule.spread == "pooled" for note in _notes_on_spread(table)),
        *_notes_on_order({**tables, **beside}),
    ]
    return Analysis(
        variants={name: _summaries(v, {**tables, **beside}) for v, name in enumerate(names)},
        effects=tuple(effects.values()),
        interactions=tuple(make_interactions(config, variants, tables)),
        predictors=tuple(predictors),
        rfid_against_gfid=tuple(reconstructions),
        claims=tuple(make_claims(config, effects, {record.variant for record in records if record.failed})),
        rule=rule_in_words(config, len(variants)),
        notes=tuple(dict.fromkeys([*notes, *about_health, *about_reconstructions])),
    )


def power_in_words(config: StudyConfig, variants: Sequence[Variant]) -> str:
    """Return what the study can find before it is run: the differences in KID that four studies of five would call."""
    count, seeds = len(claimed_effects(config)), len(config.seeds)
    if seeds < 2 or not count:
        return "Without claims and at least two seeds the study judges nothing."
    design = {"variants": len(variants), "seeds": seeds, "comparisons": count}
    found = [
        detectable_effect(scatter, **design, level=config.rule.level, spread=config.rule.spread) for scatter in SCATTERS
    ]
    told = ", ".join(f"{-100 * math.expm1(-effect):.0f} %" for effect in found)
    scatters = ", ".join(f"{100 * scatter:.0f} %" for scatter in SCATTERS)
    return (
        f"Between two of {len(variants)} variants with {seeds} seeds each, four studies of five find a KID that is "
        f"lower by {told}, where the KIDs of a variant scatter by {scatters} between seeds, with {count} "
        f"comparison{'s' * (count > 1)} in all at level {config.rule.level:g} ({config.rule.spread})."
    )


def _summaries(variant: int, tables: Mapping[str, MetricTable]) -> dict[str, Summary]:
    summaries = {}
    for metric, table in tables.items():
        row = table.values[variant]
        present = np.flatnonzero(np.isfinite(row))
        if len(present):
            spread = Spread.of(row[present].tolist())
            seeds = tuple(table.seeds[s] for s in present)
            summaries[metric] = Summary(seeds, spread.values, spread.mean, spread.std)
    return summaries


def _notes_on_cells(config: StudyConfig, names: Sequence[str], records: Sequence[CellRecord]) -> list[str]:
    notes = []
    expected = len(names) * len(config.seeds)
    if len(records) < expected:
        notes.append(
            f"{len(records)} of {expected} cells are there: every figure is provisional, and the rule's error rate "
            "holds for the study as it was planned, looked at once"
        )
    failed = [f"{record.variant} at seed {record.seed} ({record.failed})" for record in records if record.failed]
    if failed:
        notes.append(
            "cells that failed are left out, so that no comparison with their variants decides a claim: "
            + "; ".join(failed)
        )
    return notes


def _notes_on_tables(tables: Iterable[MetricTable]) -> list[str]:
    notes = []
    for table in tables:
        label = table.column.label
        notes += [f"{why}: all effects of it on {label} are left open" for why in table.without_logarithm.values()]
        joined = [f"{table.names[v]} with {table.names[row]}" for v, row in enumerate(table.rows) if row != v]
        if joined:
            notes.append(
                "variants that share their autoencoders count as one where those are compared, by reconstructions or "
                f"latent health: {', '.join(joined)}"
            )
    return notes


def _notes_on_spread(table: MetricTable) -> list[str]:
    """Name the variants whose cells scatter so much more than the others' that the pooled spread is not theirs."""
    return [
        f"{table.column.label} of {name} scatters {ratio:.1f} times as much between seeds as that of other variants "
        f"(p = {p:.2g}): intervals with it are too narrow under the rule's pooled spread, those of others too wide"
        for name, (ratio, p) in zip(table.names, uneven_spread(table.scaled), strict=True)
        if p * len(table.names) < UNEVEN
    ]


def _notes_on_order(tables: Mapping[str, MetricTable]) -> list[str]:
    """Name the variants that stand in another order by rFID extrapolated to infinitely many images than by rFID."""
    if not {"rfid", "rfid_extrapolated"} <= tables.keys():
        return []
    table, beside = tables["rfid"], tables["rfid_extrapolated"]
    both = np.isfinite(table.values) & np.isfinite(beside.values)
    found, extrapolated = (
        {v: each.values[v, both[v]].mean() for v in np.flatnonzero(both.any(axis=1))} for each in (table, beside)
    )
    own = [v for v in found if table.rows[v] == v]
    swapped = [
        f"{table.names[v]} and {table.names[w]}"
        for v, w in itertools.combinations(own, 2)
        if (found[v] - found[w]) * (extrapolated[v] - extrapolated[w]) < 0
    ]
    if not swapped:
        return []
    more = f" and {len(swapped) - NAMED_SWAPS} more pairs" if len(swapped) > NAMED_SWAPS else ""
    return [
        "rFID of finitely many images is too high, and not alike for all autoencoders: extrapolated to infinitely many "
        f"(rFID∞), these stand the other way round: {'; '.join(swapped[:NAMED_SWAPS])}{more}"
    ]
