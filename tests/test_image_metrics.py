import math

import numpy as np
import pytest
import torch

from wavelatent.common.image_metrics import psnr, ssim


def _pair(batch: int = 2, height: int = 19, width: int = 26) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (batch, 3, height, width), generator=generator)
    noise = torch.randint(-40, 41, first.shape, generator=generator)
    return first.to(torch.uint8), (first + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_of_a_constant_error_is_the_closed_form():
    images = torch.full((3, 3, 5, 7), 100, dtype=torch.uint8)
    target = images + torch.tensor([1, 2, 10], dtype=torch.uint8).view(3, 1, 1, 1)
    expected = [20 * math.log10(255 / error) for error in (1, 2, 10)]
    assert psnr(images, target).tolist() == pytest.approx(expected, abs=1e-12)


def test_psnr_does_not_wrap_around_in_uint8():
    black, white = torch.zeros(1, 3, 4, 6, dtype=torch.uint8), torch.full((1, 3, 4, 6), 255, dtype=torch.uint8)
    assert psnr(black, white).item() == 0.0


def test_identical_images_have_a_finite_psnr_and_an_ssim_of_one():
    images, _ = _pair()
    assert psnr(images, images).tolist() == [100.0, 100.0]
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_ssim_is_scikit_images_with_wangs_settings():
    skimage_metrics = pytest.importorskip("skimage.metrics")
    images, target = _pair()
    expected = [
        skimage_metrics.structural_similarity(
            np.moveaxis(a.numpy(), 0, -1),
            np.moveaxis(b.numpy(), 0, -1),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=-1,
        )
        for a, b in zip(images, target, strict=True)
    ]
    assert ssim(images, target).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_is_not_a_pair_of_uint8_images_is_refused(metric):
    images, target = _pair()
    with pytest.raises(ValueError, match="shape"):
        metric(images, target[:, :, :-1])
    with pytest.raises(ValueError, match="uint8"):
        metric(images.float(), target)


def test_ssim_names_its_smallest_image():
    images, target = _pair(height=10)
    with pytest.raises(ValueError, match="11 px"):
        ssim(images, target)
