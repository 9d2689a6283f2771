"""Effects and interactions of a study: contrasts of its variants, for every metric."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtri

from .metric_columns import BESIDE, METRICS, OF_VARIANTS
from .study_config import ComparisonConfig, StudyConfig
from .study_design import Variant, pairs
from .study_findings import Bounds, Effect, Interaction
from .study_records import CellRecord
from .study_statistics import AdditiveModel, Estimate, FloatArray, by_seed, paired


@dataclass(frozen=True)
class Comparison:
    """Two levels of a factor: a row of the table of effects, whatever the metric."""

    factor: str
    level: str
    against: str
    at: tuple[tuple[str, str], ...] = ()
    against_at: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, config: ComparisonConfig) -> Comparison:
        """Take it from a claim."""
        at, against_at = (tuple(sorted(levels.items())) for levels in (config.at, config.against_at))
        return cls(config.factor, config.level, config.against, at, against_at)

    def contexts(self, variants: Sequence[Variant]) -> list[tuple[str, str]]:
        """Return the pairs of variants that it is the mean over."""
        return pairs(variants, self.factor, self.level, self.against, dict(self.at), dict(self.against_at))


def comparisons_of(config: StudyConfig) -> list[Comparison]:
    """Return every level against its factor's first, then what claims compare beside that."""
    levels = [Comparison(factor, level, next(iter(of))) for factor, of in config.factors.items() for level in of]
    claimed = [Comparison.of(part) for claim in config.claims.values() for part in claim.comparisons]
    return [one for one in dict.fromkeys([*levels, *claimed]) if one.level != one.against]


def claimed_effects(config: StudyConfig) -> set[tuple[Comparison, str]]:
    """Return the comparisons and metrics that the claims rest on; their number is what the rule corrects for."""
    return {(Comparison.of(part), part.metric) for claim in config.claims.values() for part in claim.comparisons}


