"""What every option of stage one must keep, over the tiny presets, of which each option has one."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from wavelatent.common.config import load_config, preset_names
from wavelatent.common.images import open_data
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.train_autoencoder import train_autoencoder
from wavelatent.stage1_autoencoder.adversarial import AdversarialConfig, Adversary
from wavelatent.stage1_autoencoder.autoencoder import DECODERS, ENCODERS, Autoencoder
from wavelatent.stage1_autoencoder.bottlenecks import BOTTLENECKS
from wavelatent.stage1_autoencoder.decoder import WIDTHS
from wavelatent.stage1_autoencoder.discriminators import DISCRIMINATORS
from wavelatent.stage1_autoencoder.gan_losses import GAN_LOSSES
from wavelatent.stage1_autoencoder.litevae import LiteVAEConfig, Size
from wavelatent.stage1_autoencoder.objective import ObjectiveConfig, reconstruction_distances, weighted_total
from wavelatent.stage1_autoencoder.perturbations import PERTURBATIONS
from wavelatent.stage1_autoencoder.unet_discriminator import UNET_WIDTHS

TINY = [name for name in preset_names() if name.startswith("tiny/")]
CPU = torch.device("cpu")


def config(preset: str, *overrides: str) -> AutoencoderRunConfig:
    """Load a preset; of LiteVAE's residual blocks, all alike, one is enough."""
    loaded = load_config(AutoencoderRunConfig, preset, overrides)
    if loaded.model.encoder.kind != "litevae":
        return loaded
    return load_config(AutoencoderRunConfig, preset, [*overrides, "model.encoder.num_res_blocks=1"])


CONFIGS = {preset: config(preset) for preset in TINY}


def images(height: int = 40, width: int = 48) -> Tensor:
    """Smooth noise ``[2, 3, height, width]`` in [-1, 1]."""
    small = torch.rand(2, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small * 2 - 1, size=(height, width), mode="bilinear")


def build(preset: str) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(CONFIGS[preset].model)


def size_of(preset: str) -> tuple[int, int]:
    """An image size that divides by the downsampling, with other height than width."""
    return (64, 96) if CONFIGS[preset].model.encoder.downsampling > 8 else (40, 48)


def test_every_option_has_a_tiny_preset():
    models = [c.model for c in CONFIGS.values()]
    games = [g for c in CONFIGS.values() if (g := c.objective.adversarial) is not None]
    assert {m.encoder.kind for m in models} == set(ENCODERS)
    assert {m.decoder.kind for m in models} == set(DECODERS)
    assert {m.bottleneck.kind for m in models} == set(BOTTLENECKS)
    assert {p.kind for m in models for p in m.perturbations} == set(PERTURBATIONS)
    assert {g.discriminator.kind for g in games} == set(DISCRIMINATORS)
    assert {g.loss for g in games} == set(GAN_LOSSES)
    everything = ObjectiveConfig(**{name: {"weight": 1} for name in ("charbonnier", "high_pass", "low_pass")})
    losses = {name for c in CONFIGS.values() for name in c.objective.reconstruction_weights}
    assert losses >= {"l2", "vgg_features", *everything.reconstruction_weights}
    litevae = [m.encoder for m in models if isinstance(m.encoder, LiteVAEConfig)]
    assert {e.levels for e in litevae} == {1, 2, 3}
    assert {m.encoder.downsampling for m in models} >= {2, 4, 8, 32}
    pretrained = {m.encoder.class_name for m in models if m.encoder.kind == "pretrained"}
    assert pretrained == {"AutoencoderKL", "AutoencoderDC", "AutoencoderTiny"}  # the others: test_pretrained.py
    assert any(p.schedule.factor(0.9) != 1 for m in models for p in m.perturbations)
    assert {e.shared_extraction for e in litevae} == {False, True}
    assert {e.wavelet for e in litevae} > {"haar"}
    conv = [m.decoder for m in models if m.decoder.kind == "conv"]
    for field in ("norm", "output", "attention", "post_quant_conv"):
        assert len({getattr(d, field) for d in conv}) == 2, field
    for field in ("adaptive", "lecam", "r1_weight", "r2_weight", "augment", "pause", "warmup", "ramp"):
        default = AdversarialConfig.model_fields[field].default
        assert any(getattr(g, field) != default for g in games), field
    assert any(c.train.phases for c in CONFIGS.values())
    assert {m.channels for m in models} >= {4, 64}


