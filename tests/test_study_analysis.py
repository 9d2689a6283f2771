"""The analysis of a study: its statistics against other ways to compute them, planted effects, and its error rates."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy import stats

from wavelatent.common.config import load_config
from wavelatent.pipelines.learnability import learnability
from wavelatent.pipelines.metric_columns import METRICS
from wavelatent.pipelines.study_analysis import analyse, power_in_words
from wavelatent.pipelines.study_claims import judge
from wavelatent.pipelines.study_config import Metric, StudyConfig
from wavelatent.pipelines.study_design import Variant, make_variants
from wavelatent.pipelines.study_effects import Comparison, claimed_effects
from wavelatent.pipelines.study_findings import Analysis, Effect
from wavelatent.pipelines.study_predictors import OF_THE_SHAPE, SIZE
from wavelatent.pipelines.study_records import CellRecord
from wavelatent.pipelines.study_results import health_figures
from wavelatent.pipelines.study_statistics import (
    AdditiveModel,
    detectable_effect,
    holm,
    paired,
    rank_correlations,
    uneven_spread,
)
from wavelatent.stage1_autoencoder.health import LatentData
from wavelatent.stage1_autoencoder.health_latents import LATENT_SECTIONS

BASE_KID = 0.02
PAIRS = [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (2, 1), (4, 3), (5, 4)]
"""The eight comparisons of the simulated studies of six variants."""


def contrast(variants: int, level: int, against: int) -> np.ndarray:
    return np.eye(variants)[level] - np.eye(variants)[against]


def planned(
    claims: Mapping[str, Sequence[Mapping]] = {},
    *,
    factors: Mapping[str, Sequence[str]] = {"kind": "abcdef"},
    design: Sequence[Mapping[str, str]] | None = None,
    seeds: int = 3,
    **rule: object,
) -> tuple[StudyConfig, list[Variant]]:
    """A study whose variants are all levels of one factor, or as ``design`` lists them; recipes do not matter here."""
    base = {factor: levels[0] for factor, levels in factors.items()}
    design = design or [{factor: level} for factor, levels in factors.items() for level in levels]
    named = {" ".join({**base, **levels}.values()): {**base, **levels} for levels in design}
    config = StudyConfig.model_validate(
        {
            "title": "A study",
            "factors": {factor: {level: {} for level in levels} for factor, levels in factors.items()},
            "design": {"kind": "named", "variants": named},
            "seeds": list(range(seeds)),
            "claims": {name: {"statement": name, "comparisons": list(parts)} for name, parts in claims.items()},
            "rule": rule,
        }
    )
    return config, [Variant(name, levels, None) for name, levels in named.items()]  # type: ignore[arg-type]


def compare(level: str, against: str = "a", expect: str = "better", **more: object) -> dict:
    return {"factor": "kind", "level": level, "against": against, "expect": expect, **more}


def recorded(variants: Sequence[Variant], metrics: Mapping[str, ArrayLike], **more: Mapping) -> list[CellRecord]:
    """Records of metrics ``[V, S]``; ``more`` holds fields of a record by (variant's name, seed). NaN: no record."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in metrics.items()}
    seeds = range(next(iter(arrays.values())).shape[1])
    return [
        CellRecord(
            variant=variant.name,
            levels=variant.levels,
            seed=seed,
            metrics={name: float(values[v, seed]) for name, values in arrays.items()},
            **{field: by_cell[variant.name, seed] for field, by_cell in more.items()},
        )
        for v, variant in enumerate(variants)
        for seed in seeds
        if not all(np.isnan(values[v, seed]) for values in arrays.values())
    ]


def effect_of(analysis: Analysis, metric: str = "kid_mean", **fields: object) -> Effect:
    (found,) = [
        effect
        for effect in analysis.effects
        if effect.metric == metric and all(getattr(effect, name) == value for name, value in fields.items())
    ]
    return found


def noisy_kid(rng: np.random.Generator, *effects: float, seeds: int = 3, scatter: float = 0.03) -> np.ndarray:
    """KID ``[V, S]`` whose logarithm is effect + seed + noise."""
    log = np.array(effects)[:, None] + rng.normal(0, 0.1, seeds) + rng.normal(0, scatter, (len(effects), seeds))
    return BASE_KID * np.exp(log)


class TestTheAdditiveModel:
    VALUES = np.array([[3.1, 2.7, 4.0, 3.3], [3.9, 3.8, 4.6, 4.4], [2.0, 2.5, 3.1, 2.2]])

    def test_a_complete_layout_is_the_two_way_analysis_of_variance(self):
        y = self.VALUES
        residual = y - y.mean(axis=1, keepdims=True) - y.mean(axis=0) + y.mean()
        variance = (residual**2).sum() / 6  # (3 - 1)(4 - 1) degrees of freedom
        estimate = AdditiveModel(y).contrast(np.array([-0.5, 1, -0.5]))
        assert estimate.degrees == 6
        assert estimate.value == pytest.approx(y[1].mean() - (y[0].mean() + y[2].mean()) / 2)
        assert estimate.error == pytest.approx(math.sqrt(variance * 1.5 / 4))
        reach = stats.t.ppf(0.995, 6) * estimate.error
        assert estimate.interval(0.01) == pytest.approx((estimate.value - reach, estimate.value + reach))

    def test_of_two_variants_it_is_the_paired_t_test(self):
        oracle = stats.ttest_rel(self.VALUES[0], self.VALUES[1]).confidence_interval(0.99)
        assert AdditiveModel(self.VALUES[:2]).contrast(np.array([1, -1])).interval(0.01) == pytest.approx(oracle)
        for more in (self.VALUES[:2], self.VALUES):  # where the third variant is nobody's business
            weights = contrast(len(more), 0, 1)
            assert paired(more, weights).interval(0.01) == pytest.approx(oracle)

    def test_missing_cells_leave_the_least_squares_of_those_that_are_there(self):
        y = self.VALUES.copy()
        y[0, 1] = y[2, 3] = np.nan
        v, s = np.nonzero(np.isfinite(y))
        treatment = np.column_stack([np.ones(10), v == 1, v == 2, s == 1, s == 2, s == 3]).astype(float)
        solution, squares, _, _ = np.linalg.lstsq(treatment, y[v, s], rcond=None)
        covariance = squares[0] / (10 - 6) * np.linalg.inv(treatment.T @ treatment)
        estimate = AdditiveModel(y).contrast(np.array([-1, 0, 1]))
        assert (estimate.degrees, estimate.value) == (4, pytest.approx(solution[2]))
        assert estimate.error == pytest.approx(math.sqrt(covariance[2, 2]))
        alone = paired(y, np.array([-1.0, 0, 1]))
        oracle = stats.ttest_rel(y[2, [0, 2]], y[0, [0, 2]]).confidence_interval()
        assert alone.interval() == pytest.approx(oracle)

    def test_what_the_cells_do_not_determine_is_not_estimated(self):
        nothing, apart = self.VALUES[:, :2].copy(), np.full((2, 2), np.nan)
        nothing[1] = np.nan
        apart[0, 0] = apart[1, 1] = 1.0
        for y, weights in ((nothing, contrast(3, 1, 0)), (apart, contrast(2, 1, 0))):
            assert AdditiveModel(y).contrast(weights) is None
            assert paired(y, weights) is None
        assert AdditiveModel(nothing).contrast(contrast(3, 2, 0)).degrees == 1

    def test_rounding_is_no_effect(self):
        y = np.log(np.array([[0.1, 0.3, 0.7]] * 2)) + np.array([[0, 0, 0], [1e-16, -2e-16, 1e-16]])
        assert AdditiveModel(y).contrast(np.array([1, -1])).interval() == (0, 0)

    def test_many_studies_at_once_are_each_alone(self):
        y = np.random.default_rng(0).normal(size=(5, 3, 4))
        weights = np.array([1, -0.25, -0.75])
        for at_once, alone in ((AdditiveModel(y).contrast(weights), lambda one: AdditiveModel(one).contrast(weights)),
                               (paired(y, weights), lambda one: paired(one, weights))):  # fmt: skip
            assert at_once.interval()[0] == pytest.approx([alone(one).interval()[0] for one in y])

    def test_uneven_spread_is_f_distributed_where_there_is_none(self):
        rng = np.random.default_rng(0)
        p = [p for _ in range(100) for _, p in uneven_spread(rng.normal(size=(5, 3)))]
        assert stats.kstest(p[::5], "uniform").pvalue > 0.01
        y = rng.normal(size=(5, 4))
        y[2] *= 30
        ratios, p = zip(*uneven_spread(y), strict=True)
        assert (np.argmax(ratios), np.argmin(p)) == (2, 2)
        assert p[2] < 1e-3
        assert ratios[2] > 10


def test_holm_by_a_worked_example():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.5])) == pytest.approx([1, 1])


