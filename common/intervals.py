"""How far the figures of one evaluation can be trusted: 95 % intervals, and FID without the bias of small samples.

The reference is part of the protocol and stays as it is. An interval says where the figure of another equally large
set of samples from the same source, measured against the same reference, would lie on average. It knows nothing of the
training's randomness, nor of the bias that a finite set gives to FID.

Every draw is keyed: the same features and seed give the same bits. With 5,000 samples and references of 2048 features,
one core takes 7 s for FID's interval, 14 s for its extrapolation, 2 s for KID's, and 6 s for the other four.

Simulated with Gaussian features (4 to 32 dimensions; equal, shifted and scaled distributions), nominal 95 % intervals
held the expected figure in 87 to 100 % of the cases from 200 samples on. With 90 samples KID's, whose figures are
skewed, did in 83 to 88 %, and a precision within 1 % of its bound in 88 %. Coverage's are up to 1.6 times too wide, as
are FID's up to 1.5 times where there are few images or no difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WavelatentError
from .feature_distances import FeatureStatistics, FrechetReference, KernelDistance
from .manifolds import at_most, figures_of_parts
from .randomness import generator

REPLICATES = 1000
"""Resamplings of a mean."""
HALVES = 100
"""Random halves of the samples, of which precision, recall, density and coverage are taken."""
PARTITIONS = 4
"""FID is extrapolated from sets of N, N/2, ... N/PARTITIONS images."""
_NORMAL_975 = 1.959964
_BLOCK = 1000


@dataclass(frozen=True)
class Interval:
    """A 95 % interval around a figure."""

    low: float
    high: float


@dataclass(frozen=True)
class Extrapolated:
    """A figure at infinitely many images: the intercept of a line through figures at several numbers of them.

    Attributes:
        value: the intercept, at 1/N = 0.
        slope: of the figure over 1/N.
        error: the standard error of ``value``.
        points: (N, figure) that the line was laid through.
    """

    value: float
    slope: float
    error: float
    points: tuple[tuple[int, float], ...]

    @property
    def interval(self) -> Interval:
        """The 95 % interval of ``value`` by ``error``; it may reach below zero, as an estimate may."""
        reach = _NORMAL_975 * self.error
        return Interval(self.value - reach, self.value + reach)


def mean_interval(values: Tensor, *, seed: int = 0) -> Interval:
    """Return the interval of the mean of per-image ``values`` ``[N]``, such as PSNR, SSIM or LPIPS.

    The images are resampled with replacement :data:`REPLICATES` times; the interval is that of the replicates' 2.5 %
    and 97.5 % quantiles (Efron's percentile interval).
    """
    values = values.double().cpu()
    draw = generator("bootstrap", seed)
    means = [values[torch.randint(len(values), values.shape, generator=draw)].mean() for _ in range(REPLICATES)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high)


def frechet_interval(
    samples: Tensor, reference: FrechetReference, *, figure: float | None = None, seed: int = 0
) -> Interval:
    """Return the interval of FID between samples ``[N, dim]`` and ``reference``; ``figure`` spares computing it.

    An image that is drawn twice narrows the covariance, so FIDs of resampled sets are too large, and spread too far.
    Instead each image's influence on the figure (:meth:`.FrechetReference.influence`) is taken, and the mean of these
    is resampled: the infinitesimal jackknife (Jaeckel 1972, Efron 1982), the bootstrap of the figure's linear part.
    """
    figure = reference.distance(samples) if figure is None else figure
    spread = mean_interval(reference.influence(samples), seed=seed)
    return Interval(max(0.0, figure + spread.low), figure + spread.high)


def kernel_interval(samples: Tensor, reference: Tensor, figure: KernelDistance, *, seed: int = 0) -> Interval:
    """Return the interval of KID's mean ``figure`` between samples ``[N, dim]`` and reference ``[M, dim]``.

    As for FID, each image's influence ``2 (mean_j k(x, x_j) - mean_j k(x, y_j))`` is resampled. What the choice of the
    figure's random subsets adds, its deviation over the root of their number, is added in squares. Of more images a
    side than :func:`.at_most` lets pass, the spread is scaled to the number of all.
    """
    few, others = at_most(samples).float(), at_most(reference).float()
    influence = []
    for start in range(0, len(few), _BLOCK):
        rows = few[start : start + _BLOCK]
        own = _kernel(rows, few)
        own.diagonal(start).fill_(0)
        influence.append(2 * (own.sum(dim=1) / (len(few) - 1) - _kernel(rows, others).mean(dim=1)))
    pulls = torch.cat(influence)
    spread = mean_interval(pulls - pulls.mean(), seed=seed)
    scale = math.sqrt(len(few) / len(samples))
    of_subsets = _NORMAL_975 * figure.std / math.sqrt(figure.subsets)
    return Interval(
        figure.mean - math.hypot(scale * spread.low, of_subsets),
        figure.mean + math.hypot(scale * spread.high, of_subsets),
    )


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1).double() ** 3


def manifold_intervals(samples: Tensor, reference: Tensor, *, seed: int = 0) -> dict[str, Interval]:
    """Return the intervals of ``precision``, ``recall``, ``density`` and ``coverage``.

    Who is whose neighbour changes where images are drawn twice, so :data:`HALVES` random halves of the samples are
    drawn without replacement. For a mean over images their spread is the one that sampling with replacement gives (it
    is the bootstrap with weights 0 and 2, Præstgaard and Wellner 1993); it is put around the figure of the whole set,
    cut at the figure's bounds. Of larger sets the images are taken that :func:`.manifold_figures` takes.
    """
    samples, reference = at_most(samples), at_most(reference)
    draw = generator("halves", seed)
    present = torch.ones(HALVES + 1, len(samples), dtype=torch.bool)
    for half in present[1:]:
        half[torch.randperm(len(samples), generator=draw)[len(samples) // 2 :]] = False
    figures = figures_of_parts(samples, reference, present)
    reach = _NORMAL_975 * figures[1:].std(dim=0)
    low, high = (figures[0] - reach).clamp(min=0), figures[0] + reach
    high[[0, 1, 3]] = high[[0, 1, 3]].clamp(max=1)  # density has no upper bound
    names = ("precision", "recall", "density", "coverage")
    return {name: Interval(*bounds) for name, *bounds in zip(names, low.tolist(), high.tolist(), strict=True)}


def frechet_at_infinity(samples: Tensor, reference: FrechetReference, *, seed: int = 0) -> Extrapolated:
    """Return FID between samples ``[N, dim]`` and ``reference`` without the bias of finite N.

    The bias is linear in 1/N, so a line through FID at several N meets 1/N = 0 at FID_infinity (Chong and Forsyth 2020,
    arXiv 1911.07023). The subsets are ours: the samples, in an order drawn from ``seed``, are cut into 1, 2, ...
    :data:`PARTITIONS` equal parts, and the FIDs of the parts of one cut are averaged. So every point is of all images,
    what this draw of them adds is nearly the same at each, and the slope hardly knows of it. ``error`` is the root of
    that part's variance, from the images' influences, plus the intercept's variance from the points' scatter.
    The bias of the finite reference is the protocol's, and stays; so does what is not linear in 1/N, which counts where
    the smallest part has hardly more images than there are features that vary.
    """
    if len(samples) < 2 * PARTITIONS:
        raise WavelatentError(f"extrapolating FID needs at least {2 * PARTITIONS} images, got {len(samples)}")
    order = torch.randperm(len(samples), generator=generator("partitions", seed))
    figures = [
        [_distance_of(samples, part, reference) for part in order.tensor_split(count)]
        for count in range(1, PARTITIONS + 1)
    ]
    values = torch.tensor([sum(parts) / len(parts) for parts in figures], dtype=torch.float64)
    inverse = torch.arange(1, PARTITIONS + 1, dtype=torch.float64) / len(samples)
    design = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    value, slope = torch.linalg.lstsq(design, values).solution.tolist()
    scatter = (values - value - slope * inverse).square().sum() / (PARTITIONS - 2)
    of_line = scatter * torch.linalg.inv(design.T @ design)[0, 0]
    of_images = reference.influence(samples).var() / len(samples)
    points = tuple((round(1 / x), y) for x, y in zip(inverse.tolist(), values.tolist(), strict=True))
    return Extrapolated(value, slope, float((of_line + of_images).sqrt()), points)


def _distance_of(samples: Tensor, rows: Tensor, reference: FrechetReference) -> float:
    if len(rows) < samples.shape[1]:
        return reference.distance(samples[rows])
    statistics = FeatureStatistics(samples.shape[1])
    for block in rows.split(_BLOCK):  # the samples may be larger than the memory
        statistics.update(samples[block])
    return reference.distance(statistics)
