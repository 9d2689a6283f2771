"""Samplers, grids, objectives and guidance together, on tiny models."""

import math
from functools import lru_cache

import pytest
import torch

from wavelatent.common.denoising import expand_like
from wavelatent.common.errors import UsageError
from wavelatent.common.randomness import image_noise
from wavelatent.stage2_diffusion.generation import (
    draw_labels,
    evaluations,
    generate_interpolation,
    generate_latents,
    guided_denoiser,
    spherical_interpolation,
)
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.objectives import OBJECTIVES
from wavelatent.stage2_diffusion.samplers import SAMPLERS
from wavelatent.stage2_diffusion.sampling import GRIDS, Sampling
from wavelatent.stage2_diffusion.unet import UNetConfig

SHAPE = (3, 4, 6)
STATISTICS = {"mean": [0.3, -2.0, 5.0], "std": [0.5, 1.0, 4.0]}
TINY = UNetConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_levels=(), head_channels=8)
SEEDS = [4, 0, 123456789]
LABELS = torch.tensor([1, 0, 1])


@lru_cache
def make(objective="edm", num_classes=2, seed=0, shape=SHAPE, mean=0.3, std=0.5):
    torch.manual_seed(seed)
    statistics = {"mean": [mean, -2.0, 5.0], "std": [std, 1.0, 4.0]}
    model = LatentDiffusion(TINY, {"kind": objective}, shape, num_classes=num_classes, statistics=statistics)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def sampling_with(sampler, grid, steps, **options):
    return Sampling(sampler=sampler, grid=grid, steps=steps, grid_shift=2.0 if grid == "shifted" else 1.0, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_sampler_works_with_every_objective_and_grid(objective, sampler):
    """And row i depends on its own seed and label alone."""
    model, found = make(objective), []
    for grid in GRIDS:
        sampling = sampling_with(sampler, grid, 3, guidance=2.0)
        latents = generate_latents(model, SEEDS, labels=LABELS, sampling=sampling)
        assert latents.shape == (3, *SHAPE)
        assert latents.isfinite().all()
        alone = generate_latents(model, SEEDS[1:2], labels=LABELS[1:2], sampling=sampling)
        torch.testing.assert_close(latents[1:2], alone, rtol=1e-4, atol=1e-4)
        found.append(latents)
    differing = found if objective != "edm" else [found[0], *found[2:]]  # EDM's own time is ln(sigma): one grid twice
    for i, first in enumerate(differing):
        for second in differing[i + 1 :]:
            assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_moments_of_the_data_come_out_of_every_grid(objective, sampler, monkeypatch):
    """Of whitened data that is N(0, 1) everywhere the best denoiser is known: E[y | x] = x / (1 + sigma^2)."""
    model = make(objective)
    monkeypatch.setattr(model, "denoise", lambda x, sigma, labels=None: x / (1 + expand_like(sigma, x) ** 2))
    steps = 192 if sampler == "dpmpp_2m_sde" else 96  # it takes more to come down from the highest levels
    for grid in GRIDS:
        raw = generate_latents(model, range(60), sampling=sampling_with(sampler, grid, steps))
        channels = raw.transpose(0, 1).flatten(1)  # 1,440 draws of each
        std = torch.tensor(STATISTICS["std"])
        assert ((channels.mean(dim=1) - torch.tensor(STATISTICS["mean"])) / std).abs().max() < 4 / math.sqrt(1440)
        assert (channels.std(dim=1) / std - 1).abs().max() < 4 / math.sqrt(2 * 1440) + 0.05  # chance, and so few steps


def test_seeds_and_labels_decide():
    model, sampling = make(), Sampling(steps=2)
    latents = generate_latents(model, [5, 5, 6], labels=torch.tensor([0, 1, 0]), sampling=sampling)
    assert not torch.allclose(latents[0], latents[1])
    assert not torch.allclose(latents[0], latents[2])
    with pytest.raises(ValueError, match="one label per seed"):
        generate_latents(model, [5, 6], labels=torch.tensor([1]), sampling=sampling)


def test_labels_are_drawn_by_the_seed():
    labels = draw_labels(range(200), 3)
    assert torch.equal(draw_labels([150], 3), labels[150:151])
    assert set(labels.tolist()) == {0, 1, 2}


def test_settings_reach_the_sampler():
    model = make()

    def latents(**settings):
        return generate_latents(model, SEEDS, labels=LABELS, sampling=Sampling(steps=4, **settings))

    assert not torch.allclose(latents(sampler="heun"), latents(sampler="heun", churn=2.0))
    assert not torch.allclose(latents(), latents(rho=3.0))
    assert not torch.allclose(latents(), latents(guidance=2.0))
    assert not torch.allclose(latents(guidance=2.0), latents(guidance=2.0, guidance_interval=(0.1, 1.0)))
    assert not torch.allclose(latents(sampler="ddim"), latents(sampler="ddim", eta=1.0))
    assert torch.equal(latents(sampler="ddim", eta=1.0), latents(sampler="euler_ancestral"))


def test_a_guidance_of_one_is_bit_identical_to_none():
    model, weaker, sampling = make(), make(seed=1), Sampling(steps=3, guidance=1.0)
    plain = generate_latents(model, SEEDS, labels=LABELS, sampling=Sampling(steps=3))
    assert torch.equal(generate_latents(model, SEEDS, labels=LABELS, sampling=sampling), plain)
    assert torch.equal(generate_latents(model, SEEDS, labels=LABELS, sampling=sampling, weaker=weaker), plain)


@pytest.mark.parametrize("classes", [0, 2])
def test_guidance_with_neither_labels_nor_a_weaker_model_is_refused(classes):
    with pytest.raises(UsageError, match="needs class labels or a weaker model"):
        generate_latents(make(num_classes=classes), SEEDS, sampling=Sampling(steps=2, guidance=1.5))


@pytest.mark.parametrize(
    ("classes", "weak_classes", "labels"), [(0, 0, None), (0, 2, None), (2, 0, LABELS), (2, 2, LABELS), (2, 2, None)]
)
def test_autoguidance_leads_away_from_the_weaker_model(classes, weak_classes, labels):
    model, weaker = make(num_classes=classes), make("flow", num_classes=weak_classes, seed=1)
    x, sigma = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 1.0, 7.0])
    weak = weaker.denoise(x, sigma, labels if weak_classes else None)
    expected = weak + 3 * (model.denoise(x, sigma, labels) - weak)
    denoise = guided_denoiser(model, labels, Sampling(guidance=3.0), weaker)
    torch.testing.assert_close(denoise(x, sigma, labels), expected, rtol=1e-4, atol=1e-4)
    limited = guided_denoiser(model, labels, Sampling(guidance=3.0, guidance_interval=(0.5, 2.0)), weaker)
    expected[[0, 2]] = model.denoise(x, sigma, labels)[[0, 2]]
    torch.testing.assert_close(limited(x, sigma, labels), expected, rtol=1e-4, atol=1e-4)


