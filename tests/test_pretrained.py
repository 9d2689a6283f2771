"""Pretrained halves against diffusers' own encode and decode."""

import copy
import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_diffusers import GAUSSIAN, MODELS, diffusers_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.latents import Posterior
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.diffusers_source import WEIGHTS, load_diffusers_model, read_architecture
from wavelatent.stage1_autoencoder.pretrained import PretrainedDecoder, PretrainedEncoder, resolve_pretrained

DOWNSAMPLING = {"tiny": 4}
CHANNELS = {"dc": 4, "vq": 3}


def config(source: object, name: str = "kl", **changes: object) -> AutoencoderConfig:
    half = {"kind": "pretrained", "source": str(source), **changes}
    bottleneck = {"kind": "kl" if name in GAUSSIAN else "plain"}
    channels = CHANNELS.get(name, 5)
    return AutoencoderConfig.model_validate(
        {"encoder": half, "decoder": half, "channels": channels, "bottleneck": bottleneck}
    )


def build(source: object, name: str = "kl", **changes: object) -> Autoencoder:
    autoencoder = Autoencoder(resolve_pretrained(config(source, name, **changes)))
    autoencoder.load_source_weights()
    return autoencoder


def images() -> Tensor:
    return torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(name: str = "kl") -> Tensor:
    factor = DOWNSAMPLING.get(name, 2)
    return torch.randn(2, CHANNELS.get(name, 5), 24 // factor, 32 // factor, generator=torch.Generator().manual_seed(2))


def encoded(model, name: str) -> Posterior:
    """What diffusers' public ``encode`` says."""
    output = model.encode(images())
    if name in GAUSSIAN:
        return Posterior(output.latent_dist.mean, output.latent_dist.std)
    return Posterior(output.latent if name == "dc" else output.latents)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    diffusers_model("kl").save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.mark.parametrize("name", MODELS)
def test_encode_and_decode_are_those_of_diffusers(name, tmp_path):
    model = diffusers_model(name)
    model.save_pretrained(tmp_path / "model")
    autoencoder = build(tmp_path / "model", name).eval()
    assert autoencoder.downsampling == DOWNSAMPLING.get(name, 2)
    mine, theirs = autoencoder.encode(images()), encoded(model, name)
    torch.testing.assert_close(mine.mean, theirs.mean, rtol=0, atol=1e-5)
    if name in GAUSSIAN:
        torch.testing.assert_close(mine.std, theirs.std, rtol=0, atol=1e-5)
    else:
        assert mine.deterministic
    decoded = autoencoder.decode(latents(name))
    assert decoded.shape == (2, 3, 24, 32)
    torch.testing.assert_close(decoded, model.decode(latents(name)).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shift", "scale"),
    [
        ("kl", 0.0, 0.18215),
        ("kl shifted", 0.2, 0.7),
        ("kl per channel", [0.1, -0.2, 0.3, 0.0, 1.0], [0.5 / s for s in (1.5, 0.5, 2.0, 1.0, 3.0)]),
        ("dc", 0.0, 0.4),
        ("tiny", 0.0, 1.0),
    ],
)
def test_the_models_own_normalisation_is_applied_and_taken_back(name, shift, scale, tmp_path):
    """``(z - shift) * scale`` of a draw has the mean and the deviation of the normalised posterior."""
    model = diffusers_model(name)
    model.save_pretrained(tmp_path / "model")
    autoencoder = build(tmp_path / "model", name, normalise=True).eval()
    shift, scale = (torch.as_tensor(value).reshape(1, -1, 1, 1) for value in (shift, scale))
    mine, theirs = autoencoder.encode(images()), encoded(model, name)
    torch.testing.assert_close(mine.mean, (theirs.mean - shift) * scale)
    if theirs.std is not None:
        torch.testing.assert_close(mine.std, theirs.std * scale)
    torch.testing.assert_close(autoencoder.decode(latents(name)), model.decode(latents(name) / scale + shift).sample)


def test_a_model_without_a_scaling_factor_is_not_normalised(tmp_path):
    diffusers_model("kl flux 2").save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="states no scaling factor: set normalise=false"):
        build(tmp_path / "model", "kl flux 2", normalise=True)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_weight_of_a_trainable_half(name, tmp_path):
    diffusers_model(name).save_pretrained(tmp_path / "model")
    autoencoder = build(tmp_path / "model", name, trainable=True).train()
    output = autoencoder(images())
    (output.images.square().mean() + output.raw.square().mean()).backward()
    trained = {n: p for n, p in autoencoder.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    frozen = {n for n, p in autoencoder.named_parameters() if not p.requires_grad}
    assert frozen == ({"decoder.model.quantize.embedding.weight"} if name == "vq" else set())
    last = autoencoder.decoder.last_layer
    assert last.grad.abs().sum() > 0
    assert last is list(autoencoder.decoder.model.decoder.parameters())[-2]  # the weight before its bias


def test_a_frozen_half_stays_in_eval_and_an_encoder_builds_no_graph(folder):
    autoencoder = build(folder).train()
    assert autoencoder.training
    assert not any(module.training for half in (autoencoder.encoder, autoencoder.decoder) for module in half.modules())
    assert not any(p.requires_grad for p in autoencoder.parameters())
    assert not autoencoder.encoder(images()).requires_grad
    free = latents().requires_grad_()
    autoencoder.decode(free).sum().backward()  # the gradient passes through a frozen decoder to the latents
    assert free.grad is not None
    with pytest.raises(UsageError, match=r"frozen here: set model\.decoder\.trainable=true"):
        _ = autoencoder.decoder.last_layer
    trainable = build(folder, trainable=True).train()
    assert all(module.training for module in trainable.modules())
    assert trainable.encoder(images()).requires_grad
    assert not any(module.training for module in trainable.eval().modules())


def test_a_saved_model_loads_without_its_source(folder, tmp_path):
    autoencoder = build(folder).eval()
    expected = autoencoder(images()).images
    autoencoder.save_pretrained(tmp_path / "ours")
    (folder / "config.json").unlink()
    loaded = Autoencoder.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(loaded(images()).images, expected)
    assert resolve_pretrained(loaded.config) == loaded.config


def test_a_copy_is_independent(folder):
    autoencoder = build(folder, trainable=True)
    twin = copy.deepcopy(autoencoder)
    with torch.no_grad():
        twin.decoder.last_layer.zero_()
    assert not torch.equal(twin.decode(latents()), autoencoder.decode(latents()))


def test_half_a_model_can_be_sized_without_data(folder):
    """As ``info`` does: nothing in building or running one may look at a value."""
    with FakeTensorMode():
        autoencoder = Autoencoder(resolve_pretrained(config(folder, normalise=True)))
        assert autoencoder(torch.zeros(2, 3, 24, 32)).images.shape == (2, 3, 24, 32)


def test_an_architecture_alone_is_random_and_deterministic_in_the_seed():
    architecture = {"_class_name": "AutoencoderKL", **MODELS["kl"][1]}
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        half = {"kind": "pretrained", "architecture": architecture}
        built.append(Autoencoder(AutoencoderConfig(encoder=half, decoder=half, channels=5)))
        built[-1].load_source_weights()  # there is no source: nothing to do
    assert built[0].fingerprint() == built[1].fingerprint() != built[2].fingerprint()


def test_what_does_not_fit_is_refused_with_both_numbers(folder):
    halves = resolve_pretrained(config(folder))
    with pytest.raises(UsageError, match="gives 10 feature channels, the bottleneck takes 8: set channels=5"):
        Autoencoder(halves.model_copy(update={"channels": 4}))
    with pytest.raises(UsageError, match=r"10 feature channels, the bottleneck takes 5.*bottleneck.kind=kl"):
        PretrainedEncoder(halves.encoder, 5)
    with pytest.raises(UsageError, match="decodes 5 channels, the latents have 4: set channels=5"):
        PretrainedDecoder(halves.decoder, 4, 2)
    with pytest.raises(UsageError, match="upsamples by 2, the encoder downsamples by 8"):
        PretrainedDecoder(halves.decoder, 5, 8)
    with pytest.raises(ValueError, match="divisible"):
        Autoencoder(halves).encode(images()[..., :31])
    with pytest.raises(UsageError, match="call resolve_pretrained"):
        Autoencoder(config(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_chanels": 4}, "no setting latent_chanels"),
        ({"in_channels": 4}, "in_channels is 4, images have 3"),
        ({"norm_num_groups": 5}, "cannot be built from its architecture"),
    ],
)
def test_a_wrong_architecture_is_refused(changes, message):
    half = {"kind": "pretrained", "architecture": {"_class_name": "AutoencoderKL", **MODELS["kl"][1], **changes}}
    with pytest.raises(UsageError, match=message):
        Autoencoder(AutoencoderConfig.model_validate({"encoder": half, "decoder": half, "channels": 5}))


@pytest.mark.parametrize(
    "half", [{}, {"architecture": {"_class_name": "AutoencoderKLWan"}}, {"architecture": {"latent_channels": 4}}]
)
def test_a_half_without_a_source_or_of_another_class_is_no_configuration(half):
    with pytest.raises(ValidationError, match=r"needs a source|_class_name must be one of AutoencoderKL, "):
        AutoencoderConfig.model_validate({"encoder": {"kind": "pretrained", **half}})


def test_weights_that_do_not_belong_are_refused_and_never_drawn_at_random(folder):
    weights = load_file(folder / f"{WEIGHTS}.safetensors")
    left_out = dict(list(weights.items())[1:])
    save_file(left_out, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    with pytest.raises(WavelatentError, match=f"1 weights do not belong.*{next(iter(weights))}"):
        load_diffusers_model(str(folder))
    (folder / f"{WEIGHTS}.safetensors").write_bytes(b"broken")
    with pytest.raises(WavelatentError, match="cannot be loaded"):
        load_diffusers_model(str(folder))


def test_weights_of_another_architecture_than_the_recorded_one_are_refused(folder):
    resolved = resolve_pretrained(config(folder))
    diffusers_model("tiny").save_pretrained(folder)
    with pytest.raises(WavelatentError, match=r"kl is not of the recorded architecture"):
        Autoencoder(resolved).load_source_weights()


def test_attention_under_its_old_names_is_read(folder):
    """Weights from before diffusers renamed attention, as on the hub still."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / f"{WEIGHTS}.safetensors")
    expected = load_diffusers_model(str(folder)).state_dict()
    renamed = {}
    for key, value in weights.items():
        for new, was in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        renamed[key] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    loaded = load_diffusers_model(str(folder)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_half_precision_files_are_read_as_float32(folder):
    diffusers_model("kl").half().save_pretrained(folder)
    assert {value.dtype for value in load_diffusers_model(str(folder)).state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("source", ["missing", "name/repository/../x", "/nowhere/at/all"])
def test_a_source_that_is_nothing_is_refused(source):
    with pytest.raises(UsageError, match="no such folder, and no hub id"):
        read_architecture(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has no config.json"),
        ("not json", "cannot be read"),
        ("[]", "not that of a diffusers autoencoder"),
        ("{}", "it names no class"),
        (json.dumps({"_class_name": "UNet2DModel"}), "'UNet2DModel' cannot be taken.*AutoencoderTiny"),
        (json.dumps({"_class_name": "AutoencoderKLWan"}), "'AutoencoderKLWan' cannot be taken.*no video"),
    ],
)
def test_a_folder_of_something_else_is_refused_by_name(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_architecture(str(tmp_path))


def test_a_pipeline_is_pointed_to_its_autoencoder(folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    diffusers_model("kl").save_pretrained(pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match=f"give {pipeline}/vae"):
        read_architecture(str(pipeline))
    assert read_architecture(f"{pipeline}/vae") == read_architecture(str(folder))


def test_a_hub_id_with_a_subfolder_is_fetched_from_there(tmp_path, monkeypatch):
    asked = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    diffusers_model("kl").save_pretrained(tmp_path / "vae")
    load_diffusers_model("some/pipeline/vae")
    assert asked[0] == ("some/pipeline", ["vae/config.json"])
    assert "vae/diffusion_pytorch_model.safetensors" in asked[-1][1]
    assert not any("*" in pattern.replace(f"{WEIGHTS}-*", "") for pattern in asked[-1][1])  # no variants, no pickles


def test_the_hubs_failures_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WavelatentError, match="the hub cannot be reached") as offline:
        read_architecture("some/never-fetched")
    assert offline.value.exit_code == 1
    assert "\n" not in str(offline.value)

    def missing(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(UsageError, match="no such repository on the hub"):
        read_architecture("some/never-fetched")


def test_without_diffusers_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"pip install 'wavelatent\[diffusers\]'"):
        read_architecture(str(folder))
