"""Samplers on Gaussian data, where the denoiser and the solution of the probability flow ODE are known."""

import math

import pytest
import torch

from wavelatent.stage2_diffusion.samplers import SAMPLERS, ddim, dpmpp_2m_sde, euler, euler_ancestral, heun
from wavelatent.stage2_diffusion.schedules import karras_sigmas

MEAN, STD = 0.7, 0.6
SIGMA_MAX = 20.0
STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde"}


def denoise(x, sigma, labels=None):
    variance = sigma.reshape(-1, 1, 1, 1) ** 2
    return (STD**2 * x + variance * MEAN) / (STD**2 + variance)


def solution(x, sigma, sigma_next):
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + sigma_next**2) / (STD**2 + sigma**2))


def start(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SIGMA_MAX * torch.randn(batch, 3, 4, 5, generator=generator, dtype=torch.float64)


def noise_from(seed, shape):
    def noise(step):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + step), dtype=torch.float64)

    return noise


def order_of_convergence(sampler, steps):
    x, errors = start(), []
    for n in (steps, 2 * steps):
        sigmas = karras_sigmas(n, 0.05, SIGMA_MAX)[:-1]  # to sigma_min, without the step to zero
        exact = solution(x, sigmas[0].item(), sigmas[-1].item())
        errors.append((sampler(denoise, x, sigmas) - exact).abs().max().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    assert order_of_convergence(SAMPLERS[name], steps=128) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampled_moments(name):
    x = MEAN + start(batch=700)
    sampled = SAMPLERS[name](denoise, x, karras_sigmas(80, 0.002, SIGMA_MAX), None, noise_from(1, x.shape))
    # 42,000 draws: the mean is known to 0.003 and the standard deviation to 0.002 (one sigma).
    assert sampled.mean().item() == pytest.approx(MEAN, abs=0.02)
    tolerance = 0.06 if name in {"euler", "ddim", "euler_ancestral"} else 0.02  # first order: a bias at 80 steps
    assert sampled.std().item() == pytest.approx(STD, abs=tolerance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_on_the_data_when_there_is_one_datum(name):
    x = start()
    sampled = SAMPLERS[name](
        lambda x, s, _: torch.full_like(x, MEAN), x, karras_sigmas(5), None, noise_from(1, x.shape)
    )
    torch.testing.assert_close(sampled, torch.full_like(x, MEAN))


def test_ddim_is_euler_and_its_ancestral_form_is_euler_ancestral():
    x, sigmas = start(), karras_sigmas(9, 0.002, SIGMA_MAX)
    torch.testing.assert_close(ddim(denoise, x, sigmas), euler(denoise, x, sigmas))
    noise = noise_from(2, x.shape)
    ancestral = euler_ancestral(denoise, x, sigmas, None, noise)
    torch.testing.assert_close(ddim(denoise, x, sigmas, None, noise, eta=1.0), ancestral)
    assert not torch.allclose(ancestral, euler(denoise, x, sigmas))


def test_churn_draws_noise_and_keeps_the_distribution():
    x, sigmas = MEAN + start(batch=700), karras_sigmas(40, 0.002, SIGMA_MAX)
    churned = heun(denoise, x, sigmas, None, noise_from(3, x.shape), churn=20.0)
    assert not torch.allclose(churned, heun(denoise, x, sigmas), atol=0.1)
    assert churned.std().item() == pytest.approx(STD, abs=0.02)
    outside = heun(denoise, x, sigmas, None, noise_from(3, x.shape), churn=20.0, churn_min=SIGMA_MAX + 1)
    torch.testing.assert_close(outside, heun(denoise, x, sigmas))


def test_the_sde_solver_keeps_each_marginal():
    # One exact step for a denoiser that is constant: mean and variance of x at the next level are known.
    x = torch.randn(400, 3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sigma, sigma_next = 2.0, 0.5
    grid = torch.tensor([sigma, sigma_next], dtype=torch.float64)
    out = dpmpp_2m_sde(lambda x, s, _: torch.full_like(x, MEAN), MEAN + sigma * x, grid, None, noise_from(5, x.shape))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(sigma_next, abs=0.01)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_a_stochastic_sampler_without_noise_says_so(name):
    with pytest.raises(ValueError, match="noise="):
        SAMPLERS[name](denoise, start(), karras_sigmas(4))


@pytest.mark.parametrize("name", SAMPLERS)
def test_labels_reach_the_denoiser(name):
    labels, seen = torch.tensor([3, 1]), []

    def recording(x, sigma, labels):
        seen.append(labels)
        return denoise(x, sigma)

    SAMPLERS[name](recording, start(), karras_sigmas(3), labels, noise_from(1, start().shape))
    assert len(seen) >= 3
    assert all(given is labels for given in seen)


def test_karras_grid():
    sigmas = karras_sigmas(18)
    assert sigmas.shape == (19,)
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    roots = sigmas[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17))
    for arguments in [(0,), (4, 0.0), (4, 2.0, 1.0)]:
        with pytest.raises(ValueError, match=r"sigma|step"):
            karras_sigmas(*arguments)
