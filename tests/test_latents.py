from typing import Literal

import pytest
import torch

from wavelatent.common.latents import LatentStatistics, Posterior, Whitening
from wavelatent.common.randomness import generator

B, C, H, W = 7, 3, 5, 4


def raw_latents(seed: int = 0) -> torch.Tensor:
    x = torch.randn(B, C, H, W, generator=generator(seed), dtype=torch.float64)
    return (x * torch.tensor([0.5, 2.0, 4.0])[:, None, None] + torch.tensor([1.0, -20.0, 3.0])[:, None, None]).float()


def test_a_deterministic_posterior_is_its_mean() -> None:
    posterior = Posterior(raw_latents())
    assert posterior.deterministic
    assert torch.equal(posterior.sample(generator(1)), posterior.mean)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_samples_have_the_mean_and_std_of_the_posterior() -> None:
    mean, std = torch.full((2000, C, 1, 2), 3.0), torch.full((2000, C, 1, 2), 0.25)
    draws = Posterior(mean, std).sample(generator(0))
    assert draws.mean().item() == pytest.approx(3.0, abs=0.01)
    assert draws.std().item() == pytest.approx(0.25, rel=0.02)


def test_one_generator_per_image_makes_a_draw_independent_of_its_batch() -> None:
    mean = raw_latents()
    whole = Posterior(mean, torch.ones_like(mean)).sample([generator("z", i) for i in range(B)])
    part = Posterior(mean[4:6], torch.ones_like(mean[4:6])).sample([generator("z", 4), generator("z", 5)])
    assert torch.equal(whole[4:6], part)


def test_statistics_equal_brute_force_whatever_the_batches() -> None:
    raw = torch.cat([raw_latents(s) for s in range(4)]) + 1e4  # a large mean: a sum of squares in float32 would cancel
    streamed = LatentStatistics(C)
    for start, stop in [(0, 1), (1, 12), (12, 12), (12, 28)]:
        streamed.update(raw[start:stop])
    exact = raw.double().transpose(0, 1).flatten(1)
    assert streamed.count == exact.shape[1]
    assert streamed.mean == pytest.approx(exact.mean(1).tolist(), rel=1e-13)
    assert streamed.std == pytest.approx(exact.std(1, unbiased=False).tolist(), rel=1e-10)
    assert streamed.min == exact.amin(1).tolist()
    assert streamed.max == exact.amax(1).tolist()


def test_merging_equals_one_pass() -> None:
    parts = [raw_latents(s) for s in range(3)]
    one, merged = LatentStatistics(C), LatentStatistics(C)
    for part in parts:
        one.update(part)
    for group in (parts[:1], parts[1:]):
        partial = LatentStatistics(C)
        partial.update(torch.cat(group))
        merged.merge(partial)
    merged.merge(LatentStatistics(C))
    assert merged.mean == pytest.approx(one.mean, rel=1e-13)
    assert merged.std == pytest.approx(one.std, rel=1e-13)
    assert (merged.count, merged.min, merged.max) == (one.count, one.min, one.max)


def test_posterior_statistics_are_those_of_the_sampled_latent() -> None:
    mean = raw_latents()
    std = torch.rand(mean.shape, generator=generator(5))
    statistics = LatentStatistics(C)
    statistics.update(Posterior(mean[:2], std[:2]))
    statistics.update(Posterior(mean[2:], std[2:]))
    flat, spread = (x.double().transpose(0, 1).flatten(1) for x in (mean, std))
    expected = (flat.var(1, unbiased=False) + spread.square().mean(1)).sqrt()
    assert statistics.std == pytest.approx(expected.tolist(), rel=1e-12)
    assert statistics.max == flat.amax(1).tolist()


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
def test_whitening_inverts(kind: str) -> None:
    raw = raw_latents()
    statistics = LatentStatistics(C)
    statistics.update(raw)
    whitening = Whitening.from_statistics(kind, statistics.as_dict())  # type: ignore[arg-type]
    assert torch.allclose(whitening.inverse(whitening(raw)), raw, atol=1e-5)
    assert whitening.shift.shape == whitening.scale.shape == (1, C, 1, 1)


def test_channel_whitening_gives_every_channel_zero_mean_and_unit_variance() -> None:
    raw = raw_latents()
    statistics = LatentStatistics(C)
    statistics.update(raw)
    white = Whitening.from_statistics("channel", statistics.as_dict())(raw).double().transpose(0, 1).flatten(1)
    assert torch.allclose(white.mean(1), torch.zeros(C, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(white.std(1, unbiased=False), torch.ones(C, dtype=torch.float64), atol=1e-5)


def test_scalar_whitening_uses_the_moments_of_all_channels_together() -> None:
    raw = raw_latents()
    statistics = LatentStatistics(C)
    statistics.update(raw)
    whitening = Whitening.from_statistics("scalar", statistics.as_dict())
    assert whitening.shift[0, 0].item() == pytest.approx(raw.double().mean().item(), rel=1e-6)
    assert whitening.scale.unique().item() == pytest.approx(raw.double().std(unbiased=False).item(), rel=1e-6)


def test_no_whitening_is_the_identity() -> None:
    raw = raw_latents()
    assert torch.equal(Whitening("none", [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])(raw), raw)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_constant_channels_do_not_divide_by_zero(kind: Literal["scalar", "channel"]) -> None:
    whitening = Whitening(kind, [2.0, 2.0], [0.0, 0.0])
    assert torch.equal(whitening(torch.full((1, 2, 3, 4), 2.0)), torch.zeros(1, 2, 3, 4))
    assert whitening.scale.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("std", [0.0, 1e-8])
def test_a_channel_that_is_all_but_constant_is_not_blown_up(std: float) -> None:
    whitening = Whitening("channel", [2.0, 0.0, -1.0], [std, 5.0, 0.01])
    assert whitening.scale.flatten().tolist() == pytest.approx([5e-4, 5.0, 0.01])
    rounded = torch.full((1, 3, 2, 4), 2.0) + torch.finfo(torch.float32).eps * 2
    assert whitening(rounded)[0, 0].abs().max() < 1e-3
    assert torch.allclose(whitening.inverse(whitening(rounded)), rounded)


def test_the_whitening_travels_in_the_state_dict() -> None:
    trained, fresh = Whitening("channel", [1.0, 2.0], [3.0, 4.0]), Whitening("channel", [0.0, 0.0], [1.0, 1.0])
    fresh.load_state_dict(trained.state_dict())
    raw = torch.ones(1, 2, 3, 4)
    assert torch.equal(fresh(raw), trained(raw))


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("half", [0.0], [1.0]),
        ("channel", [0.0, 1.0], [1.0]),
        ("channel", [float("nan")], [1.0]),
        ("scalar", [0.0], [-1.0]),
    ],
)
def test_unusable_statistics_are_refused(kind: str, mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match=r"whitening|statistics"):
        Whitening(kind, mean, std)  # type: ignore[arg-type]
