"""The validation loss, of denoisers whose errors are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_cache import COUNT, write_cache

from wavelatent.common.denoising import expand_like
from wavelatent.common.latent_cache import LatentCache
from wavelatent.common.latent_loader import TrainingLatents
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.objectives import EDMConfig, FlowConfig
from wavelatent.stage2_diffusion.unet import UNetConfig
from wavelatent.stage2_diffusion.validation import SIGMA_BINS, Validation, sums_by_sigma

UNET = UNetConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_levels=(), head_channels=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return LatentCache.open(write_cache(tmp_path_factory.mktemp("cache")))


def process(rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """What `Validation` needs of an accelerator; the sum over processes is left to the test."""
    return SimpleNamespace(
        process_index=rank, num_processes=world_size, device=torch.device("cpu"), reduce=lambda x, how: x
    )


def make(cache: LatentCache, objective: EDMConfig | FlowConfig) -> LatentDiffusion:
    torch.manual_seed(0)
    stats = cache.manifest.stats
    statistics = {"mean": stats.mean, "std": stats.std}
    return LatentDiffusion(UNET, objective, cache.shape, statistics=statistics).eval()


def measure(cache: LatentCache, model: LatentDiffusion, batch_size: int = 4, **process_options: int) -> dict:
    latents = TrainingLatents(cache, 1, seed=0)
    return Validation(latents, range(COUNT), batch_size)(model, process(**process_options))


def test_a_denoiser_that_returns_its_input_scores_the_noise(cache, monkeypatch):
    """Error sigma^2, weight (1 + sigma^2) / sigma^2: 1 + sigma^2 times the noise's mean square."""
    model = make(cache, EDMConfig(noise_shift=1))
    levels = []

    def identity(x, sigma, labels=None):
        levels.append(sigma)
        return x

    monkeypatch.setattr(model, "denoise", identity)
    losses = measure(cache, model, batch_size=COUNT)
    assert len(levels) == len(SIGMA_BINS)
    values = 3 * 4 * 8 * COUNT
    for name, sigma in zip(SIGMA_BINS, levels, strict=True):
        weights = 1 + sigma.double() ** 2
        error = 4 * math.sqrt(2 / values * (weights**2).mean().item())  # of a mean of squared normals
        assert losses[f"validation/sigma_{name}"] == pytest.approx(weights.mean().item(), abs=error)
    edges = [0.02, 0.2, 1.0, 5.0, 50.0]
    assert all(low <= s <= high for sigma, low, high in zip(levels, edges[:-1], edges[1:], strict=True) for s in sigma)
    ratios = [levels[0].max() / levels[0].min(), levels[3].max() / levels[3].min()]
    assert all(ratio > 6 for ratio in ratios), "the range is filled"


def test_a_denoiser_that_knows_the_variance_alone_scores_one(cache, monkeypatch):
    model = make(cache, EDMConfig(noise_shift=1))
    # White latents of variance 1, for which x / (1 + sigma^2) is the best estimate and its weighted error is 1.
    white = torch.Generator().manual_seed(5)
    monkeypatch.setattr(model.whitening, "forward", lambda raw: torch.randn(raw.shape, generator=white))
    monkeypatch.setattr(model, "denoise", lambda x, sigma, labels=None: x / (1 + expand_like(sigma, x) ** 2))
    losses = measure(cache, model)
    assert all(loss == pytest.approx(1, abs=4 * math.sqrt(2 / (96 * COUNT))) for loss in losses.values())


def test_the_measure_is_the_same_for_every_batch_size_objective_and_split(cache):
    flow, edm = make(cache, FlowConfig(noise_shift=1)), make(cache, EDMConfig(noise_shift=1))
    whole = measure(cache, edm)
    for name, value in measure(cache, edm, batch_size=5).items():
        assert value == pytest.approx(whole[name], rel=1e-5)
    parts = [measure(cache, edm, rank=rank, world_size=2) for rank in range(2)]
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-5)
    assert measure(cache, flow)["validation/sigma_0-0.2"] != pytest.approx(whole["validation/sigma_0-0.2"], rel=1e-3)


def test_sums_by_sigma():
    sigma = torch.tensor([0.1, 0.3, 0.5, 4.0, 7.0, 80.0])
    sums, counts = sums_by_sigma(torch.tensor([1.0, 2, 4, 8, 16, 32]), sigma)
    assert sums.tolist() == [1, 6, 8, 48]
    assert counts.tolist() == [1, 2, 1, 2]