def test_rank_correlations_are_spearmans_with_the_p_values_of_all_permutations():
    rng = np.random.default_rng(0)
    target = np.array([3.0, 1.0, 4.0, 1.5, 5.0])
    figures = np.stack([target**3, -target, rng.normal(size=5), [2.0, 2.0, 7.0, 1.0, 7.0]])
    rho, p = rank_correlations(figures, target)
    for row, r, q in zip(figures, rho, p, strict=True):
        oracle = stats.permutation_test(
            (row,), lambda x: stats.spearmanr(x, target).statistic, permutation_type="pairings", n_resamples=200
        )  # 120 permutations: all of them
        assert r == pytest.approx(oracle.statistic)
        if len(set(row)) == 5:  # ties skew the distribution, of which the oracle doubles the smaller tail
            assert q == pytest.approx(oracle.pvalue)
    many = rng.normal(size=(2, 11))
    rho, p = rank_correlations(many[:1], many[1], key="kid_mean")
    oracle = stats.spearmanr(*many)
    assert rho[0] == pytest.approx(oracle.statistic)
    assert p[0] == pytest.approx(oracle.pvalue, abs=0.03)
    assert p[0] == rank_correlations(many[:1], many[1], key="kid_mean")[1][0]
    assert rank_correlations(many[:1], many[0])[1][0] == 1 / 10_001