def test_a_weaker_model_of_other_latents_or_classes_is_refused():
    def generate(**other):
        sampling = Sampling(steps=1, guidance=2.0)
        return generate_latents(make(), SEEDS, labels=LABELS, sampling=sampling, weaker=make(seed=1, **other))

    for other in ({"mean": 0.31}, {"std": 0.51}):
        with pytest.raises(UsageError, match=r"whitens its latents otherwise.*same latent cache"):
            generate(**other)
    with pytest.raises(UsageError, match="latents of 3x4x8 and 3x4x6"):
        generate(shape=(3, 4, 8))
    with pytest.raises(UsageError, match="5 classes and the model 2"):
        generate(num_classes=5)
    rounded = generate(mean=0.3 + 1e-6, std=0.5 - 1e-6)
    torch.testing.assert_close(rounded, generate())


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde"])
def test_an_interpolation_leads_from_one_seed_to_the_other(sampler):
    model, sampling = make(), Sampling(sampler=sampler, steps=4)
    labels = torch.tensor([1, 1, 1, 0, 0])
    path = generate_interpolation(model, (7, 8), 5, labels=labels, sampling=sampling)
    ends = generate_latents(model, [7, 8], labels=torch.tensor([1, 0]), sampling=sampling)
    torch.testing.assert_close(path[[0, -1]], ends, rtol=1e-4, atol=1e-4)
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    apart = generate_interpolation(model, (7, 8), 5, labels=labels, sampling=sampling, pass_rows=3)
    torch.testing.assert_close(apart, path, rtol=1e-4, atol=1e-4)
    assert set(seen) == {3}
    steps = path.diff(dim=0).flatten(1).norm(dim=1)
    assert (steps > 0).all()
    assert steps.max() < (path[-1] - path[0]).norm()  # no jump
    for points, given in ((1, None), (4, labels)):
        with pytest.raises((UsageError, ValueError), match=r"2 points or more|one label per point"):
            generate_interpolation(model, (7, 8), points, labels=given, sampling=sampling)


def test_spherical_interpolation_keeps_the_strength_of_the_noise():
    first, second = image_noise([1, 2], (8, 16, 16))
    path = spherical_interpolation(first, second, 9)
    assert torch.equal(path[0], first)
    assert torch.equal(path[-1], second)
    norms = path.flatten(1).norm(dim=1)
    assert norms.min() > 0.99 * min(norms[0], norms[-1])  # a straight line would pass at 0.71
    cosines = torch.nn.functional.cosine_similarity(path[:-1].flatten(1), path[1:].flatten(1))
    angles = cosines.double().acos()
    torch.testing.assert_close(angles, angles.mean().expand(8), rtol=0.02, atol=0)
    assert torch.equal(spherical_interpolation(first, first, 3), torch.stack([first] * 3))


def test_evaluations_count_the_calls_of_a_real_run(monkeypatch):
    model = make()
    for settings, expected in [
        ({}, 5),
        ({"sampler": "heun"}, 9),
        ({"sampler": "euler"}, 5),
        ({"sampler": "dpmpp_2m_sde"}, 5),
        ({"sampler": "heun", "guidance": 2.0}, 18),
        ({"sampler": "ddim", "guidance": 2.0}, 10),
        ({"sampler": "heun", "guidance": 2.0, "guidance_interval": (0.01, 3.0), "churn": 1.0}, None),
        ({"sampler": "euler", "guidance": 2.0, "guidance_interval": (0.01, 3.0)}, None),
    ]:
        calls, denoise = [], model.denoise
        with monkeypatch.context() as patch:
            patch.setattr(model, "denoise", lambda *arguments, c=calls, d=denoise: (c.append(1), d(*arguments))[1])
            sampling = Sampling(steps=5, **settings)
            generate_latents(model, SEEDS, labels=LABELS, sampling=sampling)
        assert evaluations(sampling, model.objective) == len(calls)
        if expected is not None:
            assert evaluations(sampling) == len(calls) == expected
        else:
            assert len(calls) < evaluations(sampling) == 2 * evaluations(Sampling(steps=5, sampler=sampling.sampler))
