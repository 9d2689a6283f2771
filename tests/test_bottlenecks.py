"""Bottlenecks against closed forms: KL, bounds, moments, and the gradient of a straight-through clamp."""

import math

import pytest
import torch

from wavelatent.common.latents import Posterior
from wavelatent.stage1_autoencoder.bottlenecks import (
    BoundedBottleneck,
    BoundedConfig,
    KLBottleneck,
    KLConfig,
    kl_to_standard_normal,
)
from wavelatent.stage1_autoencoder.moments import global_moments


def features(channels: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(3, channels, 4, 6, generator=torch.Generator().manual_seed(2))


def test_kl_matches_torch_distributions():
    mean, std = features(5), features(5).exp()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_to_standard_normal(Posterior(mean, std)), expected.sum(dim=(1, 2, 3)))
    zero = kl_to_standard_normal(Posterior(torch.zeros(2, 5, 4, 6), torch.ones(2, 5, 4, 6)))
    assert torch.equal(zero, torch.zeros(2))


def test_the_reductions_of_kl_are_what_they_say():
    h, channels, downsampling = features(10), 5, 4
    by_mean = KLBottleneck(KLConfig(reduction="mean"), channels, downsampling)(h)
    by_sum = KLBottleneck(KLConfig(reduction="sum"), channels, downsampling)(h)
    total = kl_to_standard_normal(by_mean.posterior)  # per image
    torch.testing.assert_close(by_mean.penalties["kl"], total.mean() / (5 * 4 * 6))
    torch.testing.assert_close(by_sum.penalties["kl"], total.mean() / (3 * 16 * 24))
    assert by_sum.posterior.mean.shape == by_sum.posterior.std.shape == (3, 5, 4, 6)


def test_the_posterior_draws_what_it_says():
    torch.manual_seed(0)
    posterior = Posterior(torch.full((64, 2, 8, 8), 1.5), torch.full((64, 2, 8, 8), 0.5))
    draw = posterior.sample()
    assert draw.mean().item() == pytest.approx(1.5, abs=0.02)
    assert draw.std().item() == pytest.approx(0.5, abs=0.02)


def test_the_log_variance_is_clamped():
    h = torch.full((1, 2, 1, 1), 100.0)
    std = KLBottleneck(KLConfig(), 1, 4)(h).posterior.std
    assert std.item() == pytest.approx(math.exp(10))


@pytest.mark.parametrize("activation", ["tanh", "clamp"])
@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_bounded_latents_stay_inside_and_their_penalties_are_the_moments(activation, bound):
    bottleneck = BoundedBottleneck(BoundedConfig(activation=activation, bound=bound), 5, 4)
    result = bottleneck(features(5, scale=4))
    raw = result.posterior.mean
    assert result.posterior.deterministic
    assert raw.abs().max() <= bound + 1e-6
    assert raw.abs().max() > 0.99 * bound
    mean = raw.mean(dim=(0, 2, 3))
    variance = raw.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(result.penalties["latent_mean"], mean.square().mean())
    torch.testing.assert_close(result.penalties["latent_variance"], (variance - 1).square().mean())


def test_the_clamp_is_straight_through_and_tanh_is_not():
    for activation, expected in (("clamp", 1.0), ("tanh", 1 - math.tanh(2) ** 2)):
        h = torch.full((1, 1, 2, 3), 6.0, requires_grad=True)
        BoundedBottleneck(BoundedConfig(activation=activation), 1, 4)(h).posterior.mean.sum().backward()
        torch.testing.assert_close(h.grad, torch.full_like(h, expected))


def test_minimising_the_variance_penalty_gives_unit_variance():
    h = (0.2 * features(4) + 0.7).requires_grad_()
    bottleneck = BoundedBottleneck(BoundedConfig(), 4, 4)
    optimizer = torch.optim.Adam([h], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        result = bottleneck(h)
        sum(result.penalties.values()).backward()
        optimizer.step()
    mean, variance = global_moments(result.posterior.mean)
    torch.testing.assert_close(mean, torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(variance, torch.ones(4), atol=0.02, rtol=0)
