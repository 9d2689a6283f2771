"""Whole trajectories against diffusers' schedulers: same denoiser, start, noise levels and noise.

A trajectory is every state that the denoiser is called with, brought to our frame (x = clean + sigma * noise), and the
result. Where a scheduler would compute noise levels of its own it is given ours; `DDIMScheduler` and the schedulers'
own grids are taken as they are and ours are set to theirs. They compute in float32.
"""

from itertools import pairwise

import pytest
import torch
from gaussian_mixture import denoise, noise_from, normal

from wavelatent.stage2_diffusion.samplers import SAMPLERS
from wavelatent.stage2_diffusion.schedules import exponential_sigmas, karras_sigmas

diffusers = pytest.importorskip("diffusers.schedulers")

SHAPE = (2, 3, 4, 5)
NOISE = noise_from(3, SHAPE)
GRIDS = {"karras": karras_sigmas, "exponential": exponential_sigmas}


@pytest.fixture(params=[(8, "karras"), (20, "exponential")], ids=["8 steps", "20 steps"])
def sigmas(request):
    """Fewer and more than 15 steps, where diffusers' multistep solvers change their last steps."""
    steps, grid = request.param
    return GRIDS[grid](steps, 0.02, 15.0)


class Trajectory:
    """The denoiser, which notes the states it sees."""

    def __init__(self):
        self.states = []

    def __call__(self, x, sigma, labels=None):
        self.states.append(x.double())
        return denoise(x.double(), torch.as_tensor(sigma).double().expand(len(x)))

    def ended(self, x):
        return torch.stack([*self.states, x.double()])


def ours(name, sigmas, noise=None, **options):
    trajectory = Trajectory()
    x = sigmas[0] * normal(SHAPE, seed=1)
    return trajectory.ended(SAMPLERS[name](trajectory, x, sigmas, None, noise, **options))


def given(scheduler, sigmas):
    """Give the scheduler our levels; what it holds per call is repeated by Heun's, whose inner levels come twice."""
    scheduler.set_timesteps(len(sigmas) - 1)
    if len(scheduler.sigmas) > len(sigmas):
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    assert len(scheduler.sigmas) == len(sigmas)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)  # timesteps only name the steps
    return scheduler


def theirs(scheduler, output, frame=lambda sigma: 1.0, options=lambda step: {}):
    """Run the scheduler. ``output`` is what its network would predict, ``frame(sigma)`` its states over ours."""
    trajectory = Trajectory()
    x = scheduler.sigmas[0] * normal(SHAPE, seed=1) * frame(scheduler.sigmas[0])
    for step, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[step]
        scheduler.scale_model_input(x, t)
        state = x / frame(sigma)
        x = scheduler.step(output(state, sigma, trajectory(state, sigma)), t, x, **options(step)).prev_sample
    return trajectory.ended(x)


def assert_same(first, second):
    assert first.shape == second.shape
    scale = second.abs().amax(dim=(1, 2, 3, 4))
    assert len(scale) > 5
    assert ((first - second).abs().amax(dim=(1, 2, 3, 4)) / scale).max() < 1e-4
    assert (first[-1] - first[0]).abs().max() > 1


def noise_prediction(x, sigma, denoised):
    return (x - denoised) / sigma


def clean_prediction(x, sigma, denoised):
    return denoised


def edm_output(x, sigma, denoised, sigma_data=0.5):
    """The F of EDM equation 7."""
    variance = sigma**2 + sigma_data**2
    return (denoised - sigma_data**2 / variance * x) * variance.sqrt() / (sigma * sigma_data)


def variance_preserving(sigma):
    return 1 / (1 + sigma**2) ** 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_euler(sigmas, prediction):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=prediction)
    output = noise_prediction if prediction == "epsilon" else clean_prediction
    assert_same(ours("euler", sigmas), theirs(given(scheduler, sigmas), output))


def test_euler_of_edm(sigmas):
    assert_same(ours("euler", sigmas), theirs(given(diffusers.EDMEulerScheduler(), sigmas), edm_output))


def test_heun(sigmas):
    found = ours("heun", sigmas)
    assert len(found) == 2 * (len(sigmas) - 1)
    assert_same(found, theirs(given(diffusers.HeunDiscreteScheduler(), sigmas), noise_prediction))


def test_euler_ancestral(sigmas):
    scheduler = given(diffusers.EulerAncestralDiscreteScheduler(), sigmas)
    options = generator_per_step()
    assert_same(ours("euler_ancestral", sigmas, NOISE), theirs(scheduler, noise_prediction, options=options))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpm_solver(sigmas, solver):
    algorithm = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}[solver]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=2, prediction_type="sample", final_sigmas_type="zero"
    )
    noisy = solver == "dpmpp_2m_sde"
    expected = theirs(
        given(scheduler, sigmas),
        clean_prediction,
        variance_preserving,
        lambda step: {"variance_noise": NOISE(step)} if noisy else {},
    )
    assert_same(ours(solver, sigmas, NOISE), expected)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_dpm_solver_of_edm(sigmas, solver):
    algorithm = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++"}[solver]
    scheduler = given(diffusers.EDMDPMSolverMultistepScheduler(algorithm_type=algorithm), sigmas)
    assert_same(ours(solver, sigmas, NOISE), theirs(scheduler, edm_output, options=generator_per_step()))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddim(schedule, eta):
    scheduler = diffusers.DDIMScheduler(beta_schedule=schedule, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), alpha_bar.new_zeros(1)])
    assert all(a > b for a, b in pairwise(scheduler.sigmas.tolist()))

    expected = theirs(
        scheduler, noise_prediction, variance_preserving, lambda step: {"eta": eta, "variance_noise": NOISE(step)}
    )
    assert_same(ours("ddim", scheduler.sigmas, NOISE, eta=eta), expected)


@pytest.mark.parametrize("name", GRIDS)
def test_grids_of_edm(name):
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_schedule=name, rho=5.0)
    scheduler.set_timesteps(17)
    options = {"rho": 5.0} if name == "karras" else {}
    torch.testing.assert_close(
        GRIDS[name](17, 0.01, 50.0, **options).float(), scheduler.sigmas.float(), rtol=1e-4, atol=0
    )


def generator_per_step():
    """Options that make a scheduler draw the same noise as `NOISE` draws."""
    return lambda step: {"generator": torch.Generator().manual_seed(3000 + step)}
