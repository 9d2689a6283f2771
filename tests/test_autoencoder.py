"""The autoencoder as a whole, and parameter counts of the published models. Options: test_stage1_contracts.py."""

import pytest
import torch

from wavelatent.common.config import load_config, preset_names
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.decoder import ConvDecoder, ConvDecoderConfig
from wavelatent.stage1_autoencoder.kl_vae import KLEncoder, KLEncoderConfig
from wavelatent.stage1_autoencoder.litevae import LiteVAEConfig, LiteVAEEncoder

LITEVAE = {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1}
VARIANTS = {
    "litevae f8": {"encoder": LITEVAE | {"levels": 3}},
    "kl encoder f8": {"encoder": {"kind": "kl", "width": 8, "multipliers": (1, 1, 2, 2), "num_res_blocks": 1}},
    "plain": {"encoder": LITEVAE, "bottleneck": {"kind": "plain"}},
    "perturbed": {"encoder": LITEVAE, "perturbations": [{"kind": "gaussian", "std": 0.3}]},
}


def build(name: str) -> Autoencoder:
    torch.manual_seed(0)
    small = {"decoder": {"width": "tiny", "num_res_blocks": 1}, "channels": 5}
    return Autoencoder(AutoencoderConfig.model_validate(small | VARIANTS[name]))


def images(coarseness: int = 1) -> torch.Tensor:
    """Noise ``[2, 3, 24, 32]`` in [-1, 1], of blocks of ``coarseness`` pixels."""
    small = torch.rand(2, 3, 24 // coarseness, 32 // coarseness, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(small * 2 - 1, size=(24, 32))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
