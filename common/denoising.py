"""The one contract between denoisers, objectives and samplers, and the preconditionings of the objectives.

Everything here is written in the variance-exploding frame of EDM (Karras et al. 2022, arXiv 2206.00364): ``x = clean +
sigma * noise``, and a *denoiser* is a function ``denoise(x, sigma, labels) -> E[clean | x]``. Other parametrisations
(flow, eps, v) differ only in their `Scalings` and in the distribution of ``sigma`` during training. Their papers mix
data and noise as ``z = a * clean + b * noise``; that is ``x = z / a`` with ``sigma = b / a``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
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
class _LogLabelled:
    """What the preconditionings share: the noise label, and a loss weight that evens out the network's own loss."""

    label_origin: float = field(default=1.0, kw_only=True)
    """The noise level whose label is 0. Where all levels are multiplied by a factor and this too, no label changes."""

    def label(self, sigma: Tensor) -> Tensor:
        """Return EDM's c_noise = ln(sigma) / 4, of ``sigma`` in units of ``label_origin``: ``[B]``.

        It is a bijection of whatever time a paper gives its network (t of flow, the index of a discrete schedule), and
        -1.6 to 1.4 over the noise levels of every objective, which suits one and the same network.
        """
        return (sigma / self.label_origin).log() / 4

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out, c_in and c_noise at ``sigma [B] > 0``."""
        raise NotImplementedError

    def weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / c_out^2, ``[B]``: it turns the error of D into the error of the network's output F.

        For then ``weight * (D - clean)^2 = (F - target)^2``, where ``target = (clean - c_skip x) / c_out``.
        """
        return self.scalings(sigma).out ** -2


@dataclass(frozen=True)
class EDMPreconditioning(_LogLabelled):
    """EDM's preconditioning (table 1, last column) for data of standard deviation ``sigma_data``.

    It follows from three demands (appendix B.6): the network's input and its training target have unit variance at
    every sigma, and c_out, which amplifies the network's errors, is as small as possible. The loss weight is
    (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2.
    """

    sigma_data: float = 0.5

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out, c_in and c_noise at ``sigma [B] > 0``."""
        variance = sigma**2 + self.sigma_data**2
        return Scalings(
            skip=self.sigma_data**2 / variance,
            out=sigma * self.sigma_data * variance.rsqrt(),
            input=variance.rsqrt(),
            noise=self.label(sigma),
        )


@dataclass(frozen=True)
class FlowPreconditioning(_LogLabelled):
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): the network predicts the velocity ``noise - clean``.

    The straight path ``z = (1 - t) clean + t noise``, with t = 0 the data as in Esser et al. 2024 (arXiv 2403.03206),
    is ``x = z / (1 - t)`` with ``sigma = t / (1 - t)``. From ``clean = z - t * velocity`` follow the scalings. The loss
    weight is 1 / t^2. The input has variance (1 - t)^2 + t^2 for data of variance 1, between 0.5 and 1.
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip = c_in = 1 / (1 + sigma) = 1 - t, c_out = -t and c_noise at ``sigma [B] > 0``."""
        remaining = 1 / (1 + sigma)
        return Scalings(skip=remaining, out=-sigma * remaining, input=remaining, noise=self.label(sigma))


@dataclass(frozen=True)
class EpsPreconditioning(_LogLabelled):
    """DDPM (Ho et al. 2020, arXiv 2006.11239): the network predicts the noise from data of variance 1.

    The loss weight is 1 / sigma^2 (the paper's L_simple). The network's errors are multiplied by sigma.
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip = 1, c_out = -sigma, c_in = (1 + sigma^2)^(-1/2) and c_noise at ``sigma [B] > 0``."""
        return Scalings(skip=torch.ones_like(sigma), out=-sigma, input=(1 + sigma**2).rsqrt(), noise=self.label(sigma))


@dataclass(frozen=True)
class VPreconditioning(_LogLabelled):
    """v-prediction (Salimans & Ho 2022, arXiv 2202.00512, appendix D): ``v = alpha * noise - beta * clean``.

    Here ``alpha = (1 + sigma^2)^(-1/2)`` and ``beta = sigma * alpha`` are the shares of data and noise at variance 1.
    The scalings are EDM's for ``sigma_data = 1`` with the sign of the output turned. The loss weight is
    (1 + sigma^2) / sigma^2, the paper's "SNR + 1".
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip = alpha^2, c_out = -beta, c_in = alpha and c_noise at ``sigma [B] > 0``."""
        alpha = (1 + sigma**2).rsqrt()
        return Scalings(skip=alpha**2, out=-sigma * alpha, input=alpha, noise=self.label(sigma))


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
