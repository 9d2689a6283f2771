"""VGG features before the activation, against torchvision's own VGG16."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from wavelatent.common.metric_weights import LoadedWeights, MissingWeightsError, lpips_backbone
from wavelatent.common.torchvision_import import ensure_torchvision
from wavelatent.stage1_autoencoder import vgg_features
from wavelatent.stage1_autoencoder.vgg_features import VGGFeatureDistance, VGGFeaturesConfig

BEFORE_RELU = {"conv1_1": 1, "conv1_2": 3, "conv3_3": 15, "conv4_1": 18, "conv5_3": 29}
"""How many modules of torchvision's ``vgg16().features`` lead to the layer's output, its ReLU not included."""


def empty_vgg16() -> nn.Sequential:
    ensure_torchvision()
    import torchvision

    with torch.device("meta"):
        return torchvision.models.vgg16(weights=None, init_weights=False).features


@pytest.fixture(scope="module")
def backbone() -> LoadedWeights:
    """The published weights, or, where they are not at hand, random ones of the same shapes and a fair scale."""
    try:
        return lpips_backbone("vgg", fetch=False)
    except MissingWeightsError:
        return LoadedWeights(random_tensors(), "random", "this test")


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in empty_vgg16().named_parameters(prefix="features"):
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1
        tensors[name] = scale * torch.randn(parameter.shape, generator=generator)
    return tensors


@pytest.fixture
def make(backbone, monkeypatch):
    def build(*layers: str) -> VGGFeatureDistance:
        return VGGFeatureDistance(layers) if layers else VGGFeatureDistance()

    monkeypatch.setattr(vgg_features, "lpips_backbone", lambda net: backbone)
    return build


@pytest.fixture(scope="module")
def reference(backbone) -> nn.Sequential:
    features = empty_vgg16()
    tensors = {name.removeprefix("features."): tensor for name, tensor in backbone.tensors.items()}
    features.load_state_dict(tensors, assign=True)
    return features


def images(seed: int, height: int = 32, width: int = 20) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference_features(network: nn.Sequential, x: torch.Tensor, layer: str) -> torch.Tensor:
    from torchvision.transforms.functional import normalize

    x = normalize((x + 1) / 2, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    with torch.no_grad():
        return network[: BEFORE_RELU[layer]](x)


@pytest.mark.parametrize("layer", BEFORE_RELU)
def test_it_is_l1_between_torchvisions_features_before_the_activation(layer, make, reference):
    x, target = images(0), images(1)
    mine, theirs = (reference_features(reference, y, layer) for y in (x, target))
    assert (mine < 0).any(), "a feature after the activation would not be negative"
    distance = make(layer)(x, target)
    assert distance.shape == (2,)
    torch.testing.assert_close(distance, (mine - theirs).abs().mean(dim=(1, 2, 3)), rtol=1e-4, atol=0)


def test_several_layers_are_their_mean_in_any_order(make):
    x, target = images(0), images(1)
    separate = torch.stack([make("conv1_2")(x, target), make("conv3_3")(x, target)])
    torch.testing.assert_close(make("conv3_3", "conv1_2")(x, target), separate.mean(dim=0))


def test_it_takes_the_last_convolution_by_default_and_computes_nothing_behind_it(make):
    x, target = images(0), images(1)
    torch.testing.assert_close(make()(x, target), make("conv5_3")(x, target), rtol=0, atol=0)
    assert [name for name, _ in make("conv2_1")._frozen[0].named_children()] == [
        *("scaling", "conv1_1", "1", "conv1_2", "3", "4", "conv2_1"),
    ]


def test_equal_images_are_at_distance_zero_and_neighbours_do_not_matter(make):
    distance, x, target = make("conv3_3"), images(0), images(1)
    assert distance(x, x).tolist() == [0.0, 0.0]
    torch.testing.assert_close(distance(x, torch.cat([x[:1], target[1:]]))[1], distance(x[1:], target[1:])[0])


def test_gradient_reaches_the_images_and_not_the_target(make):
    distance = make("conv3_3")
    x, target = images(0).requires_grad_(), images(1).requires_grad_()
    distance(x, target).sum().backward()
    assert target.grad is None
    step = 1e-2 * x.grad / x.grad.norm()
    with torch.no_grad():
        slope = (distance(x + step, target) - distance(x - step, target)).sum() / 2e-2
    assert slope.item() == pytest.approx(x.grad.norm().item(), rel=0.05)
    (at_zero,) = torch.autograd.grad(distance(x, x.detach()).sum(), x)
    assert at_zero.isfinite().all()


def test_a_parent_cannot_train_save_or_round_it(make):
    parent = nn.ModuleDict({"loss": copy.deepcopy(make("conv3_3")), "decoder": nn.Linear(2, 2)})
    x, target = images(0), images(1)
    expected = parent["loss"](x, target)
    parent.train().to(torch.bfloat16)
    assert set(parent.state_dict()) == {"decoder.weight", "decoder.bias"}
    assert len(list(parent.parameters())) == 2
    assert not parent["loss"]._frozen[0].training
    torch.testing.assert_close(parent["loss"](x, target), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y in (x, x.clone().requires_grad_()):
            torch.testing.assert_close(parent["loss"](y, target), expected, rtol=0, atol=0)


def test_building_it_leaves_the_callers_generator_and_the_weights_alone(make, backbone):
    before, weight = torch.get_rng_state(), backbone.tensors["features.0.weight"].clone()
    make("conv1_1").to(torch.bfloat16)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(backbone.tensors["features.0.weight"], weight)


def test_the_deepest_layer_sets_the_smallest_image(make):
    assert make("conv5_3", "conv1_1").min_size == 16
    assert make("conv5_3")(images(0, 16, 16), images(1, 16, 16)).isfinite().all()
    with pytest.raises(ValueError, match=r"VGG needs images of at least 16 px, got \(15, 20\)"):
        make("conv5_3")(images(0, 15), images(1, 15))
    assert make("conv2_2")(images(0, 2, 3), images(1, 2, 3)).shape == (2,)
    with pytest.raises(ValueError, match="differ in shape"):
        make("conv1_1")(images(0), images(1)[:1])


def test_the_configuration_knows_the_layers_and_is_off_by_default():
    assert VGGFeaturesConfig().weight == 0
    assert VGGFeaturesConfig(layers=["conv1_2", "conv5_3"]).layers == ("conv1_2", "conv5_3")
    for wrong in ([], ["conv5_4"], ["relu5_3"]):
        with pytest.raises(ValidationError, match="layers"):
            VGGFeaturesConfig(layers=wrong)
