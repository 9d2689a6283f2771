import math

import pytest
import torch
from torch import Tensor

from wavelatent.common.config import load_config, preset_names
from wavelatent.common.denoising import denoising_loss, expand_like
from wavelatent.common.errors import UsageError
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.stage2_diffusion.noise_tables import NOISE_TABLES, alphas_cumprod, table_sigmas
from wavelatent.stage2_diffusion.objectives import OBJECTIVE_CONFIG, OBJECTIVES, Objective, build_objective
from wavelatent.stage2_diffusion.weighting import WEIGHTINGS

PLAIN = [
    {"kind": "edm"},
    {"kind": "edm", "sigma_data": 0.5},
    {"kind": "flow"},
    {"kind": "flow", "times": "uniform"},
    *({"kind": kind, "schedule": schedule} for kind in ("eps", "v") for schedule in NOISE_TABLES),
]
every_objective = pytest.mark.parametrize("plain", PLAIN, ids=lambda plain: " ".join(map(str, plain.values())))
SIGMAS = torch.tensor([0.01, 0.3, 1.0, 4.0, 50.0], dtype=torch.float64)


def build(plain: dict, latent_size: int = 4096, **settings) -> Objective:
    return build_objective(OBJECTIVE_CONFIG.validate_python(plain | settings), latent_size)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(count: int) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


def assert_quantiles(drawn: Tensor, expected: dict[float, float]) -> None:
    """The share of ``drawn`` below each level is the share expected there, within 4 standard errors."""
    for share, level in expected.items():
        error = math.sqrt(share * (1 - share) / len(drawn))
        assert (drawn < level).double().mean().item() == pytest.approx(share, abs=4 * error)


NORMAL_QUANTILES = {0.02275: -2.0, 0.15866: -1.0, 0.5: 0.0, 0.84134: 1.0, 0.97725: 2.0}


def test_the_tables_of_options_are_complete():
    assert {plain["kind"] for plain in PLAIN} == set(OBJECTIVES)
    named = [n for n in preset_names() if n.startswith(("tiny2/objective-", "tiny2/weighting-"))]
    objectives = [load_config(DiffusionRunConfig, name).objective for name in named]
    assert {o.kind for o in objectives} == set(OBJECTIVES)
    assert {o.weighting.kind for o in objectives} == set(WEIGHTINGS)
    assert {o.schedule for o in objectives if o.kind in ("eps", "v")} == set(NOISE_TABLES)
    assert {o.times for o in objectives if o.kind == "flow"} == {"logit_normal", "uniform"}


# --- the training distribution and the objective's time


def test_edm_and_logit_normal_flow_draw_lognormal_levels():
    drawn = build({"kind": "edm", "p_mean": 0.7, "p_std": 0.5}).draw_sigma(20_000, generator())
    assert drawn.dtype == torch.float32
    assert_quantiles(drawn, {share: math.exp(0.7 + 0.5 * z) for share, z in NORMAL_QUANTILES.items()})
    drawn = build({"kind": "flow", "logit_mean": -0.4, "logit_std": 1.5}).draw_sigma(20_000, generator())
    times = drawn / (1 + drawn)
    assert_quantiles(times, {s: 1 / (1 + math.exp(0.4 - 1.5 * z)) for s, z in NORMAL_QUANTILES.items()})


def test_uniform_flow_draws_times_evenly_between_its_ends():
    drawn = build({"kind": "flow", "times": "uniform", "t_min": 0.2, "t_max": 0.9}).draw_sigma(20_000, generator())
    times = drawn / (1 + drawn)
    assert times.min() >= 0.2 - 1e-6
    assert times.max() <= 0.9 + 1e-6
    assert_quantiles(times, {share: 0.2 + 0.7 * share for share in (0.1, 0.25, 0.5, 0.75, 0.9)})


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("schedule", NOISE_TABLES)
def test_a_discrete_schedule_draws_each_of_its_levels_as_often(kind, schedule):
    objective = build({"kind": kind, "schedule": schedule})
    table = table_sigmas(schedule, 200.0).float()
    drawn = objective.draw_sigma(20_000, generator())
    index = torch.searchsorted(table, drawn)
    assert torch.equal(table[index], drawn)
    assert_quantiles(index + 0.5, {i / len(table): i for i in (1, 100, 500, 900, len(table) - 1)})


@every_objective
def test_time_runs_from_the_lowest_level_to_the_highest(plain):
    objective = build(plain, 9000)
    sigmas = objective.sigma_at(ramp(5001).reshape(3, -1))
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (3, 1667)
    sigmas = sigmas.flatten()
    assert (sigmas.diff() > 0).all()
    assert (sigmas[0].item(), sigmas[-1].item()) == (objective.sigma_min, objective.sigma_max)


