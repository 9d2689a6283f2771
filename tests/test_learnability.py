"""The fixed small denoiser of the health report, on latents whose best loss is known."""

import math

import pytest
import torch
from torch import Tensor

from wavelatent.common.randomness import generator
from wavelatent.pipelines.learnability import Quick, learnability
from wavelatent.stage1_autoencoder.health import LatentData
from wavelatent.stage2_diffusion.validation import SIGMA_BINS

N, C, H, W = 60, 3, 4, 6


def data(mean: Tensor, std: Tensor | None = None) -> LatentData:
    return LatentData(torch.zeros(len(mean), 3, 8, 12), mean, std, mean)


def white(count: int = N) -> LatentData:
    scales = torch.tensor([0.1, 2.0, 30.0]).reshape(-1, 1, 1)
    return data(5 + scales * torch.randn(count, C, H, W, generator=generator("white")))


def flat(count: int = N) -> LatentData:
    """Latents that are the same at every site: one value of noise in 24 decides a channel."""
    return data(torch.randn(count, C, 1, 1, generator=generator("flat")).expand(-1, -1, H, W).contiguous())


def test_white_noise_scores_one_and_is_hard_to_learn():
    section = learnability(white(400), steps=0)  # the untrained network outputs zero, which is best
    assert section.figures["held_out_latents"] == 40
    error = 4 * math.sqrt(2 / (40 * C * H * W))
    for name in ("loss", *(f"loss_sigma_{name}" for name in SIGMA_BINS)):
        assert section.figures[name] == pytest.approx(1, abs=error), name
    assert [(verdict.name, verdict.level) for verdict in section.verdicts] == [("hard_to_learn", "fault")]


def test_latents_that_say_everything_many_times_are_learnt():
    section = learnability(flat(), steps=40)
    untrained = learnability(flat(), steps=0)
    assert section.figures["loss"] < min(0.96, untrained.figures["loss"] - 0.03)
    assert section.verdicts[0].level != "fault"
    assert section.figures["training_latents"] + section.figures["held_out_latents"] == N
    curve = section.plots[1].series["mean of 10 steps"]
    assert len(curve) == 4
    assert curve == sorted(curve, reverse=True)


def test_the_result_is_a_function_of_the_latents_alone():
    latents = data(flat().mean, torch.full((N, C, H, W), 0.5))
    before = torch.get_rng_state()
    first = dict(learnability(latents, steps=2).figures)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = dict(learnability(latents, steps=2).figures)
    assert first.pop("seconds") > 0
    second.pop("seconds")
    assert first == second


def test_the_network_grows_with_the_channels_by_its_ends_alone():
    """By as many weights for every further channel: 3x3 into 32 features, and out of them with a bias."""
    counts = [
        learnability(data(flat(20).mean[:, :1].repeat(1, channels, 1, 1)), steps=0).figures["parameters"]
        for channels in (1, 2, 5)
    ]
    assert [count - counts[0] for count in counts] == [0, 577, 4 * 577]


def test_the_posterior_is_drawn_from():
    figures = [learnability(data(flat().mean, std), steps=0).figures for std in (None, torch.full((N, C, H, W), 0.5))]
    assert figures[0]["loss_sigma_0-0.2"] != pytest.approx(figures[1]["loss_sigma_0-0.2"], rel=1e-5)


@pytest.mark.parametrize("latents", [flat(19), data(torch.randn(N, C, 3, W))])
def test_what_does_not_suit_the_network_is_not_measured(latents):
    section = learnability(latents)
    assert section.figures == {"loss": None}
    assert section.verdicts[0].level == "note"
    assert "at least 20 images" in section.verdicts[0].text


def test_quick_figures_are_of_decoded_samples_against_the_images():
    seen = []

    def extract(images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        seen.append(images)
        return torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1)

    def decode(latents: Tensor) -> Tensor:
        assert latents.shape[1:] == (C, H, W)
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2) / 10

    latents = flat()
    figures = learnability(latents, steps=0, quick=Quick(extract, decode, num_samples=12)).figures
    assert (figures["quick_samples"], figures["quick_reference"]) == (12, 12)
    assert sum(len(images) for images in seen) == 24
    assert figures["quick_fid"] > 0
    assert "quick_kid" in figures
    assert not any(name.startswith("quick") for name in learnability(latents, steps=0).figures)
    section = learnability(latents, steps=0, quick=Quick(extract, lambda z: decode(z) * torch.nan, num_samples=12))
    assert (section.figures["quick_fid"], section.figures["quick_kid"]) == (None, None)
    assert "is not finite" in section.verdicts[0].text
