"""The sections of the health report that run the autoencoder, on autoencoders whose answers are known."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavelatent.common.latents import Posterior
from wavelatent.stage1_autoencoder.health import LatentData, Section
from wavelatent.stage1_autoencoder.health_autoencoder import AUTOENCODER_SECTIONS

N, H, W, FACTOR = 5, 24, 32, 4
ORTHONORMAL = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0]


class Blocks(nn.Module):
    """Latents are the means of 4x4 blocks, their colours turned; decoding repeats them. It commutes with everything."""

    def __init__(self, factor: int = FACTOR) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(torch.einsum("dc,bchw->bdhw", ORTHONORMAL, F.avg_pool2d(images, self.factor)))

    def decode(self, latents: Tensor) -> Tensor:
        images = torch.einsum("dc,bdhw->bchw", ORTHONORMAL, latents)
        return images.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)


class Masked(Blocks):
    """The encoder turns the sign of every second site, seen from the left border: whole sites do not commute."""

    def encode(self, images: Tensor) -> Posterior:
        latents = super().encode(images).mean
        return Posterior(latents * (1 - 2 * (torch.arange(latents.shape[-1]) % 2)))


class Redundant(Blocks):
    """Every channel twice; the decoder adds ten times the difference of the two, which the encoder makes zero."""

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(super().encode(images).mean.repeat(1, 2, 1, 1))

    def decode(self, latents: Tensor) -> Tensor:
        first, second = latents.chunk(2, dim=1)
        return super().decode(11 * first - 10 * second)


class GlobalSite(Blocks):
    """One site is added to every pixel."""

    row, column = 2, 1

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents + latents[:, :, self.row, self.column, None, None])


class Mean(Blocks):
    """Every site is spread over the whole picture, and over nothing else."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.mean(dim=(2, 3), keepdim=True).expand_as(latents))


