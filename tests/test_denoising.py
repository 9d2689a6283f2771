import pytest
import torch

from wavelatent.common.denoising import EDMPreconditioning, denoise_with, denoising_loss, expand_like

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_network_input_and_target_have_unit_variance(sigma_data):
    scalings = EDMPreconditioning(sigma_data).scalings(SIGMAS)
    # Appendix B.6, with clean ~ sigma_data * normal: Var[c_in (clean + noise)] = 1 ...
    torch.testing.assert_close(scalings.input**2 * (sigma_data**2 + SIGMAS**2), torch.ones_like(SIGMAS))
    # ... and the target (clean - c_skip (clean + noise)) / c_out has variance 1.
    target_variance = ((1 - scalings.skip) ** 2 * sigma_data**2 + scalings.skip**2 * SIGMAS**2) / scalings.out**2
    torch.testing.assert_close(target_variance, torch.ones_like(SIGMAS))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_c_skip_minimises_c_out_and_the_weight_evens_out_the_loss(sigma_data):
    preconditioning = EDMPreconditioning(sigma_data)
    scalings = preconditioning.scalings(SIGMAS)

    def c_out_squared(skip):  # the variance of clean - skip * x, which the network's unit-variance output must cover
        return (1 - skip) ** 2 * sigma_data**2 + skip**2 * SIGMAS**2

    torch.testing.assert_close(c_out_squared(scalings.skip), scalings.out**2)
    for nudge in (-1e-3, 1e-3):
        assert (c_out_squared(scalings.skip + nudge) > scalings.out**2).all()
    torch.testing.assert_close(preconditioning.weight(SIGMAS) * scalings.out**2, torch.ones_like(SIGMAS))


def test_edm_limits():
    low, high = EDMPreconditioning(1.0).scalings(torch.tensor([1e-4, 1e4], dtype=torch.float64)).skip
    assert low == pytest.approx(1, abs=1e-7)
    assert high == pytest.approx(0, abs=1e-7)


def test_denoise_with_a_network_that_returns_its_input():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    denoised = denoise_with(lambda x, noise_label, labels: x, EDMPreconditioning(1.0), x, sigma)
    for row, s in enumerate([0.5, 2.0]):  # c_skip + c_out c_in = (1 + s) / (1 + s^2)
        torch.testing.assert_close(denoised[row], x[row] * (1 + s) / (1 + s**2))


def test_the_loss_is_per_sample_and_weighted():
    clean = torch.zeros(2, 3, 4, 5)
    denoised = torch.ones(2, 3, 4, 5) * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    loss = denoising_loss(denoised, clean, torch.tensor([10.0, 100.0]))
    torch.testing.assert_close(loss, torch.tensor([10.0, 900.0]))


def test_expand_like_refuses_a_sigma_that_would_broadcast_along_the_width():
    with pytest.raises(AssertionError):
        expand_like(torch.ones(5), torch.ones(2, 3, 4, 5))
    assert expand_like(torch.ones(2), torch.ones(2, 3, 4, 5)).shape == (2, 1, 1, 1)
