"""What every option of stage two must keep, over its tiny presets, of which each option has one."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from tiny_cache import C, H, W, write_cache
from torch import Tensor, nn

from wavelatent.common.checkpoints import latest_checkpoint
from wavelatent.common.config import load_config, preset_names
from wavelatent.common.latent_cache import LatentCache
from wavelatent.common.randomness import generator
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.common.training import LearningRateConfig
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.diffusion_run import load_diffusion
from wavelatent.pipelines.train_diffusion import build_model, resolved, train_diffusion
from wavelatent.stage2_diffusion.generation import draw_labels, generate_latents
from wavelatent.stage2_diffusion.model import LatentDiffusion, WhiteningKind
from wavelatent.stage2_diffusion.networks import DENOISERS
from wavelatent.stage2_diffusion.noise_tables import NOISE_TABLES
from wavelatent.stage2_diffusion.objectives import OBJECTIVES
from wavelatent.stage2_diffusion.samplers import SAMPLERS
from wavelatent.stage2_diffusion.sampling import Sampling
from wavelatent.stage2_diffusion.trainer import prepare_network
from wavelatent.stage2_diffusion.weighting import WEIGHTINGS

TINY = [name for name in preset_names() if name.startswith("tiny2/")]
CONFIGS = {preset: load_config(DiffusionRunConfig, preset, []) for preset in TINY}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def tracing_is_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the network forwards and backwards as `torch.compile` does; to generate its kernels takes minutes."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))


def build(preset: str, cache: Path) -> LatentDiffusion:
    """Return the preset's model with every weight in use, also those that begin at zero, and as it is trained."""
    opened = LatentCache.open(cache)
    model = build_model(resolved(CONFIGS[preset], opened), opened)
    prepare_network(model.network, CONFIGS[preset].train)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return model


def labels_of(model: LatentDiffusion, count: int) -> Tensor | None:
    return draw_labels(range(count), model.num_classes) if model.num_classes else None


def test_every_option_has_a_tiny_preset():
    configs = CONFIGS.values()
    assert {c.model.kind for c in configs} == set(DENOISERS)
    assert {c.objective.kind for c in configs} == set(OBJECTIVES)
    assert {c.objective.weighting.kind for c in configs} == set(WEIGHTINGS)
    schedules = {c.objective.schedule for c in configs if c.objective.kind in ("eps", "v")}
    assert schedules == set(NOISE_TABLES)
    assert {c.objective.times for c in configs if c.objective.kind == "flow"} == {"logit_normal", "uniform"}
    assert {c.whitening for c in configs} == set(get_args(WhiteningKind))
    assert {c.class_conditional for c in configs} == {False, True}
    decays = {c.train.learning_rate.decay for c in configs}
    assert decays == set(get_args(LearningRateConfig.model_fields["decay"].annotation))
    for field in ("uncertainty", "gradient_checkpointing", "compile", "channels_last", "ema"):
        assert len({str(getattr(c.train, field)) for c in configs}) > 1, field


@pytest.mark.parametrize("preset", TINY)
def test_every_parameter_has_a_gradient(preset, cache):
    model = build(preset, cache).train()
    raw = torch.randn(5, C, H, W, generator=generator("raw"))
    labels = None if not model.num_classes else torch.tensor([0, 1, 2, 0, 1])  # 2 is the unconditional one
    sigma, noise = model.draw_noise(raw, generator("noise"))
    losses = model(raw, sigma, noise, labels)
    assert losses.total.shape == losses.denoising.shape == (5,)
    losses.total.mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("preset", TINY)
def test_save_and_load_are_exact_and_every_sampler_works(preset, cache, tmp_path):
    model = build(preset, cache).eval()
    model.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path).eval()
    prepare_network(loaded.network, CONFIGS[preset].train)  # another memory layout differs by rounding
    x = torch.randn(3, C, H, W, generator=generator("x"))
    sigma, labels = torch.tensor([0.05, 0.6, 12.0]), labels_of(model, 3)
    assert torch.equal(loaded.denoise(x, sigma, labels), model.denoise(x, sigma, labels))
    for sampler in SAMPLERS:
        raw = generate_latents(loaded, range(3), labels=labels, sampling=Sampling(sampler, steps=3))
        assert raw.shape == (3, C, H, W)
        assert raw.isfinite().all(), sampler


@pytest.mark.parametrize("preset", TINY)
def test_a_run_changes_the_weights_and_a_resumed_one_is_the_same_to_the_bit(preset, cache, tmp_path):
    """Four steps at once, or the last two from the checkpoint of the first two."""
    options, run = RuntimeOptions(device="cpu", mixed_precision="bf16"), shortened(preset)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_diffusion(run, latents=cache, out=whole, options=options)
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("checkpoint-4", "model"))
    assert train_diffusion(run, latents=cache, out=parts, options=options)
    first, second = state(whole), state(parts)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    trained = load_diffusion(whole).state_dict()
    start = build_model(resolved(CONFIGS[preset], LatentCache.open(cache)), LatentCache.open(cache)).state_dict()
    assert any(not torch.equal(start[name], trained[name]) for name in start)


@pytest.mark.parametrize("preset", TINY)
def test_the_loss_of_one_batch_falls(preset, cache):
    torch.manual_seed(0)
    opened = LatentCache.open(cache)
    model = build_model(resolved(CONFIGS[preset], opened), opened).train()
    prepare_network(model.network, CONFIGS[preset].train)
    posterior = opened.read(range(5)).posterior
    labels = labels_of(model, 5)
    sigma, noise = model.draw_noise(posterior.mean, generator("noise"))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(posterior.mean, sigma, noise, labels).denoising.mean()
        losses.append(loss.item())
        loss.backward()
        adam.step()
        adam.zero_grad()
        model.after_step()
    assert losses[-1] < 0.9 * losses[0]


def shortened(preset: str) -> DiffusionRunConfig:
    config = CONFIGS[preset]
    short = {"steps": 4, "batch_size": 4, "log_every": 2, "checkpoint_every": 2, "sample_every": 0}
    return config.model_copy(update={"train": config.train.model_copy(update=short)})


def state(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint's modules."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return {f"{p.stem}/{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}
