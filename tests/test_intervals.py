import pytest
import torch
from torch import Tensor

from wavelatent.common.errors import WavelatentError
from wavelatent.common.feature_distances import FeatureStatistics, FrechetReference, kernel_distance
from wavelatent.common.intervals import (
    Interval,
    frechet_at_infinity,
    frechet_interval,
    kernel_interval,
    manifold_intervals,
    mean_interval,
)
from wavelatent.common.manifolds import manifold_figures

DIM = 12
SPREADS = torch.arange(1, DIM + 1).double().pow(-0.5)
SHIFT = 0.5


def gaussian(count: int, seed: int, *, shift: float = SHIFT, scale: float = 1.2) -> Tensor:
    noise = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = scale * noise * SPREADS
    features[:, 0] += shift
    return features.float()


def whole_population() -> FrechetReference:
    """The exact statistics of ``gaussian(..., shift=0, scale=1)``."""
    statistics = FeatureStatistics(DIM)
    statistics.count = 1_000_000
    statistics.outer = (statistics.count - 1) * SPREADS.square().diag()
    return FrechetReference(statistics)


TRUTH = SHIFT**2 + 0.2**2 * float(SPREADS.square().sum())
"""The distance of the samples' population to the reference's: |m1 - m2|^2 + |S1^(1/2) - S2^(1/2)|^2."""


def share_held(intervals: list[Interval], truth: float) -> float:
    return sum(interval.low <= truth <= interval.high for interval in intervals) / len(intervals)


def test_intervals_of_a_mean_hold_it_as_often_as_they_say():
    draws = torch.Generator().manual_seed(1)
    intervals = [mean_interval(torch.empty(60).exponential_(generator=draws), seed=i) for i in range(100)]
    assert 0.88 <= share_held(intervals, truth=1.0) <= 0.99


def test_interval_of_a_mean_has_the_width_of_the_central_limit():
    values = gaussian(400, seed=2)[:, 1]
    interval = mean_interval(values)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.08)
    assert interval.low < float(values.mean()) < interval.high


def test_frechet_intervals_hold_the_expected_figure_of_as_many_images():
    reference = whole_population()
    samples = [gaussian(200, seed) for seed in range(100)]
    figures = [reference.distance(features) for features in samples]
    intervals = [frechet_interval(features, reference) for features in samples]
    assert 0.88 <= share_held(intervals, sum(figures) / len(figures)) <= 0.99
    assert frechet_interval(samples[0], reference, figure=figures[0]) == intervals[0]


def test_frechet_intervals_are_not_far_too_wide_where_there_is_no_difference():
    """There the figure is all bias, the linear part is next to nothing, and a plain bootstrap gives twice the width."""
    reference = whole_population()
    samples = [gaussian(90, seed, shift=0, scale=1) for seed in range(60)]
    figures = torch.tensor([reference.distance(features) for features in samples], dtype=torch.float64)
    intervals = [frechet_interval(features, reference) for features in samples]
    assert share_held(intervals, float(figures.mean())) >= 0.93
    assert sum(i.high - i.low for i in intervals) / 60 < 1.7 * 2 * 1.96 * float(figures.std())


def test_kernel_intervals_hold_the_expected_figure():
    reference = gaussian(250, seed=1000, shift=0, scale=1)
    samples = [gaussian(200, seed) for seed in range(60)]
    figures = [
        kernel_distance(features, reference, subsets=10, subset_size=100, seed=seed)
        for seed, features in enumerate(samples)
    ]
    intervals = [kernel_interval(f, reference, kid) for f, kid in zip(samples, figures, strict=True)]
    values = torch.tensor([figure.mean for figure in figures])
    assert 0.86 <= share_held(intervals, float(values.mean())) <= 1
    width = sum(interval.high - interval.low for interval in intervals) / len(intervals)
    assert 0.8 < width / (2 * 1.96 * float(values.std())) < 1.25


def test_kernel_intervals_know_of_the_random_subsets():
    samples, reference = gaussian(80, seed=0), gaussian(80, seed=1, shift=0, scale=1)
    few = kernel_distance(samples, reference, subsets=2, subset_size=10)
    interval = kernel_interval(samples, reference, few)
    assert interval.high - interval.low > 2 * 1.95 * few.std / 2**0.5


def test_manifold_intervals_hold_the_expected_figures():
    reference = gaussian(130, seed=1000, shift=0, scale=1)
    samples = [gaussian(120, seed, scale=0.8) for seed in range(40)]
    figures = [manifold_figures(features, reference) for features in samples]
    intervals = [manifold_intervals(features, reference) for features in samples]
    for name in ("precision", "recall", "density", "coverage"):
        values = torch.tensor([getattr(figure, name) for figure in figures])
        assert 0.85 <= share_held([by_name[name] for by_name in intervals], float(values.mean())) <= 1, name
        width = sum(by_name[name].high - by_name[name].low for by_name in intervals) / len(intervals)
        assert 0.7 < width / (2 * 1.96 * float(values.std())) < 1.7, name


def test_manifold_intervals_stay_within_the_bounds_of_their_figures():
    points = gaussian(60, seed=3)
    intervals = manifold_intervals(points, points)
    assert intervals["precision"] == Interval(1, 1)
    assert all(intervals[name].high == 1 for name in ("recall", "coverage"))
    assert intervals["density"].high > 1


def test_extrapolation_removes_most_of_the_bias_and_knows_its_error():
    reference = whole_population()
    results = [frechet_at_infinity(gaussian(150, seed), reference) for seed in range(60)]
    values = torch.tensor([result.value for result in results], dtype=torch.float64)
    raw = sum(result.points[0][1] for result in results) / len(results)
    assert raw - TRUTH > 0.1
    assert abs(float(values.mean()) - TRUTH) < 0.2 * (raw - TRUTH)
    error = sum(result.error for result in results) / len(results)
    assert 0.8 < error / float(values.std()) < 1.3
    assert 0.88 <= share_held([result.interval for result in results], TRUTH) <= 1


def test_extrapolation_is_the_line_through_its_points():
    result = frechet_at_infinity(gaussian(120, seed=4), whole_population())
    assert [size for size, _ in result.points] == [120, 60, 40, 30]
    design = torch.tensor([[1, 1 / size] for size, _ in result.points], dtype=torch.float64)
    figures = torch.tensor([figure for _, figure in result.points], dtype=torch.float64)
    expected = torch.linalg.pinv(design) @ figures
    assert [result.value, result.slope] == pytest.approx(expected.tolist())
    assert result.points[0][1] == pytest.approx(whole_population().distance(gaussian(120, seed=4)))
    with pytest.raises(WavelatentError, match="at least 8 images"):
        frechet_at_infinity(gaussian(7, seed=0), whole_population())


def test_all_repeat_to_the_last_bit_and_depend_on_the_seed():
    samples, others = gaussian(60, seed=5), gaussian(50, seed=6, shift=0, scale=1)
    reference, kid = whole_population(), kernel_distance(samples, others)

    def everything(seed: int) -> list[object]:
        return [
            mean_interval(samples[:, 0], seed=seed),
            frechet_interval(samples, reference, seed=seed),
            kernel_interval(samples, others, kid, seed=seed),
            manifold_intervals(samples, others, seed=seed),
            frechet_at_infinity(samples, reference, seed=seed),
        ]

    assert everything(0) == everything(0)
    assert all(first != second for first, second in zip(everything(0), everything(1), strict=True))
