"""The sections on latents alone against known answers; each planted fault is named, and none on healthy latents."""

import json
import math

import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.stats import t as students_t
from torch import Tensor

from wavelatent.common.errors import WavelatentError
from wavelatent.stage1_autoencoder.health import LatentData, Section
from wavelatent.stage1_autoencoder.health_distribution import (
    mmd_to_standard_normal,
    site_vectors,
    sliced_wasserstein_to_standard_normal,
)
from wavelatent.stage1_autoencoder.health_latents import LATENT_SECTIONS
from wavelatent.stage1_autoencoder.health_measures import channel_quantiles
from wavelatent.stage1_autoencoder.health_spectrum import dct_power, high_frequency_share, spectral_slope
from wavelatent.stage1_autoencoder.health_structure import (
    effective_rank,
    nearest_two,
    spatial_autocorrelation,
    twonn_dimension,
)

N, C, H, W = 60, 5, 6, 10


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def power_law_fields(count: int, channels: int, height: int, width: int, slope: float, seed: int = 0) -> Tensor:
    """Gaussian fields whose DCT coefficients have a power of frequency^slope; unit variance over all."""
    vertical, horizontal = torch.arange(height) / (2 * height), torch.arange(width) / (2 * width)
    radius = (vertical[:, None] ** 2 + horizontal**2).sqrt()
    radius[0, 0] = radius[0, 1]
    coefficients = noise(count, channels, height, width, seed=seed) * radius ** (slope / 2)
    fields = torch.from_numpy(idctn(coefficients.numpy(), axes=(2, 3), norm="ortho"))
    return fields / fields.std(dim=(0, 2, 3), keepdim=True)


def healthy(std: float | None = 0.1, **changes: Tensor | float) -> LatentData:
    """Smooth fields of unit variance, correlated by 0.4 over channels, of images with a spectrum like photographs'."""
    images = (0.4 * power_law_fields(N, 3, 4 * H, 4 * W, -2.0, seed=1)).clamp(-1, 1)
    mixing = torch.linalg.cholesky(0.6 * torch.eye(C) + 0.4)
    mean = torch.einsum("cd,ndhw->nchw", mixing, power_law_fields(N, C, H, W, -1.5))
    return with_latents(LatentData(images, mean, None, mean), mean, std)


def with_latents(data: LatentData, mean: Tensor, std: float | Tensor | None = None, bound: float | None = None):
    if std is None:
        return LatentData(data.images, mean, None, mean, bound)
    deviation = torch.as_tensor(std).expand_as(mean).contiguous()
    return LatentData(data.images, mean, deviation, mean + deviation * noise(*mean.shape, seed=9), bound)


def of_latents(mean: Tensor, std: float | Tensor | None = None, bound: float | None = None) -> LatentData:
    images = torch.zeros(len(mean), 3, 2 * mean.shape[2], 2 * mean.shape[3])
    return with_latents(LatentData(images, mean, None, mean), mean, std, bound)


def faults(section: Section) -> dict[str, str]:
    return {verdict.name: verdict.text for verdict in section.verdicts if verdict.level == "fault"}


def measure(name: str, data: LatentData) -> Section:
    section = LATENT_SECTIONS[name](data)
    assert section.name == name
    assert section.verdicts
    return section


@pytest.mark.parametrize("std", [0.1, None])
@pytest.mark.parametrize("name", LATENT_SECTIONS)
def test_healthy_latents_have_no_fault(name: str, std: float | None):
    assert faults(measure(name, healthy(std))) == {}


@pytest.mark.parametrize("name", LATENT_SECTIONS)
def test_figures_are_the_same_again_and_fit_for_json_whatever_the_latents(name: str):
    broken = noise(N, C, H, W)
    broken[3, 1, 2, 2] = math.nan
    constant, one_site = torch.full((4, C, 2, 3), 7.0), noise(2, 1, 1, 1)
    for data in (of_latents(broken, 0.0), of_latents(constant), of_latents(one_site, 0.3)):
        before, section = data.mean.clone(), measure(name, data)
        assert not any("nan" in verdict.text for verdict in section.verdicts)
        json.dumps([dict(section.figures), [dict(plot.series) for plot in section.plots]], allow_nan=False)
        for plot in section.plots:
            assert (
                len({len(values) for values in [*plot.series.values(), plot.x or next(iter(plot.series.values()))]})
                == 1
            )
        torch.testing.assert_close(data.mean, before, equal_nan=True)
    assert measure(name, of_latents(one_site, 0.3)) == section


