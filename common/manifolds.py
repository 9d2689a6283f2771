"""How far samples and a reference lie within each other's manifold: precision, recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WavelatentError

MAX_MANIFOLD_IMAGES = 10_000
MANIFOLD_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
_BLOCK = 1000
_CANDIDATES = 32


@dataclass(frozen=True)
class ManifoldFigures:
    """The four figures, and the numbers of images that they were taken over."""

    precision: float
    recall: float
    density: float
    coverage: float
    num_samples: int
    num_reference: int


def manifold_figures(samples: Tensor, reference: Tensor) -> ManifoldFigures:
    """Return the four figures of features ``[N, dim]`` against ``[M, dim]``.

    Precision and recall are the improved ones of Kynkäänniemi et al. 2019 (arXiv 1904.06991) with
    :data:`MANIFOLD_NEIGHBOURS`: the part of the samples within a ball of the reference, and the reverse; each ball
    reaches to its centre's third neighbour. Density and coverage are those of Naeem et al. 2020 (arXiv 2002.09797) with
    :data:`DENSITY_NEIGHBOURS`: the mean number of the reference's balls around a sample over five, which may exceed 1,
    and the part of the reference's balls that hold a sample. All depend on the sizes of the sets. Of a larger set
    :func:`at_most` takes :data:`MAX_MANIFOLD_IMAGES` rows, which bounds the memory: at most a few hundred megabytes.

    Raises:
        WavelatentError: a side has fewer than 6 images.
    """
    samples, reference = at_most(samples), at_most(reference)
    everybody = torch.ones(1, len(samples), dtype=torch.bool)
    precision, recall, density, coverage = figures_of_parts(samples, reference, everybody)[0].tolist()
    return ManifoldFigures(precision, recall, density, coverage, len(samples), len(reference))


def at_most(features: Tensor) -> Tensor:
    """Return :data:`MAX_MANIFOLD_IMAGES` of the rows, evenly spread, or all where there are no more.

    Not the first ones: samples may be in the order of their classes.
    """
    if len(features) <= MAX_MANIFOLD_IMAGES:
        return features
    return features[torch.arange(MAX_MANIFOLD_IMAGES) * len(features) // MAX_MANIFOLD_IMAGES]


def figures_of_parts(samples: Tensor, reference: Tensor, present: Tensor) -> Tensor:
    """Return precision, recall, density and coverage ``[R, 4]`` float64 of ``R`` parts of the samples at once.

    ``present`` bool ``[R, N]`` says which samples are in each part. The reference is whole each time, and every
    distance is computed once. Takes all rows that it is given.
    """
    smallest = min(len(samples), len(reference))
    if smallest <= DENSITY_NEIGHBOURS:
        raise WavelatentError(
            f"precision, recall, density and coverage need {DENSITY_NEIGHBOURS + 1} images on each side, "
            f"got {len(samples)} and {len(reference)}: ask for more images"
        )
    around, _ = _nearest(reference, DENSITY_NEIGHBOURS)
    radii = _radii_within(present, *_nearest(samples, _CANDIDATES if not present.all() else MANIFOLD_NEIGHBOURS))
    hit = torch.zeros(len(samples), dtype=torch.bool)
    balls = torch.zeros(len(samples), dtype=torch.float64)
    recalled = torch.zeros(len(present), dtype=torch.float64)
    covered = torch.zeros(len(present), dtype=torch.float64)
    for start in range(0, len(reference), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distances = torch.cdist(reference[rows], samples)
        hit |= (distances <= around[rows, MANIFOLD_NEIGHBOURS - 1, None]).any(dim=0)
        inside = distances < around[rows, DENSITY_NEIGHBOURS - 1, None]
        balls += inside.sum(dim=0)
        covered += (inside.float() @ present.T.float() > 0).sum(dim=0)
        recalled += torch.stack([(distances <= reach).any(dim=1).sum() for reach in radii])
    members, sizes = present.double(), present.sum(dim=1)
    return torch.stack(
        [
            members @ hit.double() / sizes,
            recalled / len(reference),
            members @ balls / (DENSITY_NEIGHBOURS * sizes),
            covered / len(reference),
        ],
        dim=1,
    )


def _nearest(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the distances to the ``count`` nearest other points and which these are, both ``[N, count]``."""
    count = min(count, len(points) - 1)
    found = []
    for start in range(0, len(points), _BLOCK):
        distances = torch.cdist(points[start : start + _BLOCK], points)
        distances.diagonal(start).fill_(-1)  # oneself comes first, before equal points
        found.append(distances.topk(count + 1, largest=False))
    return torch.cat([part.values[:, 1:] for part in found]), torch.cat([part.indices[:, 1:] for part in found])


def _radii_within(present: Tensor, distances: Tensor, neighbours: Tensor) -> list[Tensor]:
    """Return for each part the distance ``[N]`` to the third neighbour that is in it; -1 for who is not.

    Of 32 neighbours fewer than three are in a random half with probability 1e-7; the last one serves then.
    """
    radii = []
    for part in present:
        third = (part[neighbours].cumsum(dim=1) >= MANIFOLD_NEIGHBOURS).int()
        third[:, -1] = 1
        radius = distances.gather(1, third.argmax(dim=1, keepdim=True)).squeeze(1)
        radii.append(torch.where(part, radius, -1.0))
    return radii
