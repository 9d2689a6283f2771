"""Does anything that is known of an autoencoder predict the samples? Rank correlations across the variants of a study.

Across variants, on their means over seeds: seeds of one variant are not independent observations. Of variants that
share their autoencoders the first stands for all, for their figures are the same measurement. A variant of which a cell
failed is left out: the mean over its other seeds is that of its lucky ones.

The p-values are of permutations, which take the variants as exchangeable. They are not, where most are of one kind: of
the presets' eight autoencoders five are bounded and two have a KL term. Of simulated figures that have nothing to do
with KID 7 to 15 % had p below 0.05 where both scatter one to three times as much between bottlenecks as between
variants of one (``tests/test_study_predictors.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .metric_columns import METRICS
from .study_effects import MetricTable, shared_autoencoders
from .study_findings import Predictor
from .study_records import CellRecord
from .study_statistics import FloatArray, holm, rank_correlations, smallest_p

DECIDING, BESIDE = "kid_mean", "fid"
"""What is to be predicted, and what stands beside it: so nearly the same that its correlations are no further tests."""
FEWEST_VARIANTS = 5
"""With fewer, no correlation is computed: two orders of four values in 24 are as far from chance as can be."""
SIZE = "geometry.values"
"""The number of values of a latent: what a figure that grows with it must be held against."""
OF_THE_SHAPE = frozenset(
    {
        "correlation.variance_share",
        "gaussianity.mmd_null_std",
        "gaussianity.mmd_width",
        "gaussianity.sliced_wasserstein_null_max",
        "gaussianity.sliced_wasserstein_null_mean",
        "learnability.noise_shift",
        "learnability.parameters",
        "posterior.units",
    }
)
"""Figures that the shape of the latents decides, whatever is in them (the first: a mean of shares is one by their
number). They would only say once more what :data:`SIZE` says, and each costs all others of Holm's correction."""

Found = tuple[list[Predictor], list[str]]
"""The rows of a table, surest first, and what must be known to read it."""


def health_predictors(names: Sequence[str], tables: Mapping[str, MetricTable], records: Sequence[CellRecord]) -> Found:
    """Return the rank correlation of every health figure with KID and FID; Holm's correction is over those with KID."""
    own, failed = _own_autoencoders(names, records)
    cells = [[record.health for record in records if record.variant == name] for name in own]
    known = dict.fromkeys(figure for record in records for figure in record.health if figure not in OF_THE_SHAPE)
    figures = {
        figure: np.array([_mean([cell.get(figure, math.nan) for cell in of_variant]) for of_variant in cells])
        for figure in known
    }
    rows, notes = _correlate("health figures", figures, {name: names.index(name) for name in own}, tables)
    if any(row.figure == SIZE for row in rows):
        notes.append(
            "health figures: variants differ in the number of latent values, with which ranks, dimensions and extremes "
            f"grow whatever is in the latents: hold a correlation against that of {SIZE}"
        )
    return rows, [*failed, *notes]


def reconstructions_as_predictors(
    names: Sequence[str], tables: Mapping[str, MetricTable], records: Sequence[CellRecord]
) -> Found:
    """Return the rank correlation of rFID with KID and FID."""
    if "rfid" not in tables:
        return [], []
    names_of_own, failed = _own_autoencoders(names, records)
    own = {name: names.index(name) for name in names_of_own}
    rows, notes = _correlate("rFID", {"rfid": _means(tables["rfid"], own)}, own, tables)
    return rows, [*failed, *notes]


def _own_autoencoders(names: Sequence[str], records: Sequence[CellRecord]) -> tuple[list[str], list[str]]:
    """Return the variants to correlate over, of those that share autoencoders the first, and a note on who failed."""
    failed = dict.fromkeys(record.variant for record in records if record.failed)
    whole = [name for name in names if name not in failed]
    shared = shared_autoencoders(whole, records)
    note = f"variants left out of the rank correlations, as a cell of theirs failed: {', '.join(failed)}"
    return [name for name in whole if name not in shared], [note] if failed else []


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _means(table: MetricTable, own: Mapping[str, int]) -> FloatArray:
    return np.array([_mean(table.values[row].tolist()) for row in own.values()])


def _correlate(
    what: str, figures: Mapping[str, FloatArray], own: Mapping[str, int], tables: Mapping[str, MetricTable]
) -> Found:
    """Correlate ``figures`` ``[len(own)]`` with what is predicted, over the variants that have it."""
    rows: list[Predictor] = []
    notes: list[str] = []
    for metric in (DECIDING, BESIDE):
        if metric not in tables or not figures:
            continue
        target = _means(tables[metric], own)
        there = np.isfinite(target)
        count = int(there.sum())
        if count < FEWEST_VARIANTS:
            notes.append(
                f"{what} against {METRICS[metric].label}: too few variants with autoencoders of their own "
                f"({count}, of at least {FEWEST_VARIANTS})"
            )
            continue
        complete = {name: figure[there] for name, figure in figures.items() if np.isfinite(figure[there]).all()}
        varied = {name: figure for name, figure in complete.items() if np.ptp(figure) > 0}
        notes += _left_out(what, "not computed for every variant", figures.keys() - complete.keys())
        notes += _left_out(what, "the same in all variants", complete.keys() - varied.keys())
        if varied and np.ptp(target[there]) > 0:
            rho, p = rank_correlations(np.stack(list(varied.values())), target[there], key=metric)
            rows += [
                Predictor(name, metric, float(r), float(q), None, count)
                for name, r, q in zip(varied, rho, p, strict=True)
            ]
    return _corrected(what, rows, notes)


def _left_out(what: str, why: str, names: set[str]) -> list[str]:
    return [f"{what} left out of the rank correlations, {why}: {', '.join(sorted(names))}"] if names else []


def _corrected(what: str, rows: Sequence[Predictor], notes: list[str]) -> Found:
    """Fill in Holm's p-values over the rows of KID, and say where none of them could have been small."""
    tests = [row for row in rows if row.metric == DECIDING]
    if tests:
        adjusted = holm(np.array([row.p for row in tests])).tolist()
        tests = [replace(row, adjusted=value) for row, value in zip(tests, adjusted, strict=True)]
        smallest = min(1.0, len(tests) * smallest_p(tests[0].variants))
        if smallest > 0.05:
            notes.append(
                f"{what}: with {tests[0].variants} variants and {len(tests)} rank correlations with "
                f"{METRICS[DECIDING].label} no corrected p-value could have been below {smallest:.2g}, so they can "
                "point at something and show nothing"
            )
    done = [*tests, *(row for row in rows if row.metric != DECIDING)]
    return sorted(done, key=lambda row: (row.p, -abs(row.rho))), notes
