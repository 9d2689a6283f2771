"""Contracts that every entry of stage one's option tables must keep, and parameter counts of the published models."""

import pytest
import torch

from wavelatent.common.config import load_config, preset_names
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.stage1_autoencoder.autoencoder import ENCODERS, Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.bottlenecks import BOTTLENECKS
from wavelatent.stage1_autoencoder.decoder import ConvDecoder, ConvDecoderConfig
from wavelatent.stage1_autoencoder.kl_vae import KLEncoder, KLEncoderConfig
from wavelatent.stage1_autoencoder.litevae import LiteVAEConfig, LiteVAEEncoder

TINY_DECODER = {"width": "tiny", "num_res_blocks": 1}
LITEVAE = {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1}
VARIANTS = {
    "litevae f2": {"encoder": LITEVAE | {"levels": 1}},
    "litevae f4": {"encoder": LITEVAE},
    "litevae f8": {"encoder": LITEVAE | {"levels": 3}},
    "litevae db2": {"encoder": LITEVAE | {"wavelet": "db2"}},
    "kl encoder f4": {"encoder": {"kind": "kl", "width": 8, "multipliers": (1, 2, 2), "num_res_blocks": 1}},
    "kl encoder f8": {"encoder": {"kind": "kl", "width": 8, "multipliers": (1, 1, 2, 2), "num_res_blocks": 1}},
    "kl mean": {"encoder": LITEVAE, "bottleneck": {"kind": "kl", "reduction": "mean", "kl_weight": 1e-3}},
    "plain": {"encoder": LITEVAE, "bottleneck": {"kind": "plain"}},
    "bounded tanh": {"encoder": LITEVAE, "bottleneck": {"kind": "bounded"}, "channels": 16},
    "bounded clamp": {"encoder": LITEVAE, "bottleneck": {"kind": "bounded", "activation": "clamp", "bound": 1.0}},
    "perturbed": {"encoder": LITEVAE, "perturbations": [{"kind": "gaussian", "std": 0.3}]},
    "smc": {"encoder": LITEVAE, "decoder": TINY_DECODER | {"norm": "smc"}},
    "no attention": {"encoder": LITEVAE, "decoder": TINY_DECODER | {"attention": False}},
}


def build(name: str) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig.model_validate({"decoder": TINY_DECODER, "channels": 5} | VARIANTS[name]))


def images(coarseness: int = 1) -> torch.Tensor:
    """Noise ``[2, 3, 24, 32]`` in [-1, 1], of blocks of ``coarseness`` pixels."""
    small = torch.rand(2, 3, 24 // coarseness, 32 // coarseness, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small * 2 - 1, size=(24, 32))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_variants_cover_the_tables():
    configs = [AutoencoderConfig.model_validate(v) for v in VARIANTS.values()]
    assert {c.encoder.kind for c in configs} == set(ENCODERS)
    assert {c.bottleneck.kind for c in configs} == set(BOTTLENECKS)


@pytest.mark.parametrize(("size", "published"), [("s", 1.03e6), ("b", 6.75e6), ("m", 32.75e6), ("l", 41.42e6)])
def test_litevae_has_the_published_number_of_parameters(size, published):
    with torch.device("meta"):
        count = parameters(LiteVAEEncoder(LiteVAEConfig(size=size), 8))
    exact = {"s": 1_035_692, "b": 6_750_636, "m": 32_750_124, "l": 41_422_380}[size]
    assert count == exact
    assert abs(count - published) < 0.01e6  # the paper prints two decimals of a million


def test_kl_f8_has_stable_diffusions_number_of_parameters():
    with torch.device("meta"):
        assert parameters(KLEncoder(KLEncoderConfig(), 8)) == 34_163_592
        assert parameters(ConvDecoder(ConvDecoderConfig(), 4, 8)) == 49_490_179


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_and_gradients(name):
    autoencoder = build(name).train()
    output = autoencoder(images())
    f, channels = autoencoder.downsampling, autoencoder.latent_channels
    assert output.images.shape == (2, 3, 24, 32)
    assert output.raw.shape == (2, channels, 24 // f, 32 // f)
    loss = (output.images - images()).square().mean() + sum(output.penalties.values())
    loss.backward()
    dead = [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("name", VARIANTS)
def test_save_and_load_are_exact(name, tmp_path):
    autoencoder = build(name).eval()
    autoencoder.save_pretrained(tmp_path / "model")
    loaded = load_autoencoder(tmp_path / "model")
    assert loaded.config == autoencoder.config
    assert loaded.fingerprint() == autoencoder.fingerprint()
    assert torch.equal(loaded(images()).images, autoencoder(images()).images)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_batch_can_be_learned_under_bf16_autocast(name):
    autoencoder = build(name).train()
    optimizer = torch.optim.Adam(autoencoder.parameters(), 3e-3)
    target = images(8)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = autoencoder(target)
        loss = (output.images.float() - target).abs().mean()
        assert output.raw.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.93 * losses[0]


def test_evaluation_is_deterministic_and_training_is_not():
    autoencoder = build("perturbed")
    assert torch.equal(autoencoder.eval()(images()).images, autoencoder(images()).images)
    assert not torch.equal(autoencoder.train()(images()).images, autoencoder(images()).images)


def test_the_fingerprint_follows_weights_and_configuration():
    autoencoder = build("plain")
    before = autoencoder.fingerprint()
    assert build("plain").fingerprint() == before
    with torch.no_grad():
        next(autoencoder.decoder.parameters()).view(-1)[0] += 1e-6
    assert autoencoder.fingerprint() != before


def test_sizes_that_do_not_divide_are_refused():
    for name in ("litevae f8", "kl encoder f8"):
        autoencoder = build(name)
        with pytest.raises(ValueError, match="divi"):
            autoencoder.encode(torch.zeros(1, 3, 20, 24))
        with pytest.raises(ValueError, match="60 px do not divide"):
            autoencoder.latent_shape(60)
        assert autoencoder.latent_shape(64) == (5, 8, 8)


@pytest.mark.parametrize("preset", [n for n in preset_names() if n.startswith(("litevae", "kl", "ae"))])
def test_every_autoencoder_preset_builds(preset):
    config = load_config(AutoencoderRunConfig, preset)
    with torch.device("meta"):
        Autoencoder(config.model)
