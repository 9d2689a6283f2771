import math

import pytest
import torch
from torch import nn

from wavelatent.common.config import load_config
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.stage2_diffusion.mp_layers import (
    MPAttention,
    MPConv,
    MPFourier,
    MPLayer,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
)
from wavelatent.stage2_diffusion.mp_unet import DecoderBlock, EncoderBlock, MPUNet, MPUNetConfig
from wavelatent.stage2_diffusion.networks import build_network

SMALL = MPUNetConfig(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=8)


def magnitude(x):
    return x.square().mean().sqrt().item()


def standard_normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(config=SMALL, in_channels=5, num_classes=0):
    torch.manual_seed(0)
    return MPUNet(config, in_channels, num_classes)


def open_gains(network, value=0.5):
    """Move the learned gains off zero, so that the output and the embedding count."""
    for name, parameter in network.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(parameter, value)
    return network


def block_magnitudes(network, *arguments):
    """The magnitude of what the stem, every block and the output's convolution return, by name."""
    found = {}
    watched = [(n, m) for n, m in network.named_modules() if isinstance(m, (EncoderBlock, DecoderBlock))]
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: magnitude(output)}))
        for name, module in [("stem", network.stem), *watched, ("out", network.out)]
    ]
    with torch.no_grad():
        network(*arguments)
    for handle in handles:
        handle.remove()
    return found


