"""The reconstruction losses against answers that can be worked out by hand."""

import functools
import math

import numpy as np
import pytest
import pywt
import torch
from pydantic import ValidationError
from scipy.ndimage import correlate1d

from wavelatent.stage1_autoencoder.losses import (
    HighPassConfig,
    LowPassConfig,
    WaveletCharbonnierConfig,
    gaussian_blur,
    high_pass_l1,
    l1,
    l2,
    low_pass_l2,
    wavelet_charbonnier,
)

EPSILON = 1e-3
LOSSES = {
    "l1": l1,
    "l2": l2,
    "wavelet_charbonnier": functools.partial(wavelet_charbonnier, epsilon=EPSILON, levels=2),
    "high_pass_l1": functools.partial(high_pass_l1, sigma=1.0),
    "low_pass_l2": functools.partial(low_pass_l2, sigma=2.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def checkerboard(amplitude: float) -> torch.Tensor:
    """``+a`` where row and column have the same parity, else ``-a``."""
    rows, columns = torch.arange(12)[:, None], torch.arange(20)[None]
    return amplitude * (1.0 - 2.0 * ((rows + columns) % 2)).expand(2, 3, -1, -1)


def expect(actual: torch.Tensor, value: float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.full((2,), value), rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    ("name", "value"),
    [("l1", 0.3), ("l2", 0.09), ("wavelet_charbonnier", EPSILON), ("high_pass_l1", 0.0), ("low_pass_l2", 0.09)],
)
def test_a_constant_difference_is_low_frequency_only(name, value):
    target = images(0)
    expect(LOSSES[name](target + 0.3, target), value)


def test_a_checkerboard_is_in_the_finest_hh_only():
    target, a = images(0), 0.25
    in_hh = (math.hypot(a, EPSILON) + 2 * EPSILON) / 3
    expect(wavelet_charbonnier(target + checkerboard(a), target, EPSILON, levels=1), in_hh)
    expect(wavelet_charbonnier(target + checkerboard(a), target, EPSILON, levels=2), (in_hh + EPSILON) / 2)


def test_two_pixel_stripes_are_in_the_second_levels_lh_only():
    """Rows ``a, a, -a, -a``: the finest bands see pairs of equal rows, the next one an edge of height 2a."""
    target, a = images(0), 0.25
    stripes = a * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(3)[:, None].expand(2, 3, -1, 20)
    second = (math.hypot(a, EPSILON) + 2 * EPSILON) / 3
    expect(wavelet_charbonnier(target + stripes, target, EPSILON, levels=2), (EPSILON + second) / 2)


def test_charbonnier_takes_pywavelets_details_scaled_by_the_level():
    x, target = images(0), images(1)
    _, *details = pywt.wavedec2((x - target).double().numpy(), "haar", level=2, mode="periodic")
    per_level = [
        np.mean([np.sqrt((band / 2**level) ** 2 + 0.05**2).mean(axis=(1, 2, 3)) for band in bands], axis=0)
        for level, bands in zip((2, 1), details, strict=True)
    ]
    expected = torch.tensor(np.mean(per_level, axis=0)).float()
    torch.testing.assert_close(wavelet_charbonnier(x, target, epsilon=0.05, levels=2), expected)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_the_blur_is_scipys_gaussian_reflected_at_the_pixel(sigma):
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    expected = images(0).double().numpy()
    for axis in (2, 3):
        expected = correlate1d(expected, kernel / kernel.sum(), axis=axis, mode="mirror")
    torch.testing.assert_close(gaussian_blur(images(0), sigma), torch.tensor(expected).float(), rtol=0, atol=1e-6)


def test_high_and_low_pass_are_taken_of_both_images():
    x, target = images(0), images(1)
    blurred, target_blurred = gaussian_blur(x, 1.0), gaussian_blur(target, 1.0)
    high = ((x - blurred) - (target - target_blurred)).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(high_pass_l1(x, target, 1.0), high)
    torch.testing.assert_close(low_pass_l2(x, target, 1.0), (blurred - target_blurred).square().mean(dim=(1, 2, 3)))


def test_high_pass_keeps_a_checkerboard_and_low_pass_removes_it():
    target = images(0)
    fine = target + checkerboard(0.5)
    expect(high_pass_l1(fine, target, 2.0), 0.5, atol=1e-3)
    expect(low_pass_l2(fine, target, 2.0), 0.0, atol=1e-6)


@every_loss
def test_an_images_value_does_not_depend_on_its_neighbours(loss):
    x, target = images(0), images(1)
    together = loss(x, target)
    assert together.shape == (2,)
    assert together[0] != together[1]
    torch.testing.assert_close(together, torch.cat([loss(x[i : i + 1], target[i : i + 1]) for i in range(2)]))


@every_loss
def test_gradients_are_finite_between_equal_images_and_right_elsewhere(loss):
    x, target = images(0).requires_grad_(), images(1)
    loss(x, x.detach()).sum().backward()
    assert x.grad.isfinite().all()
    (gradient,) = torch.autograd.grad(loss(x, target).sum(), x)
    direction = images(2)
    slope = (loss(x + 1e-2 * direction, target) - loss(x - 1e-2 * direction, target)).sum() / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=0.02, atol=2e-3)


@every_loss
def test_it_is_float32_under_autocast_and_from_half_precision_images(loss):
    x, target = images(0).bfloat16(), images(1).bfloat16()
    expected = loss(x.float(), target.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            actual = loss(x.to(dtype), target.to(dtype))
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_loss
def test_images_that_are_no_pair_fail_instead_of_broadcasting(loss):
    with pytest.raises(AssertionError, match="target"):
        loss(images(0), images(1)[:1])


def test_charbonnier_takes_sides_that_do_not_divide():
    """A constant difference has no details, whatever is repeated at its border."""
    x = torch.zeros(2, 3, 13, 22)
    torch.testing.assert_close(wavelet_charbonnier(x + 0.3, x, EPSILON, levels=3), torch.full((2,), EPSILON))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sigma 4 needs sides of at least 13 px, got 12x20"):
        low_pass_l2(images(0), images(1), sigma=4.0)


@pytest.mark.parametrize("config", [WaveletCharbonnierConfig, HighPassConfig, LowPassConfig])
def test_a_term_is_off_by_default_and_its_width_is_positive(config):
    assert config().weight == 0
    width = "epsilon" if config is WaveletCharbonnierConfig else "sigma"
    for wrong in ({"weight": -1.0}, {width: 0.0}):
        with pytest.raises(ValidationError, match="greater than"):
            config(**wrong)
