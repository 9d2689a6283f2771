"""The verdicts of a study on its claims, by the rule that its configuration fixed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .metric_columns import METRICS
from .study_config import ClaimConfig, ComparisonConfig, StudyConfig
from .study_effects import Comparison, claimed_effects
from .study_findings import Bounds, ClaimVerdict, Contrast, Effect, Part, Verdict


def make_claims(
    config: StudyConfig, effects: Mapping[tuple[Comparison, str], Effect], failed: Collection[str] = ()
) -> list[ClaimVerdict]:
    """Return the verdict on every claim: supported where all of its parts are, refuted where any of them is.

    ``failed`` are the variants of which a cell failed. What is left of such a variant are its lucky seeds, so nothing
    is concluded from a comparison with it.
    """
    return [_claim(name, claim, effects, failed, config) for name, claim in config.claims.items()]


def _claim(
    name: str,
    claim: ClaimConfig,
    effects: Mapping[tuple[Comparison, str], Effect],
    failed: Collection[str],
    config: StudyConfig,
) -> ClaimVerdict:
    parts = [_part(c, effects[Comparison.of(c), c.metric], failed) for c in claim.comparisons]
    verdicts = {part.verdict for part in parts}
    verdict: Verdict = "inconclusive"
    if "refuted" in verdicts:
        verdict = "refuted"
    elif verdicts == {"supported"}:
        verdict = "supported"
    return ClaimVerdict(name, claim.statement, verdict, tuple(parts), _reason(parts, verdict, config))


def _part(comparison: ComparisonConfig, effect: Effect, failed: Collection[str]) -> Part:
    verdict: Verdict = "inconclusive"
    lucky = tuple(dict.fromkeys(name for pair in effect.contexts for name in pair if name in failed))
    if effect.simultaneous is not None and not lucky:
        verdict = judge(effect.simultaneous, effect.metric, comparison.expect, comparison.margin)
    return Part(effect, comparison.expect, comparison.margin, verdict, lucky)


def judge(interval: Bounds, metric: str, expect: str, margin: float = 0.0) -> Verdict:
    """Return what an ``interval`` of an effect on ``metric`` says about what is expected of it.

    ``better`` is supported where the whole interval lies on the good side of no effect, and refuted where all of it
    lies on the bad side; ``worse`` the other way round. ``no_worse`` is supported where all of it is better than worse
    by ``margin``, and refuted where all of it is worse than that. What only touches the limit is inconclusive.
    """
    low, high = interval
    limit = limit_of(metric, margin)
    if METRICS[metric].higher_is_better:
        good, bad = low > limit, high < limit
    else:
        good, bad = high < limit, low > limit
    if expect == "worse":
        good, bad = bad, good
    return "supported" if good else "refuted" if bad else "inconclusive"


def limit_of(metric: str, margin: float = 0.0) -> float:
    """Return the effect on ``metric`` that is worse by ``margin``; without one, no effect."""
    column = METRICS[metric]
    worse = -margin if column.higher_is_better else margin
    return 1 + worse if column.scale == "ratio" else worse


def _reason(parts: Sequence[Part], verdict: Verdict, config: StudyConfig) -> str:
    """Return one sentence: every part's numbers, seeds and samples, and the verdict at this scale."""
    told = "; ".join(_told(part) for part in parts)
    return f"{told}; with {_measured(parts, config)}, {verdict} at this scale."


def _told(part: Part) -> str:
    effect = part.effect
    label, compared = METRICS[effect.metric].label, f"{side(effect)} against {side(effect, against=True)}"
    if effect.estimate is None or effect.simultaneous is None:
        return f"{label} of {compared} cannot be judged ({effect.reason})"
    number = figure(effect, effect.estimate)
    bounds = " to ".join(figure(effect, bound) for bound in effect.simultaneous)
    why = f", as a cell of {' and of '.join(part.failed)} failed" if part.failed else ""
    return f"{label} of {compared} is {number} ({bounds}), {_expected(part)}: {part.verdict}{why}"