def test_time_is_each_objectives_own():
    time = ramp(7)
    sigma = build({"kind": "edm", "sigma_min": 0.1, "sigma_max": 9.0}).sigma_at(time)
    torch.testing.assert_close((sigma / 0.1).log() / math.log(90), time)
    sigma = build({"kind": "flow", "t_min": 0.1, "t_max": 0.7}).sigma_at(time)
    torch.testing.assert_close((sigma / (1 + sigma) - 0.1) / 0.6, time)
    table = table_sigmas("cosine", 200.0)
    objective = build({"kind": "v", "schedule": "cosine"})
    torch.testing.assert_close(objective.sigma_at(ramp(len(table))), table, rtol=1e-10, atol=0)
    halfway = (ramp(len(table))[:-1] + ramp(len(table))[1:]) / 2
    torch.testing.assert_close(objective.sigma_at(halfway), (table[:-1] * table[1:]).sqrt(), rtol=1e-10, atol=0)


# --- discrete schedules


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        ("ldm_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_the_schedules_are_those_of_diffusers(schedule, arguments):
    schedulers = pytest.importorskip("diffusers.schedulers")
    reference = schedulers.DDPMScheduler(num_train_timesteps=1000, **arguments).alphas_cumprod.double()
    # Theirs is a float32 product of 1000 factors, one of them 1 - 0.999 where beta is capped.
    torch.testing.assert_close(alphas_cumprod(schedule), reference, rtol=5e-5, atol=0)


def test_levels_above_the_limit_are_left_out():
    assert [len(table_sigmas(schedule, 200.0)) for schedule in NOISE_TABLES] == [1000, 1000, 996]
    assert table_sigmas("cosine")[-1] > 20_000
    assert build({"kind": "v", "schedule": "cosine"}).sigma_max == pytest.approx(160, abs=1)
    objective = build({"kind": "eps", "sigma_limit": 10.0}, noise_shift=3)
    assert objective.draw_sigma(5000, generator()).max() <= 30
    assert 29 < objective.sigma_max <= 30


# --- the noise shift


@every_objective
def test_the_shift_multiplies_every_level_and_no_label(plain):
    plain_one, shifted = build(plain), build(plain, 4 * 4096)
    assert (plain_one.noise_shift, shifted.noise_shift) == (1, 2)
    assert shifted.sigma_min == pytest.approx(2 * plain_one.sigma_min)
    assert shifted.sigma_max == pytest.approx(2 * plain_one.sigma_max)
    torch.testing.assert_close(shifted.draw_sigma(50, generator()), 2 * plain_one.draw_sigma(50, generator()))
    torch.testing.assert_close(shifted.sigma_at(ramp(9)), 2 * plain_one.sigma_at(ramp(9)))
    at_two, at_one = shifted.preconditioning.scalings(2 * SIGMAS), plain_one.preconditioning.scalings(2 * SIGMAS)
    torch.testing.assert_close(at_two[:3], at_one[:3])  # functions of the level that is there
    torch.testing.assert_close(at_two.noise, plain_one.preconditioning.scalings(SIGMAS).noise)
    torch.testing.assert_close(
        shifted.preconditioning.weight(SIGMAS), plain_one.preconditioning.weight(SIGMAS), rtol=1e-12, atol=0
    )


def test_the_shift_of_flow_is_the_timestep_shift_of_sd3():
    """Esser et al. 2024, equation 23: t' = s t / (1 + (s - 1) t)."""
    for s in (0.25, 3.0):
        sigma = build({"kind": "flow", "noise_shift": s}).sigma_at(ramp(9))
        t = 0.002 + (0.99 - 0.002) * ramp(9)
        torch.testing.assert_close(sigma / (1 + sigma), s * t / (1 + (s - 1) * t))


def test_auto_is_the_root_of_the_size_over_the_reference_size_and_at_least_1():
    for plain in PLAIN:
        assert build(plain, 3 * 64 * 128).noise_shift == pytest.approx(math.sqrt(6))
        assert build(plain, 96, reference_size=24).noise_shift == 2
        assert build(plain, 96, reference_size=97).noise_shift == 1, "levels are raised, never lowered"
        assert build(plain, 96, noise_shift=0.5).noise_shift == 0.5


@every_objective
@pytest.mark.parametrize("latent_size", [16 * 16 * 4, 128 * 128 * 32])
def test_every_label_is_of_order_one(plain, latent_size):
    objective = build(plain, latent_size)
    ends = torch.tensor([objective.sigma_min, objective.sigma_max], dtype=torch.float64)
    drawn = objective.draw_sigma(5000, generator()).double()
    labels = objective.preconditioning.scalings(torch.cat([ends, drawn])).noise
    assert labels.min() > -1.6
    assert labels.max() < 1.4


# --- the optimum and the weights


@every_objective
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_training_loss_is_stationary_at_the_analytic_denoiser_and_only_there(plain, weighting):
    """By Monte Carlo: the slope of the loss in an offset of D and in a factor on D is zero at E[clean | x]."""
    objective = build(plain, 1000, weighting={"kind": weighting})
    count, mean, std = 20_000, 0.2, 1.3
    random = generator(1)
    sigma = objective.draw_sigma(count, random).double()
    clean = mean + std * torch.randn(count, 1, 2, 1, generator=random, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=random, dtype=torch.float64)
    level = expand_like(sigma, clean)
    x = clean + level * noise
    best = (std**2 * x + level**2 * mean) / (std**2 + level**2)
    weight = objective.preconditioning.weight(sigma)

    def errors_from_zero(at: float) -> list[float]:
        """Slopes of the mean loss in offset and factor, in standard errors; ``at`` is where both are."""
        moves = torch.full((2, count), at, dtype=torch.float64, requires_grad=True)
        offset, factor = (expand_like(move, x) for move in moves)
        loss = denoising_loss(best * (1 + factor) + offset, clean, weight)
        (slopes,) = torch.autograd.grad(loss.sum(), moves)
        return (slopes.mean(1) / slopes.std(1) * math.sqrt(count)).abs().tolist()

    assert max(errors_from_zero(0.0)) < 4
    assert min(errors_from_zero(0.3)) > 6


@every_objective
def test_the_network_weighting_is_the_preconditionings_own(plain):
    preconditioning = build(plain).preconditioning
    torch.testing.assert_close(
        preconditioning.weight(SIGMAS) * preconditioning.scalings(SIGMAS).out ** 2, torch.ones_like(SIGMAS)
    )


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_weights_by_snr_do_not_depend_on_what_the_network_predicts(kind):
    snr = SIGMAS**-2

    def weight(**weighting):
        return build({"kind": kind, "weighting": weighting}).preconditioning.weight(SIGMAS)

    # Hang et al.: min(SNR, gamma) / SNR on the noise's error, which is SNR times the error of the signal.
    torch.testing.assert_close(weight(kind="min_snr", gamma=5), (5 / snr).clamp(max=1) * snr)
    torch.testing.assert_close(weight(kind="min_snr"), weight(kind="min_snr", gamma=5))
    # Crowson et al.: 1 / (sigma^2 + 1 / gamma).
    torch.testing.assert_close(weight(kind="soft_min_snr", gamma=3), 1 / (SIGMAS**2 + 1 / 3))
    # Hoogeboom et al. on the signal's error: e^b sigmoid(ln SNR - b).
    torch.testing.assert_close(weight(kind="sigmoid", bias=-2), math.exp(-2) * (snr.log() + 2).sigmoid())
    torch.testing.assert_close(weight(kind="sigmoid", bias=-2), weight(kind="soft_min_snr", gamma=math.exp(-2)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_does_not_depend_on_the_unit_of_the_data(weighting):
    """Data, noise and estimates twice as large: four times the squared error, at a quarter of the weight."""
    one, two = (
        build({"kind": "edm", "sigma_data": unit, "weighting": {"kind": weighting}}).preconditioning
        for unit in (1.0, 2.0)
    )
    torch.testing.assert_close(4 * two.weight(2 * SIGMAS), one.weight(SIGMAS))


# --- refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=vp", r"objective\.kind: unknown kind 'vp'; did you mean 'v'"),
        ("objective={kind: flow, times: lognormal}", r"objective\.times: .*'logit_normal' or 'uniform'"),
        ("objective={kind: flow, t_max: 1}", r"objective\.t_max: .*less than 1, got 1"),
        ("objective={kind: flow, t_min: 0}", r"objective\.t_min: .*greater than 0, got 0"),
        ("objective={kind: flow, t_min: 0.5, t_max: 0.5}", r"objective: t_min 0\.5 must be below t_max 0\.5"),
        ("objective={kind: edm, sigma_min: 80}", r"objective: sigma_min 80\.0 must be below sigma_max 80\.0"),
        ("objective={kind: eps, schedule: cosin}", r"objective\.schedule: .*'cosine'"),
        ("objective={kind: v, sigma_limit: 0.5}", r"objective\.sigma_limit: .*greater than 1, got 0\.5"),
        ("objective.noise_shift=0", r"objective\.noise_shift: .*greater than 0, got 0"),
        ("objective.noise_shift=none", r"objective\.noise_shift: .*'auto', got 'none'"),
        ("objective.reference_size=0", r"objective\.reference_size: .*greater than or equal to 1"),
        (
            "objective.weighting.kind=minsnr",
            r"objective\.weighting\.kind: unknown kind 'minsnr'; did you mean 'min_snr'",
        ),
        ("objective.weighting={kind: min_snr, gamma: 0}", r"objective\.weighting\.gamma: .*greater than 0, got 0"),
        ("objective.weighting={kind: sigmoid, gamma: 1}", r"unknown key 'objective\.weighting\.gamma'"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key(override, message):
    with pytest.raises(UsageError, match=message):
        load_config(DiffusionRunConfig, "tiny2/objective-edm", [override])
