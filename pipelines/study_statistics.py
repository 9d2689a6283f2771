"""The statistics of a study: variants x seeds under an additive model, rank correlations, and what can be found at all.

Every function takes plain arrays, so that thousands of simulated studies are analysed at once by what analyses one.

How often any of eight comparisons of 6 variants x 3 seeds is called at level 0.05 though nothing differs, of 200,000
simulated studies (log-normal figures, seeds that shift all variants alike, noise of the images; repeated in short by
``tests/test_study_analysis.py``):

=====================================================  ======  ======
residuals                                              pooled  paired
=====================================================  ======  ======
normal, alike in all variants                           3.6 %   4.9 %
Student's t with 3 degrees of freedom                   3.3 %   4.3 %
three times as large in a variant compared twice        7.6 %   4.9 %
three times as large in the base of five comparisons   10.4 %   4.6 %
=====================================================  ======  ======

And how often any of the presets' claims comes to a verdict, by all twelve comparisons of 11 variants x 3 seeds and of
both KID and rFID, at the same level (20,000 studies):

=====================================================  ======  ======
residuals of both metrics                              pooled  paired
=====================================================  ======  ======
normal, alike in all variants                           1.8 %   1.7 %
twice as large in bounded-4                             7.4 %   1.6 %
three times as large in bounded-4                      15.5 %   1.9 %
three times as large in kl-4                            5.2 %   1.7 %
=====================================================  ======  ======

Of five comparisons for "no worse by a margin", where the true effect is the margin, 1.9 % of studies had one supported
and 3.7 % one supported or refuted (pooled; paired 2.4 % and 4.8 %). Variants that share an autoencoder share what its
seed did to it: where three of the six do and stage two adds little of its own, 5.6 % (pooled, of 20,000).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc, nctdtrinc, stdtrit

from ..common.randomness import generator

FloatArray = NDArray[np.floating[Any]]

EXACT_UP_TO = 8
"""Rank correlations of so many variants are tested with all of their permutations."""
PERMUTATIONS = 10_000
"""Random permutations otherwise."""
_ROUNDING = 1e-12
"""What is smaller than this share of the values is their rounding, and counts as 0."""


@dataclass(frozen=True)
class Estimate:
    """An effect, its standard error, and the degrees of freedom of that; arrays ``[...]``, one entry per study."""

    value: FloatArray
    error: FloatArray
    degrees: int

    def interval(self, level: float = 0.05) -> tuple[FloatArray, FloatArray]:
        """Return the two-sided t interval that leaves the effect out with probability ``level``."""
        reach = stdtrit(self.degrees, 1 - level / 2) * self.error
        return self.value - reach, self.value + reach


class AdditiveModel:
    """``y[v, s] = variant_v + seed_s + residual`` by least squares over the cells that are there.

    Where all are, this is the two-way analysis of variance without replication (a randomised block design with the
    seeds as blocks, e.g. Montgomery, Design and Analysis of Experiments, chapter 4): an effect is the mean of its
    differences by seed, and the residual variance has (V - 1)(S - 1) degrees of freedom. It is one variance for all
    variants; where they differ much, too much is called (see the table above), which :func:`paired` does not do.

    Args:
        values: ``[..., V, S]``, NaN where there is no cell; the same cells in all leading entries.

    Attributes:
        squares: ``[...]``, sum of the squared residuals.
        variance: ``[...]``, of the residuals; NaN with 0 ``degrees``.
        degrees: of freedom of ``variance``.
    """

    def __init__(self, values: FloatArray) -> None:
        present = np.isfinite(values)
        cells = present.reshape(-1, *values.shape[-2:])[0]
        assert (present == cells).all(), "studies of one model have the same cells"
        variant, seed = np.nonzero(cells)
        design = np.concatenate([np.eye(values.shape[-2])[variant], np.eye(values.shape[-1])[seed]], axis=1)
        self._estimable = design.T @ np.linalg.pinv(design.T)  # onto the row space of the design
        self._inverse = np.linalg.pinv(design)
        figures = values[..., variant, seed]
        self.coefficients = figures @ self._inverse.T
        residuals = figures - self.coefficients @ design.T
        size = np.abs(figures).max(axis=-1, initial=0)
        self._rounding = _ROUNDING * size
        residuals[np.abs(residuals) <= self._rounding[..., None]] = 0
        self.degrees = len(variant) - int(np.linalg.matrix_rank(design)) if len(variant) else 0
        self.squares = np.square(residuals).sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.variance = self.squares / np.float64(self.degrees)

    def contrast(self, weights: FloatArray) -> Estimate | None:
        """Return the sum of the variants' levels times ``weights`` ``[V]``, which add up to 0.

        None where the cells do not determine it: a variant has none, or no seed connects the two sides.
        """
        full = np.concatenate([weights, np.zeros(len(self._estimable) - len(weights))])
        if not np.allclose(self._estimable @ full, full):
            return None
        value = self.coefficients @ full
        value = np.where(np.abs(value) <= self._rounding, 0, value)
        spread = np.square(full @ self._inverse).sum()
        return Estimate(value, np.sqrt(self.variance * spread), self.degrees)


def uneven_spread(values: FloatArray) -> list[tuple[float, float]]:
    """Return, per variant of one study ``[V, S]``, how its residuals' deviation compares with that of all others.

    Each as (ratio of deviations, p-value that it is not larger). What the residuals lose when the variant is left out
    of the additive model is independent of what stays, so that the ratio of both variances follows F: exact for normal
    residuals, cells missing or not. (nan, 1) where a variant cannot be told from the others.
    """
    whole, found = AdditiveModel(values), []
    for row in range(len(values)):
        others = AdditiveModel(np.delete(values, row, axis=0))
        own = whole.degrees - others.degrees
        if own < 1 or others.degrees < 1 or not others.squares > 0:
            found.append((math.nan, 1.0))
            continue
        ratio = max(0.0, float(whole.squares - others.squares)) / own / float(others.variance)
        found.append((math.sqrt(ratio), float(fdtrc(own, others.degrees, ratio))))
    return found


def by_seed(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the contrast ``weights`` ``[V]`` of ``values`` ``[..., V, S]`` at each seed, ``[..., S]``.

    NaN at seeds at which a variant with a weight is missing.
    """
    used = weights != 0
    return np.einsum("v,...vs->...s", weights[used], values[..., used, :])


