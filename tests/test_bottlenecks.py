"""Bottlenecks against closed forms: KL, bounds, moments, and the gradient of a straight-through clamp."""

import copy
import math
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from wavelatent.common.ema import EMA, EMAConfig
from wavelatent.common.latents import LatentStatistics, Posterior
from wavelatent.stage1_autoencoder.bottlenecks import (
    BOTTLENECKS,
    BatchNormBottleneck,
    BatchNormConfig,
    BottleneckConfig,
    BoundedBottleneck,
    BoundedConfig,
    FixedVarianceBottleneck,
    FixedVarianceConfig,
    KLBottleneck,
    KLConfig,
    kl_to_standard_normal,
)
from wavelatent.stage1_autoencoder.moments import global_covariance, global_moments, posterior_metrics

COMMON_METRICS = {"latent/std_min", "latent/std_max", "latent/active_channels"}


def features(channels: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(3, channels, 4, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("channels", [1, 4, 64])
@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_every_bottleneck_keeps_its_contract(kind, channels):
    config = TypeAdapter(BottleneckConfig).validate_python({"kind": kind})
    bottleneck = BOTTLENECKS[kind](config, channels, 4)
    h = features(bottleneck.feature_channels).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = bottleneck(h)
    assert result.posterior.mean.shape == (3, channels, 4, 6)
    assert result.posterior.mean.dtype == torch.float32
    assert result.penalties.keys() <= config.penalty_weights.keys()
    assert result.metrics.keys() >= COMMON_METRICS
    for value in result.metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
    (result.posterior.sample().square().sum() + sum(result.penalties.values())).backward()
    assert h.grad.isfinite().all()
    assert h.grad.abs().sum() > 0


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


def test_the_targets_of_the_moments_can_be_set_and_must_be_within_reach():
    config = BoundedConfig(mean=0.5, variance=0.25, bound=1.0)
    result = BoundedBottleneck(config, 5, 4)(features(5))
    mean = result.posterior.mean.mean(dim=(0, 2, 3))
    variance = result.posterior.mean.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(result.penalties["latent_mean"], (mean - 0.5).square().mean())
    torch.testing.assert_close(result.penalties["latent_variance"], (variance - 0.25).square().mean())
    BoundedConfig(bound=1.0, variance=1.0)  # within reach of +-1 alone: a study's variant
    with pytest.raises(ValidationError, match=r"within \+-1, at mean 0\.5, the variance is 0\.75 at most"):
        BoundedConfig(mean=0.5, bound=1.0)
    with pytest.raises(ValidationError, match="widen bound"):
        BoundedConfig(mean=-4, variance=0)


def test_the_covariance_penalty_is_that_of_numpy():
    h = torch.cat([features(3), 0.5 * features(3)[:, :2]], dim=1)  # the last two repeat the first two
    for dtype in (None, torch.bfloat16):  # autocast must not round the products
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            result = BoundedBottleneck(BoundedConfig(covariance_weight=1.0, bound=5.0), 5, 4)(h)
        values = result.posterior.mean.transpose(0, 1).flatten(1)
        expected = torch.cov(values, correction=0)
        off_diagonal = expected[~torch.eye(5, dtype=torch.bool)]
        torch.testing.assert_close(result.penalties["latent_covariance"], off_diagonal.square().sum() / 5)
        torch.testing.assert_close(result.penalties["latent_variance"], (expected.diagonal() - 1).square().mean())
    assert "latent_covariance" not in BoundedBottleneck(BoundedConfig(), 5, 4)(h).penalties


def test_moments_are_exact_where_the_mean_is_large():
    x = features(5) + 1000 * torch.arange(1, 6).view(5, 1, 1)
    values = x.double().transpose(0, 1).flatten(1)
    mean, variance = global_moments(x)
    torch.testing.assert_close(mean.double(), values.mean(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), values.var(dim=1, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(global_covariance(x)[1].double(), torch.cov(values, correction=0), rtol=1e-3, atol=1e-4)
    shifted = (features(5).double() + 1000).requires_grad_()
    global_moments(shifted)[1].sum().backward()
    gradient = 2 * (features(5) - features(5).mean(dim=(0, 2, 3), keepdim=True)) / 72
    torch.testing.assert_close(shifted.grad.float(), gradient, rtol=1e-2, atol=1e-5)


def test_batchnorm_is_pytorchs():
    ours, theirs = BatchNormBottleneck(BatchNormConfig(), 5, 4), nn.BatchNorm2d(5, affine=False)
    for scale in (1.0, 3.0):
        mine, its = (features(5, scale).add(0.5).requires_grad_() for _ in range(2))
        torch.testing.assert_close(ours(mine).posterior.mean, theirs(its))
        weights = features(5)
        (ours(mine).posterior.mean * weights).sum().backward()
        (theirs(its) * weights).sum().backward()
        torch.testing.assert_close(mine.grad, its.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    before = copy.deepcopy(ours.state_dict())
    torch.testing.assert_close(ours.eval()(features(5)).posterior.mean, theirs.eval()(features(5)))
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_an_average_of_weights_copies_the_running_averages():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormBottleneck(BatchNormConfig(), 5, 4))
    ema = EMA(model, EMAConfig())
    model(features(3))
    ema.update(model, 1000, 3)
    assert model[1].running_mean.abs().min() > 0
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert torch.equal(ema.model[1].running_variance, model[1].running_variance)


def test_a_fixed_variance_gives_the_kl_of_that_variance():
    config = FixedVarianceConfig(std=0.5, reduction="mean")
    result = FixedVarianceBottleneck(config, 5, 4)(features(5))
    assert torch.equal(result.posterior.mean, features(5))
    assert torch.equal(result.posterior.std, torch.full((3, 5, 4, 6), 0.5))
    expected = 0.5 * (features(5).square().mean() + 0.25 - 1 - math.log(0.25))
    torch.testing.assert_close(result.penalties["kl"], expected)
    by_sum = FixedVarianceBottleneck(FixedVarianceConfig(std=0.5), 5, 4)(features(5))
    torch.testing.assert_close(by_sum.penalties["kl"], expected * (5 * 4 * 6) / (3 * 16 * 24))


def test_the_log_shows_spread_and_active_channels():
    # Channels of the means: constant, just inactive, just active, and wide; the noise adds to their variance.
    scales = torch.tensor([0.0, 0.099, 0.101, 2.0]).view(4, 1, 1)
    white = features(4) - features(4).mean(dim=(0, 2, 3), keepdim=True)
    mean = scales * white / white.std(dim=(0, 2, 3), correction=0, keepdim=True) + 7
    point, noisy = posterior_metrics(Posterior(mean)), posterior_metrics(Posterior(mean, torch.full_like(mean, 0.3)))
    assert point["latent/active_channels"] == noisy["latent/active_channels"] == 2
    assert (point["latent/std_min"].item(), point["latent/std_max"].item()) == pytest.approx((0, 2), abs=1e-4)
    statistics = LatentStatistics(4)
    statistics.update(Posterior(mean, torch.full_like(mean, 0.3)))
    assert noisy["latent/std_min"].item() == pytest.approx(min(statistics.std))
    assert noisy["latent/std_max"].item() == pytest.approx(max(statistics.std))


def test_the_log_shows_what_is_saturated_or_clamped():
    h = torch.tensor([-9.0, -3.0, -2.9, 0.0, 2.5, 3.0, 8.5, 100.0]).view(1, 1, 2, 4)
    clamp = BoundedBottleneck(BoundedConfig(activation="clamp", bound=3.0), 1, 4)(h)
    assert clamp.metrics["latent/saturation"] == 5 / 8
    tanh = BoundedBottleneck(BoundedConfig(bound=3.0), 1, 4)(h)  # tanh(8.5 / 3) = 0.993, tanh(1) = 0.76
    assert tanh.metrics["latent/saturation"] == 3 / 8
    logvar = torch.tensor([-31.0, -30.0, -29.0, 0.0, 19.0, 20.0, 21.0, 1.0]).view(1, 1, 2, 4)
    kl = KLBottleneck(KLConfig(), 1, 4)(torch.cat([h, logvar], dim=1))
    assert kl.metrics["latent/logvar_clamped"] == 4 / 8


def statistics_loss(convolution: nn.Module, bottlenecks: nn.ModuleList, images: Tensor) -> Tensor:
    """Return the mean over images of a loss through the penalties of one bottleneck and the latents of another."""
    bounded, normalised = (bottleneck(convolution(images)) for bottleneck in bottlenecks)
    values = normalised.posterior.mean * images[:, :1]  # depends on each image, unlike the normalised latents' power
    return sum(bounded.penalties.values()) + (values - 1).square().mean()


def statistics_networks() -> tuple[nn.Module, nn.ModuleList]:
    torch.manual_seed(0)
    bounded = BoundedBottleneck(BoundedConfig(covariance_weight=1.0), 5, 4)
    return nn.Conv2d(3, 5, 1), nn.ModuleList([bounded, BatchNormBottleneck(BatchNormConfig(), 5, 4)])


def whole_batch() -> Tensor:
    """Return six images of different brightness, so that the halves of the batch have different means."""
    return features(3).repeat(2, 1, 1, 1) + torch.arange(6.0).view(6, 1, 1, 1)


def statistics_of_half_the_batch(folder: str) -> None:
    """Write, from each of two processes, what its half of the batch gives under DistributedDataParallel."""
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    convolution, bottlenecks = statistics_networks()
    wrapped = nn.parallel.DistributedDataParallel(convolution)
    loss = statistics_loss(wrapped, bottlenecks, whole_batch().chunk(2)[rank])
    loss.backward()
    bottlenecks.eval()  # in which a process may be alone
    if rank == 0:
        bottlenecks[0](features(5))
    gradients = {name: p.grad for name, p in convolution.named_parameters()}
    torch.save({"loss": loss.detach(), **gradients, **bottlenecks.state_dict()}, Path(folder) / f"{rank}.pt")


def test_two_processes_have_the_statistics_and_gradients_of_the_whole_batch(tmp_path):
    from accelerate import debug_launcher

    debug_launcher(statistics_of_half_the_batch, (str(tmp_path),), num_processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    convolution, bottlenecks = statistics_networks()
    loss = statistics_loss(convolution, bottlenecks, whole_batch())
    loss.backward()
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss.detach())
    for name, parameter in convolution.named_parameters():
        torch.testing.assert_close(first[name], parameter.grad)
    for name, value in bottlenecks.state_dict().items():
        torch.testing.assert_close(first[name], value)
        assert torch.equal(first[name], second[name])
