"""What the analysis of a study finds, as plain values: what ``results.json`` holds and the report shows.

An effect is given on the scale of its metric (:data:`~.metric_columns.METRICS`): of a ``ratio`` 1 is no effect and 0.93
is 7 % lower, of a ``difference`` 0 is no effect. Standard errors (``error``, ``image_error``) are of the logarithm of a
ratio, which makes them shares of the metric: 0.03 is 3 %.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .metric_columns import Scale
from .study_config import Levels

Bounds = tuple[float, float]
Verdict = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True)
class Summary:
    """One metric of one variant: its values in the order of ``seeds``, their mean and sample standard deviation.

    ``std`` is None for a single value.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float | None


@dataclass(frozen=True)
class Contrast:
    """What a comparison of variants comes to.

    Attributes:
        metric: name of the metric.
        scale: ``ratio`` or ``difference``.
        estimate: the effect; None where there is none, see ``reason``.
        interval: its 95 % interval; None where there is no spread.
        error: standard error over seeds.
        degrees: degrees of freedom of ``error``.
        image_error: standard error over images alone, see :func:`~.study_effects.image_error`; None where the cells
            have no intervals over images.
        seeds: seeds at which all variants of the comparison were measured.
        by_seed: the effect at each of these.
        reason: why there is no estimate or no interval.
    """

    metric: str
    scale: Scale
    estimate: float | None
    interval: Bounds | None
    error: float | None
    degrees: int
    image_error: float | None
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    reason: str | None


@dataclass(frozen=True)
class Effect(Contrast):
    """What a level of a factor does to a metric, held against another level.

    Attributes:
        factor: the factor.
        level: the level that the effect is of.
        against: the level that it is held against.
        at: levels of other factors that the effect is restricted to.
        against_at: levels that the side of ``against`` has instead, where a claim is about several factors at once.
        contexts: pairs of variants, at ``level`` and at ``against``, alike in all else, that it is the mean over.
        simultaneous: the interval that holds together with those of all other comparisons of claims, at the
            probability that the rule states; None where no claim asks for this effect.
        paired: what ``simultaneous`` would be by Student's t on the effect's own differences by seed, which does not
            take variants to scatter alike: a check of the pooled spread, which decides nothing. None where
            ``simultaneous`` is, and under a rule that is paired itself.
    """

    factor: str
    level: str
    against: str
    at: Levels
    against_at: Levels
    contexts: tuple[tuple[str, str], ...]
    simultaneous: Bounds | None
    paired: Bounds | None


@dataclass(frozen=True)
class Interaction(Contrast):
    """How an effect depends on another factor: the effect at its level over (or minus) that at its base level.

    Exploratory: its interval is not corrected for the number of interactions.

    Attributes:
        factors: both factors.
        levels: the level of each.
        against: the base level of each.
        contexts: names of the four variants: both at their level, the first alone, the second alone, none.
    """

    factors: tuple[str, str]
    levels: tuple[str, str]
    against: tuple[str, str]
    contexts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Predictor:
    """The rank correlation across variants of a figure of the autoencoder with a metric of the samples.

    Attributes:
        figure: name of the health figure, or of the reconstruction metric.
        metric: ``kid_mean`` or ``fid``.
        rho: Spearman's rank correlation of the variants' means over seeds.
        p: two-sided p-value of a permutation test.
        adjusted: the same after Holm's correction for all of the table's correlations with KID; None of those with FID,
            which say nearly the same once more.
        variants: how many variants it is taken over.
    """

    figure: str
    metric: str
    rho: float
    p: float
    adjusted: float | None
    variants: int


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: its effect, what the claim expects of it, and what came out.

    Attributes:
        failed: the variants in it of which a cell failed, which leaves it inconclusive.
    """

    effect: Effect
    expect: Literal["better", "worse", "no_worse"]
    margin: float
    verdict: Verdict
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim, the verdict on it and on its parts, and in one sentence why."""

    name: str
    statement: str
    verdict: Verdict
    parts: tuple[Part, ...]
    reason: str


@dataclass(frozen=True)
class Analysis:
    """Everything that a study's cells say.

    Attributes:
        variants: per variant, per metric that it has, and what stands beside some (:data:`~.metric_columns.BESIDE`),
            the values by seed.
        effects: every level against its factor's base level, and every comparison of a claim, for every metric.
        interactions: for every two factors of which all four variants are there.
        predictors: health figures of the autoencoder against KID and FID of the samples, surest first; empty where
            there are too few variants.
        rfid_against_gfid: the reconstructions' FID against KID and FID of the samples, likewise.
        claims: the verdicts.
        rule: in words, how they came about.
        notes: what must be known to read all this.
    """

    variants: dict[str, dict[str, Summary]]
    effects: tuple[Effect, ...]
    interactions: tuple[Interaction, ...]
    predictors: tuple[Predictor, ...]
    rfid_against_gfid: tuple[Predictor, ...]
    claims: tuple[ClaimVerdict, ...]
    rule: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)
