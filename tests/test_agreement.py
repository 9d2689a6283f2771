"""Our figures are those of torch-fidelity and of pytorch-fid on the same features."""

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from wavelatent.common.feature_distances import FeatureStatistics, FrechetReference, frechet_distance, kernel_distance
from wavelatent.common.inception import InceptionFeatures
from wavelatent.common.manifolds import manifold_figures
from wavelatent.common.metric_weights import MissingWeightsError, inception_weights
from wavelatent.common.torchvision_import import ensure_torchvision

DIM = 64


def like_inception(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Features ``[count, DIM]`` that are positive, correlated and of uneven spread, as Inception's are."""
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0)) / torch.arange(1, DIM + 1).sqrt()
    noise = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))
    return 0.1 * torch.nn.functional.softplus(noise @ mixing + shift)


SAMPLES, REFERENCE = like_inception(170, seed=1, shift=0.3), like_inception(210, seed=2)


def ours() -> float:
    return frechet_distance(FeatureStatistics.of(SAMPLES), FeatureStatistics.of(REFERENCE))


@pytest.mark.parametrize("count", [170, 20])
def test_fid_is_torch_fidelitys(count):
    """Also with fewer images than features."""
    ensure_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    samples = SAMPLES[:count]
    both = (fid_features_to_statistics(features.double()) for features in (samples, REFERENCE))
    theirs = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    statistics, reference = FeatureStatistics.of(samples), FeatureStatistics.of(REFERENCE)
    assert frechet_distance(statistics, reference) == pytest.approx(theirs, rel=1e-6)
    assert FrechetReference(reference).distance(samples) == pytest.approx(theirs, rel=1e-6)


def pytorch_fids_distance(first: Tensor, second: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Its arithmetic: numpy's mean and covariance, the root of the product by scipy's Schur method."""
    ensure_torchvision()
    from pytorch_fid import fid_score

    root = fid_score.linalg.sqrtm  # it asks for an error estimate that scipy 1.18 no longer gives, and ignores it
    monkeypatch.setattr(
        fid_score.linalg, "sqrtm", lambda matrix, disp=True: root(matrix) if disp else (root(matrix), 0)
    )
    moments = [
        moment
        for features in (first.double().numpy(), second.double().numpy())
        for moment in (features.mean(axis=0), np.cov(features, rowvar=False))
    ]
    return float(fid_score.calculate_frechet_distance(*moments))


def test_fid_is_pytorch_fids(monkeypatch):
    assert ours() == pytest.approx(pytorch_fids_distance(SAMPLES, REFERENCE, monkeypatch), rel=1e-6)


def test_figures_of_the_same_images_are_those_of_the_libraries(monkeypatch):
    """From uint8 images on, each through its own network; of Inception's layers the cheapest."""
    ensure_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    try:
        weights = inception_weights()
    except MissingWeightsError as error:
        pytest.skip(str(error))
    draw = torch.Generator().manual_seed(3)
    images = [
        torch.randint(*limits, (68, 3, 37, 29), dtype=torch.uint8, generator=draw) for limits in ((0, 200), (40, 256))
    ]
    extractor = InceptionFeatures(layer="64")
    first, second = (extractor(batch) for batch in images)
    network = torch_fidelitys_network(weights.tensors)
    with torch.no_grad():
        theirs = [torch.cat([network(part)[0] for part in batch.split(16)]).double() for batch in images]
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, theirs), verbose=False)
    figure = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert figure == pytest.approx(fid["frechet_inception_distance"], rel=1e-3)
    assert figure == pytest.approx(pytorch_fids_distance(*theirs, monkeypatch), rel=1e-3)
    kid = kid_features_to_metric(*theirs, kid_subset_size=34, verbose=False)
    assert kernel_distance(first, second).mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    # Of sets that share a part: those of the two kinds of images lie wholly apart.
    mixed = [[torch.cat([x[:40], y[:9]]), torch.cat([x[40:], y[9:]])] for x, y in ((first, second), theirs)]
    prc = prc_features_to_metric(*(features.float() for features in mixed[1]), prc_neighborhood=3, verbose=False)
    figures = manifold_figures(*mixed[0])
    assert (figures.precision, figures.recall) == pytest.approx((prc["precision"], prc["recall"]), rel=1e-3)
    assert 0 < figures.precision < 1
    assert 0 < figures.recall < 1


def torch_fidelitys_network(tensors: dict[str, Tensor]) -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = io.BytesIO()
    torch.save({**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, state)
    state.seek(0)
    return FeatureExtractorInceptionV3("example", ["64"], feature_extractor_weights_path=state)


@pytest.mark.parametrize("size", [None, 100])
def test_kid_is_torch_fidelitys(size):
    """With its own random subsets: the seeds are the same."""
    ensure_torchvision()
    from torch_fidelity.metric_kid import kid_features_to_metric

    figure = kernel_distance(SAMPLES, REFERENCE, subset_size=size)
    theirs = kid_features_to_metric(SAMPLES, REFERENCE, kid_subset_size=figure.subset_size, verbose=False)
    assert figure.subsets == 100
    assert figure.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert figure.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_precision_and_recall_are_torch_fidelitys(shift):
    ensure_torchvision()
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples = like_inception(170, seed=1, shift=shift)
    theirs = prc_features_to_metric(samples, REFERENCE, prc_neighborhood=3, verbose=False)
    figures = manifold_figures(samples, REFERENCE)
    assert figures.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert figures.recall == pytest.approx(theirs["recall"], abs=1e-6)
    assert 0 < figures.precision < 1


def test_all_figures_repeat_to_the_last_bit():
    def figures() -> tuple[object, ...]:
        return ours(), kernel_distance(SAMPLES, REFERENCE), manifold_figures(SAMPLES, REFERENCE)

    assert figures() == figures()