class MetricTable:
    """One metric of all cells, and the contrasts of its variants.

    Variants that share their autoencoder share its reconstructions too. For a metric of these they are one row of the
    model, for otherwise the same measurement would count twice.

    Attributes:
        metric: its name.
        column: what is known of it.
        names: the variants.
        seeds: the seeds.
        values: ``[V, S]``, NaN where there is none.
        rows: per variant the index of the one whose row holds its values: its own, or of the first that shares them.
    """

    def __init__(
        self, metric: str, variants: Sequence[Variant], seeds: Sequence[int], records: Sequence[CellRecord]
    ) -> None:
        self.metric, self.column = metric, OF_VARIANTS[metric]
        self.names, self.seeds = [variant.name for variant in variants], list(seeds)
        places = {(name, seed): (v, s) for v, name in enumerate(self.names) for s, seed in enumerate(self.seeds)}
        self.values = np.full((len(self.names), len(self.seeds)), np.nan)
        self._image_errors = self.values.copy()
        for record in records:
            place = places.get((record.variant, record.seed))
            value = record.metrics.get(metric)
            if place is None or record.failed is not None or value is None or not math.isfinite(value):
                continue
            self.values[place] = value
            if metric in record.intervals:
                low, high = record.intervals[metric]
                self._image_errors[place] = (high - low) / (2 * ndtri(0.975))
        if self.column.scale == "ratio":  # the delta method: d log y = dy / y
            self._image_errors /= np.where(self.values > 0, self.values, np.nan)
        shared = shared_autoencoders(self.names, records) if self.column.stage == 1 else {}
        self.rows = [self.names.index(shared.get(name, name)) for name in self.names]
        for v, row in enumerate(self.rows):
            gaps = np.isnan(self.values[row])
            self.values[row, gaps], self._image_errors[row, gaps] = self.values[v, gaps], self._image_errors[v, gaps]

    @cached_property
    def without_logarithm(self) -> dict[str, str]:
        """Per variant with a value of 0 or less of a ratio: which."""
        if self.column.scale == "difference":
            return {}
        return {
            self.names[v]: f"{self.names[v]} has {self.column.label} {self.values[v, s]:.3g} at seed {self.seeds[s]}, "
            "of which there is no ratio"
            for v, s in reversed(np.argwhere(self.values <= 0).tolist())
        }

    @cached_property
    def scaled(self) -> FloatArray:
        """What is modelled, ``[V, S]``: logarithms of a ratio's values; NaN where there is no cell of its own."""
        scaled = self.values.copy()
        scaled[[row != v or self.names[v] in self.without_logarithm for v, row in enumerate(self.rows)]] = np.nan
        return np.log(scaled) if self.column.scale == "ratio" else scaled

    @cached_property
    def model(self) -> AdditiveModel:
        """The additive model of all variants that have values."""
        return AdditiveModel(self.scaled)

    def contrast(
        self, contexts: Sequence[Sequence[str]], signs: Sequence[int], spread: str, level: float
    ) -> tuple[dict[str, Any], Bounds | None]:
        """Return the fields of a :class:`~.study_findings.Contrast`, and the interval at ``level``.

        Args:
            contexts: variants that are held against each other, as many in each as there are ``signs``. The contrast is
                the mean over these; such as have their rows in common count once.
            signs: with which the variants of a context are added; they add up to 0.
            spread: ``pooled`` or ``paired``, of :class:`~.study_config.RuleConfig`.
            level: probability with which the second interval leaves the effect out.
        """
        distinct = dict.fromkeys(tuple(self.rows[self.names.index(name)] for name in names) for names in contexts)
        vector = np.zeros(len(self.names))
        for rows in distinct:
            for row, sign in zip(rows, signs, strict=True):
                vector[row] += sign / len(distinct)
        vector[np.abs(vector) < 1e-12] = 0
        reason = self._missing(dict.fromkeys(name for names in contexts for name in names))
        estimate = None
        if reason is None:
            estimate = self.model.contrast(vector) if spread == "pooled" else paired(self.scaled, vector)
            reason = _shortcoming(estimate, vector, len(self.seeds))
        differences = by_seed(self.scaled, vector)
        seeds = np.flatnonzero(np.isfinite(differences)) if vector.any() else np.arange(0)
        sure = estimate if estimate is not None and estimate.degrees > 0 else None
        fields = {
            "metric": self.metric,
            "scale": self.column.scale,
            "estimate": None if estimate is None else self._shown(estimate.value),
            "interval": self._bounds(sure, 0.05),
            "error": None if sure is None else float(sure.error),
            "degrees": 0 if sure is None else sure.degrees,
            "image_error": None if estimate is None else image_error(self._image_errors, vector, self.column.stage),
            "seeds": tuple(self.seeds[s] for s in seeds),
            "by_seed": tuple(self._shown(differences[s]) for s in seeds),
            "reason": reason,
        }
        return fields, self._bounds(sure, level)

    def _missing(self, names: Iterable[str]) -> str | None:
        """Return why the variants cannot be compared: one has no value, or one of which there is no ratio."""
        for name in names:
            row = self.names[self.rows[self.names.index(name)]]
            if row in self.without_logarithm:
                return self.without_logarithm[row]
            if np.isnan(self.values[self.names.index(row)]).all():
                return f"{name} has no {self.column.label}"
        return None

    def _shown(self, value: Any) -> float:
        """Return an effect as a report gives it; a bound of a ratio that is beyond all floats as one of the last."""
        return math.exp(min(max(value, -700), 700)) if self.column.scale == "ratio" else float(value)

    def _bounds(self, estimate: Estimate | None, level: float) -> Bounds | None:
        if estimate is None:
            return None
        low, high = estimate.interval(level)
        return self._shown(low), self._shown(high)


def _shortcoming(estimate: Estimate | None, vector: FloatArray, num_seeds: int) -> str | None:
    if not vector.any():
        return "both sides share their autoencoders, which were measured once"
    if estimate is None:
        return "no seed at which both sides were measured"
    if estimate.degrees < 1:
        return "one seed has no spread" if num_seeds == 1 else "too few cells for a spread"
    return None


def image_error(errors: FloatArray, weights: FloatArray, stage: int) -> float | None:
    """Return the standard error that a contrast has because every cell was measured with finitely many images.

    Samples are other images at every seed, so that their errors average out over seeds, and the spread over seeds holds
    them already: this is the part of it that more images would remove. Reconstructions are of the same images at every
    seed: their errors do not average out, the spread over seeds knows nothing of them, and an interval is for these
    images. Variants count as independent, although their samples begin with the same noise and their reconstructions
    with the same images; what they have in common cancels, so this is an upper bound. Ours.

    Args:
        errors: ``[V, S]``, standard error of each cell on the scale that is modelled; NaN where there is none.
        weights: of the variants, ``[V]``.
        stage: 1 for a metric of reconstructions, 2 for one of samples.
    """
    variances = []
    for weight, row in zip(weights[weights != 0], errors[weights != 0], strict=True):
        known = row[np.isfinite(row)]
        if not len(known):
            return None
        of_mean = known.mean() if stage == 1 else math.sqrt(np.square(known).sum()) / len(known)
        variances.append((weight * of_mean) ** 2)
    return math.sqrt(sum(variances))