@pytest.mark.parametrize("preset", TINY)
def test_shapes_and_gradients(preset):
    """Every parameter that is trained has a gradient from the preset's own objective, and so has the discriminator."""
    autoencoder = build(preset).train()
    target = images(*size_of(preset))
    torch.manual_seed(1)
    output = autoencoder(target)
    f, channels = autoencoder.downsampling, autoencoder.latent_channels
    assert output.raw.shape == (2, channels, target.shape[2] // f, target.shape[3] // f)
    assert output.images.shape == output.target.shape
    posterior = autoencoder.eval().encode(target)
    assert posterior.mean.shape == output.raw.shape
    assert autoencoder.decode(posterior.mode()).shape == target.shape
    autoencoder.train()
    objective = CONFIGS[preset].objective
    distances = reconstruction_distances(objective, CPU)
    terms = {name: distance(output.images, output.target).mean() for name, distance in distances.items()}
    assert all(term.ndim == 0 for term in (*terms.values(), *output.penalties.values(), *output.metrics.values()))
    weights = objective.reconstruction_weights | CONFIGS[preset].model.bottleneck.penalty_weights
    weighted_total(terms | output.penalties, weights).backward()
    trained = {n: p for n, p in autoencoder.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    if objective.adversarial is not None:
        adversary = Adversary(objective.adversarial)
        judged = adversary.discriminator_terms(adversary.network, output.target, output.images.detach(), 0)
        weighted_total(judged.terms, judged.weights).backward()
        without = [n for n, p in adversary.network.named_parameters() if p.grad is None]
        assert without == []


@pytest.mark.parametrize("preset", TINY)
def test_save_and_load_are_exact(preset, tmp_path):
    autoencoder = build(preset).eval()
    autoencoder.save_pretrained(tmp_path / "model")
    loaded = load_autoencoder(tmp_path / "model")
    assert loaded.config == autoencoder.config
    assert loaded.fingerprint() == autoencoder.fingerprint()
    with torch.no_grad():
        assert torch.equal(loaded(images(*size_of(preset))).images, autoencoder(images(*size_of(preset))).images)


@pytest.mark.parametrize("preset", TINY)
def test_one_batch_can_be_learned_under_bf16_autocast(preset):
    """A single small step lowers the preset's own loss on one batch under the same noise; larger ones lower it more."""
    autoencoder = build(preset).train()
    objective = CONFIGS[preset].objective
    distances = reconstruction_distances(objective, CPU)
    weights = objective.reconstruction_weights | CONFIGS[preset].model.bottleneck.penalty_weights
    optimizer = torch.optim.Adam([p for p in autoencoder.parameters() if p.requires_grad])
    losses = []
    for rate in (1e-4, *[2e-3] * 6):
        optimizer.param_groups[0]["lr"] = rate
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = autoencoder(images(*size_of(preset)))
        assert output.raw.dtype == torch.float32
        terms = {n: d(output.images, output.target).mean() for n, d in distances.items()} | output.penalties
        loss = weighted_total(terms, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.97 * losses[0]


@pytest.fixture(scope="module")
def data():
    """Eight faces of each size, painted once."""
    faces = {size: open_data("synthetic:8", size=size) for size in (32, 64)}
    for each in faces.values():
        each.image = cache(each.image)
    return faces


SETTINGS = (
    "train.steps=2", "train.checkpoint_every=1", "train.batch_size=2", "train.sample_every=0", "train.log_every=1",
    "train.learning_rate={peak: 1e-3}",
)  # fmt: skip


def assert_resumes(run: AutoencoderRunConfig, faces, folder: Path, options: RuntimeOptions) -> dict[str, Tensor]:
    """Two steps at once, or the second from the checkpoint of the first: the same weights and log. Return the weights.

    What is resumed is the run as it lies there when it ends between its second step's log and its checkpoint.
    """
    whole, parts = folder / "whole", folder / "parts"
    assert train_autoencoder(run, data=faces, out=whole, options=options)
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("checkpoint-2", "model"))
    assert train_autoencoder(run, data=faces, out=parts, options=options)
    one, other = (load_autoencoder(out).state_dict() for out in (whole, parts))
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []
    logs = [(out / "metrics.jsonl").read_text().splitlines() for out in (whole, parts)]
    logged, resumed = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert len(logged) == 2
    assert logged == resumed
    return one


@pytest.mark.parametrize("preset", TINY)
def test_a_resumed_run_is_the_same_run(preset, tmp_path, data):
    """In bfloat16."""
    faces = data[64 if CONFIGS[preset].model.encoder.downsampling > 8 else 32]
    options = RuntimeOptions(device="cpu", mixed_precision="bf16")
    trained = assert_resumes(config(preset, *SETTINGS), faces, tmp_path, options)
    untrained = build(preset).state_dict()
    assert any(not torch.equal(untrained[name], value) for name, value in trained.items())


@pytest.mark.parametrize(
    "size",
    [
        *(f"model.encoder.size={size}" for size in get_args(Size)),
        *(f"model.decoder.width={width}" for width in WIDTHS),
        *(
            f"objective.adversarial={{start: 0, discriminator: {{kind: unet, width: {width}, levels: 2}}}}"
            for width in UNET_WIDTHS
        ),
    ],
)
def test_every_size_trains_saves_loads_and_resumes(size, tmp_path, data):
    run = config("ae-tiny", "model.encoder.levels=1", "objective.lpips.weight=0", size, *SETTINGS)
    assert_resumes(run, data[32], tmp_path, RuntimeOptions(device="cpu"))
