"""How far the figures of one evaluation can be trusted: 95 % intervals, and FID without the bias of small samples.

The reference is part of the protocol and stays as it is. An interval says where the figure of another equally large
set of samples from the same source, measured against the same reference, would lie on average. It knows nothing of the
training's randomness, nor of the bias that a finite set gives to FID.

Every draw is keyed: the same features and seed give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WavelatentError
from .feature_distances import FrechetReference, KernelDistance
from .manifolds import MAX_MANIFOLD_IMAGES, figures_of_parts
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


def mean_interval(values: Tensor, *, seed: int = 0) -> Interval:
    """Return the interval of the mean of per-image ``values`` ``[N]``, such as PSNR, SSIM or LPIPS."""
    raise NotImplementedError


def frechet_interval(samples: Tensor, reference: FrechetReference, *, seed: int = 0) -> Interval:
    """Return the interval of FID between samples ``[N, dim]`` and ``reference``."""
    raise NotImplementedError


def kernel_interval(samples: Tensor, reference: Tensor, figure: KernelDistance, *, seed: int = 0) -> Interval:
    """Return the interval of KID's mean ``figure`` between samples ``[N, dim]`` and reference ``[M, dim]``."""
    raise NotImplementedError


def manifold_intervals(samples: Tensor, reference: Tensor, *, seed: int = 0) -> dict[str, Interval]:
    """Return the intervals of ``precision``, ``recall``, ``density`` and ``coverage``."""
    raise NotImplementedError


def frechet_at_infinity(samples: Tensor, reference: FrechetReference, *, seed: int = 0) -> Extrapolated:
    """Return FID between samples ``[N, dim]`` and ``reference`` without the bias of finite N."""
    raise NotImplementedError
