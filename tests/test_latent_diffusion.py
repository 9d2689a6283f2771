import math

import pytest
import torch

from wavelatent.common.denoising import expand_like
from wavelatent.common.randomness import generator
from wavelatent.stage2_diffusion.generation import generate_latents
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.objectives import EDM, EDMConfig
from wavelatent.stage2_diffusion.sampling import Sampling
from wavelatent.stage2_diffusion.unet import UNetConfig

TINY = UNetConfig(channels=16, multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=8)
STATISTICS = {"mean": [0.3, -2.0, 5.0], "std": [0.5, 1.0, 4.0]}


def make(**options):
    torch.manual_seed(0)
    model = LatentDiffusion(TINY, EDMConfig(), (3, 4, 6), statistics=STATISTICS, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_saving_and_loading_is_exact_and_keeps_the_whitening(tmp_path):
    model = make(num_classes=2)
    model.whitening.shift += 0.25  # what travels is the buffer, not only the statistics of config.json
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = LatentDiffusion.from_pretrained(tmp_path)
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert loaded.network.config == model.network.config
    assert loaded.objective.config == model.objective.config
    x, sigma, labels = torch.randn(2, 3, 4, 6), torch.tensor([0.1, 9.0]), torch.tensor([1, 0])
    assert torch.equal(loaded.denoise(x, sigma, labels), model.denoise(x, sigma, labels))
    raw = torch.randn(2, 3, 4, 6)
    assert torch.equal(loaded.whitening(raw), model.whitening(raw))


def test_the_loss_whitens_and_weighs():
    model = make()
    raw = torch.tensor(STATISTICS["mean"]).reshape(1, 3, 1, 1).expand(5, 3, 4, 6)  # whitened: zero
    sigma, noise = model.draw_noise(raw, generator(1, 2))
    torch.nn.init.zeros_(model.network.out.weight)
    torch.nn.init.zeros_(model.network.out.bias)
    # F = 0, so D = c_skip sigma n = sigma n / (1 + sigma^2), and lambda = (1 + sigma^2) / sigma^2
    expected = noise.square().mean((1, 2, 3)) / (1 + sigma**2)
    total, denoising = model(raw, sigma, noise)
    torch.testing.assert_close(total, expected)
    assert denoising is total


def test_a_learned_uncertainty_divides_the_loss_and_is_paid_for():
    model = make(uncertainty={"channels": 8})
    raw = torch.randn(5, 3, 4, 6, generator=generator("raw"))
    sigma, noise = model.draw_noise(raw, generator(1, 2))
    total, denoising = model(raw, sigma, noise)
    u = model.uncertainty(sigma.log() / 4 - math.log(model.objective.noise_shift) / 4)
    assert u.abs().min() > 1e-4
    torch.testing.assert_close(total, denoising / u.exp() + u)


def test_denoise_keeps_the_type_of_x():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    denoised = make().denoise(x, torch.tensor([0.1, 9.0], dtype=torch.float64))
    assert denoised.dtype == torch.float64


def test_noise_levels_are_lognormal():
    log_sigma = EDM(EDMConfig(p_mean=-0.4, p_std=1.2)).draw_sigma(20_000, generator(0)).log()
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=4 * 1.2 / math.sqrt(20_000))
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


def test_latents_that_do_not_suit_the_network_are_refused_when_it_is_built():
    with pytest.raises(ValueError, match="divide by 2"):
        LatentDiffusion(TINY, EDMConfig(), (3, 4, 7))


def test_what_is_generated_is_raw_latents_with_the_mean_and_std_of_the_data(monkeypatch):
    """Of whitened data that is N(0, 1) everywhere, the best denoiser is known: E[y | x] = x / (1 + sigma^2)."""
    model = make()
    monkeypatch.setattr(model, "denoise", lambda x, sigma, labels=None: x / (1 + expand_like(sigma, x) ** 2))
    raw = generate_latents(model, range(300), sampling=Sampling(steps=32))
    channels = raw.transpose(0, 1).flatten(1)  # 300 x 4 x 6 = 7200 draws of each
    assert channels.mean(dim=1).tolist() == pytest.approx(STATISTICS["mean"], abs=4 * 4.0 / math.sqrt(7200))
    for std, expected in zip(channels.std(dim=1).tolist(), STATISTICS["std"], strict=True):
        assert std == pytest.approx(expected, rel=4 / math.sqrt(2 * 7200) + 0.01)  # chance, and 32 steps
