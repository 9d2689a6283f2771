import pytest
import torch

from wavelatent.common.errors import WavelatentError
from wavelatent.common.feature_distances import (
    FeatureStatistics,
    FrechetReference,
    frechet_distance,
    kernel_distance,
)
from wavelatent.common.torchvision_import import ensure_torchvision


def _normal(count: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return shift + scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _exactly(mean: torch.Tensor, covariance: torch.Tensor, count: int = 100) -> FeatureStatistics:
    statistics = FeatureStatistics(len(mean))
    statistics.count, statistics.total = count, count * mean.double()
    statistics.outer = (count - 1) * covariance.double() + count * torch.outer(mean, mean).double()
    return statistics


def test_statistics_are_the_mean_and_covariance_whatever_the_batches():
    features = _normal(53, 7, seed=0, shift=3.0)
    statistics = FeatureStatistics(7)
    for part in features.split(9):
        statistics.update(part)
    torch.testing.assert_close(statistics.mean, features.double().mean(dim=0))
    torch.testing.assert_close(statistics.covariance, features.double().T.cov())


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    mean1, mean2 = torch.tensor([[1.0, -2.0, 0.5], [0.0, 2.0, 0.5]]).double()
    var1, var2 = torch.tensor([[4.0, 0.25, 9.0], [1.0, 0.0, 16.0]]).double()
    rotation = torch.linalg.qr(_normal(3, 3, seed=1).double()).Q
    first = _exactly(mean1, rotation @ var1.diag() @ rotation.T)
    second = _exactly(mean2, rotation @ var2.diag() @ rotation.T)
    expected = (mean1 - mean2).square().sum() + (var1.sqrt() - var2.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected.item(), rel=1e-7)


def test_frechet_distance_is_torch_fidelitys_also_with_fewer_images_than_features():
    ensure_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    first, second = _normal(20, 33, seed=2), _normal(31, 33, seed=3, shift=0.3, scale=1.2)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(features.double()) for features in (first, second)), verbose=False
    )
    ours = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(first)) == pytest.approx(0, abs=1e-6)


def test_fewer_images_than_features_leave_no_rounding_noise():
    first, second = _normal(10, 300, seed=4).double(), _normal(13, 300, seed=5, scale=0.5).double()
    x, y = first - first.mean(dim=0), second - second.mean(dim=0)
    trace_of_root = torch.linalg.svdvals(x @ y.T).sum() / (9 * 12) ** 0.5
    expected = (first.mean(dim=0) - second.mean(dim=0)).square().sum() - 2 * trace_of_root
    expected += x.square().sum() / 9 + y.square().sum() / 12
    ours = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert ours == pytest.approx(expected.item(), rel=1e-10)
    assert abs(frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(first))) < 1e-9


@pytest.mark.parametrize("count", [40, 20, 6])
@pytest.mark.parametrize("reference_count", [50, 9])
def test_a_prepared_reference_gives_the_same_distance_from_statistics_and_from_features(count, reference_count):
    samples, others = _normal(count, 20, seed=6, shift=0.2), _normal(reference_count, 20, seed=7, scale=1.1)
    reference = FrechetReference(FeatureStatistics.of(others))
    expected = frechet_distance(FeatureStatistics.of(samples), FeatureStatistics.of(others))
    assert reference.distance(FeatureStatistics.of(samples)) == pytest.approx(expected, rel=1e-10)
    assert reference.distance(samples) == pytest.approx(expected, rel=1e-10)


def test_images_that_are_all_alike_are_a_point():
    point, samples = torch.ones(7, 5), _normal(9, 5, seed=8)
    statistics = FeatureStatistics.of(samples)
    expected = (statistics.mean - 1).square().sum() + statistics.covariance.trace()
    for distance in (
        FrechetReference(FeatureStatistics.of(point)).distance(samples),
        FrechetReference(statistics).distance(point),
        FrechetReference(statistics).distance(point[:3]),
    ):
        assert distance == pytest.approx(expected.item())


@pytest.mark.parametrize("count", [30, 12])
def test_an_images_influence_is_the_derivative_of_the_distance_by_its_weight(count):
    """Of more images than features, and of fewer."""
    samples, others = _normal(count, 20, seed=9, shift=0.3).double(), _normal(60, 20, seed=10)
    reference = FrechetReference(FeatureStatistics.of(others))

    def distance(weights: torch.Tensor) -> float:
        statistics = FeatureStatistics(20)
        statistics.count, statistics.total = count, weights @ samples
        statistics.outer = samples.T @ (weights[:, None] * samples)
        return reference.distance(statistics)

    expected, step = [], 1e-4
    for image in torch.eye(count, dtype=torch.float64):
        towards = count * image - 1
        expected.append((distance(1 + step * towards) - distance(1 - step * towards)) / (2 * step))
    influence = reference.influence(samples)
    assert influence.mean() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(influence, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_one_image_has_no_covariance():
    with pytest.raises(WavelatentError, match="at least 2"):
        frechet_distance(FeatureStatistics.of(_normal(1, 4, seed=0)), FeatureStatistics.of(_normal(5, 4, seed=1)))


def test_kernel_distance_over_the_whole_sets_is_the_unbiased_mmd():
    first, second = _normal(12, 6, seed=0).double(), _normal(12, 6, seed=1, shift=0.5).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 6 + 1) ** 3

    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    expected = (
        kernel(first, first)[off_diagonal].mean()
        + kernel(second, second)[off_diagonal].mean()
        - 2 * kernel(first, second).mean()
    )
    result = kernel_distance(first, second, subsets=1, subset_size=12)
    assert result.mean == pytest.approx(expected.item(), rel=1e-9)


def test_kernel_distance_of_small_sets_has_a_spread_and_repeats():
    first, second = _normal(40, 6, seed=0), _normal(30, 6, seed=1, shift=0.5)
    result = kernel_distance(first, second)
    assert (result.subset_size, result.subsets) == (15, 100)
    assert result.std > 0
    assert result == kernel_distance(first, second)
    with pytest.raises(WavelatentError, match="more images"):
        kernel_distance(first[:3], second[:3])
