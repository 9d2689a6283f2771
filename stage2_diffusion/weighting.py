"""How much the error at each noise level counts: weights on the mean squared error of the denoised estimate.

Every kind but ``network`` is a function of the signal-to-noise ratio alone, ``SNR = sigma_data^2 / sigma^2``, whatever
the network predicts, and stands in papers about another prediction as that function divided by SNR (the noise) or by
SNR + 1 (v). With one of them, every objective minimises the same loss at a given noise level; they still differ in
which levels they draw. The SNR is that of the noise that is there: a noise shift moves no weight. Adding one costs a
config, a function and a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from ..common.config import Config
from ..common.denoising import Preconditioning, Scalings


class NetworkWeightingConfig(Config):
    """All noise levels count the same in the loss of the network's target, as the papers of EDM, flow, eps and v do."""

    kind: Literal["network"] = "network"


class MinSNRConfig(Config):
    """Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556): the weight of the clean signal's own SNR, but no more."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(5.0, gt=0, allow_inf_nan=False)
    """The largest weight, reached below ``sigma = sigma_data / sqrt(gamma)``. The default is the paper's."""


class SoftMinSNRConfig(Config):
    """Soft-min-SNR (Crowson et al. 2024, arXiv 2401.11605): min-SNR without the kink."""

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The weight in the limit of no noise. The authors take SNR as 1 / sigma^2 of images of standard deviation 0.5, and
    their gamma of 4 is 1 for data of variance 1."""


class SigmoidConfig(Config):
    """The sigmoid of log-SNR (Kingma & Gao 2023, arXiv 2303.00848; Hoogeboom et al. 2024, arXiv 2410.19324).

    The papers weigh the loss per unit of log-SNR, and so divide by the density that the levels are drawn from; here the
    objective's density is left as it is. Then it is soft-min-SNR with ``gamma = e^bias`` under another name.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float = Field(-1.0, allow_inf_nan=False)
    """The log-SNR at which the weight on the error of the predicted noise is one half. The default is ours: the papers'
    values are for pixels, lower for larger images."""


WeightingConfig = Annotated[
    NetworkWeightingConfig | MinSNRConfig | SoftMinSNRConfig | SigmoidConfig, Field(discriminator="kind")
]


def min_snr(snr: Tensor, config: MinSNRConfig) -> Tensor:
    """Return min(SNR, gamma) with the clean signal as the target, shaped like ``snr``."""
    return snr.clamp(max=config.gamma)


def soft_min_snr(snr: Tensor, config: SoftMinSNRConfig) -> Tensor:
    """Return SNR gamma / (SNR + gamma), half the harmonic mean of both, shaped like ``snr``."""
    return snr * config.gamma / (snr + config.gamma)


def sigmoid(snr: Tensor, config: SigmoidConfig) -> Tensor:
    """Return SNR times the sigmoid of ``bias - ln SNR``; the papers weigh the noise's error, SNR times the signal's."""
    return snr * (config.bias - snr.log()).sigmoid()


SNRWeight = Callable[[Tensor, Any], Tensor]
"""``(SNR [B], the config of its kind) -> weight [B]``."""

WEIGHTINGS: dict[str, SNRWeight | None] = {
    "network": None,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "sigmoid": sigmoid,
}
"""Weights by kind; None is the preconditioning's own."""


@dataclass(frozen=True)
class Weighted:
    """A preconditioning with a loss weight that is a function of SNR; the scalings stay."""

    preconditioning: Preconditioning
    snr_weight: SNRWeight
    config: WeightingConfig
    sigma_data: float = 1.0
    """Standard deviation of the data: the error is counted in units of its variance."""

    def scalings(self, sigma: Tensor) -> Scalings:
        """Return c_skip, c_out, c_in and c_noise at ``sigma [B]``."""
        return self.preconditioning.scalings(sigma)

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the weight on the error of the denoised estimate at ``sigma [B]``."""
        return self.snr_weight((self.sigma_data / sigma) ** 2, self.config) / self.sigma_data**2


def weighted(preconditioning: Preconditioning, config: WeightingConfig, sigma_data: float = 1.0) -> Preconditioning:
    """Return ``preconditioning`` with the loss weight that ``config`` describes."""
    snr_weight = WEIGHTINGS[config.kind]
    return preconditioning if snr_weight is None else Weighted(preconditioning, snr_weight, config, sigma_data)
