"""Sizes and costs of configurations and runs, against published counts and a count by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wavelatent.common.config import load_config
from wavelatent.common.errors import UsageError
from wavelatent.common.nn import SelfAttention
from wavelatent.pipelines.info import info, is_diffusion_config
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder


def test_the_papers_autoencoder() -> None:
    found = info("litevae-b")
    assert found["parameters"]["encoder"] == pytest.approx(6.75e6, rel=1e-3)
    assert found["parameters"]["decoder"] == 49_490_179
    assert found["parameters"]["total"] == found["parameters"]["encoder"] + 49_490_179
    assert found["parameters"]["discriminator"] > 0
    assert (found["size"], found["latent_shape"]) == (256, [4, 32, 32])


def test_the_kl_autoencoder_costs_more_to_encode() -> None:
    found = info("kl-f8", size=128)
    assert (found["parameters"]["encoder"], found["parameters"]["decoder"]) == (34_163_592, 49_490_179)
    assert found["latent_shape"] == [4, 16, 16]
    assert found["flops"]["encode"] > 3 * info("litevae-b", size=128)["flops"]["encode"]


def test_a_denoiser() -> None:
    found = info("unet-tiny")
    assert (found["kind"], found["latent_shape"]) == ("diffusion", [4, 16, 16])
    assert found["parameters"]["denoiser"] == pytest.approx(5e6, rel=0.02)
    wide = info("unet-tiny", latent_shape=[16, 16, 16])
    # Twelve more channels through the 3x3 convolutions at either end.
    assert wide["flops"]["denoise"] - found["flops"]["denoise"] == 2 * 2 * 12 * 64 * 9 * 16 * 16
    assert info("unet-s")["latent_shape"] == [4, 32, 32]


def test_operations_are_those_of_every_layer() -> None:
    """The count equals one by hand: 2 per multiply-add of convolutions and of attention's two products."""
    config = load_config(AutoencoderRunConfig, "ae-tiny")
    model, size, counted = Autoencoder(config.model).eval(), 32, []

    def count_convolution(layer: nn.Conv2d, _: tuple[Tensor, ...], out: Tensor) -> None:
        counted.append(2 * layer.weight.numel() * out.shape[-2] * out.shape[-1])

    def count_attention(layer: SelfAttention, _: tuple[Tensor, ...], out: Tensor) -> None:
        sites = out.shape[-2] * out.shape[-1]
        counted.append(2 * 2 * sites * sites * out.shape[1])

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count_convolution)
        elif isinstance(layer, SelfAttention):
            layer.register_forward_hook(count_attention)
    with torch.no_grad():
        latents = model.encode(torch.zeros(1, 3, size, size)).mode()
        encode = sum(counted)
        model.decode(latents)
    assert info("ae-tiny", size=size)["flops"] == {"encode": encode, "decode": sum(counted) - encode}


def test_overrides_and_files(tmp_path: Path) -> None:
    assert info("ae-tiny", overrides=["model.channels=16"], size=64)["latent_shape"] == [16, 16, 16]
    (tmp_path / "mine.yaml").write_text("model: {channels: 32, multipliers: [1], head_channels: 8}\n")
    assert is_diffusion_config(str(tmp_path / "mine.yaml"))
    assert not is_diffusion_config("kl-f8")


def test_a_run_has_its_own_size_and_shape(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {channels: 3}\n")
    (tmp_path / "inputs.json").write_text(json.dumps({"data": {"transform": {"size": 64}}}))
    assert info(str(tmp_path))["latent_shape"] == [3, 8, 8]
    (tmp_path / "config.yaml").write_text(
        "model: {kind: unet, channels: 32, head_channels: 16}\nclass_conditional: true\n"
    )
    (tmp_path / "inputs.json").write_text(json.dumps({"latents": {"shape": [5, 8, 4]}, "data": {"num_classes": 6}}))
    found = info(str(tmp_path))
    assert found["latent_shape"] == [5, 8, 4]
    (tmp_path / "inputs.json").write_text(json.dumps({"latents": {"shape": [5, 8, 4]}, "data": {}}))
    assert found["parameters"]["denoiser"] - info(str(tmp_path))["parameters"]["denoiser"] == 7 * 4 * 32


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("kl-f9", {}, "kl-f8"),
        ("kl-f8", {"size": 100}, "do not divide"),
        ("kl-f8", {"latent_shape": [4, 8, 8]}, "follows from the image size"),
        ("unet-s", {"size": 64}, "not an image size"),
        ("unet-s", {"latent_shape": [4, 5, 8]}, "halved"),
        (".", {}, "not a run folder"),
    ],
)
def test_what_does_not_fit_is_refused(source: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        info(source, **options)  # type: ignore[arg-type]