def paired(values: FloatArray, weights: FloatArray) -> Estimate | None:
    """Return the contrast as the mean over seeds of its own values, whose spread is its error.

    With S - 1 degrees of freedom it assumes nothing of other variants, and with few seeds it finds little. None where
    no seed has all of its variants.

    Args:
        values: ``[..., V, S]``, NaN where there is no cell; the same cells in all leading entries.
        weights: ``[V]``, which add up to 0.
    """
    differences = by_seed(values, weights)
    differences = differences[..., np.isfinite(differences.reshape(-1, differences.shape[-1])[0])]
    count = differences.shape[-1]
    if not count:
        return None
    if count == 1:
        return Estimate(differences[..., 0], np.full(differences.shape[:-1], np.nan), 0)
    value = differences.mean(axis=-1)
    return Estimate(value, differences.std(axis=-1, ddof=1) / math.sqrt(count), count - 1)


def detectable_effect(
    std: float,
    *,
    variants: int,
    seeds: int,
    comparisons: int,
    level: float = 0.05,
    power: float = 0.8,
    contexts: int = 1,
    spread: str = "pooled",
) -> float:
    """Return the smallest effect that a share ``power`` of studies call, in the unit of ``std``.

    A difference of two variants has the error ``std sqrt(2 / (seeds contexts))``. Its t statistic follows the
    noncentral t distribution and has to pass the quantile of the two-sided test at ``level / comparisons``.

    For 6 variants x 3 seeds, eight comparisons, pooled, that is 3.6 ``std``: where the KIDs of a variant scatter by
    3 %, 5 % or 10 % between seeds (beyond what a seed does to all variants alike), a KID that is lower by 10 %, 17 % or
    30 % (``1 - exp(-effect)``). Paired it is 13 ``std``: 32 %, 48 % or 73 %.

    Args:
        std: of one cell's residual; on the log scale, a share of the metric.
        variants: how many the study has.
        seeds: how many each is trained with.
        comparisons: of all claims together.
        level: the rule's.
        power: share of studies.
        contexts: pairs of variants that the comparison is the mean over.
        spread: the rule's, ``pooled`` or ``paired``.

    Returns infinity with one seed, which finds nothing.
    """
    degrees = seeds - 1 if spread == "paired" else (variants - 1) * (seeds - 1)
    if degrees < 1:
        return math.inf
    threshold = stdtrit(degrees, 1 - level / (2 * comparisons))
    noncentrality = float(nctdtrinc(degrees, 1 - power, threshold))
    return noncentrality * std * math.sqrt(2 / (seeds * contexts))


def holm(p: FloatArray) -> FloatArray:
    """Return p-values ``[N]`` adjusted for their number: Holm 1979, the step-down form of Bonferroni's correction."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(stepped)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def rank_correlations(figures: FloatArray, target: FloatArray, *, key: str = "") -> tuple[FloatArray, FloatArray]:
    """Return Spearman's rho ``[F]`` of the rows of ``figures`` ``[F, N]`` with ``target`` ``[N]``, and its p-values.

    The p-value is the share of permutations of ``target`` whose rho is at least as far from 0: of all of them up to
    N = :data:`EXACT_UP_TO`, else of :data:`PERMUTATIONS` random ones that ``key`` decides, among which the one that was
    seen counts too (Phipson and Smyth 2010). No row may be constant.
    """
    from scipy.stats import rankdata

    ranks = _standardised(rankdata(figures, axis=1))
    target_ranks = _standardised(rankdata(target))
    rho = ranks @ target_ranks
    orders, exact = _permutations(len(target), key)
    as_far = (np.abs(target_ranks[orders] @ ranks.T) >= np.abs(rho) - 1e-9).sum(axis=0)
    return rho, as_far / len(orders) if exact else (1 + as_far) / (1 + len(orders))


def smallest_p(count: int) -> float:
    """Return the smallest p-value that :func:`rank_correlations` can give for ``count`` values without ties."""
    return 2 / math.factorial(count) if count <= EXACT_UP_TO else 1 / (1 + PERMUTATIONS)


def _standardised(ranks: FloatArray) -> FloatArray:
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=-1, keepdims=True)


def _permutations(count: int, key: str) -> tuple[NDArray[np.integer[Any]], bool]:
    """Return orders ``[P, count]``, and whether they are all there are."""
    if count <= EXACT_UP_TO:
        orders = np.zeros((1, 0), dtype=np.int64)
        for new in range(count):  # put the next number at every place of every order of those before it
            orders = np.concatenate([np.insert(orders, place, new, axis=1) for place in range(new + 1)])
        return orders, True
    import torch

    uniform = torch.rand(PERMUTATIONS, count, generator=generator("permutations", key), dtype=torch.float64)
    return uniform.numpy().argsort(axis=1), False
