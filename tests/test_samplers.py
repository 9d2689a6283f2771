"""Samplers on a mixture of Gaussians, whose denoiser, and so the probability flow ODE, is known."""

import math
from functools import lru_cache

import gaussian_mixture as mixture
import pytest
import torch
from gaussian_mixture import denoise, noise_from, normal

from wavelatent.stage2_diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, heun
from wavelatent.stage2_diffusion.schedules import exponential_sigmas, karras_sigmas

SIGMA_MAX = 20.0
SHAPE = (2, 3, 4, 5)
STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde"}
FIRST_ORDER = {"euler", "ddim", "euler_ancestral"}


def start(batch=2):
    return mixture.MEAN + SIGMA_MAX * normal((batch, *SHAPE[1:]), seed=0)


@lru_cache
def reference(sigma_end):
    """The probability flow ODE, dx / d ln(sigma) = x - D(x; sigma), solved to 1e-11."""
    from scipy.integrate import solve_ivp

    def slope(log_sigma, x):
        x = torch.from_numpy(x).reshape(SHAPE)
        return (x - denoise(x, torch.full((2,), math.exp(log_sigma), dtype=x.dtype))).flatten().numpy()

    span = math.log(SIGMA_MAX), math.log(sigma_end)
    solved = solve_ivp(slope, span, start().flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-11)
    return torch.from_numpy(solved.y[:, -1]).reshape(SHAPE)


@pytest.mark.parametrize("grid", [karras_sigmas, exponential_sigmas])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order, grid):
    errors = []
    for steps in (64, 128):
        sigmas = grid(steps, 0.05, SIGMA_MAX)[:-1]  # to sigma_min, without the step to zero
        errors.append((SAMPLERS[name](denoise, start(), sigmas) - reference(0.05)).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert errors[1] < 0.02


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in SAMPLERS), ("heun", {"churn": 30.0})])
def test_sampled_moments(name, options):
    x = start(batch=400)
    sampled = SAMPLERS[name](denoise, x, karras_sigmas(80, 0.002, SIGMA_MAX), None, noise_from(1, x.shape), **options)
    # 24,000 draws: mean and standard deviation are known to 0.006 and 0.004 (one sigma), the skewness to 0.01.
    assert sampled.mean().item() == pytest.approx(mixture.MEAN, abs=0.025)
    tolerance = 0.06 if name in FIRST_ORDER else 0.02  # first order: a bias at 80 steps
    assert sampled.std().item() == pytest.approx(mixture.STD, abs=tolerance)
    skewness = (((sampled - sampled.mean()) / sampled.std()) ** 3).mean().item()
    assert skewness == pytest.approx(mixture.SKEWNESS, abs=0.06)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_sampler_ends_on_the_data_when_there_is_one_datum(name, steps):
    x = start()
    sampled = SAMPLERS[name](
        lambda x, s, _: torch.full_like(x, 0.7), x, karras_sigmas(steps), None, noise_from(1, x.shape)
    )
    torch.testing.assert_close(sampled, torch.full_like(x, 0.7))


def test_ddim_is_euler_and_its_ancestral_form_is_euler_ancestral():
    x, sigmas = start(), karras_sigmas(9, 0.002, SIGMA_MAX)
    torch.testing.assert_close(ddim(denoise, x, sigmas), euler(denoise, x, sigmas))
    noise = noise_from(2, x.shape)
    ancestral = euler_ancestral(denoise, x, sigmas, None, noise)
    torch.testing.assert_close(ddim(denoise, x, sigmas, None, noise, eta=1.0), ancestral)
    assert not torch.allclose(ancestral, euler(denoise, x, sigmas))


def test_the_sde_solver_without_noise_is_the_ode_solver():
    x, sigmas = start(), karras_sigmas(9, 0.002, SIGMA_MAX)
    torch.testing.assert_close(dpmpp_2m_sde(denoise, x, sigmas, eta=0.0), dpmpp_2m(denoise, x, sigmas))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_whatever_eta_the_noise_level_is_kept(name, eta):
    """One step for a denoiser that is constant: mean and standard deviation at the next level are known."""
    unit = normal((400, 3, 4, 5), seed=4)
    sigma, sigma_next = 2.0, 0.5
    grid = torch.tensor([sigma, sigma_next], dtype=torch.float64)
    noise = noise_from(5, unit.shape)
    out = SAMPLERS[name](lambda x, s, _: torch.full_like(x, 0.7), 0.7 + sigma * unit, grid, None, noise, eta=eta)
    assert out.mean().item() == pytest.approx(0.7, abs=0.01)
    assert out.std().item() == pytest.approx(sigma_next, abs=0.01)
    kept = torch.corrcoef(torch.stack([out.flatten(), unit.flatten()]))[0, 1].item()
    share_kept = {  # of the standard deviation at sigma_next, what was there before
        "ddim": math.sqrt(1 - eta**2 * (1 - (sigma_next / sigma) ** 2)),
        "dpmpp_2m_sde": (sigma_next / sigma) ** eta,
    }
    assert kept == pytest.approx(share_kept[name], abs=0.02)


def test_churn_raises_the_noise_as_the_paper_says():
    """EDM, algorithm 2: gamma = min(S_churn / N, sqrt(2) - 1) between S_min and S_max, noise of strength S_noise."""
    seen, x = [], torch.zeros(200, 3, 4, 5, dtype=torch.float64)

    def recording(x, sigma, labels=None):
        seen.append((sigma[0].item(), x.std().item()))
        return x  # the slope is zero: x changes by the churn alone

    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    heun(recording, x, sigmas, None, noise_from(1, x.shape), churn=0.9, churn_min=1.5, churn_max=3, churn_noise=1.1)
    assert [level for level, _ in seen] == pytest.approx([4, 2, 2 * 1.3, 1, 1])
    added = 1.1 * math.sqrt((2 * 1.3) ** 2 - 2**2)
    assert [std for _, std in seen] == pytest.approx([0, 0, added, added, added], rel=0.02)
    seen.clear()
    heun(recording, x, sigmas, None, noise_from(1, x.shape), churn=100.0)
    assert seen[0][0] == pytest.approx(4 * math.sqrt(2))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_type_of_the_state_is_kept_and_the_start_is_not_written_to(name):
    x = start().float()
    before = x.clone()
    sampled = SAMPLERS[name](denoise, x, karras_sigmas(4, 0.002, SIGMA_MAX), None, noise_from(1, x.shape))
    assert sampled.dtype == torch.float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_grid_that_does_not_fall_is_refused(name):
    with pytest.raises(AssertionError, match="must fall"):
        SAMPLERS[name](denoise, start(), torch.tensor([2.0, 2.0, 0.0]), None, noise_from(1, SHAPE))


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

    SAMPLERS[name](recording, start(), karras_sigmas(3), labels, noise_from(1, SHAPE))
    assert len(seen) >= 3
    assert all(given is labels for given in seen)