def side(effect: Effect, *, against: bool = False) -> str:
    """Return a side of an effect in words: its factor and level, and the levels that it is restricted to."""
    held = {**effect.at, **effect.against_at} if against else effect.at
    restricted = ", ".join(f"{factor} {level}" for factor, level in held.items())
    return f"{effect.factor} {effect.against if against else effect.level}" + (f" ({restricted})" if restricted else "")


def figure(effect: Contrast, value: float) -> str:
    """Return a value of an effect as text: ``×0.931`` of a ratio, ``+0.31`` of a difference."""
    if effect.scale == "ratio":
        return f"×{value:.3f}" if value < 10 else f"×{value:.3g}"
    return f"{value:+.{METRICS[effect.metric].digits}f}".replace("-", "−")


def _expected(part: Part) -> str:
    metric = part.effect.metric
    limit = figure(part.effect, limit_of(metric, part.margin))
    above = METRICS[metric].higher_is_better != (part.expect == "worse")
    return f"expected {'above' if above else 'below'} {limit}"


def _measured(parts: Sequence[Part], config: StudyConfig) -> str:
    counts = [len(part.effect.seeds) for part in parts if part.effect.seeds] or [0]
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    told = [f"{seeds} seed{'' if counts == [1] * len(counts) else 's'}"]
    stages = {METRICS[part.effect.metric].stage for part in parts}
    if 2 in stages:
        told.append(f"{config.evaluation.num_samples:,} samples each")
    if 1 in stages:
        number = config.evaluation.num_reconstructions
        told.append("all validation images reconstructed" if number is None else f"{number:,} reconstructions each")
    return ", ".join(told)


def rule_in_words(config: StudyConfig, num_variants: int) -> str:
    """Return how effects and verdicts come about."""
    count, num_seeds = len(claimed_effects(config)), len(config.seeds)
    if num_seeds < 2:
        return "One seed has no spread, so no effect has an interval and every claim is inconclusive."
    ratios = ", ".join(column.label for column in METRICS.values() if column.scale == "ratio")
    parts = [
        f"{ratios} are analysed by their logarithm, so that an effect is a ratio (×0.93: 7 % lower); all else as it "
        "is, so that an effect is a difference. An effect is the mean, over all pairs of variants that are alike in "
        "all else, of level against level, seed by seed.",
        _spread_in_words(config.rule.spread, num_variants, num_seeds),
    ]
    if count:
        together, each = (100 * (1 - level) for level in (config.rule.level, config.rule.level / count))
        parts.append(
            f"Claims are judged by intervals that hold together with a probability of {together:g} %"
            f"{' where variants scatter alike' * (config.rule.spread == 'pooled')}, over the {count} "
            f"comparison{'s' * (count > 1)} that all claims make (Bonferroni: {each:.4g} % each). “Better” is "
            "supported where the whole interval is better than no effect and refuted where all of it is worse; “worse” "
            "the other way round; “no worse” by a margin is supported where the whole interval is better than the "
            "margin and refuted where all of it is worse; anything else is inconclusive, which does not mean that "
            "there is no effect. A claim is supported where all of its comparisons are, and refuted where one is. A "
            "comparison with a variant of which a cell failed is inconclusive: what is left are its lucky seeds."
        )
    parts.append("All other intervals are 95 % each, for display. Interactions and rank correlations are exploratory.")
    return " ".join(parts)


def _spread_in_words(spread: str, num_variants: int, num_seeds: int) -> str:
    if spread == "paired":
        where = f"the spread of its own {num_seeds} values by seed"
        return f"Its error is {where} (Student's t, {num_seeds - 1} degrees of freedom)."
    degrees = (num_variants - 1) * (num_seeds - 1)
    return (
        "Its error comes from the residuals of all cells about variant plus seed, pooled over variants (Student's t, "
        f"{degrees} degrees of freedom where no cell is missing; for reconstructions fewer, where variants share their "
        "autoencoders). This takes the spread to be alike in all variants. "
        "Where it is, and nothing differs, 2 % of simulated studies of the presets' design come to any verdict at "
        "level 0.05; where the variant that most comparisons share scatters twice or three times as much as the "
        "others, 7.5 % or 15 % do. So the interval of each deciding comparison by its own differences stands beside "
        "it, which takes nothing of the kind and decides nothing."
    )
