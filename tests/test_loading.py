"""AE as it is named on the command line: our runs and models, and diffusers autoencoders through every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_diffusers import GAUSSIAN, MODELS, diffusers_model
from torch import Tensor

from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.images import open_data
from wavelatent.common.latent_cache import LatentCache
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines import evaluate
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.encode import encode
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.sample import sample
from wavelatent.pipelines.sample_images import SampleOptions
from wavelatent.pipelines.train_autoencoder import train_autoencoder
from wavelatent.pipelines.train_diffusion import train_diffusion
from wavelatent.stage1_autoencoder.pretrained import PretrainedEncoderConfig
from wavelatent.stage2_diffusion.sampling import Sampling

CPU = RuntimeOptions(device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    diffusers_model("kl shifted").save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.mark.parametrize("name", MODELS)
def test_a_diffusers_autoencoder_is_loaded_as_ours(name, tmp_path):
    diffusers_model(name).save_pretrained(tmp_path / "model")
    autoencoder = load_autoencoder(f"diffusers:{tmp_path / 'model'}")
    assert not autoencoder.training
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert autoencoder.latent_shape(16) == (autoencoder.latent_channels, *[16 // autoencoder.downsampling] * 2)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert autoencoder(images).images.shape == images.shape


def test_the_fingerprint_is_of_the_model_wherever_it_lies(folder, tmp_path, monkeypatch):
    fingerprint = load_autoencoder(f"diffusers:{folder}").fingerprint()
    monkeypatch.chdir(tmp_path)
    assert load_autoencoder("diffusers:kl").fingerprint() == fingerprint
    shutil.copytree(folder, tmp_path / "moved")
    assert load_autoencoder("diffusers:moved").fingerprint() == fingerprint
    diffusers_model("kl shifted", seed=1).save_pretrained(tmp_path / "other")
    assert load_autoencoder("diffusers:other").fingerprint() != fingerprint


def test_what_is_loaded_can_be_saved_as_ours(folder, tmp_path):
    autoencoder = load_autoencoder(f"diffusers:{folder}")
    autoencoder.save_pretrained(tmp_path / "ours")
    shutil.rmtree(folder)
    assert load_autoencoder(tmp_path / "ours").fingerprint() == autoencoder.fingerprint()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("diffusers:nowhere", UsageError, "nowhere: no such folder"),
        ("diffusers:", UsageError, "no such folder"),
        ("diffusers:some/never-fetched", WavelatentError, "the hub cannot be reached"),
        ("nowhere", UsageError, "no such folder"),
    ],
)
def test_an_ae_that_is_not_there_is_one_clear_line(spec, error, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=message) as raised:
        load_autoencoder(spec)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


class HalfMeans:
    """Six numbers per image in place of Inception's features: the mean of each half, per channel."""

    name = "stand-in"
    dim = 6
    weights_sha256 = "of the stand-in"

    def __init__(self, device: object = "cpu") -> None:
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, (2, 1)).flatten(1)


