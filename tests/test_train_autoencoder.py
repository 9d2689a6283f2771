"""Starting stage one from another autoencoder, and what its configuration refuses before anything is read."""

import json
import shutil

import pytest
import torch
from tiny_diffusers import MODELS

from wavelatent.common.config import load_config
from wavelatent.common.errors import UsageError
from wavelatent.common.images import open_data
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines import train_autoencoder as train_autoencoder_module
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.train_autoencoder import train_autoencoder
from wavelatent.stage1_autoencoder.diffusers_source import import_diffusers

CPU = RuntimeOptions(device="cpu")
STEP = ["train.batch_size=2", "train.sample_every=0", "objective.lpips.weight=0"]


def config(preset: str, *overrides: str) -> AutoencoderRunConfig:
    return load_config(AutoencoderRunConfig, preset, [*STEP, *overrides])


@pytest.fixture(scope="module")
def data():
    return open_data("synthetic:4", size=32)


def test_a_run_starts_from_another_and_resumes_without_going_back_to_it(tmp_path, data):
    train_autoencoder(config("ae-tiny", "train.steps=1", "seed=3"), data=data, out=tmp_path / "first", options=CPU)
    frozen = ["train.learning_rate.peak=1e-30", f"init={tmp_path / 'first'}"]
    train_autoencoder(config("ae-tiny", *frozen, "train.steps=1"), data=data, out=tmp_path / "second", options=CPU)
    first, second = (load_autoencoder(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "fingerprint" in json.loads((tmp_path / "second/inputs.json").read_text())["init"]
    moving = [f"init={tmp_path / 'first'}", "train.steps="]
    for out, stops in (("whole", [2]), ("parts", [1, 2])):
        for steps in stops:
            run = config("ae-tiny", moving[0], f"{moving[1]}{steps}")
            train_autoencoder(run, data=data, out=tmp_path / out, options=CPU)
    whole, parts = (load_autoencoder(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    shutil.rmtree(tmp_path / "first")  # what goes on, or is done, has no need of it
    longer = config("ae-tiny", moving[0], f"{moving[1]}3")
    assert train_autoencoder(longer, data=data, out=tmp_path / "whole", options=CPU)
    assert not train_autoencoder(longer, data=data, out=tmp_path / "whole", options=CPU)
    with pytest.raises(UsageError, match="first"):
        train_autoencoder(longer, data=data, out=tmp_path / "new", options=CPU)


def test_our_kl_autoencoder_starts_from_diffusers(tmp_path, data):
    """The weights of the layout that is theirs are in ours before the first step: the very small rate leaves them."""
    torch.manual_seed(0)
    settings = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    settings |= {"block_out_channels": [128, 256], "layers_per_block": 1, "latent_channels": 4}
    model = import_diffusers().AutoencoderKL(**settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    run = config(
        "kl-f8", "train.steps=1", "train.num_workers=0", "train.learning_rate.peak=1e-30", "objective.adversarial=null",
        "model.encoder.multipliers=[1,2]", "model.encoder.num_res_blocks=1", "model.encoder.quant_conv=true",
        "model.decoder.num_res_blocks=1", "model.decoder.post_quant_conv=true", f"init=diffusers:{tmp_path / 'theirs'}",
    )  # fmt: skip
    train_autoencoder(run, data=data, out=tmp_path / "run", options=CPU)
    images = torch.rand(2, 3, 8, 16) * 2 - 1
    with torch.no_grad():
        mean = load_autoencoder(tmp_path / "run").encode(images).mean
        torch.testing.assert_close(mean, model.encode(images).latent_dist.mean, rtol=0, atol=1e-5)


def test_out_of_memory_is_not_put_down_to_the_size_of_the_images(tmp_path, data, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_autoencoder_module, "AutoencoderTrainer", full)
    with pytest.raises(torch.OutOfMemoryError):
        train_autoencoder(config("ae-tiny"), data=data, out=tmp_path / "run", options=CPU)


def test_a_start_of_another_architecture_is_refused_by_name(tmp_path, data):
    train_autoencoder(config("ae-tiny", "train.steps=1"), data=data, out=tmp_path / "first", options=CPU)
    other = config("ae-tiny", f"init={tmp_path / 'first'}", "model.channels=7", "train.steps=1")
    with pytest.raises(UsageError, match=r"is not of this model's architecture: .* differ, .* among them"):
        train_autoencoder(other, data=data, out=tmp_path / "second", options=CPU)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.adversarial={}", "objective.adversarial.start=1.5"], r"objective\.adversarial\.start: .*got 1\.5"),
        (["objective.adversarial={}", "objective.adversarial.start=1.0"], r"objective\.adversarial\.start: .*got 1\.0"),
        (["train.phases=[{losses: [l1, lpisp]}]", "objective.lpips.weight=1"], "'lpisp' .* did you mean 'lpips'"),
        (["train.phases=[{losses: [adversarial]}]", "objective.adversarial={}"], "has no reconstruction loss"),
        (["model.perturbations=[{kind: prefix_mask, min_channels: 9}]"], r"model: prefix_mask keeps at least 9"),
    ],
)
def test_what_cannot_be_is_said_when_the_configuration_is_read(overrides, message):
    with pytest.raises(UsageError, match=message) as refused:
        config("ae-tiny", *overrides)
    assert "constrained" not in str(refused.value)  # no names of types
    assert len(str(refused.value)) < 400  # and no whole sections


def test_both_halves_are_normalised_or_neither():
    name, settings = MODELS["kl shifted"]
    half = {"kind": "pretrained", "architecture": {"_class_name": name, **settings}}
    model = {"channels": 5, "encoder": half | {"normalise": True}, "decoder": half}
    with pytest.raises(ValueError, match="normalise of both"):
        AutoencoderRunConfig.model_validate({"model": model})


def test_steps_are_the_sum_of_the_phases_where_they_are_not_given():
    phases = [{"steps": 3}, {"steps": 4}]
    assert AutoencoderRunConfig.model_validate({"train": {"phases": phases}}).train.steps == 7
    assert AutoencoderRunConfig.model_validate({"train": {"phases": phases, "steps": 5}}).train.steps == 5
    assert AutoencoderRunConfig.model_validate({"train": {"phases": [{"steps": 3}, {}]}}).train.steps == 100_000
