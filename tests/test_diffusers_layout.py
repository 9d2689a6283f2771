"""Our KL autoencoder and diffusers' AutoencoderKL: one network under two layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import MODELS, diffusers_model

from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.latent_cache import LatentCache
from wavelatent.pipelines.encode import encode
from wavelatent.pipelines.export import export
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.diffusers_layout import from_diffusers, to_diffusers
from wavelatent.stage1_autoencoder.diffusers_source import import_diffusers, load_diffusers_model

IMAGES = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
ENCODER = {"kind": "kl", "width": 128, "multipliers": [1, 2], "num_res_blocks": 1}
DECODER = {"kind": "conv", "width": "full", "num_res_blocks": 1}


def kl_model(widths: tuple[int, ...] = (128, 256), **settings: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "latent_channels": 5,
        **settings,
    }
    return import_diffusers().AutoencoderKL(**options).eval().requires_grad_(False)


def ours(**changes: Any) -> Autoencoder:
    torch.manual_seed(0)
    config = {"encoder": ENCODER, "decoder": DECODER, "channels": 5} | changes
    return Autoencoder(AutoencoderConfig.model_validate(config)).eval().requires_grad_(False)


def assert_equal_outputs(autoencoder: Autoencoder, model: Any, images: torch.Tensor = IMAGES) -> None:
    mine, theirs = autoencoder.encode(images), model.encode(images).latent_dist
    torch.testing.assert_close(mine.mean, theirs.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.std, theirs.std, rtol=0, atol=1e-5)
    latents = torch.randn(mine.mean.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(autoencoder.decode(latents), model.decode(latents).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "settings"),
    [
        ((128, 256), {}),
        ((128, 256), {"layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False}),
        ((128, 256), {"mid_block_add_attention": False, "use_quant_conv": False}),
        ((128, 256, 512), {"latent_channels": 3}),
    ],
)
def test_a_diffusers_model_becomes_ours_and_comes_back_bit_for_bit(widths, settings):
    model = kl_model(widths, **settings)
    autoencoder = from_diffusers(model)
    assert not autoencoder.training
    assert_equal_outputs(autoencoder, model)
    back = to_diffusers(autoencoder)
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())
    left_behind = {"scaling_factor", "block_out_channels", "down_block_types", "up_block_types"}
    written = {k: v for k, v in back.config.items() if not k.startswith("_") and k not in left_behind}
    assert written == {key: model.config[key] for key in written}
    assert from_diffusers(back).fingerprint() == autoencoder.fingerprint()


def test_ours_becomes_a_diffusers_model_that_its_library_reads(tmp_path):
    autoencoder = ours()
    to_diffusers(autoencoder).save_pretrained(tmp_path / "model")
    assert_equal_outputs(autoencoder, import_diffusers().AutoencoderKL.from_pretrained(tmp_path / "model"))
    again = from_diffusers(tmp_path / "model")
    assert again.fingerprint() == autoencoder.fingerprint()
    assert again.requires_grad_(True).train()(IMAGES).images.requires_grad  # it can be trained on


def test_the_kl_f8_preset_has_stable_diffusions_layout():
    """The weights of Stable Diffusion's autoencoder, by name and shape, without drawing them."""
    with torch.device("meta"):
        widths = (128, 256, 512, 512)
        model = kl_model(widths, latent_channels=4, layers_per_block=2)
        autoencoder = from_diffusers(model)
        assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
        shapes = {key: value.shape for key, value in to_diffusers(autoencoder).state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: diffusers_model("tiny"), "AutoencoderTiny has no counterpart"),
        (lambda: diffusers_model("kl"), "group normalisation of 8 channels has 2 groups in ours and 4"),
        (lambda: kl_model((128, 128)), r"block_out_channels=\[128, 128\] has no counterpart"),
        (lambda: kl_model(norm_num_groups=16), "128 channels has 32 groups in ours and 16"),
        (lambda: kl_model(act_fn="relu"), "act_fn=relu has no counterpart"),
        (
            lambda: kl_model(down_block_types=["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
            r"down_block_types=\['AttnDownEncoderBlock2D'",
        ),
    ],
)
def test_models_that_ours_cannot_be_are_refused_by_name(model, message):
    with pytest.raises(UsageError, match=message):
        from_diffusers(model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"kind": "litevae", "levels": 1, "num_res_blocks": 1}}, "encoder.kind=litevae"),
        ({"encoder": ENCODER | {"width": 64}}, r"one widths for both halves; here the encoder's is \[64, 128\]"),
        ({"encoder": ENCODER | {"num_res_blocks": 2}}, "one num_res_blocks for both halves"),
        ({"encoder": ENCODER | {"attention": False}}, "one attention for both halves"),
        ({"encoder": ENCODER | {"width": 64}, "decoder": DECODER | {"width": "half"}}, "128 channels has 32 groups"),
        ({"decoder": DECODER | {"norm": "smc"}}, "norm=smc"),
        ({"decoder": DECODER | {"output": "wavelet"}}, "output=wavelet"),
        ({"bottleneck": {"kind": "plain"}}, "bottleneck.kind=plain"),
    ],
)
def test_autoencoders_that_diffusers_cannot_be_are_refused_by_name(changes, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        to_diffusers(ours(**changes))


@pytest.mark.parametrize("name", ["kl shifted", "dc", "tiny", "vq"])
def test_a_pretrained_pair_goes_back_into_its_class(name, tmp_path):
    model = diffusers_model(name)
    model.save_pretrained(tmp_path / "model")
    back = to_diffusers(load_autoencoder(f"diffusers:{tmp_path / 'model'}"))
    assert type(back) is type(model)
    assert {k: v for k, v in json.loads(back.to_json_string()).items() if not k.startswith("_")} == {
        k: v for k, v in json.loads(model.to_json_string()).items() if not k.startswith("_")
    }
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())


