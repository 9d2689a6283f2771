"""Perturbations keep their laws: what they add, drop, move or transform, how often, and when."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from wavelatent.stage1_autoencoder.local_jitter import shift_sources, swap_sources
from wavelatent.stage1_autoencoder.perturbation_settings import ScheduleConfig
from wavelatent.stage1_autoencoder.perturbations import PERTURBATIONS, PerturbationConfig, Perturbations

EXAMPLES = {
    "gaussian": {"std": 0.3},
    "uniform_gaussian": {"max_std": 0.9},
    "interpolative": {"gamma": 3.0},
    "spatial_dropout": {"rate": 0.4},
    "channel_dropout": {"rate": 0.4},
    "prefix_mask": {"min_channels": 2},
    "local_jitter": {"rate": 0.5, "radius": 2},
    "scale_equivariance": {"min_scale": 0.5},
    "rotation_equivariance": {},
}
SAME_SHAPE = [kind for kind in EXAMPLES if "equivariance" not in kind]


def make(kind: str, **settings) -> Perturbations:
    settings = {"kind": kind, "probability": 1.0} | EXAMPLES[kind] | settings
    return Perturbations([TypeAdapter(PerturbationConfig).validate_python(settings)]).train()


def draw(kind: str, latents: torch.Tensor, **settings) -> torch.Tensor:
    torch.manual_seed(0)
    return make(kind, **settings)(latents, torch.zeros(1))[0]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def latents_and_images() -> tuple[torch.Tensor, torch.Tensor]:
    return noise(2, 5, 4, 6), noise(2, 3, 16, 24)


def numbered(batch: int, height: int, width: int) -> torch.Tensor:
    """Latents of two channels that hold each site's number, and that number and a thousand."""
    sites = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    return torch.cat([sites, sites + 1000], dim=1).repeat(batch, 1, 1, 1)


def test_the_examples_cover_the_table():
    assert EXAMPLES.keys() == PERTURBATIONS.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_evaluation_and_probability_zero_change_nothing(kind):
    latents, images = latents_and_images()
    for perturbations in (make(kind).eval(), make(kind, probability=0.0), make(kind, schedule={"end": 0.5})):
        assert perturbations(latents, images) == (latents, images)  # the very same tensors
    torch.manual_seed(0)  # some draw nothing to change now and then
    changed, target = make(kind)(latents, images)
    assert changed.shape != latents.shape or not torch.equal(changed, latents)
    f = target.shape[-2] // changed.shape[-2]
    assert target.shape == (2, 3, f * changed.shape[-2], f * changed.shape[-1])
    assert f == 4


@pytest.mark.parametrize("kind", EXAMPLES)
def test_gradients_reach_the_latents_under_autocast(kind):
    latents, images = latents_and_images()
    latents.requires_grad_()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changed, _ = make(kind)(latents, images)
    assert changed.dtype == torch.float32
    changed.square().sum().backward()
    assert latents.grad.isfinite().all()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", SAME_SHAPE)
def test_the_probability_is_that_of_an_image(kind):
    latents = noise(3000, 4, 2, 3)
    settings = {"min_channels": 1} if kind == "prefix_mask" else {}
    always, sometimes = (draw(kind, latents, probability=p, **settings) for p in (1.0, 0.25))
    share = [(x != latents).flatten(1).any(dim=1).float().mean().item() for x in (always, sometimes)]
    assert share[1] / share[0] == pytest.approx(0.25, abs=0.03)
    assert share[0] > 0.7


@pytest.mark.parametrize("kind", ["scale_equivariance", "rotation_equivariance"])
def test_the_probability_of_an_equivariance_is_that_of_a_batch(kind):
    torch.manual_seed(0)
    perturbations = make(kind, probability=0.25)
    latents, images = latents_and_images()
    changed = [perturbations(latents, images)[0] is not latents for _ in range(1000)]
    assert sum(changed) / 1000 == pytest.approx(0.25, abs=0.05)


