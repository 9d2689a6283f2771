import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from wavelatent.common.config import load_config
from wavelatent.common.nn import ChannelsLastConv2d
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.stage2_diffusion.unet import NoiseEmbedding, UNet, UNetConfig

TINY = UNetConfig(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=8)


def randomised(network):
    """Nothing at zero, so that every part matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


@pytest.mark.parametrize(
    ("preset", "millions", "tolerance"),
    [("unet-tiny", 4.95, 0.01), ("unet-s", 30, 0.05), ("unet-b", 110, 0.02), ("ldm8", 258, 0.01)],
)
def test_parameter_counts_of_the_presets(preset, millions, tolerance):
    config = load_config(DiffusionRunConfig, preset)
    with torch.device("meta"):
        network = UNet(config.model, in_channels=4)
    with FakeTensorMode():
        UNet(config.model, in_channels=4)  # as `info` builds it
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == pytest.approx(millions * 1e6, rel=tolerance)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_shape_is_kept_and_gradients_reach_every_parameter(num_classes):
    network = randomised(UNet(TINY, in_channels=5, num_classes=num_classes))
    x = torch.randn(2, 5, 4, 6)
    labels = torch.tensor([6, 0]) if num_classes else None
    out = network(x, torch.tensor([0.1, -0.5]), labels)
    assert out.shape == x.shape
    out.square().sum().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_a_new_network_returns_zero_and_samples_do_not_mix():
    x, noise_label = torch.randn(3, 5, 4, 6), torch.tensor([0.1, -0.5, 1.0])
    network = UNet(TINY, in_channels=5).eval()
    assert network(x, noise_label).abs().max() == 0
    randomised(network)
    alone = torch.cat([network(x[i : i + 1], noise_label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(x, noise_label), alone, rtol=1e-4, atol=1e-4)


def test_noise_level_and_class_change_the_output():
    network = randomised(UNet(TINY, in_channels=5, num_classes=3)).eval()
    x = torch.randn(1, 5, 4, 6).expand(4, -1, -1, -1)
    noise_label = torch.tensor([0.1, 0.2, 0.1, 0.1])
    first, other_noise, other_class, _ = network(x, noise_label, torch.tensor([0, 0, 1, 2]))
    unconditional = network(x[:1], noise_label[:1])[0]
    for other in (other_noise, other_class, unconditional):
        assert not torch.allclose(first, other, atol=1e-4)


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="without classes"):
        UNet(TINY, in_channels=5)(torch.randn(2, 5, 4, 6), torch.zeros(2), torch.tensor([0, 1]))


def test_bf16_autocast_is_close_to_float32():
    network = randomised(UNet(TINY, in_channels=5)).eval()
    x, noise_label = torch.randn(2, 5, 4, 6), torch.tensor([0.1, -0.5])
    exact = network(x, noise_label)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, noise_label)
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_gradient_checkpointing_keeps_fewer_tensors_and_gives_the_same_gradients():
    network = randomised(UNet(TINY.model_copy(update={"dropout": 0.3}), in_channels=5)).train()
    x, noise_label = torch.randn(2, 5, 4, 6), torch.tensor([0.1, -0.5])

    def gradients_and_kept():
        kept = []

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        network.zero_grad()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(x, noise_label).square().sum()
        before_backward = sum(kept)
        loss.backward()
        return [parameter.grad.clone() for parameter in network.parameters()], before_backward

    plain, kept_plain = gradients_and_kept()
    network.gradient_checkpointing = True
    checkpointed, kept_checkpointed = gradients_and_kept()
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)
    assert kept_checkpointed < 0.5 * kept_plain


def test_nothing_happens_after_a_step():
    network = randomised(UNet(TINY, in_channels=5))
    before = [parameter.clone() for parameter in network.parameters()]
    network.after_step()
    assert all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_what_the_plain_layout_gives(training, monkeypatch):
    network = randomised(UNet(TINY, in_channels=5)).train(training)
    x, noise_label = torch.randn(2, 5, 4, 6), torch.tensor([0.1, -0.5])
    layouts, outputs = [], []

    def plain(self, x):
        weight = self.weight.transpose(1, 2).unflatten(2, self.kernel_size).contiguous()
        return F.conv2d(x.contiguous(), weight, self.bias, self.stride, self.padding)

    hook = network.out.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0]))
    for _ in range(2):
        with torch.set_grad_enabled(training):
            out = network(x, noise_label)
        gradients = torch.autograd.grad(out.square().mean(), list(network.parameters())) if training else ()
        outputs.append([out.detach(), *gradients])
        monkeypatch.setattr(ChannelsLastConv2d, "forward", plain)
    hook.remove()
    assert layouts[0].is_contiguous(memory_format=torch.channels_last)
    assert layouts[1].is_contiguous()
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_weights_and_gradients_are_contiguous():
    """Where they are not, fused Adam copies them and DistributedDataParallel warns."""
    network = randomised(UNet(TINY, in_channels=5))
    network(torch.randn(2, 5, 4, 6), torch.zeros(2)).square().sum().backward()
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in network.parameters())


def test_a_size_that_cannot_be_halved_says_how_to_fix_it():
    with pytest.raises(ValueError, match="divide by 2"):
        UNet(TINY, in_channels=5)(torch.randn(2, 5, 4, 7), torch.zeros(2))


@pytest.mark.parametrize("wrong", [{"attention_levels": (2,)}, {"head_channels": 24}, {"channels": 0}])
def test_configurations_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(ValidationError):
        UNetConfig.model_validate({**TINY.model_dump(), **wrong})


def test_noise_embedding_tells_close_levels_apart():
    embedding = NoiseEmbedding(32, 8)
    angles = torch.tensor([0.0, 0.05])[:, None] * embedding.frequencies
    assert (angles.cos()[0] - angles.cos()[1]).abs().max() > 0.5
