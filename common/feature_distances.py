"""Distances between two sets of image features: Fréchet (FID) and kernel (KID)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WavelatentError
from .torchvision_import import ensure_torchvision

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
KID_SEED = 2020  # torch-fidelity's, so that equal features give equal figures
_BLOCK = 1024


class FeatureStatistics:
    """Count, mean and covariance of features, gathered as float64 sums: order and batch size do not matter.

    Args:
        dim: the number of features.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Return the statistics of features ``[N, dim]``."""
        statistics = cls(features.shape[1])
        for block in features.split(_BLOCK):
            statistics.update(block)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add features ``[B, dim]``."""
        features = features.detach().to("cpu", torch.float64)
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.outer += features.T @ features

    @property
    def mean(self) -> Tensor:
        """The mean ``[dim]``."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance ``[dim, dim]``; needs two images."""
        if self.count < 2:
            raise WavelatentError(f"a covariance needs at least 2 images, got {self.count}: ask for more images")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


class FrechetReference:
    """One side of many Fréchet distances: the factor of its covariance is computed once (seconds at 2048).

    With ``F F^T = S1``, the eigenvalues of ``F^T S2 F`` are those of ``S1 S2``, and real; ``F`` has as many columns
    as the covariance has rank, so a side with fewer images than features makes everything smaller.

    Args:
        statistics: of the reference, at least 2 images.
    """

    def __init__(self, statistics: FeatureStatistics) -> None:
        self.count, self.mean = statistics.count, statistics.mean
        covariance = statistics.covariance
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > _noise(values)
        kept[-1] = True  # of images that are all alike one column of zeros is left
        self._factor = vectors[:, kept] * _root_of(values)[kept]  # [dim, rank]
        self._trace = covariance.trace()

    def distance(self, samples: FeatureStatistics | Tensor) -> float:
        """Return the Fréchet distance to samples, given by their statistics or as features ``[N, dim]``.

        Features of fewer images than dimensions are exact too, and faster: the eigenvalues are then those of the
        ``N x N`` Gram matrix of the centred features times ``F``.
        """
        if isinstance(samples, Tensor) and len(samples) >= samples.shape[1]:
            samples = FeatureStatistics.of(samples)
        if isinstance(samples, FeatureStatistics):
            covariance = samples.covariance
            mean, trace, product = samples.mean, covariance.trace(), self._factor.T @ covariance @ self._factor
        else:
            mean, centred = _centred(samples)
            projected = centred @ self._factor
            trace, product = centred.square().sum(), projected @ projected.T
        trace_of_root = _root_of(torch.linalg.eigvalsh(product)).sum()
        return float((mean - self.mean).square().sum() + self._trace + trace - 2 * trace_of_root)

    def influence(self, samples: Tensor) -> Tensor:
        """Return how much each image of samples ``[N, dim]`` pulls at the distance, ``[N]`` float64 of mean 0.

        The derivative of the distance in the direction of one image (its influence function, Hampel 1974):
        ``2 (x - m2).(m2 - m1) + N/(N-1) (x - m2)^T (I - F (F^T S2 F)^(-1/2) F^T) (x - m2)``, less its mean. The
        distance of another draw of N images from the same source differs, to first order, by their mean influence.
        """
        count = len(samples)
        if count < samples.shape[1]:
            mean, centred = _centred(samples)
            projected = centred @ self._factor
            values, vectors = torch.linalg.eigh(projected @ projected.T)
            quadratic = centred.square().sum(dim=1) - vectors.square() @ _root_of(values)
            influence = count * quadratic + 2 * (count - 1) ** 0.5 * centred @ (mean - self.mean)
            return influence - influence.mean()
        statistics = FeatureStatistics.of(samples)
        mean, towards = statistics.mean, 2 * (statistics.mean - self.mean)
        values, vectors = torch.linalg.eigh(self._factor.T @ statistics.covariance @ self._factor)
        kept = values > _noise(values)
        basis = self._factor @ (vectors[:, kept] * values[kept] ** -0.25)
        blocks = []
        for block in samples.split(_BLOCK):
            centred = block.double() - mean
            quadratic = centred.square().sum(dim=1) - (centred @ basis).square().sum(dim=1)
            blocks.append(centred @ towards + count / (count - 1) * quadratic)
        influence = torch.cat(blocks)
        return influence - influence.mean()


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return the Fréchet distance between the Gaussians fitted to two sets (Heusel et al. 2017, arXiv 1706.08500).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``. The eigenvalues of ``S1 S2`` are taken from a symmetric matrix: six
    times as fast as the general solver. Where one side is used again, :class:`FrechetReference` is faster still.
    """
    return FrechetReference(first).distance(second)


def _centred(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``[dim]`` and ``X`` ``[N, dim]`` with ``X^T X`` the unbiased covariance."""
    if len(samples) < 2:
        raise WavelatentError(f"a covariance needs at least 2 images, got {len(samples)}: ask for more images")
    features = samples.double()
    mean = features.mean(dim=0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5


def _noise(eigenvalues: Tensor) -> Tensor:
    # Fewer images than features leave zero eigenvalues, which come out as rounding noise; a root would magnify it.
    return eigenvalues.max() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


def _root_of(eigenvalues: Tensor) -> Tensor:
    return torch.where(eigenvalues > _noise(eigenvalues), eigenvalues, 0.0).sqrt()


@dataclass(frozen=True)
class KernelDistance:
    """KID's mean and standard deviation over subsets, and the subsets it was taken over."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = KID_SUBSETS, subset_size: int | None = None, seed: int = KID_SEED
) -> KernelDistance:
    """Return KID (Bińkowski et al. 2018, arXiv 1801.01401) between features ``[N, dim]`` and ``[M, dim]``.

    The unbiased squared MMD under ``(x.y / dim + 1)^3``, averaged over random subsets. ``subset_size`` None is 1000, or
    half of the smaller set where that has fewer than 2000: subsets as large as the set would all be the same one, and
    the deviation zero. The mean does not depend on the subset size.
    """
    ensure_torchvision()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    smaller = min(len(first), len(second))
    size = subset_size or (KID_SUBSET_SIZE if smaller >= 2 * KID_SUBSET_SIZE else smaller // 2)
    if not 2 <= size <= smaller:
        raise WavelatentError(f"KID needs subsets of 2 to {smaller} images, got {size}: ask for more images")
    result = kid_features_to_metric(
        first, second, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return KernelDistance(float(result[KEY_METRIC_KID_MEAN]), float(result[KEY_METRIC_KID_STD]), subsets, size)
