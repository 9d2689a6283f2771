"""The latent health report on how latent values depend on each other: ``correlation`` and ``geometry``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .health import Figure, LatentData, Plot, Section, Verdict
from .health_measures import (
    DEAD_SHARE,
    dead_channels,
    every_nth,
    image_variance,
    in_words,
    live_channels,
    plain,
    usable,
    whitened,
)
from .moments import global_covariance

# One of two channels with a correlation of 0.95 leaves 10 % of the other's variance unexplained. The largest between
# two channels of the autoencoders that we trained is 0.86.
DUPLICATE_NOTE, DUPLICATE_FAULT = 0.9, 0.95
RANK_NOTE = 0.5
LAGS = range(1, 9)
NEIGHBOUR_NOTE = 0.1
MAX_FIELDS = 1000  # images for the autocorrelation

MAX_POINTS = 2000  # images for the intrinsic dimension, whose distance matrix grows with the square
MIN_POINTS, FEW_POINTS = 20, 500
RATIOS_PLOTTED = 200
DISCARDED = 0.1  # Facco et al.'s share of the largest ratios, which the fit leaves out


def correlation(data: LatentData) -> Section:
    """Return how channels depend on each other and sites on their neighbours, of the posterior's mean.

    The covariance of the channels is over images and sites. A channel is dead by its variance from image to image.
    """
    data = usable(data)
    covariance = global_covariance(data.mean, across_processes=False)[1].double()
    live, dead = live_channels(data.mean), dead_channels(data.mean)
    matrix = _correlation_of(covariance)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0).flip(0)
    of_live = torch.linalg.eigvalsh(matrix[live][:, live]).clamp_min(0)
    rank, standard_rank = effective_rank(eigenvalues), effective_rank(of_live)
    lags = spatial_autocorrelation(every_nth(data.mean, MAX_FIELDS))
    pairs = _duplicates(matrix, live)
    variance = image_variance(data.mean).mean(dim=(1, 2))
    figures: dict[str, Figure] = {
        "images": len(data.mean),
        "covariance_eigenvalues": plain(eigenvalues),
        "effective_rank": rank,
        "effective_rank_standardised": standard_rank,
        "variance_share": plain(variance / variance.sum().clamp_min(1e-300)),
        "dead_channels": dead,
        "duplicate_pairs": "; ".join(f"{a},{b}" for a, b in pairs),
        "largest_correlation": plain((matrix - torch.eye(len(matrix))).abs().amax(dim=1)),
        "autocorrelation_images": len(every_nth(data.mean, MAX_FIELDS)),
        **{f"autocorrelation_lag_{lag}": plain(row) for lag, row in zip(LAGS, lags, strict=True)},
    }
    by_lag = [float(row[live].nanmean()) for row in lags]
    known = [(lag, value) for lag, value in zip(LAGS, by_lag, strict=True) if math.isfinite(value)]
    plots = [
        Plot("Covariance spectrum", {"eigenvalue": [float(e) for e in eigenvalues]}, labels=("rank", "variance")),
        Plot(
            "Correlation of the channels",
            {"correlation": [[float(r) for r in row] for row in matrix]},
            kind="image",
            labels=("channel", "channel"),
        ),
        Plot(
            "Spatial autocorrelation, mean over channels",
            {"autocorrelation": [value for _, value in known]},
            x=[float(lag) for lag, _ in known],
            labels=("lag in sites", "correlation"),
        ),
    ]
    verdicts = [
        _dead_verdict(dead, variance),
        _duplicate_verdict(pairs, matrix, live),
        _rank_verdict(standard_rank, len(live)),
        _neighbour_verdict(by_lag[0], one_site=data.mean.shape[2:].numel() == 1),
    ]
    return Section("correlation", figures, verdicts, plots)


def effective_rank(eigenvalues: Tensor) -> float:
    """Return the exponential of the entropy of the normalised eigenvalues ``[n]`` (Roy and Vetterli 2007).

    0 where all are zero.
    """
    total = eigenvalues.sum()
    if total <= 0:
        return 0.0
    shares = eigenvalues / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def spatial_autocorrelation(latents: Tensor) -> Tensor:
    """Return the correlation of sites ``1 ... 8`` apart, mean of the two axes: ``[8, C]``.

    About the channel's mean over images and sites. NaN where no axis is long enough, or the channel is constant.
    """
    fields = whitened(latents)
    constant = fields.abs().amax(dim=(0, 2, 3)) == 0
    rows = []
    for lag in LAGS:
        products = [
            fields.narrow(axis, 0, size - lag) * fields.narrow(axis, lag, size - lag)
            for axis in (2, 3)
            if (size := fields.shape[axis]) > lag
        ]
        means = [product.mean(dim=(0, 2, 3), dtype=torch.float64) for product in products]
        empty = torch.full((fields.shape[1],), math.nan, dtype=torch.float64)
        rows.append(torch.stack(means).mean(dim=0).masked_fill(constant, math.nan) if means else empty)
    return torch.stack(rows)


def _correlation_of(covariance: Tensor) -> Tensor:
    """Return the correlation matrix; a constant channel is correlated with itself only."""
    std = covariance.diagonal().clamp_min(0).sqrt()  # rounding can leave a constant channel below 0
    matrix = torch.where(torch.outer(std, std) > 0, covariance / torch.outer(std, std), 0.0)
    return matrix.fill_diagonal_(1.0).clamp(-1, 1)


def _duplicates(matrix: Tensor, live: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a in live for b in live if a < b and abs(matrix[a, b]) > DUPLICATE_NOTE]


def _dead_verdict(dead: list[int], variance: Tensor) -> Verdict:
    least = float(variance.min() / variance.mean()) if variance.sum() > 0 else 0.0
    return Verdict(
        "fault" if dead else "ok",
        "dead_channel",
        f"Hardly any variation from image to image in {in_words(dead)}: the least is {least:.2g} of an equal share of "
        "the variance"
        if dead
        else f"No dead channel: channel {int(variance.argmin())} varies least, with {least:.2g} of an equal share of "
        "the variance",
        f"a variance of at most {DEAD_SHARE:g} of an equal share is a fault",
        "ours",
    )


def _duplicate_verdict(pairs: list[tuple[int, int]], matrix: Tensor, live: list[int]) -> Verdict:
    others = [abs(float(matrix[a, b])) for a in live for b in live if a < b]
    largest = max(others, default=0.0)
    listed = ", ".join(f"{a} and {b} (r = {float(matrix[a, b]):.3f})" for a, b in pairs[:12])
    return Verdict(
        "fault" if largest > DUPLICATE_FAULT else "note" if pairs else "ok",
        "duplicate_channel",
        f"Nearly the same: channels {listed}" + (f" ({len(pairs)} pairs in all)" if len(pairs) > 12 else "")
        if pairs
        else f"No channel repeats another: the largest correlation of two is {largest:.3f} in size",
        f"a correlation above {DUPLICATE_NOTE:g} in size is a note, above {DUPLICATE_FAULT:g} a fault",
        "ours",
    )


def _rank_verdict(rank: float, live: int) -> Verdict:
    low = rank < RANK_NOTE * live
    return Verdict(
        "note" if low else "ok",
        "effective_rank",
        f"The effective rank of the channels' correlations is {rank:.3g} of {live} channels that are not dead"
        + ("; fewer channels might do" if low else ""),
        f"below {100 * RANK_NOTE:g} % of the channels is a note",
        "ours; the rank is Roy and Vetterli's (2007)",
    )


def _neighbour_verdict(nearest: float, *, one_site: bool) -> Verdict:
    threshold, source = f"below {NEIGHBOUR_NOTE:g} is a note", "ours"
    if math.isnan(nearest):
        why = "The latent has one site: there are no neighbours" if one_site else "All channels are constant"
        return Verdict("ok", "spatial_correlation", why, threshold, source)
    low = nearest < NEIGHBOUR_NOTE
    return Verdict(
        "note" if low else "ok",
        "spatial_correlation",
        f"The correlation of neighbouring sites is {nearest:.3g}, mean over channels"
        + (": the latents have hardly any smoothness for a convolution to use" if low else ""),
        threshold,
        source,
    )


def geometry(data: LatentData) -> Section:
    """Return the intrinsic dimension of whole latents, the posterior's mean whitened per channel.

    Of all images, half and a quarter of them: an estimate that changes with their number is not yet that of the
    manifold but of its noise or curvature (Facco et al. 2017).
    """
    latents = every_nth(whitened(usable(data).mean), MAX_POINTS).flatten(1)
    values = latents.shape[1]
    nearest = {step: nearest_two(latents[::step]) for step in (1, 2, 4) if len(latents[::step]) >= MIN_POINTS}
    dimensions = {step: twonn_dimension(distances) for step, distances in nearest.items()}
    dimension = dimensions.get(1)
    same = int((nearest[1][:, 0] == 0).sum()) if nearest else None
    figures: dict[str, Figure] = {
        "images": len(latents),
        "values": values,
        "intrinsic_dimension": dimension,
        "intrinsic_dimension_of_half": dimensions.get(2),
        "intrinsic_dimension_of_quarter": dimensions.get(4),
        "images_with_equal_latents": same,
    }
    verdict = _dimension_verdict(dimension, len(latents), values)
    return Section("geometry", figures, [verdict], [] if dimension is None else [_ratio_plot(nearest[1], dimension)])


def _ratio_plot(nearest: Tensor, dimension: float) -> Plot:
    ratios, level = (every_nth(values, RATIOS_PLOTTED) for values in _ratios(nearest))
    series = {"measured": [float(y) for y in level], "fit": [float(dimension * x) for x in ratios]}
    labels = ("log of the ratio of the second to the first distance", "-log(1 - F)")
    return Plot("TwoNN: the slope is the dimension", series, x=[float(x) for x in ratios], labels=labels)


def nearest_two(points: Tensor) -> Tensor:
    """Return the distances of every point of ``[n, dim]`` to its two nearest others, float64 ``[n, 2]``.

    Candidates come from a product of matrices in float32, whose rounding is as large as small distances; those of the
    five best are then computed exactly.
    """
    squares = points.square().sum(dim=1)
    found = []
    for start in range(0, len(points), 256):
        block = points[start : start + 256]
        rough = squares - 2 * block @ points.T
        rows = torch.arange(len(block))
        rough[rows, rows + start] = math.inf
        candidates = rough.topk(min(5, len(points) - 1), largest=False).indices
        exact = torch.stack(
            [(block.double() - points[column].double()).square().sum(dim=1).sqrt() for column in candidates.T], dim=1
        )
        found.append(exact.sort(dim=1).values[:, :2])
    return torch.cat(found)


def twonn_dimension(nearest: Tensor) -> float | None:
    """Return the TwoNN intrinsic dimension (Facco et al. 2017, Scientific Reports 7, 12140) from :func:`nearest_two`.

    The ratio ``mu`` of the second to the first distance has the distribution function ``1 - mu^(-d)``: ``d`` is the
    slope of ``-log(1 - F(mu))`` over ``log(mu)`` through the origin, the largest tenth of the ratios left out. Points
    with an equal are left out first. None where that leaves too few, or all points are equally far from each other.
    """
    ratios, level = _ratios(nearest)
    total = float(ratios.square().sum())
    enough = len(ratios) >= MIN_POINTS * (1 - DISCARDED)
    return float((ratios * level).sum()) / total if enough and total > 0 else None


def _ratios(nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log(mu)`` in ascending order and ``-log(1 - F(mu))``, of the ratios that the fit keeps."""
    distinct = nearest[nearest[:, 0] > 0]
    ratios = (distinct[:, 1] / distinct[:, 0]).log().sort().values
    kept = int(len(ratios) * (1 - DISCARDED))
    level = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / max(len(ratios), 1))
    return ratios[:kept], level


def _dimension_verdict(dimension: float | None, images: int, values: int) -> Verdict:
    threshold = f"fewer than {FEW_POINTS} images are a note; the dimension itself is judged by nothing"
    if dimension is None:
        text = f"{images} images are too few different ones for an estimate of the intrinsic dimension"
        return Verdict("note", "intrinsic_dimension", text, threshold, "ours")
    few = images < FEW_POINTS
    return Verdict(
        "note" if few else "ok",
        "intrinsic_dimension",
        f"The latents of {images} images lie near a manifold of about {dimension:.3g} dimensions among {values} values"
        + ("; with so few images it is likely more" if few else ""),
        threshold,
        "ours; the estimate is Facco et al.'s (2017), and tends to be too low where the dimension is high",
    )