@pytest.mark.parametrize(
    ("interval", "metric", "expect", "verdict"),
    [
        ((0.90, 0.99), "kid_mean", "better", "supported"),
        ((0.90, 1.00), "kid_mean", "better", "inconclusive"),
        ((1.01, 1.20), "kid_mean", "better", "refuted"),
        ((1.01, 1.20), "fid", "worse", "supported"),
        ((0.90, 0.99), "lpips", "worse", "refuted"),
        ((0.90, 1.01), "rfid", "worse", "inconclusive"),
        ((0.10, 0.40), "psnr", "better", "supported"),
        ((-0.4, -0.1), "psnr", "better", "refuted"),
        ((-0.4, -0.1), "recall", "worse", "supported"),
        ((0.98, 1.04), "kid_mean", "no_worse", "supported"),
        ((0.98, 1.06), "kid_mean", "no_worse", "inconclusive"),
        ((1.051, 1.2), "kid_mean", "no_worse", "refuted"),
        ((-0.04, 0.2), "ssim", "no_worse", "supported"),
        ((-0.06, 0.2), "ssim", "no_worse", "inconclusive"),
        ((-0.3, -0.06), "ssim", "no_worse", "refuted"),
    ],
)
def test_a_verdict_can_be_read_off_its_interval(interval, metric, expect, verdict):
    assert judge(interval, metric, expect, 0.05 if expect == "no_worse" else 0.0) == verdict


class TestPlantedEffects:
    def test_a_crippled_variant_is_found_and_an_equal_one_is_not(self):
        claims = {
            "it is better": [compare("b")],
            "it is worse": [compare("b", expect="worse")],
            "the twin is better": [compare("c")],
            "the twin is no worse": [compare("c", expect="no_worse", margin=0.3)],
            "one of both": [compare("b", expect="worse"), compare("c", expect="worse")],
            "one the other way": [compare("b"), compare("c", expect="no_worse", margin=0.3)],
            "no worse than crippled": [compare("b", expect="no_worse", margin=0.05)],
        }
        config, variants = planned(claims)
        kid = noisy_kid(np.random.default_rng(0), 0, math.log(1.5), 0, 0.1, -0.1, 0)
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": kid}))
        verdicts = {claim.name: claim.verdict for claim in analysis.claims}
        assert verdicts == {
            "it is better": "refuted",
            "it is worse": "supported",
            "the twin is better": "inconclusive",
            "the twin is no worse": "supported",
            "one of both": "inconclusive",
            "one the other way": "refuted",
            "no worse than crippled": "refuted",
        }
        effect = effect_of(analysis, level="b")
        assert effect.estimate == pytest.approx(1.5, rel=0.1)
        assert effect.by_seed == pytest.approx(kid[1] / kid[0])
        assert (effect.contexts, effect.seeds, effect.degrees) == ((("b", "a"),), (0, 1, 2), 10)
        assert effect.simultaneous[0] < effect.interval[0] < 1.5 < effect.interval[1] < effect.simultaneous[1]
        reason = analysis.claims[1].reason
        assert f"×{effect.estimate:.3f}" in reason
        assert reason.endswith("with 3 seeds, 2,000 samples each, supported at this scale.")
        json.dumps(analysis.as_dict())

    def test_the_correction_is_for_distinct_comparisons_of_all_claims(self):
        claims = {"one": [compare("b")], "same": [compare("b", expect="worse"), compare("c")]}
        config, variants = planned(claims, level=0.1)
        kid = noisy_kid(np.random.default_rng(1), *6 * [0.0])
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": kid, "fid": 100 * kid}))
        estimate = AdditiveModel(np.log(kid)).contrast(contrast(6, 1, 0))
        assert effect_of(analysis, level="b").simultaneous == pytest.approx(tuple(np.exp(estimate.interval(0.1 / 2))))
        assert effect_of(analysis, level="b").interval == pytest.approx(tuple(np.exp(estimate.interval(0.05))))
        assert effect_of(analysis, level="d").simultaneous is None
        assert effect_of(analysis, "fid", level="b").simultaneous is None
        assert "2 comparisons" in analysis.rule
        assert "where variants scatter alike" in analysis.rule

    def test_the_paired_interval_stands_beside_the_pooled_one_and_decides_nothing(self):
        claims = {"one": [compare("b", expect="worse")], "other": [compare("c")]}
        kid = noisy_kid(np.random.default_rng(0), 0, math.log(1.5), 0, 0.1, -0.1, 0)
        kid[1] *= [0.85, 1.15, 1.0]  # it scatters more than all others
        by_rule = {}
        for spread in ("pooled", "paired"):
            config, variants = planned(claims, spread=spread)
            by_rule[spread] = analyse(config, variants, recorded(variants, {"kid_mean": kid}))
        effect = effect_of(by_rule["pooled"], level="b")
        oracle = stats.ttest_rel(*np.log(kid[[1, 0]])).confidence_interval(1 - 0.05 / 2)
        assert effect.paired == pytest.approx(tuple(np.exp(oracle)))
        assert by_rule["pooled"].as_dict()["claims"][0]["parts"][0]["effect"]["paired"] == effect.paired
        assert effect.paired == effect_of(by_rule["paired"], level="b").simultaneous
        assert effect.paired[0] < 1 < effect.simultaneous[0]
        assert [rule.claims[0].verdict for rule in by_rule.values()] == ["supported", "inconclusive"]
        assert effect_of(by_rule["pooled"], level="d").paired is None
        assert effect_of(by_rule["paired"], level="b").paired is None, "it is the rule's own"
        assert "scatter" not in by_rule["paired"].rule

    def test_effects_and_interactions_of_a_factorial_are_recovered(self):
        factors = {"channels": ["4", "16"], "bound": ["no", "yes"], "seen": ["few", "many"]}
        design = [
            {"channels": c, "bound": b, "seen": s}
            for c in factors["channels"] for b in factors["bound"] for s in factors["seen"]
        ]  # fmt: skip
        parts = [{"factor": "bound", "level": "yes", "against": "no", "at": {"channels": "16"}}]
        config, variants = planned({"it helps": parts}, factors=factors, design=design)
        wide, bound, many = (
            np.array([[variant.levels[factor] == levels[1]] for variant in variants], dtype=float)
            for factor, levels in factors.items()
        )
        seeds = np.array([[0.0, 0.2, -0.1]])
        kid = BASE_KID * np.exp(0.3 * wide - 0.1 * bound - 0.5 * many - 0.2 * wide * bound + seeds)
        psnr = 20 + 3 * wide + 1 * wide * bound + seeds
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": kid, "psnr": psnr}))
        assert effect_of(analysis, factor="bound", at={}).estimate == pytest.approx(math.exp(-0.2))
        restricted = effect_of(analysis, factor="bound", at={"channels": "16"})
        assert restricted.estimate == pytest.approx(math.exp(-0.3))
        assert restricted.contexts == (("16 yes few", "16 no few"), ("16 yes many", "16 no many"))
        assert effect_of(analysis, "psnr", factor="channels").estimate == pytest.approx(3.5)
        assert effect_of(analysis, "psnr", factor="seen").estimate == 0
        found = {(one.factors, one.metric): one for one in analysis.interactions}
        assert len(found) == 6
        interaction = found[("channels", "bound"), "kid_mean"]
        assert interaction.estimate == pytest.approx(math.exp(-0.2))
        assert interaction.contexts[0] == ("16 yes few", "16 no few", "4 yes few", "4 no few")
        assert found[("channels", "bound"), "psnr"].estimate == pytest.approx(1)
        assert found[("channels", "seen"), "kid_mean"].estimate == pytest.approx(1)

    def test_a_claim_across_two_factors(self):
        factors = {"kind": ["kl", "bounded"], "channels": ["4", "16"]}
        design = [{"kind": "kl", "channels": "4"}, {"kind": "bounded", "channels": "16"}]
        part = compare("bounded", "kl", at={"channels": "16"}, against_at={"channels": "4"})
        config, variants = planned({"both": [part]}, factors=factors, design=design)
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": [[4, 5, 6], [2, 2.5, 3.1]]}))
        (effect,) = analysis.effects
        assert effect.contexts == (("bounded 16", "kl 4"),)
        assert analysis.claims[0].verdict == "supported"
        assert "kind bounded (channels 16) against kind kl (channels 4)" in analysis.claims[0].reason


