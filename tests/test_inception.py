import io

import pytest
import torch

from wavelatent.common.feature_distances import FeatureStatistics, frechet_distance, kernel_distance
from wavelatent.common.inception import InceptionFeatures
from wavelatent.common.metric_weights import MissingWeightsError, inception_weights
from wavelatent.common.torchvision_import import ensure_torchvision


@pytest.fixture(scope="module")
def weights():
    try:
        return inception_weights()
    except MissingWeightsError as error:
        pytest.skip(str(error))


def torch_fidelity_network(weights) -> torch.nn.Module:
    ensure_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state = io.BytesIO()
    torch.save({**weights.tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, state)
    state.seek(0)
    return FeatureExtractorInceptionV3("example", ["2048"], feature_extractor_weights_path=state)


@pytest.fixture(scope="module")
def documented_images(weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of torchmetrics' FID and KID examples: seed, build the network (which draws), draw the images."""
    with torch.random.fork_rng():
        torch.manual_seed(123)
        torch_fidelity_network(weights)
        first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
        second = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    return first, second


def test_fid_with_64_features_is_torchmetrics_documented_answer(documented_images):
    extractor = InceptionFeatures(layer="64")
    first, second = (FeatureStatistics.of(extractor(x)) for x in documented_images)
    assert frechet_distance(first, second) == pytest.approx(12.7202, abs=5e-4)


def test_kid_is_torchmetrics_documented_answer(documented_images):
    extractor = InceptionFeatures()
    first, second = (extractor(images) for images in documented_images)
    kid = kernel_distance(first, second, subset_size=50)
    # Both average over 100 random subsets, not the same ones: their means differ by their standard error.
    assert kid.mean == pytest.approx(0.0337, abs=3 * 0.0023 / 10)
    assert kid.std == pytest.approx(0.0023, abs=0.0004)


def test_features_are_those_of_torch_fidelity(documented_images, weights):
    """Ours fold the batch normalisations into the convolutions."""
    images = documented_images[1][:5]
    torch.testing.assert_close(
        InceptionFeatures()(images), torch_fidelity_network(weights)(images)[0], rtol=1e-4, atol=2e-5
    )


def test_features_do_not_depend_on_the_batch_or_on_autocast(weights):
    extractor = InceptionFeatures()
    images = torch.randint(0, 256, (3, 3, 50, 38), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = extractor(images)
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one_by_one = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(one_by_one, features, rtol=1e-4, atol=1e-5)