def test_every_command_takes_a_diffusers_autoencoder(folder, tmp_path, monkeypatch):
    """encode, train-diffusion, sample and both evaluations, and again from the folder's new place."""
    monkeypatch.setattr(evaluate, "InceptionFeatures", HalfMeans)
    monkeypatch.setattr("wavelatent.common.reference_cache.cache_folder", lambda: tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    cache, run = tmp_path / "cache", tmp_path / "run"
    encode("diffusers:kl", "synthetic:8", cache, size=16, device="cpu")
    manifest = LatentCache.open(cache).manifest
    assert manifest.shape == (5, 8, 8)
    assert manifest.posterior == "mean_std"
    assert manifest.autoencoder.path == f"diffusers:{folder}"
    assert encode("diffusers:kl", "synthetic:8", cache, size=16, device="cpu")["already_complete"]
    network = {
        "kind": "unet",
        "channels": 8,
        "multipliers": [1],
        "num_res_blocks": 1,
        "attention_levels": [],
        "head_channels": 8,
    }
    train = {"steps": 2, "batch_size": 4, "sample_every": 0}
    config = DiffusionRunConfig.model_validate({"model": network, "train": train})
    assert train_diffusion(config, latents=cache, out=run, options=CPU)
    options = {"options": SampleOptions(Sampling(steps=2), pass_rows=4), "device": "cpu"}
    assert sample(run, tmp_path / "samples", [3, 5, 7], **options)["written"] == 3
    folder.rename(tmp_path / "moved")
    with pytest.raises(WavelatentError, match="kl: no such folder"):
        sample(run, tmp_path / "again", [3], **options)
    assert not (tmp_path / "again").exists()
    assert sample(run, tmp_path / "again", [3], autoencoder="diffusers:moved", **options)["written"] == 1
    assert (tmp_path / "again" / "000003.png").read_bytes() == (tmp_path / "samples" / "000003.png").read_bytes()
    reconstruction = evaluate.evaluate_reconstruction("diffusers:moved", "synthetic:8", size=16, device="cpu")
    assert 0 < reconstruction.metrics["psnr"] < 40
    generation = evaluate.evaluate_generation(samples=tmp_path / "samples", data="synthetic:8", size=16, device="cpu")
    assert generation.to_dict()["protocol"]["num_samples"] == 3


def test_training_starts_from_the_sources_weights_and_moves_only_what_is_trainable(folder, tmp_path):
    half = {"kind": "pretrained", "source": str(folder)}
    config = AutoencoderRunConfig.model_validate(
        {
            "model": {"encoder": half, "decoder": half | {"trainable": True}, "channels": 5},
            "objective": {"lpips": {"weight": 0}},
            "train": {"steps": 2, "batch_size": 2, "sample_every": 0, "learning_rate": {"peak": 1e-3}},
        }
    )
    out = tmp_path / "run"
    train_autoencoder(config, data=open_data("synthetic:4", size=16), out=out, options=CPU)
    source, trained = load_autoencoder(f"diffusers:{folder}").state_dict(), load_autoencoder(out).state_dict()
    assert trained.keys() == source.keys()
    moved = {name: (trained[name] - source[name]).abs().max().item() for name in source}
    assert {difference for name, difference in moved.items() if name.startswith("encoder.")} == {0.0}
    decoder = [difference for name, difference in moved.items() if name.startswith("decoder.")]
    assert 0 < max(decoder) < 0.01  # two small steps from the source, not another initialisation
    assert json.loads((out / "model" / "config.json").read_text())["decoder"]["architecture"]
    shutil.rmtree(folder)
    load_autoencoder(out)  # the source is no longer needed


@pytest.mark.parametrize("name", MODELS)
def test_every_family_trains_saves_loads_and_resumes(name, tmp_path):
    """Both halves, with the model's own normalisation where it states one; two steps at once, or one and one more."""
    kind, settings = MODELS[name]
    half = {"kind": "pretrained", "architecture": {"_class_name": kind, **settings}, "trainable": True}
    half["normalise"] = "scaling_factor" in settings
    channels = PretrainedEncoderConfig.model_validate(half).latent_channels
    model = {"encoder": half, "decoder": half, "channels": channels}
    model["bottleneck"] = {"kind": "kl" if name in GAUSSIAN else "plain"}
    faces = open_data("synthetic:4", size=32)
    for out, stops in (("whole", [2]), ("parts", [1, 2])):
        for steps in stops:
            train = {"steps": steps, "batch_size": 2, "sample_every": 0}
            run = {"model": model, "objective": {"lpips": {"weight": 0}}, "train": train}
            config = AutoencoderRunConfig.model_validate(run)
            assert train_autoencoder(config, data=faces, out=tmp_path / out, options=CPU)
    one, other = (load_autoencoder(tmp_path / out).state_dict() for out in ("whole", "parts"))
    assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []
