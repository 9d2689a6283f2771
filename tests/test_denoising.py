from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from wavelatent.common.denoising import (
    EDMPreconditioning,
    EpsPreconditioning,
    FlowPreconditioning,
    Preconditioning,
    VPreconditioning,
    denoise_with,
    denoising_loss,
    expand_like,
)

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)


class Paper(NamedTuple):
    """An objective as its paper writes it: ``input = a clean + b noise`` and ``target = c clean + d noise``."""

    preconditioning: Preconditioning
    coefficients: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    """sigma [B] -> a, b, c, d, each [B]."""


def edm(sigma_data: float) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    def coefficients(sigma):  # EDM equation 8: the input c_in (y + n), the target (y - c_skip (y + n)) / c_out
        root = (sigma**2 + sigma_data**2).sqrt()
        return 1 / root, sigma / root, sigma / (sigma_data * root), -sigma_data / root

    return coefficients


def flow(sigma):
    t = sigma / (1 + sigma)
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def angle(sigma):  # alpha = cos(phi) and beta = sin(phi) of Salimans & Ho, appendix D
    phi = sigma.atan()
    return phi.cos(), phi.sin()


def eps(sigma):
    return *angle(sigma), torch.zeros_like(sigma), torch.ones_like(sigma)


def v(sigma):
    alpha, beta = angle(sigma)
    return alpha, beta, -beta, alpha


PAPERS = {
    "edm": Paper(EDMPreconditioning(1.0), edm(1.0)),
    "edm, sigma_data 0.5": Paper(EDMPreconditioning(0.5), edm(0.5)),
    "flow": Paper(FlowPreconditioning(), flow),
    "flow, other labels": Paper(FlowPreconditioning(label_origin=2.0), flow),
    "eps": Paper(EpsPreconditioning(), eps),
    "v": Paper(VPreconditioning(), v),
}
papers = pytest.mark.parametrize("paper", PAPERS.values(), ids=list(PAPERS))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@papers
def test_the_best_network_makes_the_best_denoiser(paper):
    """Of Gaussian data, E[target | input] is a regression in closed form, and E[clean | x] the posterior mean."""
    mean, std = 0.3 * draw(3, 4, 5, seed=1), draw(3, 4, 5, seed=2).exp()
    seen = []

    def best(network_input, noise_label, labels):
        assert labels is None
        a, b, c, d = (expand_like(f, network_input) for f in paper.coefficients(SIGMAS))
        slope = (a * c * std**2 + b * d) / (a**2 * std**2 + b**2)
        seen.append(noise_label)
        return c * mean + slope * (network_input - a * mean)

    x = 3 * draw(len(SIGMAS), 3, 4, 5)
    denoised = denoise_with(best, paper.preconditioning, x, SIGMAS)
    noise = expand_like(SIGMAS, x) ** 2
    torch.testing.assert_close(denoised, (std**2 * x + noise * mean) / (std**2 + noise), rtol=1e-6, atol=1e-6)
    assert (seen[0].diff() > 0).all()  # the network can tell the levels apart


@papers
def test_the_weighted_loss_is_the_papers_own(paper):
    clean, noise, output = draw(6, 3, 4, 5, seed=1), draw(6, 3, 4, 5, seed=2), draw(6, 3, 4, 5, seed=3)
    a, b, c, d = (expand_like(f, clean) for f in paper.coefficients(SIGMAS))

    def network(network_input, noise_label, labels):
        torch.testing.assert_close(network_input, a * clean + b * noise)
        return output

    noisy = clean + expand_like(SIGMAS, clean) * noise
    denoised = denoise_with(network, paper.preconditioning, noisy, SIGMAS)
    own = (output - (c * clean + d * noise)).square().mean((1, 2, 3))
    loss = denoising_loss(denoised, clean, paper.preconditioning.weight(SIGMAS))
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=0)


def test_v_is_edm_for_unit_variance_with_the_sign_turned():
    (skip, out, c_in, label), of_edm = VPreconditioning().scalings(SIGMAS), EDMPreconditioning(1.0).scalings(SIGMAS)
    torch.testing.assert_close((skip, -out, c_in, label), tuple(of_edm))


def test_the_label_is_a_quarter_of_the_logarithm_in_units_of_its_origin():
    for kind in (EDMPreconditioning, FlowPreconditioning, EpsPreconditioning, VPreconditioning):
        label = kind(label_origin=0.5).scalings(0.5 * SIGMAS).noise
        torch.testing.assert_close(label, SIGMAS.log() / 4)


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
