"""The one contract between denoisers, objectives and samplers, and the preconditioning of EDM.

Everything here is written in the variance-exploding frame of EDM (Karras et al. 2022, arXiv 2206.00364): ``x = clean +
sigma * noise``, and a *denoiser* is a function ``denoise(x, sigma, labels) -> E[clean | x]``. Other parametrisations
(flow, eps, v) differ only in their `Scalings` and in the distribution of ``sigma`` during training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Denoise(Protocol):
    """``(x [B, C, h, w], sigma [B], labels [B] int64 or None) -> denoised [B, C, h, w]``."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Return the expectation of the clean signal given ``x`` at noise level ``sigma``."""
        ...


class Network(Protocol):
    """What a denoiser wraps: ``(scaled input [B, C, h, w], noise label [B], labels) -> [B, C, h, w]``."""

    def __call__(self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Return the raw output F of the network."""
        ...


class Scalings(NamedTuple):
    """The four functions of sigma of EDM equation 7, each ``[B]``."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Preconditioning(Protocol):
    """Scalings and loss weight as functions of the noise level."""

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out, c_in and c_noise at ``sigma [B]``."""
        ...

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the loss weight lambda(sigma), ``[B]``."""
        ...


@dataclass(frozen=True)
class EDMPreconditioning:
    """EDM's preconditioning (table 1, last column) for data of standard deviation ``sigma_data``.

    It follows from three demands (appendix B.6): the network's input and its training target have unit variance at
    every sigma, and c_out, which amplifies the network's errors, is as small as possible. The loss weight makes
    ``weight * c_out^2 = 1``.
    """

    sigma_data: float = 0.5

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out, c_in and c_noise = ln(sigma) / 4 at ``sigma [B] > 0``."""
        variance = sigma**2 + self.sigma_data**2
        return Scalings(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data * variance.rsqrt(),
            input=variance.rsqrt(),
            noise=sigma.log() / 4,
        )

    def weight(self, sigma: Tensor) -> Tensor:
        """Return lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2, ``[B]``."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


def expand_like(sigma: Tensor, x: Tensor) -> Tensor:
    """Return ``sigma [B]`` as ``[B, 1, ..., 1]``, with the rank of ``x [B, ...]``."""
    assert sigma.shape == x.shape[:1], f"one sigma per sample: sigma {tuple(sigma.shape)}, x {tuple(x.shape)}"
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def denoise_with(
    network: Network, preconditioning: Preconditioning, x: Tensor, sigma: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), EDM equation 7.

    The network's output is brought back to the type of ``x`` before it is scaled, so that an autocast network costs no
    precision in the skip path.
    """
    scalings = preconditioning.scalings(sigma)
    output = network(expand_like(scalings.input, x) * x, scalings.noise, labels).to(x.dtype)
    return expand_like(scalings.skip, x) * x + expand_like(scalings.out, x) * output


def denoising_loss(denoised: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight * mean squared error`` per sample, ``[B]`` (EDM equation 2 with the mean over elements)."""
    return weight * (denoised - clean).square().flatten(1).mean(1)