class TestWhatIsMissing:
    CLAIMS = {"b": [compare("b")], "c": [compare("c")]}  # noqa: RUF012

    def analysed(self, kid: np.ndarray, claims: Mapping = CLAIMS, **more: object) -> Analysis:
        config, variants = planned(claims, seeds=kid.shape[1], **more)
        return analyse(config, variants, recorded(variants, {"kid_mean": kid}))

    def test_what_has_no_logarithm_leaves_its_own_claims_open_and_no_others(self):
        kid = noisy_kid(np.random.default_rng(0), 0, -1, -1, 0, 0, 0)
        kid[1, 2] = -0.0002
        analysis = self.analysed(kid)
        assert [claim.verdict for claim in analysis.claims] == ["inconclusive", "supported"]
        assert "b has KID -0.0002 at seed 2" in analysis.claims[0].reason
        effect = effect_of(analysis, level="b")
        assert (effect.estimate, effect.interval, effect.simultaneous) == (None, None, None)
        estimate = AdditiveModel(np.log(np.delete(kid, 1, axis=0))).contrast(contrast(5, 1, 0))
        assert effect_of(analysis, level="c").interval == pytest.approx(tuple(np.exp(estimate.interval())))
        assert analysis.variants["b"]["kid_mean"].values == tuple(kid[1])

    def test_failed_cells_are_left_out_and_named(self):
        kid = noisy_kid(np.random.default_rng(0), 0, -1, -1, 0, 0, 0)
        config, variants = planned(self.CLAIMS)
        gone = [("b", 0), ("b", 1), ("b", 2), ("c", 1)]
        reasons = {
            (variant.name, seed): "stage two: the loss is not finite" if (variant.name, seed) in gone else None
            for variant in variants
            for seed in range(3)
        }
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": kid}, failed=reasons))
        assert [claim.verdict for claim in analysis.claims] == ["inconclusive", "inconclusive"]
        assert "b has no KID" in analysis.claims[0].reason
        assert "inconclusive, as a cell of c failed" in analysis.claims[1].reason, "its lucky seeds decide nothing"
        kid[1], kid[2, 1] = np.nan, np.nan
        estimate = AdditiveModel(np.log(kid)).contrast(contrast(6, 2, 0))
        effect = effect_of(analysis, level="c")
        assert effect.interval == pytest.approx(tuple(np.exp(estimate.interval())))
        assert (effect.seeds, effect.degrees) == ((0, 2), 15 - 1 - 5 - 2)
        assert [note for note in analysis.notes if "c at seed 1 (stage two: the loss is not finite)" in note]

    def test_one_seed_says_nothing(self):
        analysis = self.analysed(np.array([[1.0], [2], [3], [4], [5], [6]]))
        assert {claim.verdict for claim in analysis.claims} == {"inconclusive"}
        assert "one seed has no spread" in analysis.claims[0].reason
        assert effect_of(analysis, level="b").estimate == pytest.approx(2)
        assert analysis.rule.startswith("One seed")

    def test_bounds_of_few_cells_may_be_as_wide_as_numbers_go(self):
        config, variants = planned({str(m): [compare("b", metric=m)] for m in METRICS}, factors={"kind": "ab"}, seeds=2)
        kid = np.array([[1e-9, 1.0], [1.0, 1e-9]])
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": kid}))
        low, high = effect_of(analysis, level="b").simultaneous
        assert low < 1e-300
        assert 1e300 < high < math.inf
        assert "×1.01e+304" in analysis.claims[0].reason

    def test_cells_that_are_still_to_come_are_counted(self):
        kid = noisy_kid(np.random.default_rng(0), *6 * [0.0])
        kid[5, 1:] = np.nan
        assert [note for note in self.analysed(kid).notes if note.startswith("16 of 18 cells")]
        assert not [note for note in self.analysed(kid[:, :1]).notes if "cells" in note]

    def test_a_claim_on_a_metric_that_no_cell_has(self):
        analysis = self.analysed(np.ones((6, 3)), {"p": [compare("b", metric="precision")]})
        assert analysis.claims[0].verdict == "inconclusive"
        assert "b has no precision" in analysis.claims[0].reason

    def test_a_variant_that_scatters_is_named(self):
        kid = noisy_kid(np.random.default_rng(0), *6 * [0.0])
        kid[3] *= [1, 4, 0.3]
        assert [note for note in self.analysed(kid).notes if note.startswith("KID of d scatters")]
        assert not [note for note in self.analysed(kid, spread="paired").notes if "scatters" in note]


