"""Rank correlations across variants: which variants count, which tests they are, and what their p-values are worth."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from wavelatent.common.config import load_config
from wavelatent.pipelines.study_config import StudyConfig
from wavelatent.pipelines.study_design import Variant, make_variants
from wavelatent.pipelines.study_effects import MetricTable
from wavelatent.pipelines.study_findings import Predictor
from wavelatent.pipelines.study_predictors import health_predictors, reconstructions_as_predictors
from wavelatent.pipelines.study_records import CellRecord
from wavelatent.pipelines.study_statistics import rank_correlations
from wavelatent.pipelines.study_tables import predictor_table

NAMES = "abcdefg"
KID = dict(zip(NAMES, [0.02, 0.05, 0.03, 0.08, 0.01, 0.06, 0.04], strict=True))
FIGURES = {
    "spectrum.slope": KID,
    "scale.std": dict(zip(NAMES, [2.0, 1.0, 5.0, 3.0, 6.0, 4.0, 7.0], strict=True)),
}
SEEDS = range(2)


def measured(variant: str, seed: int) -> CellRecord:
    kid = KID[variant] * (1 + 0.01 * seed)
    metrics = {"kid_mean": kid, "fid": 100 * kid, "rfid": 1 / kid}
    health = {name: figure[variant] for name, figure in FIGURES.items()}
    return CellRecord(variant, {"kind": variant}, seed, metrics=metrics, health=health)


def failed(variant: str, seed: int) -> CellRecord:
    return CellRecord(variant, {"kind": variant}, seed, failed="stage two: the loss is not finite at step 7")


def tables_of(records: Sequence[CellRecord]) -> dict[str, MetricTable]:
    variants = [Variant(name, {"kind": name}, None) for name in NAMES]  # type: ignore[arg-type]
    return {metric: MetricTable(metric, variants, SEEDS, records) for metric in ("kid_mean", "fid", "rfid")}


def test_the_correction_is_for_the_figures_and_not_for_looking_at_fid_too():
    records = [measured(variant, seed) for variant in NAMES for seed in SEEDS]
    rows, _ = health_predictors(NAMES, tables_of(records), records)
    assert sorted((row.figure, row.metric) for row in rows) == sorted(
        (figure, metric) for figure in FIGURES for metric in ("kid_mean", "fid")
    )
    best = next(row for row in rows if row.metric == "kid_mean")
    assert (best.figure, best.rho, best.variants) == ("spectrum.slope", pytest.approx(1), 7)
    assert (best.p, best.adjusted) == pytest.approx((2 / math.factorial(7), 4 / math.factorial(7)))
    of_fid = [row for row in rows if row.metric == "fid"]
    assert [row.adjusted for row in of_fid] == [None, None]
    assert {row.p for row in of_fid} == {row.p for row in rows if row.metric == "kid_mean"}
    kid, fid = reconstructions_as_predictors(NAMES, tables_of(records), records)[0]
    assert (kid.metric, kid.rho, kid.adjusted) == ("kid_mean", pytest.approx(-1), kid.p)
    assert (fid.metric, fid.adjusted) == ("fid", None)


def test_a_variant_of_which_a_cell_failed_is_left_out_and_not_judged_by_its_lucky_seeds():
    lucky = [measured(variant, seed) for variant in NAMES for seed in SEEDS if (variant, seed) != ("d", 1)]
    records = [*lucky, failed("d", 1)]
    for find in (health_predictors, reconstructions_as_predictors):
        rows, notes = find(NAMES, tables_of(records), records)
        assert {row.variants for row in rows} == {6}
        (note,) = [note for note in notes if "cell of theirs failed" in note]
        assert note.endswith(": d")
        assert {row.variants for row in find(NAMES, tables_of(lucky), lucky)[0]} == {7}  # not finished is not failed


def test_another_variant_with_the_same_autoencoder_stands_in_for_one_that_failed():
    def of(record: CellRecord) -> CellRecord:
        folder = f"autoencoders/{'a' if record.variant == 'b' else record.variant}-seed{record.seed}"
        return CellRecord(**{**record.as_dict(), "folders": {"autoencoder": folder}})

    whole = [of(measured(variant, seed)) for variant in NAMES for seed in SEEDS]
    assert {row.variants for row in health_predictors(NAMES, tables_of(whole), whole)[0]} == {6}
    broken = [of(failed("a", 0)) if (r.variant, r.seed) == ("a", 0) else r for r in whole]
    assert {row.variants for row in health_predictors(NAMES, tables_of(broken), broken)[0]} == {6}


@pytest.mark.parametrize(("alike", "rate"), [(0, 0.045), (1, 0.065), (3, 0.15)])
def test_p_values_are_small_too_often_where_most_variants_are_of_one_kind(alike, rate):
    """Of unrelated figures that scatter ``alike`` times as much between bottlenecks as between variants of one."""
    variants = make_variants(load_config(StudyConfig, "study-claims"))
    of = {v.recipe.autoencoder.model_dump_json(): v.levels["bottleneck"] for v in variants}
    assert sorted(of.values()) == ["bounded"] * 5 + ["kl"] * 2 + ["plain"]
    kinds = np.array([["bounded", "kl", "plain"].index(kind) for kind in of.values()])
    rng = np.random.default_rng(0)

    def drawn() -> np.ndarray:
        return rng.normal(size=(20_000, 8)) + alike * rng.normal(size=(20_000, 3))[:, kinds]

    figure, target = (stats.rankdata(drawn(), axis=1) - 4.5 for _ in range(2))
    rho = (figure * target).sum(axis=1) / 42  # 42: the squares of eight ranks about their mean
    seen, p = rank_correlations(rng.normal(size=(300, 8)), np.arange(8.0))
    least = np.abs(seen[p < 0.05]).min()
    assert least == pytest.approx(0.738, abs=0.001)  # the table's critical value at N = 8
    assert np.mean(np.abs(rho) > least - 1e-9) == pytest.approx(rate, abs=0.01)


def test_a_decimal_point_in_the_name_of_a_figure_stays_one():
    names = ["learnability.loss_sigma_0.2-1", "rfid"]
    table = predictor_table([Predictor(name, "kid_mean", 0.5, 0.2, None, 8) for name in names])
    assert [row[0] for row in table.rows] == ["learnability: loss sigma 0.2-1", "rFID"]
