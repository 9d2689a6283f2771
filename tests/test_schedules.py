import math

import pytest
import torch

from wavelatent.stage2_diffusion.objectives import EDMConfig, EpsConfig, FlowConfig, VConfig, build_objective
from wavelatent.stage2_diffusion.sampling import GRIDS, Sampling
from wavelatent.stage2_diffusion.schedules import (
    exponential_sigmas,
    karras_sigmas,
    sampling_sigmas,
    shifted_sigmas,
    uniform_sigmas,
)

CONFIGS = {
    "edm": EDMConfig(),
    "flow": FlowConfig(),
    "eps": EpsConfig(),
    "eps-cosine": EpsConfig(schedule="cosine"),
    "v": VConfig(noise_shift=2.0),
}
LATENT_SIZE = 3 * 4 * 8  # far from the reference, so that the noise shift is not 1


def sampling_with(grid, steps, shift=3.0):
    return Sampling(steps=steps, grid=grid, grid_shift=shift if grid == "shifted" else 1.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1500])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_grid_falls_from_the_objectives_highest_level_over_its_lowest_to_zero(config, grid, steps):
    objective = build_objective(config, LATENT_SIZE)
    sigmas = sampling_sigmas(sampling_with(grid, steps), objective)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == objective.sigma_max
    assert sigmas[-1] == 0
    if steps > 1:
        assert sigmas[-2].item() == objective.sigma_min


def test_karras_is_even_in_the_root():
    sigmas = karras_sigmas(18)
    roots = sigmas[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17))
    assert (sigmas[0], sigmas[-2]) == (80.0, 0.002)


def test_exponential_is_even_in_the_logarithm_and_what_karras_tends_to():
    sigmas = exponential_sigmas(9, 0.01, 10.0)
    ratios = sigmas[1:-1] / sigmas[:-2]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 1000 ** (-1 / 8)))
    torch.testing.assert_close(karras_sigmas(9, 0.01, 10.0, rho=1e5), sigmas, rtol=1e-3, atol=0)


def test_uniform_is_even_in_the_time_of_a_flow():
    flow = build_objective(FlowConfig(t_min=0.01, t_max=0.9, noise_shift=1.0))
    levels = uniform_sigmas(11, flow)[:-1]
    torch.testing.assert_close(levels / (1 + levels), torch.linspace(0.9, 0.01, 11, dtype=torch.float64))


def test_uniform_with_a_step_per_level_is_the_discrete_schedule():
    objective = build_objective(EpsConfig(), LATENT_SIZE)
    torch.testing.assert_close(uniform_sigmas(1000, objective)[:-1], objective.sigmas.flip(0))


def test_uniform_is_exponential_for_edm():
    edm = build_objective(EDMConfig(), LATENT_SIZE)
    torch.testing.assert_close(uniform_sigmas(7, edm), exponential_sigmas(7, edm.sigma_min, edm.sigma_max))


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_shift_is_that_of_stable_diffusion_3_away_from_the_ends(shift):
    flow = build_objective(FlowConfig(t_min=1e-7, t_max=1 - 1e-7, noise_shift=1.0))
    levels = shifted_sigmas(21, flow, shift)[1:-2]
    t = torch.linspace(1, 0, 21, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(levels / (1 + levels), shift * t / (1 + (shift - 1) * t), rtol=1e-5, atol=0)


def test_a_shift_and_its_inverse_cancel_and_one_is_none():
    objective = build_objective(EDMConfig(), LATENT_SIZE)
    low, high = objective.sigma_min, objective.sigma_max
    torch.testing.assert_close(shifted_sigmas(9, objective, 1.0), uniform_sigmas(9, objective))
    moved = shifted_sigmas(9, objective, 4.0)[1:-2]
    assert (moved > uniform_sigmas(9, objective)[1:-2]).all()
    odds = ((moved - low) / (high - moved)) / 4
    torch.testing.assert_close((low + odds * high) / (1 + odds), uniform_sigmas(9, objective)[1:-2])


def test_impossible_grids_are_refused():
    for arguments in [(0,), (4, 0.0), (4, 2.0, 1.0), (4, 0.1, 1.0, 0.0)]:
        with pytest.raises(ValueError, match=r"sigma|step|rho"):
            karras_sigmas(*arguments)
    with pytest.raises(ValueError, match="shift"):
        shifted_sigmas(4, build_objective(EDMConfig()), -1.0)
    with pytest.raises(ValueError, match="step"):
        uniform_sigmas(0, build_objective(EDMConfig()))
    with pytest.raises(ValueError, match="sigma"):
        exponential_sigmas(3, 1.0, math.nan)