class TestAutoencodersThatVariantsShare:
    RFID = np.array([[4.0, 4.4, 4.1], [5.0, 5.2, 5.3], [4.0, 4.4, 4.1], [6.0, 6.1, 6.6], [4.6, 5, 5.1], [3, 3.2, 3]])

    def test_their_reconstructions_count_once(self):
        claims = {"b": [compare("b", metric="rfid", expect="worse")], "c": [compare("c", metric="rfid")]}
        config, variants = planned(claims)
        folders = {
            (variant.name, seed): {"autoencoder": f"autoencoders/{'a' if variant.name == 'c' else variant.name}{seed}"}
            for variant in variants
            for seed in range(3)
        }
        analysis = analyse(config, variants, recorded(variants, {"rfid": self.RFID}, folders=folders))
        alone = AdditiveModel(np.log(np.delete(self.RFID, 2, axis=0))).contrast(contrast(5, 1, 0))
        assert effect_of(analysis, "rfid", level="b").interval == pytest.approx(tuple(np.exp(alone.interval())))
        same = effect_of(analysis, "rfid", level="c")
        assert (same.estimate, same.interval) == (1, (1, 1))
        assert "share their autoencoders" in same.reason
        assert [claim.verdict for claim in analysis.claims] == ["supported", "inconclusive"]
        assert [note for note in analysis.notes if "c with a" in note]
        assert analysis.variants["c"]["rfid"].values == (4.0, 4.4, 4.1)

    def test_pairs_of_them_count_once_in_an_effect(self):
        factors = {"bound": ["no", "yes"], "channels": ["4", "16"], "scaled": ["yes", "no"]}
        design = [{}, {"bound": "yes"}, {"channels": "16"}, {"bound": "yes", "channels": "16"}]
        design += [{**levels, "scaled": "no"} for levels in design[:2]]
        config, variants = planned(factors=factors, design=design)
        rfid = np.array([4, 3, 5, 2, 4, 3])[:, None] * np.exp([[0, 0.1, -0.1]])
        folders = {
            (variant.name, seed): {"autoencoder": f"{variant.levels['bound']}{variant.levels['channels']}{seed}"}
            for variant in variants
            for seed in range(3)
        }
        analysis = analyse(config, variants, recorded(variants, {"rfid": rfid, "fid": rfid}, folders=folders))
        one, other = 3 / 4, 2 / 5
        assert effect_of(analysis, "rfid", factor="bound").estimate == pytest.approx((one * other) ** (1 / 2))
        assert effect_of(analysis, "fid", factor="bound").estimate == pytest.approx((one * one * other) ** (1 / 3))

    def test_errors_over_images_average_out_over_seeds_only_where_the_images_differ(self):
        config, variants = planned()
        half = 1.959964 * 0.1
        cells = [(variant.name, seed) for variant in variants for seed in range(3)]
        kid = 2 + self.RFID
        intervals = {
            (name, seed): {
                "kid_mean": tuple(kid["abcdef".index(name), seed] * np.array([1 - half, 1 + half])),  # 10 % of it
                "psnr": (20 - half, 20 + half),
            }
            for name, seed in cells
        }
        metrics = {"kid_mean": kid, "psnr": np.full((6, 3), 20.0), "fid": kid}
        analysis = analyse(config, variants, recorded(variants, metrics, intervals=intervals))
        assert effect_of(analysis, "kid_mean", level="b").image_error == pytest.approx(0.1 * math.sqrt(2 / 3))
        assert effect_of(analysis, "psnr", level="b").image_error == pytest.approx(0.1 * math.sqrt(2))
        assert effect_of(analysis, "fid", level="b").image_error is None


