"""Discriminators: any image size, no leak between parts of a batch, twice differentiable, and they learn to tell."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from wavelatent.stage1_autoencoder.discriminators import DISCRIMINATORS
from wavelatent.stage1_autoencoder.edge_padding import crop_padding, next_multiple, pad_edges
from wavelatent.stage1_autoencoder.gan_losses import gradient_penalty, hinge_discriminator, hinge_generator
from wavelatent.stage1_autoencoder.patchgan import PatchGANConfig
from wavelatent.stage1_autoencoder.stylegan_discriminator import (
    Blur,
    EqualizedConv2d,
    EqualizedLinear,
    StyleGANDiscriminatorConfig,
    minibatch_std,
)
from wavelatent.stage1_autoencoder.unet_discriminator import UNetDiscriminatorConfig

CONFIGS = {
    "unet": UNetDiscriminatorConfig(width="narrow", levels=2),
    "patchgan": PatchGANConfig(width=8, layers=2),
    "stylegan": StyleGANDiscriminatorConfig(width=8, max_width=16, levels=3),
}
LEARNING_RATES = {"unet": 3e-3, "patchgan": 3e-3, "stylegan": 2e-2}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return DISCRIMINATORS[kind](CONFIGS[kind])


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_discriminator_is_tested():
    assert set(CONFIGS) == set(DISCRIMINATORS)


@pytest.mark.parametrize("size", [(17, 23), (1, 2), (9, 33), (40, 24)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_any_size_works_and_the_logits_are_maps(kind, size):
    maps = build(kind)(images(5, 3, *size))
    assert all(logits.shape[:2] == (5, 1) and logits.ndim == 4 and logits.numel() >= 5 for logits in maps)
    if kind == "unet":
        assert [logits.shape[2:] for logits in maps] == [size, (1, 1)]
    if kind == "stylegan":
        assert [logits.shape[2:] for logits in maps] == [(1, 1)]


def test_padding_changes_nothing_where_none_is_needed_and_repeats_the_border_where_it_is():
    x = images(2, 3, 5, 8)
    assert pad_edges(x, 5, 8) is x
    padded = pad_edges(x, 8, 11)
    assert padded.shape == (2, 3, 8, 11)
    assert torch.equal(crop_padding(padded, 5, 8), x)
    assert torch.equal(padded[:, :, 0, 1:9], x[:, :, 0])
    assert torch.equal(padded[:, :, 1:6, -1], x[:, :, :, -1])
    assert [next_multiple(size, 8) for size in (1, 8, 9)] == [8, 8, 16]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_fakes_do_not_change_the_logits_of_the_reals(kind, training):
    """Nor the reals those of the fakes; from copies, as spectral norm's estimate moves with every training pass."""
    discriminator = build(kind).train(training)
    real, fake, other = images(5, 3, 17, 24).split([2, 2, 1])  # across parts of 2, a group would be of 4

    def logits(first, second):
        return [m.chunk(2) for m in copy.deepcopy(discriminator)(torch.cat([first, second]), parts=2)]

    for (real_map, fake_map), (kept, changed) in zip(logits(real, fake), logits(real, other * fake), strict=True):
        assert torch.equal(real_map, kept)
        assert not torch.allclose(fake_map, changed)
    for (_, fake_map), (_, kept) in zip(logits(real, fake), logits(other * real, fake), strict=True):
        assert torch.equal(fake_map, kept)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_penalty_reaches_every_weight_and_falls_when_trained(kind, autocast):
    discriminator = build(kind)
    x = images(4, 3, 17, 24).requires_grad_()
    optimizer = torch.optim.Adam(discriminator.parameters(), LEARNING_RATES[kind] / 4)
    penalties = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            penalty = gradient_penalty(discriminator(x, parts=2), x)
        assert penalty.shape == (4,)
        assert penalty.dtype == torch.float32
        optimizer.zero_grad()
        penalty.mean().backward(inputs=list(discriminator.parameters()))
        weights = [(name, p) for name, p in discriminator.named_parameters() if p.ndim > 1]
        assert [name for name, p in weights if not p.grad.abs().sum() > 0] == []
        optimizer.step()
        penalties.append(penalty.mean().item())
    assert penalties[-1] < 0.9 * penalties[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_penalty_is_the_derivative_by_differences(kind):
    """In float64: the slope along the gradient is its norm, so the penalty is half that slope's square."""
    discriminator = build(kind).double().eval()
    x = images(1, 3, 9, 14).double().requires_grad_()
    maps = discriminator(x)
    penalty = gradient_penalty(maps, x)
    (gradient,) = torch.autograd.grad(sum(m.mean() for m in maps) / len(maps), x)
    direction = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (sum(m.mean() for m in discriminator(x + sign * direction)) / len(maps) for sign in (1, -1))
    slope = (ahead - behind) / 2e-6
    torch.testing.assert_close(penalty[0].double(), slope.square() / 2, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_learns_to_tell_blurred_from_sharp_and_its_gradient_reaches_the_images(kind, autocast):
    discriminator = build(kind)
    real = images(4, 3, 17, 24)
    fake = F.avg_pool2d(real, 3, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam(discriminator.parameters(), LEARNING_RATES[kind])
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            maps = discriminator(torch.cat([real, fake.detach()]), parts=2)
        loss = hinge_discriminator(*zip(*(m.chunk(2) for m in maps), strict=True)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None for p in discriminator.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hinge_generator(discriminator(fake)).sum().backward()
    assert (fake.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_spectral_norm_is_computed_without_autocast():
    """On a GPU autocast would take its products to half precision, which some versions of PyTorch refuse."""
    discriminator = build("unet").eval()
    norms = [m.parametrizations.weight[0] for m in discriminator.modules() if hasattr(m, "parametrizations")]
    seen = []
    for norm in norms:
        norm.register_forward_hook(
            lambda module, inputs, weight: seen.append((torch.is_autocast_enabled("cpu"), weight))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        discriminator(images(1, 3, 8, 8))
    assert [autocast for autocast, _ in seen] == [False] * len(norms)
    largest = [torch.linalg.matrix_norm(weight.flatten(1), ord=2).item() for _, weight in seen]
    assert largest == pytest.approx([1.0] * len(norms), abs=0.2)  # as far as the iteration got


@pytest.mark.parametrize(("width", "channels"), [("narrow", 16), ("half", 32), ("full", 64)])
def test_the_unet_has_three_widths(width, channels):
    discriminator = DISCRIMINATORS["unet"](UNetDiscriminatorConfig(width=width, levels=2))
    assert discriminator.stem.weight.shape == (channels, 3, 3, 3)
    assert "down.0.conv1.parametrizations.weight.original" in discriminator.state_dict()


def test_minibatch_std_is_zero_for_identical_images_and_has_the_known_value_for_others():
    same = images(1, 5, 3, 7).expand(4, -1, -1, -1)
    torch.testing.assert_close(minibatch_std(same), torch.zeros(4, 1, 3, 7), atol=1.1e-4, rtol=0)
    # Of values -a and a, with equal shares, the standard deviation is a: at each channel and site, so on average too.
    levels = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0, -3.0, 3.0, -3.0])[:, None, None, None].expand(-1, 5, 3, 7)
    expected = torch.tensor([1.0] * 4 + [3.0] * 4)[:, None, None, None].expand(-1, 1, 3, 7)
    torch.testing.assert_close(minibatch_std(levels), expected)
    torch.testing.assert_close(minibatch_std(levels, parts=2), expected)


@pytest.mark.parametrize(
    ("count", "parts", "group"), [(8, 1, 4), (8, 2, 4), (12, 2, 3), (10, 1, 2), (10, 2, 1), (3, 1, 3)]
)
def test_a_group_is_the_largest_divisor_up_to_four_and_stays_inside_its_part(count, parts, group):
    x = images(count, 2, 3, 5)
    values = minibatch_std(x, parts)[:, 0, 0, 0]
    expected = [part.var(dim=0, correction=0).add(1e-8).sqrt().mean() for part in x.split(group)]
    torch.testing.assert_close(values, torch.stack(expected).repeat_interleave(group))


def test_equalised_layers_keep_unit_variance_from_weights_of_unit_variance():
    torch.manual_seed(0)
    conv, dense = EqualizedConv2d(32, 48, 3, gain=1.0), EqualizedLinear(256, 512, gain=1.0)
    assert conv.weight.std().item() == pytest.approx(1.0, abs=0.02)
    assert conv(torch.randn(4, 32, 12, 15)).std().item() == pytest.approx(1.0, abs=0.05)
    assert dense(torch.randn(64, 256)).std().item() == pytest.approx(1.0, abs=0.05)
    assert EqualizedLinear(8, 2).scale == pytest.approx(math.sqrt(2) / math.sqrt(8))


def test_the_blur_keeps_constants_and_removes_the_finest_checkerboard():
    blur = Blur(padding=0)
    flat = torch.full((2, 3, 6, 9), 0.7)
    torch.testing.assert_close(blur(flat), torch.full((2, 3, 3, 6), 0.7))
    checkerboard = (-1.0) ** (torch.arange(6)[:, None] + torch.arange(9)[None, :]).expand(2, 3, 6, 9)
    torch.testing.assert_close(blur(checkerboard), torch.zeros(2, 3, 3, 6))
    impulse = F.pad(torch.ones(1, 1, 1, 1), (3, 3, 3, 3))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    torch.testing.assert_close(blur(impulse)[0, 0], torch.outer(taps, taps))