def test_the_schedule_starts_ramps_and_ends():
    schedule = ScheduleConfig(start=0.2, ramp=0.4, end=0.8)
    expected = {0: 0, 0.19: 0, 0.2: 0, 0.3: 0.25, 0.5: 0.75, 0.6: 1, 0.79: 1, 0.8: 0, 1: 0}
    assert {p: schedule.factor(p) for p in expected} == pytest.approx(expected)
    assert [ScheduleConfig().factor(p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [ScheduleConfig(start=0.5).factor(p) for p in (0.49, 0.5, 1)] == [0, 1, 1]
    with pytest.raises(ValidationError, match=r"end 0\.3 must come after start 0\.5"):
        ScheduleConfig(start=0.5, end=0.3)


def test_the_schedule_multiplies_the_probability():
    perturbations = make("gaussian", probability=0.5, schedule={"ramp": 0.8})
    perturbations.progress = 0.4
    torch.manual_seed(0)
    changed, _ = perturbations(torch.zeros(4000, 1, 1, 2), torch.zeros(1))
    assert (changed[:, 0, 0, 0] != 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_perturbations_compose_in_order():
    configs = [{"kind": "gaussian", "std": 1.0}, {"kind": "spatial_dropout", "rate": 1.0}]
    for order, is_zero in ((configs, True), (configs[::-1], False)):
        parsed = TypeAdapter(tuple[PerturbationConfig, ...]).validate_python(order)
        changed, _ = Perturbations(parsed).train()(torch.ones(2, 3, 4, 5), torch.zeros(1))
        assert bool((changed == 0).all()) == is_zero


def test_gaussian_noise_adds_its_variance():
    added = draw("gaussian", noise(200, 3, 4, 5), std=0.3) - noise(200, 3, 4, 5)
    assert added.std().item() == pytest.approx(0.3, rel=0.03)
    assert added.mean().item() == pytest.approx(0, abs=0.01)


def test_uniform_gaussian_noise_has_a_uniform_strength_per_image():
    std = draw("uniform_gaussian", torch.zeros(1000, 4, 10, 12), max_std=0.9).flatten(1).std(dim=1)
    assert std.mean().item() == pytest.approx(0.45, abs=0.03)
    assert std.square().mean().item() == pytest.approx(0.9**2 / 3, rel=0.08)
    assert std.max() < 1.0


def test_interpolative_noise_goes_from_the_latent_to_gamma_times_noise():
    latents, generator_seed = torch.full((1000, 4, 10, 12), 5.0), 0
    changed = draw("interpolative", latents, gamma=3.0)
    torch.manual_seed(generator_seed)
    without = draw("interpolative", latents, gamma=0.0)  # the same tau, and no noise
    tau = 1 - without.mean(dim=(1, 2, 3)) / 5
    assert tau.mean().item() == pytest.approx(0.5, abs=0.03)
    assert tau.square().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert 0 <= tau.min() < 0.01 < 0.99 < tau.max() <= 1  # both ends are reached
    strength = (changed - without).flatten(1).std(dim=1)
    torch.testing.assert_close(strength, 3 * tau, rtol=0.15, atol=1e-3)


def test_spatial_dropout_takes_whole_sites_and_leaves_the_rest_as_it_is():
    changed = draw("spatial_dropout", torch.full((100, 3, 8, 10), 2.0), rate=0.4)
    assert set(changed.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert (changed == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)


def test_channel_dropout_takes_whole_channels():
    changed = draw("channel_dropout", torch.full((300, 20, 2, 3), 2.0), rate=0.4)
    assert set(changed.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(changed, changed[:, :, :1, :1].expand_as(changed))
    assert (changed == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)


def test_a_prefix_of_channels_is_kept_each_length_as_often():
    changed = draw("prefix_mask", torch.full((4000, 5, 2, 3), 2.0), min_channels=2)
    kept = (changed[:, :, 0, 0] == 2).sum(dim=1)
    expected = 2.0 * (torch.arange(5) < kept[:, None])
    assert torch.equal(changed, expected[:, :, None, None].expand_as(changed))
    shares = torch.bincount(kept, minlength=6) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 0, 1, 1, 1, 1]) / 4, atol=0.03, rtol=0)


@pytest.mark.parametrize("mode", ["shift", "swap"])
def test_jitter_moves_whole_sites_within_its_radius(mode):
    height, width, radius = 7, 9, 2
    changed = draw("local_jitter", numbered(300, height, width), mode=mode, radius=radius, rate=0.5)
    assert torch.equal(changed[:, 0] + 1000, changed[:, 1])
    source, here = changed[:, 0].long(), torch.arange(height * width).view(height, width)
    rows, columns = (source // width - here // width).abs(), (source % width - here % width).abs()
    assert (rows.max(), columns.max()) == (radius, radius)
    # Under swap, of a tile of 3 x 3 sites one has no partner, and less of a tile cut off by the border may have none.
    share = (source != here).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.01) if mode == "shift" else 0.4 < share < 0.5


def test_a_shift_chooses_among_the_others_alike():
    sources = shift_sources(20000, 3, 4, 1, 1.0)
    for site, neighbours in ((0, {1, 4, 5}), (5, {0, 1, 2, 4, 6, 8, 9, 10}), (7, {2, 3, 6, 10, 11})):
        shares = torch.bincount(sources[:, site], minlength=12) / 20000
        expected = torch.tensor([1 / len(neighbours) if s in neighbours else 0.0 for s in range(12)])
        torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(("radius", "rate"), [(1, 0.3), (2, 1.0), (3, 1.0), (9, 1.0)])
def test_a_swap_exchanges_pairs(radius, rate):
    sources = swap_sources(50, 6, 10, radius, rate)
    sites = torch.arange(60).expand_as(sources)
    assert torch.equal(sources.gather(1, sources), sites)  # so it is a permutation of cycles of two
    if radius == 1:  # pairs are complete except at the border
        assert 0.2 < (sources != sites).float().mean() <= 0.32


@pytest.mark.parametrize("mode", ["shift", "swap"])
def test_jitter_of_a_single_site_is_the_identity(mode):
    assert torch.equal(draw("local_jitter", numbered(2, 1, 1), mode=mode, rate=1.0), numbered(2, 1, 1))


def encode(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, 4)


def test_decoding_the_turned_latent_of_an_equivariant_autoencoder_gives_the_turned_image():
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents, scale_factor=4.0)

    images = decode(noise(2, 3, 4, 6))  # what it can reconstruct
    shapes = set()
    torch.manual_seed(0)
    for _ in range(12):
        latents, target = make("rotation_equivariance")(encode(images), images)
        torch.testing.assert_close(decode(latents), target)
        shapes.add(tuple(latents.shape[-2:]))
    assert shapes == {(4, 6), (6, 4)}  # half turns and quarter turns


def test_decoding_the_scaled_latent_of_an_equivariant_autoencoder_gives_the_scaled_image():
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents, scale_factor=4.0, mode="bilinear")

    def inside(images: torch.Tensor) -> torch.Tensor:
        return images[..., 8:-8, 8:-8]  # at the border, interpolation runs out of sites

    down, across = torch.linspace(-1, 1, 64)[:, None], torch.linspace(0, 1, 96)
    images = torch.stack([down + across, down - 3 * across, across.expand(64, 96)])[None]
    torch.testing.assert_close(inside(decode(encode(images))), inside(images))  # ramps: it reconstructs them
    torch.manual_seed(0)
    sizes = set()
    for _ in range(120):
        latents, target = make("scale_equivariance", min_scale=0.5)(encode(images), images)
        height, width = size = tuple(latents.shape[-2:])
        exact = size == (8, 12)  # at other factors, antialiasing weighs a ramp's values a little unevenly
        tolerance = {} if exact else {"atol": 0.03, "rtol": 0}
        torch.testing.assert_close(inside(decode(latents)), inside(target), **tolerance)
        assert abs(width - 1.5 * height) < 1  # both sides have the same factor
        sizes.add(size)
    assert {width for _, width in sizes} == set(range(12, 24))
    assert (8, 12) in sizes


def test_a_latent_that_cannot_shrink_stays():
    latents, images = noise(2, 5, 1, 1), noise(2, 3, 4, 4)
    assert make("scale_equivariance")(latents, images) == (latents, images)