class TestPredictors:
    def records(self, variants: Sequence[Variant], kid: np.ndarray, **more: Mapping) -> list[CellRecord]:
        health = {
            (variant.name, seed): {
                "spectrum.slope": float(kid[v].mean() + seed),
                "scale.flat": 1.0,
                **({"posterior.kl": 2.0 * v} if v else {}),
                "geometry.noise": [3.0, 1.0, 4.0, 1.5, 9.0, 2.6][v],
            }
            for v, variant in enumerate(variants)
            for seed in range(3)
        }
        return recorded(variants, {"kid_mean": kid, "rfid": 1 / kid}, health=health, **more)

    def test_a_figure_that_orders_the_variants_is_found_and_a_constant_one_left_out(self):
        config, variants = planned()
        kid = noisy_kid(np.random.default_rng(0), 0, 0.5, -0.7, 1, -0.2, 0.8)
        analysis = analyse(config, variants, self.records(variants, kid))
        assert [row.figure for row in analysis.predictors] == ["spectrum.slope", "geometry.noise"]
        best = analysis.predictors[0]
        assert (best.metric, best.rho, best.variants) == ("kid_mean", pytest.approx(1), 6)
        assert (best.p, best.adjusted) == pytest.approx((2 / 720, 4 / 720))
        assert [note for note in analysis.notes if "the same in all variants: scale.flat" in note]
        assert [note for note in analysis.notes if "not computed for every variant: posterior.kl" in note]
        (row,) = analysis.rfid_against_gfid
        assert (row.figure, row.rho, row.adjusted) == ("rfid", pytest.approx(-1), row.p)

    def test_variants_that_share_their_autoencoder_count_once_and_too_few_are_not_correlated(self):
        config, variants = planned()
        kid = noisy_kid(np.random.default_rng(0), 0, 0.5, -0.7, 1, -0.2, 0.8)
        for own, count in (("abcdea", 5), ("abcaaa", 0)):
            folders = {
                (variant.name, seed): {"autoencoder": f"{name}{seed}"}
                for variant, name in zip(variants, own, strict=True)
                for seed in range(3)
            }
            analysis = analyse(config, variants, self.records(variants, kid, folders=folders))
            assert {row.variants for row in analysis.predictors} == ({count} if count else set())
        assert (
            len([note for note in analysis.notes if "too few variants" in note and "(3, of at least 5)" in note]) == 2
        )
        assert analysis.rfid_against_gfid == ()

    def test_figures_that_the_shape_decides_are_left_out_but_for_the_size_itself(self):
        """Which these are: the ones that two unlike sets of latents of one shape agree in, and two shapes do not."""

        def figures(channels: int, *, smooth: bool) -> dict[str, float]:
            draw = torch.Generator().manual_seed(int(smooth))
            mean = torch.randn(24, channels, 8, 8, generator=draw)
            if smooth:
                mean = F.avg_pool2d(mean.exp(), 3, 1, 1) * torch.linspace(1, 3, channels)[:, None, None]
            std = 0.1 + 0.1 * torch.rand(mean.shape, generator=draw) * (1 + smooth)
            data = LatentData(torch.rand(24, 3, 16, 16, generator=draw) * 2 - 1, mean, std, mean, None)
            sections = {name: compute(data) for name, compute in LATENT_SECTIONS.items()}
            sections["learnability"] = learnability(data, steps=1)
            plain = {name: {"figures": section.figures} for name, section in sections.items()}
            return health_figures({"sections": plain})

        one, other, wide = figures(2, smooth=False), figures(2, smooth=True), figures(6, smooth=True)
        same = {name for name in one if name in other and one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-12)}
        of_the_shape = {name for name in same if wide[name] != pytest.approx(one[name])}
        assert not [name for name in one if name.endswith(".seconds")], "which are the machine's"
        counts = {"posterior.active_units"}  # all of them are active here
        assert of_the_shape - counts == OF_THE_SHAPE | {SIZE}

        config, variants = planned()
        kid = noisy_kid(np.random.default_rng(0), 0, 0.5, -0.7, 1, -0.2, 0.8)
        health = {
            (variant.name, seed): dict.fromkeys([*OF_THE_SHAPE, SIZE], float(v // 3))
            for v, variant in enumerate(variants)
            for seed in range(3)
        }
        analysis = analyse(config, variants, recorded(variants, {"kid_mean": kid}, health=health))
        assert [row.figure for row in analysis.predictors] == [SIZE]
        assert [note for note in analysis.notes if f"against that of {SIZE}" in note]


class TestErrorRates:
    """Simulated studies of six variants x three seeds, in which nothing differs."""

    LEVEL = 0.05

    def null(self, studies: int, *, uneven: int | None = None, heavy: bool = False) -> np.ndarray:
        """KID ``[studies, 6, 3]``: log-normal about variants that are equal, with effects of seeds and image noise."""
        rng = np.random.default_rng(2026)
        residuals = rng.standard_t(3, (studies, 6, 3)) / math.sqrt(3) if heavy else rng.normal(size=(studies, 6, 3))
        if uneven is not None:
            residuals[:, uneven] *= 3
        log = rng.normal(0, 0.1, (studies, 1, 3)) + 0.05 * residuals
        return BASE_KID * np.exp(log) * (1 + 0.025 * rng.normal(size=log.shape))

    def called(self, kid: np.ndarray, spread: str, against: float = 1.0, pairs: Sequence[tuple] = PAIRS) -> np.ndarray:
        """Of every study, whether any simultaneous interval leaves ``against`` out."""
        y, any_called = np.log(kid), np.zeros(len(kid), dtype=bool)
        model = AdditiveModel(y)
        for pair in pairs:
            weights = contrast(6, *pair)
            estimate = model.contrast(weights) if spread == "pooled" else paired(y, weights)
            low, high = estimate.interval(self.LEVEL / len(pairs))
            any_called |= (low > math.log(against)) | (high < math.log(against))
        return any_called

    @pytest.mark.parametrize(("spread", "studies"), [("pooled", 200), ("paired", 40)])
    def test_claims_are_called_at_most_as_often_as_the_rule_says(self, spread, studies):
        names = "abcdef"
        claims = {
            f"{one} {two}": [compare(names[one], names[two], ("better", "worse")[i % 2])]
            for i, (one, two) in enumerate(PAIRS)
        }
        config, variants = planned(claims, spread=spread)
        kid = self.null(studies)
        called = [
            any(claim.verdict != "inconclusive" for claim in analyse(config, variants, records).claims)
            for records in (recorded(variants, {"kid_mean": one}) for one in kid)
        ]
        assert called == self.called(kid, spread).tolist(), "what is simulated below is what a study does"
        if spread == "pooled":  # paired, eight claims come close to the level, and 200 studies to either side of it
            assert np.mean(called) <= self.LEVEL

    @pytest.mark.parametrize(
        ("how", "pooled", "separate"),
        [
            ({}, 0.036, 0.049),
            ({"heavy": True}, 0.033, 0.043),
            ({"uneven": 5}, 0.076, 0.049),
            ({"uneven": 0}, 0.104, 0.046),
        ],
    )
    def test_the_rates_that_the_module_states(self, how, pooled, separate):
        kid = self.null(10_000, **how)
        rates = [float(np.mean(self.called(kid, spread))) for spread in ("pooled", "paired")]
        print(how, rates)
        assert rates == pytest.approx([pooled, separate], abs=0.007)  # three standard errors or more

    @pytest.mark.parametrize("spread", ["pooled", "paired"])
    def test_no_worse_at_its_margin_is_called_at_most_as_often(self, spread):
        margin, names = 0.05, "abcdef"
        claims = {level: [compare(level, expect="no_worse", margin=margin)] for level in names[1:]}
        config, variants = planned(claims, spread=spread)
        kid = self.null(2000)
        kid[:, 1:] *= 1 + margin
        called = self.called(kid, spread, 1 + margin, PAIRS[:5])
        assert np.mean(called) <= self.LEVEL
        for study in (*np.flatnonzero(called)[:10], *np.flatnonzero(~called)[:10]):
            verdicts = {
                c.verdict for c in analyse(config, variants, recorded(variants, {"kid_mean": kid[study]})).claims
            }
            assert (verdicts != {"inconclusive"}) == called[study]

    def test_a_detectable_effect_is_found_in_four_studies_of_five(self):
        effect = detectable_effect(0.05, variants=6, seeds=3, comparisons=8)
        y = 0.05 * np.random.default_rng(0).normal(size=(20_000, 6, 3))
        y[:, 1] -= effect
        _, high = AdditiveModel(y).contrast(contrast(6, 1, 0)).interval(self.LEVEL / 8)
        assert np.mean(high < 0) == pytest.approx(0.8, abs=0.01)
        shares = [1 - math.exp(-detectable_effect(s, variants=6, seeds=3, comparisons=8)) for s in (0.03, 0.05, 0.1)]
        assert shares == pytest.approx([0.10, 0.17, 0.30], abs=0.005)
        assert detectable_effect(0.05, variants=6, seeds=3, comparisons=8, spread="paired") > 3 * effect
        assert detectable_effect(0.05, variants=6, seeds=1, comparisons=8) == math.inf

    def test_a_plan_says_what_it_can_find(self):
        config, variants = planned({str(i): [compare("abcdef"[v], "abcdef"[w])] for i, (v, w) in enumerate(PAIRS)})
        assert "lower by 10 %, 17 %, 30 %" in power_in_words(config, variants)
        assert "judges nothing" in power_in_words(*planned())


def firsts(values: Sequence[object]) -> tuple[int, ...]:
    """Return the first place of every value."""
    return tuple(values.index(value) for value in values)


class TestThePresetsDesign:
    """Simulated studies of the presets' own variants, seeds and claims, in which nothing differs."""

    CONFIG = load_config(StudyConfig, "study-faces64")
    VARIANTS = make_variants(CONFIG)
    FIRST = firsts([variant.recipe.autoencoder for variant in VARIANTS])
    """Per variant the first that has its autoencoders."""

    def null(self, studies: int, **scatters: float) -> dict[str, np.ndarray]:
        """Return KID and rFID ``[studies, V, 3]``; ``scatters``: how much more than others a variant scatters."""
        rng = np.random.default_rng(2026)
        scatter = 0.05 * np.array([[scatters.get(variant.name.replace("-", "_"), 1.0)] for variant in self.VARIANTS])
        size = (studies, len(self.VARIANTS), len(self.CONFIG.seeds))
        kid, rfid = (
            np.exp(rng.normal(0, 0.1, (studies, 1, size[2])) + scatter * rng.normal(size=size)) for _ in range(2)
        )
        return {"kid_mean": BASE_KID * kid, "rfid": 10 * rfid[:, self.FIRST]}

    def concluded(self, figures: Mapping[str, np.ndarray], spread: str) -> np.ndarray:
        """Of every study, whether any claim is supported or refuted: all of them need that something differs."""
        names, own = [variant.name for variant in self.VARIANTS], sorted(set(self.FIRST))
        rows = {"kid_mean": list(range(len(names))), "rfid": own}
        logs = {metric: np.log(values[:, rows[metric]]) for metric, values in figures.items()}
        models = {metric: AdditiveModel(values) for metric, values in logs.items()}
        level = self.CONFIG.rule.level / len(claimed_effects(self.CONFIG))
        found = np.zeros(len(logs["kid_mean"]), dtype=bool)
        for claim in self.CONFIG.claims.values():
            supported, refuted = np.ones_like(found), np.zeros_like(found)
            for part in claim.comparisons:
                weights, pairs = np.zeros(len(names)), Comparison.of(part).contexts(self.VARIANTS)
                for name, weight in ((name, sign) for pair in pairs for name, sign in zip(pair, (1, -1), strict=True)):
                    row = names.index(name)
                    weights[row if part.metric == "kid_mean" else self.FIRST[row]] += weight / len(pairs)
                weights = weights[rows[part.metric]]
                estimate = (
                    models[part.metric].contrast(weights) if spread == "pooled" else paired(logs[part.metric], weights)
                )
                low, high = estimate.interval(level)
                below, above = high < math.log(1 + part.margin), low > math.log(1 + part.margin)
                supported &= above if part.expect == "worse" else below
                refuted |= below if part.expect == "worse" else above
            found |= supported | refuted
        return found

    @pytest.mark.parametrize("spread", ["pooled", "paired"])
    def test_it_is_what_a_study_does(self, spread):
        config = self.CONFIG.model_copy(update={"rule": self.CONFIG.rule.model_copy(update={"spread": spread})})
        figures = self.null(300, bounded_4=3)
        found = self.concluded(figures, spread)
        folders = {
            (own.name, seed): {"autoencoder": f"{first}-{seed}"}
            for own, first in zip(self.VARIANTS, self.FIRST, strict=True)
            for seed in config.seeds
        }
        studies = [*np.flatnonzero(found)[:4], *np.flatnonzero(~found)[:4]]
        assert found.any()
        for study in studies:
            metrics = {metric: values[study] for metric, values in figures.items()}
            claims = analyse(config, self.VARIANTS, recorded(self.VARIANTS, metrics, folders=folders)).claims
            assert any(claim.verdict != "inconclusive" for claim in claims) == found[study]

    @pytest.mark.parametrize(
        ("scatters", "pooled"), [({}, 0.02), ({"bounded_4": 2}, 0.075), ({"bounded_4": 3}, 0.15), ({"kl_4": 3}, 0.05)]
    )
    def test_the_rates_that_the_rule_states(self, scatters, pooled):
        figures = self.null(6000, **scatters)
        rates = {spread: float(np.mean(self.concluded(figures, spread))) for spread in ("pooled", "paired")}
        assert rates["pooled"] == pytest.approx(pooled, abs=0.015)  # three standard errors
        assert rates["paired"] < 0.025
        if not scatters:
            assert rates["pooled"] < self.CONFIG.rule.level
            rule = analyse(self.CONFIG, self.VARIANTS, []).rule
            assert "2 % of simulated studies" in rule
            assert "7.5 % or 15 % do" in rule


def test_every_metric_of_a_claim_has_a_scale_and_a_direction():
    assert set(get_args(Metric)) == set(METRICS)