def test_pretrained_halves_that_are_no_one_model_are_refused(tmp_path):
    for name in ("asymmetric", "kl", "kl shifted"):
        diffusers_model(name).save_pretrained(tmp_path / name)
    with pytest.raises(UsageError, match=r"parts that are not kept here \(decoder.condition_encoder\)"):
        to_diffusers(load_autoencoder(f"diffusers:{tmp_path / 'asymmetric'}"))
    halves = [{"kind": "pretrained", "architecture": _architecture(name)} for name in ("kl", "kl shifted")]
    with pytest.raises(UsageError, match="two architectures"):
        to_diffusers(ours(encoder=halves[0], decoder=halves[1]))
    with pytest.raises(UsageError, match="keeps its own latent statistics"):
        to_diffusers(ours(encoder=halves[0], decoder=halves[0]), {"mean": [0.0] * 5, "std": [1.0] * 5})
    with pytest.raises(UsageError, match=r"decoder\.kind=pretrained"):
        to_diffusers(ours(encoder=ENCODER, decoder=halves[0]))


def _architecture(name: str) -> dict[str, Any]:
    kind, settings = MODELS[name]
    return {"_class_name": kind, **settings}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ae") / "model"
    ours().save_pretrained(path)
    return path


def test_export_writes_once_with_the_latents_statistics(saved, tmp_path):
    cache = tmp_path / "cache"
    encode(str(saved), "synthetic:3", cache, size=8, device="cpu")
    first = export(str(saved), tmp_path / "out", latents=cache)
    assert first["class"] == "AutoencoderKL"
    assert not first["already_complete"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    model = load_diffusers_model(str(tmp_path / "out"))
    assert first["parameters"] == sum(p.numel() for p in model.parameters())
    stats = LatentCache.open(cache).manifest.stats
    assert model.config.latents_mean == pytest.approx(list(stats.mean))
    assert model.config.latents_std == pytest.approx(list(stats.std))
    assert_equal_outputs(load_autoencoder(saved), model)
    assert_equal_outputs(load_autoencoder(f"diffusers:{tmp_path / 'out'}"), model)
    assert export(str(saved), tmp_path / "out", latents=cache)["already_complete"]
    assert list(tmp_path.glob(".*")) == []  # nothing is left beside it


def test_export_leaves_other_models_folders_and_caches_alone(saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    diffusers_model("tiny").save_pretrained(out)
    with pytest.raises(UsageError, match=r"holds another model.*--overwrite"):
        export(str(saved), out)
    monkeypatch.setattr("wavelatent.pipelines.export.replace_folder", _fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(str(saved), out, overwrite=True)
    assert load_diffusers_model(str(out)).config.latent_channels == 5
    assert type(load_diffusers_model(str(out))).__name__ == "AutoencoderTiny"
    assert list(tmp_path.glob(".*")) == []
    monkeypatch.undo()
    export(str(saved), out, overwrite=True)
    assert type(load_diffusers_model(str(out))).__name__ == "AutoencoderKL"
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds other files \(thesis.txt\)"):
        export(str(saved), out, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        export(str(saved), out / "thesis.txt")
    diffusers_model("kl").save_pretrained(tmp_path / "other")
    encode(f"diffusers:{tmp_path / 'other'}", "synthetic:3", tmp_path / "cache", size=8, device="cpu")
    with pytest.raises(WavelatentError, match="autoencoder"):
        export(str(saved), tmp_path / "new", latents=tmp_path / "cache")
    assert not (tmp_path / "new").exists()


def _fail(*_: object) -> None:
    raise OSError("the disk is full")
