"""The latent health report on the shape of the latents' distribution: the section ``gaussianity``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.randomness import generator
from .health import Figure, LatentData, Plot, Section, Verdict
from .health_measures import channel_quantiles, every_nth, in_words, level_of, plain, positions, usable, whitened

MAX_SITES = 2000  # the kernel matrix grows with its square
WIDTHS = (0.5, 1.0, 2.0)
"""Of the kernel, times ``sqrt(C)``; two vectors drawn from N(0, I) are about ``sqrt(2 C)`` apart."""
DIRECTIONS = 64
NULL_DRAWS = 20
MAX_SORTED = 200_000  # values of a channel for its quantiles
QQ_POINTS = 41
MAX_PLOTTED = 16

# Laplace's distribution has 3 and is the usual model of wavelet coefficients; Student's with 5 degrees of freedom has
# 6, and with 4 none that is finite. The autoencoders that we trained have at most 1.3.
KURTOSIS_NOTE, KURTOSIS_FAULT = 3.0, 6.0
# Nothing has to be Gaussian for a diffusion model to learn it, and with thousands of sites any difference is
# significant: it is worth a note from a tenth of a deviation.
DISTANCE_NOTE = 0.1
MMD_SIGNIFICANT = 3.0


@dataclass(frozen=True)
class KernelTest:
    """An MMD^2 against N(0, I), and its deviation where the samples are from N(0, I)."""

    squared: float
    null_std: float


def mmd_to_standard_normal(samples: Tensor, width: float) -> KernelTest:
    """Return the unbiased MMD^2 (Gretton et al. 2012) between samples ``[n, C]`` and N(0, I) itself, under an RBF.

    The kernel is ``exp(-|x - y|^2 / (2 width^2))``. Its expectations over N(0, I) have closed forms, so that nothing is
    drawn on that side, as in the BHEP tests of normality (Henze and Zirkler 1990). With ``h`` the kernel centred by
    them, the estimate is the mean of ``h`` over pairs; where the samples are independent draws of N(0, I), its mean is
    0 and its variance exactly ``2 E[h^2] / (n (n - 1))``.
    """
    samples = samples.double()
    n, dim = samples.shape
    square = width**2

    def shrink(a: float) -> float:
        return (square / (square + a)) ** (dim / 2)

    kernel = (
        torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist").square_().div_(-2 * square).exp_()
    )
    between = (kernel.sum() - n) / (n * (n - 1))
    towards = shrink(1) * torch.exp(-samples.square().sum(dim=1) / (2 * (square + 1))).mean()
    squared = float(between - 2 * towards + shrink(2))
    # E[h^2] = E[k^2] - 2 E[m^2] + E[k]^2 with m(x) = E_y[k(x, y)].
    mean_embedding = shrink(1) ** 2 * ((square + 1) / (square + 3)) ** (dim / 2)
    expected_square = shrink(4) - 2 * mean_embedding + shrink(2) ** 2
    return KernelTest(squared, math.sqrt(2 * expected_square / (n * (n - 1))))


def sliced_wasserstein_to_standard_normal(samples: Tensor, directions: Tensor) -> float:
    """Return the sliced 2-Wasserstein distance (Bonneel et al. 2015) between samples ``[n, C]`` and N(0, I).

    The root of the mean, over unit ``directions`` ``[C, k]``, of the squared distance between the projected samples and
    the standard normal, whose quantiles are taken at the middles of ``n`` equal steps of probability.
    """
    projected = (samples.double() @ directions.double()).sort(dim=0).values
    return float((projected - _normal_quantiles(len(samples))[:, None]).square().mean().sqrt())


def site_vectors(latents: Tensor, most: int = MAX_SITES) -> Tensor:
    """Return the channels at random sites, ``[n, C]``: as many sites of every image, and different ones.

    Images are thinned to ``most`` first, and then give one site each: sites of one image depend on each other.
    """
    latents = every_nth(latents, most)
    count, _, height, width = latents.shape
    total = min(most, count * height * width)
    order = torch.rand(count, height * width, generator=generator("health", "sites")).argsort(dim=1)
    rank, image = torch.arange(total) // count, torch.arange(total) % count
    return latents.flatten(2)[image, :, order[image, rank]]


def gaussianity(data: LatentData) -> Section:
    """Return how far whitened latents are from N(0, I): as vectors of channels at a site, and channel by channel."""
    latents = whitened(usable(data).drawn)
    sites = site_vectors(latents)
    dim = sites.shape[1]
    tests = [mmd_to_standard_normal(sites, width * math.sqrt(dim)) for width in WIDTHS]
    distance, null = _sliced_wasserstein(sites)
    kurtosis = _excess_kurtosis(latents)
    probabilities = (torch.arange(QQ_POINTS, dtype=torch.float64) + 0.5) / QQ_POINTS
    normal = torch.special.ndtri(probabilities)
    quantiles, quantile_images = channel_quantiles(latents, probabilities, MAX_SORTED)
    deviation = (quantiles - normal[:, None]).abs().amax(dim=0)
    figures: dict[str, Figure] = {
        "images": len(latents),
        "sites": len(sites),
        "sites_per_image": len(sites) / min(len(latents), len(sites)),
        "mmd_width": [width * math.sqrt(dim) for width in WIDTHS],
        "mmd_squared": [test.squared for test in tests],
        "mmd_null_std": [test.null_std for test in tests],
        "sliced_wasserstein": distance,
        "sliced_wasserstein_directions": DIRECTIONS,
        "sliced_wasserstein_null_mean": sum(null) / len(null),
        "sliced_wasserstein_null_max": max(null),
        "excess_kurtosis": plain(kurtosis),
        "qq_images": quantile_images,
        "qq_largest_deviation": plain(deviation),
    }
    shown = sorted(int(c) for c in deviation.argsort(descending=True)[:MAX_PLOTTED])
    axis = [float(x) for x in normal]
    series = {"normal": axis} | {f"channel {c}": [float(q) for q in quantiles[:, c]] for c in shown}
    plot = Plot("Quantiles of whitened channels", series, x=axis, labels=("of N(0, 1)", "of the channel"))
    verdicts = [_tail_verdict(kurtosis), _distance_verdict(tests, distance, null)]
    return Section("gaussianity", figures, verdicts, [plot])


def _sliced_wasserstein(sites: Tensor) -> tuple[float, list[float]]:
    """Return the distance, and those of draws from N(0, I) of the same size along the same directions."""
    random = generator("health", "sliced")
    directions = torch.randn(sites.shape[1], DIRECTIONS, generator=random)
    directions /= directions.norm(dim=0)
    draws = (torch.randn(sites.shape, generator=random) for _ in range(NULL_DRAWS))
    null = [sliced_wasserstein_to_standard_normal(draw, directions) for draw in draws]
    return sliced_wasserstein_to_standard_normal(sites, directions), null


def _normal_quantiles(count: int) -> Tensor:
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def _excess_kurtosis(latents: Tensor) -> Tensor:
    """Return that of every whitened channel, ``[C]``; NaN of a constant one."""
    fourth = torch.stack([channel.double().pow(4).mean() for channel in latents.unbind(dim=1)])
    return torch.where(fourth > 0, fourth - 3, math.nan)


def _tail_verdict(kurtosis: Tensor) -> Verdict:
    kurtosis = kurtosis.nan_to_num(0)
    off = positions(kurtosis > KURTOSIS_NOTE)
    worst = f"excess kurtosis {float(kurtosis.max()):.3g} in channel {int(kurtosis.argmax())}"
    return Verdict(
        level_of(float(kurtosis.max()), KURTOSIS_NOTE, KURTOSIS_FAULT),
        "heavy_tail",
        f"Heavy tails in {in_words(off)}: up to {worst}" if off else f"No heavy tails: {worst} at most",
        f"an excess kurtosis above {KURTOSIS_NOTE:g} (Laplace's) is a note, above {KURTOSIS_FAULT:g} (Student's with 5 "
        "degrees of freedom) a fault",
        "ours",
    )


def _distance_verdict(tests: list[KernelTest], distance: float, null: list[float]) -> Verdict:
    significance = max(test.squared / test.null_std for test in tests)
    excess = math.sqrt(max(0.0, distance**2 - sum(value**2 for value in null) / len(null)))
    far = excess > DISTANCE_NOTE and significance > MMD_SIGNIFICANT
    return Verdict(
        "note" if far else "ok",
        "gaussianity",
        f"Whitened latents are {'not' if far else 'close to'} Gaussian: the sliced Wasserstein distance to N(0, I) is "
        f"{distance:.3g}, of Gaussian samples as many it is {max(null):.3g} at most; the MMD^2 is "
        f"{significance:.3g} deviations above that of Gaussian samples",
        f"a distance of more than {DISTANCE_NOTE:g} beyond the Gaussian samples' and an MMD^2 above "
        f"{MMD_SIGNIFICANT:g} deviations is a note",
        "ours",
    )
