import copy

import pytest
import torch
from torch import nn

from wavelatent.common.lpips_metric import PerceptualDistance
from wavelatent.common.metric_weights import MissingWeightsError


def _distance(net: str) -> PerceptualDistance:
    try:
        return PerceptualDistance(net)
    except MissingWeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def vgg() -> PerceptualDistance:
    return _distance("vgg")


@pytest.fixture(scope="module")
def alex() -> PerceptualDistance:
    return _distance("alex")


def _images(seed: int, height: int = 40, width: int = 33) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_vgg_gives_torchmetrics_documented_answer(vgg):
    """Its example seeds, then builds the network (which draws from the same generator), then draws the images."""
    import lpips
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(123)
        torchvision.models.vgg16(init_weights=False)
        for channels in (64, 128, 256, 512, 512):
            lpips.lpips.NetLinLayer(channels)
        images, target = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert vgg(images, target).mean().item() == pytest.approx(0.3493, abs=5e-5)


def test_it_is_the_lpips_packages_value_per_image(alex):
    images, target = _images(0), _images(1)
    expected = alex._frozen[0](images, target).flatten()
    assert expected.shape == (2,)
    torch.testing.assert_close(alex(images, target), expected)
    assert alex(images, images).tolist() == [0.0, 0.0]


def test_gradient_reaches_the_images_and_not_the_target(alex):
    images, target = _images(0).requires_grad_(), _images(1).requires_grad_()
    alex(images, target).sum().backward()
    assert target.grad is None
    step = 1e-2 * images.grad / images.grad.norm()
    with torch.no_grad():
        slope = (alex(images + step, target) - alex(images - step, target)).sum() / 2e-2
    assert slope.item() == pytest.approx(images.grad.norm().item(), rel=0.05)


def test_a_parent_cannot_train_save_or_round_it(alex):
    parent = nn.ModuleDict({"loss": copy.deepcopy(alex), "decoder": nn.Linear(2, 2)})
    images, target = _images(0), _images(1)
    expected = alex(images, target)
    parent.train().to(torch.bfloat16)
    assert set(parent.state_dict()) == {"decoder.weight", "decoder.bias"}
    assert len(list(parent.parameters())) == 2
    torch.testing.assert_close(parent["loss"](images, target), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(parent["loss"](images, target), expected, rtol=0, atol=0)


def test_building_it_leaves_the_callers_generator_alone(alex):
    before = torch.get_rng_state()
    PerceptualDistance("alex")
    assert torch.equal(before, torch.get_rng_state())


def test_images_that_are_no_pair_or_too_small_are_refused(alex):
    with pytest.raises(ValueError, match="differ in shape"):
        alex(_images(0), _images(1)[:, :, :-1])
    with pytest.raises(ValueError, match="at least 32 px"):
        alex(_images(0, height=31), _images(1, height=31))


def test_as_a_metric_it_computes_without_tf32_and_puts_the_setting_back(alex, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's default
    seen = []
    handle = alex._frozen[0].net.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with torch.no_grad():
        alex(_images(0), _images(1))
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32
    alex(_images(0).requires_grad_(), _images(1))
    handle.remove()
    assert seen[2:] == [True, True], "as a loss it leaves the setting to the program"
