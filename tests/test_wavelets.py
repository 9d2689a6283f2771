"""The wavelet transform against PyWavelets and ptwt, and that nothing of the image is lost in it."""

import numpy as np
import ptwt
import pytest
import pywt
import torch

from wavelatent.stage1_autoencoder.wavelets import haar_bands, wavelet_levels


def images(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(2, 3, 16, 24, generator=generator) * 2 - 1).to(dtype)


def pywt_bands(x, wavelet):
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), wavelet, mode="periodic")
    return np.concatenate([low, horizontal, vertical, diagonal], axis=1)


def test_the_haar_form_equals_pywavelets_and_ptwt():
    x = images(torch.float64)
    bands = haar_bands(x)
    np.testing.assert_allclose(bands.numpy(), pywt_bands(x, "haar"), atol=1e-14)
    low, details = ptwt.wavedec2(x, "haar", level=1)
    torch.testing.assert_close(bands, torch.cat([low, *details], dim=1), atol=1e-14, rtol=0)


def test_haar_reconstructs_perfectly_through_pywavelets():
    x = images(torch.float64)
    low, *details = haar_bands(x).numpy().reshape(2, 4, 3, 8, 12).swapaxes(0, 1)
    np.testing.assert_allclose(pywt.idwt2((low, tuple(details)), "haar"), x.numpy(), atol=1e-14)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4", "bior2.2"])
def test_other_families_keep_pywavelets_coefficients_and_halve_exactly(wavelet):
    x = images()
    fine = wavelet_levels(x, 1, wavelet)[0]
    assert fine.shape == (2, 12, 8, 12)
    np.testing.assert_allclose(2 * fine.numpy(), pywt_bands(x, wavelet)[:, :, :8, :12], atol=1e-5)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_orthogonal_families_keep_the_energy_so_no_coefficient_is_lost_by_cropping(wavelet):
    x = images()
    bands = 2 * wavelet_levels(x, 1, wavelet)[0]
    torch.testing.assert_close(bands.square().sum(), x.square().sum(), rtol=1e-5, atol=0)


def test_each_level_is_scaled_so_that_ll_is_the_block_mean():
    x = images()
    for level, bands in enumerate(wavelet_levels(x, 3), start=1):
        assert bands.shape == (2, 12, 16 // 2**level, 24 // 2**level)
        block_mean = torch.nn.functional.avg_pool2d(x, 2**level)
        torch.testing.assert_close(bands[:, :3], block_mean, atol=1e-6, rtol=0)


def test_it_is_float32_under_autocast_and_refuses_odd_sizes():
    x = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wavelet_levels(x, 2, "db2")[0].dtype == torch.float32
        torch.testing.assert_close(wavelet_levels(x.bfloat16(), 2)[1], wavelet_levels(x.bfloat16().float(), 2)[1])
    with pytest.raises(ValueError, match="divisible by 8, got 16x20"):
        wavelet_levels(x[..., :20], 3)


def test_haar_levels_in_float32_equal_ptwts():
    x = images()
    low, coarsest, *_ = ptwt.wavedec2(x, "haar", level=3)
    expected = torch.cat([low, *coarsest], dim=1) / 2**3
    torch.testing.assert_close(wavelet_levels(x, 3, "haar")[2], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wavelet", ["db6", "bior3.9", "db38"])
def test_filters_longer_than_the_image_wrap_around_it(wavelet):
    x = images()[..., :12]
    assert pywt.Wavelet(wavelet).dec_len > 8
    np.testing.assert_allclose(
        2 * wavelet_levels(x, 1, wavelet)[0].numpy(), pywt_bands(x, wavelet)[:, :, :8, :6], atol=1e-5
    )
    assert wavelet_levels(x, 2, wavelet)[1].shape == (2, 12, 4, 3)