def shared_autoencoders(names: Sequence[str], records: Sequence[CellRecord]) -> dict[str, str]:
    """Return, of every variant whose cells have the same autoencoders as an earlier one's, that one's name."""
    folders: dict[str, dict[int, str]] = {name: {} for name in names}
    for record in records:
        if record.variant in folders and "autoencoder" in record.folders:
            folders[record.variant][record.seed] = record.folders["autoencoder"]
    shared: dict[str, str] = {}
    for first, other in itertools.combinations(names, 2):
        common = folders[first].keys() & folders[other].keys()
        if common and all(folders[first][seed] == folders[other][seed] for seed in common):
            shared.setdefault(other, shared.get(first, first))
    return shared


def make_tables(
    config: StudyConfig, variants: Sequence[Variant], records: Sequence[CellRecord]
) -> dict[str, MetricTable]:
    """Return the table of every metric that a cell has or a claim needs."""
    tables = {metric: MetricTable(metric, variants, config.seeds, records) for metric in METRICS}
    needed = {metric for _, metric in claimed_effects(config)}
    return {metric: table for metric, table in tables.items() if metric in needed or np.isfinite(table.values).any()}


def tables_beside(
    config: StudyConfig, variants: Sequence[Variant], records: Sequence[CellRecord]
) -> dict[str, MetricTable]:
    """Return the tables of what is only shown beside the metrics, where any cell has it."""
    tables = {metric: MetricTable(metric, variants, config.seeds, records) for metric in BESIDE}
    return {metric: table for metric, table in tables.items() if np.isfinite(table.values).any()}


def make_effects(
    config: StudyConfig, variants: Sequence[Variant], tables: Mapping[str, MetricTable]
) -> dict[tuple[Comparison, str], Effect]:
    """Return every comparison's effect on every metric."""
    claimed = claimed_effects(config)
    level = config.rule.level / max(1, len(claimed))
    effects = {}
    for comparison in comparisons_of(config):
        contexts = comparison.contexts(variants)
        if not contexts:
            continue
        for metric, table in tables.items():
            fields, bounds = table.contrast(contexts, (1, -1), config.rule.spread, level)
            is_claimed, own = (comparison, metric) in claimed, None
            if is_claimed and config.rule.spread == "pooled":
                _, own = table.contrast(contexts, (1, -1), "paired", level)
            effects[comparison, metric] = Effect(
                **fields,
                factor=comparison.factor,
                level=comparison.level,
                against=comparison.against,
                at=dict(comparison.at),
                against_at=dict(comparison.against_at),
                contexts=tuple(contexts),
                simultaneous=bounds if is_claimed else None,
                paired=own,
            )
    return effects


def make_interactions(
    config: StudyConfig, variants: Sequence[Variant], tables: Mapping[str, MetricTable]
) -> list[Interaction]:
    """Return, for every two factors and a level of each, how far both together do other than the sum of each."""
    found = []
    for factors, levels, against in _pairs_of_factors(config):
        contexts = _quadruples(variants, factors, levels, against)
        if not contexts:
            continue
        for table in tables.values():
            fields, _ = table.contrast(contexts, (1, -1, -1, 1), config.rule.spread, config.rule.level)
            found.append(
                Interaction(**fields, factors=factors, levels=levels, against=against, contexts=tuple(contexts))
            )
    return found


Two = tuple[str, str]


def _pairs_of_factors(config: StudyConfig) -> Iterator[tuple[Two, Two, Two]]:
    """Yield two factors, a level of each that is not its first, and their first levels."""
    for first, second in itertools.combinations(config.factors, 2):
        (base, *levels), (other_base, *other_levels) = config.factors[first], config.factors[second]
        for pair in itertools.product(levels, other_levels):
            yield (first, second), pair, (base, other_base)


def _quadruples(variants: Sequence[Variant], factors: Two, levels: Two, against: Two) -> list[tuple[str, ...]]:
    """Return the names of variants at both levels, at one of them, and at none, that are alike in all other factors."""
    names = {frozenset(variant.levels.items()): variant.name for variant in variants}
    first, second = ({factor: base} for factor, base in zip(factors, against, strict=True))
    found = []
    for variant in variants:
        if tuple(variant.levels[factor] for factor in factors) == levels:
            corners = [
                frozenset({**variant.levels, **base}.items()) for base in ({}, second, first, {**first, **second})
            ]
            if all(corner in names for corner in corners):
                found.append(tuple(names[corner] for corner in corners))
    return found