class Offset(nn.Module):
    """Latents near 100, where bfloat16 has steps of a half."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        for conv, sign in ((self.into, 1), (self.out, -1)):
            nn.init.dirac_(conv.weight)
            nn.init.constant_(conv.bias, 100.0 * sign)

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(self.into(images))

    def decode(self, latents: Tensor) -> Tensor:
        return self.out(latents)


@dataclass
class Sized:
    """Right at one width alone: elsewhere it halves the contrast."""

    inner: Blocks
    width: int

    def encode(self, images: Tensor) -> Posterior:
        return self.inner.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        images = self.inner.decode(latents)
        return images if images.shape[-1] == self.width else images / 2


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def blocky(factor: int = FACTOR, height: int = H, width: int = W) -> Tensor:
    """Images of standard deviation 0.25 that are constant on blocks: :class:`Blocks` loses nothing of them."""
    blocks = 0.25 * noise(N, 3, height // factor, width // factor)
    return blocks.clamp(-1, 1).repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def encoded(autoencoder: nn.Module, images: Tensor, std: float | None = None) -> LatentData:
    with torch.no_grad():
        mean = autoencoder.encode(images).mean
    if std is None:
        return LatentData(images, mean, None, mean)
    return LatentData(images, mean, torch.full_like(mean, std), mean + std * noise(*mean.shape))


def measure(name: str, autoencoder: nn.Module, data: LatentData, batch_size: int = 4, lpips=None) -> Section:
    return AUTOENCODER_SECTIONS[name](autoencoder, data, batch_size=batch_size, lpips=lpips)


def levels(section: Section) -> dict[str, str]:
    return {verdict.name: verdict.level for verdict in section.verdicts}


@pytest.mark.parametrize("std", [None, 1e-4])
def test_a_healthy_autoencoder_has_no_fault_in_any_section(std):
    images = F.interpolate(0.3 * noise(N, 3, 3, 4), (H, W), mode="bicubic").clamp(-1, 1)
    data = encoded(Blocks(), images, std)
    found = {}
    for name in AUTOENCODER_SECTIONS:
        section = measure(name, Blocks(), data)
        assert section.name == name
        found |= levels(section)
    assert found == dict.fromkeys(
        [
            "not_equivariant",
            "fragile_decoder",
            "global_site",
            "poor_reconstruction",
            "sampling_gap",
            "bf16_gap",
            "resolution_gap",
        ],
        "ok",
    )


@pytest.mark.parametrize("name", AUTOENCODER_SECTIONS)
def test_figures_are_the_same_for_every_batch_size_and_the_global_generator_stays_where_it_was(name):
    autoencoder, images = GlobalSite(), 0.3 * noise(N, 3, H, W)
    data = encoded(autoencoder, images, 0.1)
    before = torch.get_rng_state()
    first, second = (measure(name, autoencoder, data, size).figures for size in (2, 7))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    for key, value in first.items():
        for one, other in zip(*(x if isinstance(x, list) else [x] for x in (value, second[key])), strict=True):
            assert one == (other if other is None else pytest.approx(other, rel=1e-4, abs=1e-6)), key


def test_block_means_commute_with_flips_turns_halves_and_whole_shifts():
    figures = measure("equivariance", Blocks(), encoded(Blocks(), 0.3 * noise(N, 3, H, W))).figures
    for name in ("flip", "turn_90", "turn_180", "turn_270", "half_area", "shift_4"):
        assert figures[f"{name}_latent_error"] == pytest.approx(0, abs=1e-5), name
        assert figures[f"{name}_image_error"] == pytest.approx(0, abs=1e-5), name
        assert figures[f"{name}_psnr"] == pytest.approx(figures[f"{name}_psnr_encoded"])


def test_a_shift_by_half_a_site_loses_what_interpolation_loses():
    """Of white noise: the mean of 4 columns against that of 8 has half the variance of the former."""
    figures = measure("equivariance", Blocks(), encoded(Blocks(), 0.3 * noise(64, 3, 44, 48))).figures
    assert figures["shift_2_latent_error"] == pytest.approx(math.sqrt(0.5), rel=0.05)
    assert figures["shift_6_latent_error"] == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_a_ramp_is_shifted_exactly_by_any_distance():
    ramp = torch.linspace(-1, 1, W).expand(N, 3, H, W) * torch.linspace(0.5, 1, N).reshape(N, 1, 1, 1)
    figures = measure("equivariance", Blocks(), encoded(Blocks(), ramp)).figures
    assert all(figures[f"shift_{shift}_latent_error"] == pytest.approx(0, abs=1e-5) for shift in range(1, 8))


def test_an_encoder_that_knows_where_a_site_is_does_not_commute_with_whole_shifts():
    section = measure("equivariance", Masked(), encoded(Masked(), blocky()))
    assert levels(section) == {"not_equivariant": "fault"}
    assert section.figures["shift_4_latent_error"] == pytest.approx(2, rel=0.01)  # the sign is wrong everywhere


def test_images_too_small_for_a_transform_are_not_measured_on_it():
    images = 0.3 * noise(N, 3, 12, 8)
    figures = measure("equivariance", Blocks(), encoded(Blocks(), images)).figures
    assert "flip_latent_error" in figures
    assert not any(name.startswith(("half", "shift")) for name in figures)


def test_the_gain_of_a_linear_decoder_of_uncorrelated_latents_is_one():
    data = encoded(Blocks(), blocky())
    figures = measure("robustness", Blocks(), data).figures
    assert figures["gain"] == pytest.approx(1, rel=0.05)
    error = 0.1 * data.images.std().item()
    assert figures["psnr"][0] == 100
    assert figures["psnr"][figures["sigmas"].index(0.1)] == pytest.approx(20 * math.log10(2 / error), abs=0.5)
    assert figures["psnr"] == sorted(figures["psnr"], reverse=True)
    assert figures["lpips"] == [None] * len(figures["sigmas"])
    stds = data.mean.transpose(0, 1).flatten(1).std(dim=1)  # one value moves 4x4 pixels by as much as itself
    assert figures["sensitivity"] == pytest.approx((FACTOR * stds).tolist(), rel=0.2)


def test_a_decoder_that_magnifies_what_the_encoder_never_makes_is_fragile():
    section = measure("robustness", Redundant(), encoded(Redundant(), blocky()))
    assert levels(section) == {"fragile_decoder": "fault"}
    assert section.figures["gain"] == pytest.approx(math.sqrt(11**2 + 10**2), rel=0.05)
    first, second = section.figures["sensitivity"][0], section.figures["sensitivity"][3]
    assert first / second == pytest.approx(1.1, rel=0.2)


def test_lpips_is_measured_where_it_is_there():
    def distance(images: Tensor, target: Tensor) -> Tensor:
        return (images - target).square().mean(dim=(1, 2, 3))

    data = encoded(Blocks(), blocky(), 0.1)
    noised = measure("robustness", Blocks(), data, lpips=distance).figures["lpips"]
    assert noised[0] == pytest.approx(0, abs=1e-9)
    assert noised == sorted(noised)
    section = measure("reconstruction", Blocks(), data, lpips=distance)
    assert section.figures["lpips_sampled"] == pytest.approx(0.01, rel=0.1)
    assert not any("LPIPS" in verdict.text for verdict in section.verdicts)
    assert any("LPIPS" in verdict.text for verdict in measure("reconstruction", Blocks(), data).verdicts)


def test_a_site_that_moves_only_its_own_pixels_reaches_their_corner():
    section = measure("locality", Blocks(), encoded(Blocks(), blocky()))
    assert section.figures["radius_pixels"] == pytest.approx(1.5 * math.sqrt(2))
    assert section.figures["far_share_max"] == pytest.approx(0, abs=1e-9)
    assert section.plots[0].kind == "image"
    rows = section.plots[0].series["share"]
    assert (len(rows), len(rows[0])) == (H // FACTOR, W // FACTOR)


def test_a_global_site_is_named():
    section = measure("locality", GlobalSite(), encoded(GlobalSite(), blocky()))
    assert levels(section) == {"global_site": "fault"}
    assert section.figures["global_rows"] == [GlobalSite.row]
    assert section.figures["global_columns"] == [GlobalSite.column]
    assert "1 site moves the whole picture: (row 2, column 1)" in section.verdicts[0].text
    shares = torch.tensor(section.plots[0].series["share"])
    assert divmod(int(shares.argmax()), shares.shape[1]) == (GlobalSite.row, GlobalSite.column)


def test_of_many_sites_none_is_missed_but_cells_are_named():
    autoencoder = GlobalSite(factor=2)
    autoencoder.row, autoencoder.column = 11, 6
    section = measure("locality", autoencoder, encoded(autoencoder, blocky(2, 36, 40)), batch_size=32)
    assert section.figures["cell_sites"] == 2
    assert (section.figures["global_rows"], section.figures["global_columns"]) == ([10], [6])
    assert section.figures["radius_pixels"] == pytest.approx(math.sqrt(0.5)), "of single sites"


def test_a_decoder_that_spreads_every_site_is_noted():
    section = measure("locality", Mean(), encoded(Mean(), blocky()))
    assert levels(section) == {"global_site": "note"}
    assert section.figures["far_share_median"] > 0.5


def test_too_few_sites_are_not_judged():
    section = measure("locality", Mean(), encoded(Mean(), 0.3 * noise(N, 3, 8, 12)))
    assert levels(section) == {"global_site": "ok"}
    assert "too few sites" in section.verdicts[0].text


def test_energy_and_certainty_are_found_where_they_are():
    data = encoded(Blocks(), blocky(), 0.5)
    data.mean[:, :, 2, 5] *= 10
    data.std[:, :, 1, 3] = 1e-6
    section = measure("locality", Blocks(), data)
    assert (section.figures["energy_max_row"], section.figures["energy_max_column"]) == (2, 5)
    assert section.figures["energy_participation"] < 0.1
    assert section.figures["logvar_site_min"] == pytest.approx(2 * math.log(1e-6), rel=1e-4)
    assert section.figures["logvar_site_max"] == pytest.approx(2 * math.log(0.5), rel=1e-4)
    logvar = torch.tensor(section.plots[2].series["logvar"])
    assert divmod(int(logvar.argmin()), logvar.shape[1]) == (1, 3)


def test_a_wide_posterior_has_a_sampling_gap():
    section = measure("reconstruction", Blocks(), encoded(Blocks(), blocky(), 0.2))
    assert levels(section)["sampling_gap"] == "fault"
    assert section.figures["psnr"] == 100
    assert section.figures["psnr_sampled"] == pytest.approx(20 * math.log10(2 / 0.2), abs=0.5)
    assert section.figures["sampling_gap"] == section.figures["psnr"] - section.figures["psnr_sampled"]


def test_latents_that_lower_precision_cannot_hold_have_a_gap():
    autoencoder = Offset()
    section = measure("reconstruction", autoencoder, encoded(autoencoder, blocky()))
    assert levels(section)["bf16_gap"] == "fault"
    assert section.figures["psnr_bf16"] < 30
    assert section.figures["psnr"] > 80


def test_an_autoencoder_tied_to_a_size_has_a_resolution_gap():
    section = measure("reconstruction", Sized(Blocks(), W), encoded(Blocks(), blocky()))
    assert levels(section)["resolution_gap"] == "fault"
    half, same, larger = section.figures["psnr_by_scale"]
    assert same == 100
    assert max(half, larger) < 40


def test_a_size_that_does_not_divide_is_left_out():
    images = blocky(4, 20, 28)  # halves 10 x 14, and 30 x 42
    section = measure("reconstruction", Blocks(), encoded(Blocks(), images))
    assert section.figures["psnr_by_scale"] == [None, 100, None]
    assert levels(section)["resolution_gap"] == "ok"


class OneSize(Blocks):
    """Takes images of one shape and no other."""

    def encode(self, images: Tensor) -> Posterior:
        if images.shape[-2:] != (H, W):
            raise ValueError(f"images must be {H}x{W}")
        return super().encode(images)


def test_an_autoencoder_of_one_size_is_measured_on_what_keeps_it():
    data = encoded(OneSize(), blocky())
    figures = measure("equivariance", OneSize(), data).figures
    assert {name.rpartition("_latent")[0] for name in figures if "latent" in name} == {"flip", "turn_180"}
    assert measure("reconstruction", OneSize(), data).figures["psnr_by_scale"] == [None, 100, None]


def test_images_of_one_colour_have_no_relative_errors():
    data = encoded(Blocks(), torch.zeros(N, 3, H, W))
    for name in AUTOENCODER_SECTIONS:
        section = measure(name, Blocks(), replace(data))
        assert all(verdict.level != "fault" for verdict in section.verdicts)
        values = [v for figure in section.figures.values() for v in (figure if isinstance(figure, list) else [figure])]
        assert all(v is None or math.isfinite(v) for v in values)