def test_latents_that_are_not_finite_are_counted_and_left_out():
    data = healthy()
    data.mean[7, 2, 3, 3] = math.inf
    section = measure("scale", data)
    assert section.figures["images"] == N - 1
    assert "1 of 60 images" in faults(section)["not_finite"]
    assert measure("geometry", data).figures["images"] == N - 1
    with pytest.raises(WavelatentError, match="at least 2 images"):
        measure("correlation", of_latents(torch.full((3, 2, 4, 5), math.nan)))


class TestScale:
    def test_moments_and_quantiles_of_known_distributions(self):
        count = 1001 * 2 * 4
        signs = torch.tensor([-1.0, 1.0]).repeat(count // 2)
        quarter = torch.tensor([1.0, 0, 0, 0]).repeat(count // 4) + 100
        ramp = torch.arange(float(count)) / (count - 1)
        latents = torch.stack([signs, quarter, ramp]).view(3, 1001, 2, 4).transpose(0, 1)
        figures = measure("scale", of_latents(latents)).figures
        uniform_std = math.sqrt((count**2 - 1) / 12) / (count - 1)
        uniform_kurtosis = -6 * (count**2 + 1) / (5 * (count**2 - 1))
        assert figures["mean"] == pytest.approx([0, 100.25, 0.5])
        assert figures["std"] == pytest.approx([1, math.sqrt(3 / 16), uniform_std])
        assert figures["skew"] == pytest.approx([0, 0.5 / math.sqrt(3 / 16), 0], abs=1e-6)
        assert figures["excess_kurtosis"] == pytest.approx([-2, (1 - 18 / 16) / (3 / 16), uniform_kurtosis])
        for probability in (0.001, 0.25, 0.999):
            assert figures[f"quantile_{probability}"][2] == pytest.approx(probability, abs=1 / count)
        assert figures["min"] == pytest.approx([-1, 100, 0])
        assert figures["max"] == pytest.approx([1, 101, 1])

    def test_quantiles_of_many_images_are_those_of_evenly_thinned_ones(self):
        latents = torch.arange(7.0)[:, None, None, None] + torch.zeros(7, 2, 3, 5)
        quantiles, images = channel_quantiles(latents, torch.tensor([0.0, 0.3, 1.0]), most=60)
        assert images == 4
        assert quantiles.tolist() == [[0, 0], [2, 2], [6, 6]]

    def test_of_an_outsized_and_of_a_small_channel(self):
        latents = healthy().mean
        latents[:, 3] *= 12
        found = faults(measure("scale", of_latents(latents)))
        assert set(found) == {"far_from_unit_variance", "unequal_scale"}
        assert "channel 3:" in found["far_from_unit_variance"]
        assert "channel 3 is" in found["unequal_scale"]
        small = faults(measure("scale", of_latents(healthy().mean / 15)))
        assert set(small) == {"far_from_unit_variance"}

    def test_a_dead_channel_is_not_one_of_unequal_scale(self):
        latents = healthy().mean
        latents[:, 2] = 0
        assert faults(measure("scale", of_latents(latents))) == {}

    def test_saturation_at_a_declared_bound_counts_values_beyond_99_percent_of_it(self):
        latents = (healthy().mean / 4).clamp(-0.5, 0.5)
        latents[:6, 4] = 2.98
        latents[6:12, 4] = -2.96
        section = measure("scale", of_latents(latents, bound=3.0))
        assert section.figures["saturated_share"] == pytest.approx([0, 0, 0, 0, 0.1])
        assert faults(section)["saturated"].startswith("Channel 4:")

    def test_saturation_without_a_declared_bound_shows_at_the_ends_of_the_range(self):
        section = measure("scale", of_latents(torch.tanh(4 * healthy().mean)))
        assert set(faults(section)) == {"saturated"}
        declared = measure("scale", of_latents(torch.tanh(4 * healthy().mean), bound=1.0))
        assert declared.figures["saturated_share"] == pytest.approx(section.figures["saturated_share"], abs=1e-3)

    def test_range_of_float16(self):
        latents = healthy().mean
        latents[0, 1, 0, 0] = -70_000
        latents[: N // 4, 2] = 1e-5
        section = measure("scale", of_latents(latents))
        assert section.figures["fp16_overflow_share"][1] == pytest.approx(1 / (N * H * W))
        assert section.figures["fp16_denormal_share"][2] == pytest.approx(1 / 4, abs=1e-3)
        assert "Channel 1:" in faults(section)["fp16_overflow"]
        assert {v.level for v in section.verdicts if v.name == "fp16_denormal"} == {"note"}


class TestPosterior:
    def test_a_deterministic_encoder_says_so(self):
        section = measure("posterior", healthy(None))
        assert [verdict.name for verdict in section.verdicts] == ["deterministic"]

    def test_divergence_and_active_units_in_closed_form(self):
        signs = torch.tensor([1.0, -1, 1, -1])[:, None, None]
        mean = torch.stack([0.09 * signs.expand(4, 3, 5), 0.11 * signs.expand(4, 3, 5)], dim=1)
        figures = measure("posterior", of_latents(mean, 0.5)).figures
        expected = [15 * 0.5 * (m**2 + 0.25 - 1 - math.log(0.25)) for m in (0.09, 0.11)]
        assert figures["kl_nats"] == pytest.approx(expected, rel=1e-5)
        assert figures["active_share"] == [0, 1]
        assert figures["active_units"] == 15
        assert figures["signal_share"] == pytest.approx([m**2 / (m**2 + 0.25) for m in (0.09, 0.11)], rel=1e-5)
        assert figures["logvar_mean"] == pytest.approx([math.log(0.25)] * 2, rel=1e-5)
        assert sum(figures["logvar_histogram"]) == pytest.approx(1)

    def test_a_channel_that_fell_back_to_the_prior(self):
        mean, std = healthy().mean, torch.full((N, C, H, W), 0.1)
        mean[:, 3] *= 0.01
        std[:, 3] = 1
        found = faults(measure("posterior", of_latents(mean, std)))
        assert set(found) == {"posterior_collapse"}
        assert "channel 3:" in found["posterior_collapse"]

    @pytest.mark.parametrize(("images", "level"), [(0, "ok"), (4, "note"), (5, "fault")])
    def test_one_site_of_many_at_the_clamp_is_a_fault_where_most_images_have_it(self, images: int, level: str):
        std = torch.full((8, 3, 20, 30), 0.1)
        std[:images, 1, 4, 7] = math.exp(-15)
        section = measure("posterior", of_latents(noise(8, 3, 20, 30), std))
        verdict = next(verdict for verdict in section.verdicts if verdict.name == "logvar_clamp")
        assert verdict.level == level
        assert verdict.text.startswith("Channel 1:") == (images > 0)
        assert section.figures["clamped_share_worst_site"] == images / 8


class TestGaussianity:
    def test_mmd_and_its_null_against_quadrature(self):
        samples, width = noise(7, 1, seed=3).double() + 0.4, 0.8
        grid = torch.linspace(-9, 9, 1801, dtype=torch.float64)
        weights = torch.softmax(-(grid**2) / 2, dim=0)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-((a[:, None] - b) ** 2) / (2 * width**2))

        towards_grid = kernel(grid, grid) @ weights
        both = weights @ towards_grid
        x = samples[:, 0]
        centred = kernel(x, x) - (kernel(x, grid) @ weights)[:, None] - kernel(x, grid) @ weights + both
        centred_grid = kernel(grid, grid) - towards_grid[:, None] - towards_grid + both
        test = mmd_to_standard_normal(samples, width)
        assert test.squared == pytest.approx(float(centred.sum() - centred.diagonal().sum()) / 42, abs=1e-9)
        assert test.null_std == pytest.approx(math.sqrt(2 / 42 * float(weights @ centred_grid**2 @ weights)), rel=1e-6)

    def test_gaussian_samples_lie_within_the_null(self):
        tests = [mmd_to_standard_normal(noise(150, 4, seed=seed), 2.0) for seed in range(60)]
        deviations = torch.tensor([test.squared / test.null_std for test in tests])
        assert abs(deviations.mean()) < 4 / math.sqrt(60)
        assert 0.6 < deviations.std() < 1.5
        assert mmd_to_standard_normal(noise(150, 4) * 1.5, 2.0).squared > 5 * tests[0].null_std

    def test_sliced_wasserstein_of_a_shifted_and_stretched_normal(self):
        quantiles = torch.special.ndtri((torch.arange(500, dtype=torch.float64) + 0.5) / 500)
        distance = sliced_wasserstein_to_standard_normal((2 * quantiles + 3)[:, None], torch.tensor([[1.0]]))
        assert distance == pytest.approx(math.sqrt(float(quantiles.square().mean()) + 9))

    def test_sites_are_spread_evenly_and_never_taken_twice(self):
        latents = torch.arange(float(4 * 3 * 5)).view(4, 1, 3, 5).expand(4, 2, 3, 5)
        sites = site_vectors(latents, most=18)
        assert sites.shape == (18, 2)
        assert len(sites[:, 0].unique()) == 18
        per_image = torch.bincount((sites[:, 0] // 15).long())
        assert per_image.tolist() == [5, 5, 4, 4]
        thinned = site_vectors(latents, most=2)
        assert (thinned[:, 0] // 15).long().tolist() == [0, 2]

    def test_white_gaussian_latents_are_close_to_gaussian(self):
        section = measure("gaussianity", of_latents(2 * noise(N, C, H, W) + 5))
        assert {verdict.level for verdict in section.verdicts} == {"ok"}
        assert section.figures["sliced_wasserstein"] < 1.5 * section.figures["sliced_wasserstein_null_max"]
        assert max(section.figures["qq_largest_deviation"]) < 0.2

    def test_kurtosis_of_students_distribution_and_its_heavy_tail(self):
        probabilities = (torch.arange(N * H * W) + 0.5) / (N * H * W)
        shuffled = probabilities[torch.randperm(N * H * W, generator=torch.Generator().manual_seed(0))].numpy()
        latents = noise(N, C, H, W)
        for channel, freedom in ((1, 20), (3, 3)):
            latents[:, channel] = torch.from_numpy(students_t.ppf(shuffled, freedom)).view(N, H, W)
        section = measure("gaussianity", of_latents(latents))
        assert section.figures["excess_kurtosis"][1] == pytest.approx(6 / 16, rel=0.1)
        assert "channel 3:" in faults(section)["heavy_tail"]


class TestCorrelation:
    def test_effective_rank(self):
        assert effective_rank(torch.tensor([2.0, 2, 2, 2])) == pytest.approx(4)
        assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
        assert effective_rank(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)

    def test_known_correlations(self):
        white = noise(N, C, H, W)
        latents = white.clone()
        latents[:, 1] = 3 * (0.6 * white[:, 0] + 0.8 * white[:, 1])
        figures = measure("correlation", of_latents(latents)).figures
        assert figures["largest_correlation"][:2] == pytest.approx([0.6, 0.6], abs=0.03)
        expected = effective_rank(torch.tensor([1.6, 0.4, 1, 1, 1]))
        assert figures["effective_rank_standardised"] == pytest.approx(expected, rel=0.01)
        assert sum(figures["covariance_eigenvalues"]) == pytest.approx(13, rel=0.03)

    def test_autocorrelation_of_a_checkerboard_and_of_a_moving_average(self):
        rows, columns = torch.arange(4)[:, None], torch.arange(6)
        board = (1 - 2.0 * ((rows + columns) % 2)).expand(3, 1, 4, 6)
        lags = spatial_autocorrelation(board)[:, 0]
        torch.testing.assert_close(lags[:5], torch.tensor([-1.0, 1, -1, 1, -1], dtype=torch.float64))
        assert lags[5:].isnan().all()
        white = noise(300, 2, 9, 12)
        smooth = white[..., 1:] + white[..., :-1]
        lags = spatial_autocorrelation(smooth)
        torch.testing.assert_close(lags[0], torch.full((2,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)
        torch.testing.assert_close(lags[1], torch.zeros(2, dtype=torch.float64), atol=0.02, rtol=0)

    @pytest.mark.parametrize("pattern", [0.0, 1.0])
    def test_a_dead_channel_even_with_a_pattern_over_sites(self, pattern: float):
        latents = healthy().mean
        latents[:, 2] = pattern * noise(H, W) + 1e-3 * latents[:, 2]
        section = measure("correlation", of_latents(latents))
        assert section.figures["dead_channels"] == [2]
        assert set(faults(section)) == {"dead_channel"}
        assert "channel 2:" in faults(section)["dead_channel"]

    def test_a_duplicate_is_found_at_another_scale_and_sign(self):
        latents = healthy().mean
        latents[:, 4] = -2 * latents[:, 1] + 0.1 * noise(N, H, W) + 3
        section = measure("correlation", of_latents(latents))
        assert section.figures["duplicate_pairs"] == "1,4"
        assert set(faults(section)) == {"duplicate_channel"}
        assert "1 and 4 (r = -0.99" in faults(section)["duplicate_channel"]


class TestSpectrum:
    def test_power_is_that_of_the_orthonormal_transform_also_of_its_lowest_coefficients(self):
        fields = noise(7, 2, 12, 15)
        expected = torch.from_numpy(dctn(fields.double().numpy(), axes=(2, 3), norm="ortho")).square().mean(dim=0)
        torch.testing.assert_close(dct_power(fields, 12, 15), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dct_power(fields, 4, 5), expected[:, :4, :5], rtol=1e-4, atol=1e-6)

    def test_slope_and_share(self):
        frequencies = torch.tensor([0.1, 0.2, 0.3, 0.5])
        assert float(spectral_slope(frequencies, 7 * frequencies**-1.7)) == pytest.approx(-1.7, abs=1e-5)
        # Of 2 x 3 coefficients, frequencies are 0, 1/6, 1/3 along and 1/4 across: only one is low.
        assert high_frequency_share(torch.tensor([[9.0, 2, 3], [1, 1, 1]])) == pytest.approx(6 / 8)

    @pytest.mark.parametrize("slope", [-2.0, -1.0, 0.0])
    def test_fields_of_a_known_power_law(self, slope: float):
        latents = 5 * power_law_fields(400, 2, 12, 15, slope) + 3
        section = measure("spectrum", of_latents(latents))
        assert section.figures["slope"] == pytest.approx(slope, abs=0.1)
        assert section.figures["channel_slopes"] == pytest.approx([slope] * 2, abs=0.15)
        assert set(faults(section)) == ({"white_spectrum"} if slope == 0 else set())
        if slope == 0:
            white = section.figures["white_high_frequency_share"]
            assert section.figures["high_frequency_share"] == pytest.approx(white, abs=0.01)

    def test_images_are_seen_at_the_frequencies_of_the_grid(self):
        section = measure("spectrum", healthy())
        assert section.figures["image_slope"] == pytest.approx(-2.0, abs=0.4)

    def test_one_white_channel_is_a_note(self):
        latents = healthy().mean
        latents[:, 1] = noise(N, H, W)
        verdict = measure("spectrum", of_latents(latents)).verdicts[0]
        assert verdict.level == "note"
        assert "channel 1;" in verdict.text


class TestGeometry:
    def test_nearest_distances_against_all_pairs_also_of_points_that_nearly_coincide(self):
        points = noise(40, 6) + 100
        points[1] = points[0]
        points[2] = points[0] + 1e-4
        exact = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        exact.fill_diagonal_(math.inf)
        expected = exact.sort(dim=1).values[:, :2]
        torch.testing.assert_close(nearest_two(points), expected, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("dimension", [0.7, 3.0, 40.0])
    def test_ratios_of_exactly_the_papers_distribution(self, dimension: float):
        distribution = torch.arange(1, 201, dtype=torch.float64) / 200
        ratios = (1 - distribution).clamp_min(1e-9) ** (-1 / dimension)
        nearest = torch.stack([torch.full((200,), 0.3, dtype=torch.float64), 0.3 * ratios], dim=1)
        assert twonn_dimension(nearest) == pytest.approx(dimension)

    def test_points_with_an_equal_are_left_out(self):
        nearest = torch.cat([torch.zeros(30, 2), torch.ones(10, 2)]).double()
        assert twonn_dimension(nearest) is None

    def test_latents_on_a_plane_and_on_a_five_dimensional_one(self):
        for dimension in (2, 5):
            coordinates = torch.rand(500, dimension, generator=torch.Generator().manual_seed(1))
            latents = (coordinates @ noise(dimension, 3 * 4 * 5, seed=2)).view(500, 3, 4, 5)
            figures = measure("geometry", of_latents(latents)).figures
            assert figures["values"] == 60
            assert figures["intrinsic_dimension"] == pytest.approx(dimension, rel=0.15)
            assert figures["images_with_equal_latents"] == 0