def train_a_little(network, steps, learning_rate):
    """Learn to shift noise by one place; return the first and the last loss."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        x = standard_normal(2, 5, 8, 12, seed=step)
        loss = (network(x, torch.tensor([-1.0, 0.5])) - x.roll(1, dims=-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.after_step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_silu_of_a_normal_variable_has_magnitude_one():
    assert magnitude(mp_silu(standard_normal(200_000))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_a_sum_keeps_the_magnitude_and_weighs_its_terms(balance):
    a, b = standard_normal(100_000), standard_normal(100_000, seed=1)
    mixed = mp_sum(a, b, balance)
    assert magnitude(mixed) == pytest.approx(1, abs=0.02)
    norm = math.sqrt((1 - balance) ** 2 + balance**2)
    torch.testing.assert_close(mixed, (a * (1 - balance) + b * balance) / norm)


@pytest.mark.parametrize("balance", [0.3, 0.5])
def test_a_concatenation_keeps_the_magnitude_and_balances_parts_of_unequal_width(balance):
    a, b = standard_normal(2, 24, 32, 40), standard_normal(2, 8, 32, 40, seed=1)
    both = mp_cat(a, b, balance)
    assert magnitude(both) == pytest.approx(1, abs=0.02)
    energy = [both[:, :24].square().sum(), both[:, 24:].square().sum()]
    assert (energy[1] / energy[0]).sqrt().item() == pytest.approx(balance / (1 - balance), rel=0.02)


def test_pixel_norm_gives_each_site_magnitude_one():
    x = 7 * standard_normal(2, 6, 3, 4)
    torch.testing.assert_close(pixel_norm(x).square().mean(1), torch.ones(2, 3, 4), rtol=1e-3, atol=0)
    assert not pixel_norm(torch.zeros(1, 6, 1, 1)).any()


def test_a_layer_depends_on_its_weights_directions_only_and_keeps_magnitude():
    torch.manual_seed(0)
    conv = MPConv(40, 64, 3)
    x = standard_normal(2, 40, 30, 50)
    before = conv(x)
    assert magnitude(before[..., 1:-1, 1:-1]) == pytest.approx(1, abs=0.03)
    with torch.no_grad():
        conv.weight.mul_(torch.linspace(0.1, 10, 64)[:, None, None, None])
    torch.testing.assert_close(conv(x), before, rtol=1e-4, atol=1e-5)
    linear = MPLinear(300, 500)
    assert magnitude(linear(standard_normal(20, 300))) == pytest.approx(1, abs=0.03)


def test_the_gradient_of_a_weight_is_perpendicular_to_it():
    linear = MPLinear(7, 3)
    linear(standard_normal(5, 7)).sin().sum().backward()
    along = (linear.weight.grad * linear.weight).sum(1)
    torch.testing.assert_close(along, torch.zeros(3), rtol=0, atol=1e-5)
    assert linear.weight.grad.norm() > 0.01


def test_fourier_features_have_magnitude_one_at_every_label_and_travel_with_the_state():
    fourier = MPFourier(4096)
    for label in (-1.5, 0.0, 1.1):
        assert magnitude(fourier(torch.tensor([label]))) == pytest.approx(1, abs=0.05)
    other = MPFourier(4096)
    other.load_state_dict(fourier.state_dict())
    assert torch.equal(other(torch.tensor([0.3])), fourier(torch.tensor([0.3])))


def test_attention_looks_at_directions_and_keeps_most_of_the_magnitude():
    torch.manual_seed(0)
    attention = MPAttention(24, head_channels=8, balance=0.3)
    x = standard_normal(2, 24, 5, 7)
    assert 0.9 < magnitude(attention(x)) < 1.05
    added = attention(x) * math.hypot(0.7, 0.3) - 0.7 * x
    scaled = attention(9 * x) * math.hypot(0.7, 0.3) - 0.7 * 9 * x
    torch.testing.assert_close(scaled, added, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_classes", [0, 1, 9])
def test_the_embedding_has_magnitude_one_with_and_without_classes(num_classes):
    config = SMALL.model_copy(update={"embedding_channels": 2048})
    network = build(config, num_classes=num_classes)
    for label in [None, *range(num_classes + 1)] if num_classes else [None]:
        labels = None if label is None else torch.full((64,), label)
        embedding = network._embed(torch.linspace(-1.5, 1.1, 64), labels)
        assert magnitude(embedding) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("channels", [8, 24, 64])
def test_activations_have_magnitude_near_one_at_every_block_of_any_width(channels):
    config = MPUNetConfig(channels=channels, multipliers=(1, 2), attention_levels=(1,), head_channels=8)
    network = open_gains(build(config, num_classes=4), value=0.2)
    found = block_magnitudes(network, standard_normal(2, 5, 16, 24), torch.tensor([-1.0, 0.5]), torch.tensor([3, 0]))
    assert len(found) == 2 + 5 + 2 + 7
    assert min(found.values()) > 0.7
    assert max(found.values()) < 1.3


def test_after_training_activations_are_still_near_one_and_weights_exactly():
    network = build()
    first, last = train_a_little(network, steps=20, learning_rate=1e-2)
    assert last < 0.9 * first
    found = block_magnitudes(network, standard_normal(2, 5, 8, 12), torch.tensor([-1.0, 0.5]))
    assert min(found.values()) > 0.5
    assert max(found.values()) < 2
    layers = [module for module in network.modules() if isinstance(module, MPLayer)]
    assert len(layers) > 20
    for layer in layers:
        norms = layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(layer.weight[0].numel())))


def test_normalising_the_weights_changes_no_output():
    network = open_gains(build())
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, MPLayer):
                layer.weight.mul_(3)
    inputs = standard_normal(2, 5, 4, 6), torch.tensor([-1.0, 0.5])
    before = network(*inputs)
    network.after_step()
    torch.testing.assert_close(network(*inputs), before, rtol=1e-4, atol=1e-5)


def test_without_after_step_weights_would_grow():
    network = build()
    network.after_step = lambda: None
    train_a_little(network, steps=5, learning_rate=0.1)
    assert magnitude(network.stem.weight) > 1.02


def test_the_constant_channel_stands_in_for_biases():
    network = open_gains(build())
    assert network(torch.zeros(1, 5, 4, 6), torch.zeros(1)).abs().max() > 0.01
    assert not any("bias" in name for name, _ in network.named_parameters())


def test_the_preset_has_about_30_million_parameters():
    config = load_config(DiffusionRunConfig, "unet-mp-s")
    with torch.device("meta"):
        network = build_network(config.model, in_channels=4)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(28.3e6, rel=0.01)
