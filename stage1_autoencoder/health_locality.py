"""Does a latent site hold what lies under it, or something about the whole picture? A section of the health report.

The autoencoder of Stable Diffusion is reported to keep global information in a few sites: a spot at which the posterior
is certain to the clamp, and moving which changes the whole picture. A denoiser that gets such a site a little wrong
gets everything a little wrong. This section looks for such sites and shows the map, found or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.latents import Whitening
from ..common.randomness import generator
from .health import Figure, LatentData, Level, Plot, Section, Verdict
from .health_passes import Coder, Lpips, Passes, factor_of, subset, whitening_of

IMAGES = 2
"""Images whose every site is moved; the maps of energy and variance are of all images."""
MAX_CELLS = 256
"""Where a latent has more sites, square cells of neighbouring sites are moved together, so that none is missed."""
RADIUS_SITES = 4
"""Rows and columns of single sites, evenly spread, on which the radius is measured."""
CONTAINED = 0.9
"""Share of the squared change within the influence radius."""
FAR, MIN_FAR_SITES = 0.25, 2.5
"""Far is further from the moved cell's centre than this share of the image's longer side, and than this many sites."""
GLOBAL_SHARE, GLOBAL_STRENGTH = 0.25, 1.0
"""Above which share of a cell's change falls far away, and how much that is against the median cell's whole change."""
MOST_NAMED = 5


class Influence(NamedTuple):
    """What moving each of ``K`` cells does, each figure the mean over images.

    Attributes:
        total: squared change of the picture, ``[K]``.
        far: the part of it that falls far away, ``[K]``.
        radius: pixels from the cell's centre within which `CONTAINED` of it lies, ``[K]``.
        far_pixels: share of the picture that counts as far, ``[K]``.
    """

    total: Tensor
    far: Tensor
    radius: Tensor
    far_pixels: Tensor

    @property
    def far_share(self) -> Tensor:
        """Share of each cell's change that falls far away, ``[K]``; 0 of a cell that changes nothing."""
        return torch.where(self.total > 0, self.far / self.total, 0.0)

    @property
    def strength(self) -> Tensor:
        """What each cell changes far away, in units of what the median one changes in all, ``[K]``."""
        return self.far / self.total.median().clamp(min=torch.finfo(self.total.dtype).tiny)

    def global_cells(self) -> Tensor:
        """Return the numbers of the cells that move the whole picture, the strongest first."""
        found = ((self.far_share > GLOBAL_SHARE) & (self.strength > GLOBAL_STRENGTH)).nonzero().flatten()
        return found[self.strength[found].argsort(descending=True)]


def locality(autoencoder: Coder, data: LatentData, *, batch_size: int, lpips: Lpips | None) -> Section:
    """Return how far one site reaches, which sites move the whole picture, and where latent energy is concentrated.

    Every site is moved by one standard deviation, all its channels at once and each up or down by chance, and the
    squared change of the decoded picture is laid over distance. The *influence radius* is the distance from the site's
    centre that contains 90 % of it, the median over sites (in whole pictures, the edge cuts it off); ``radius_sites``
    is in latent sites, where 0.7 is the corner of the site's own square. The map shows for each site the share of the
    change that falls far away: beyond a quarter of the longer side and beyond two and a half sites. A site is *global*
    where that share is above a quarter, and more than what the median site changes in all. Where the median site's
    share is above a quarter, no site stands out: the decoder spreads every one over the picture.

    *Energy* is the square of the whitened latents, the mean over images and channels; its mean over sites is 1.

    ``lpips`` is not used. It decodes two images up to 256 times each, which makes it the dearest of these sections for
    large decoders.
    """
    whiten, factor, passes = whitening_of(data), factor_of(data), Passes(autoencoder, batch_size)
    height, width = data.mean.shape[-2:]
    side = math.ceil(math.sqrt(height * width / MAX_CELLS))
    columns = math.ceil(width / side)
    moved = subset(data, IMAGES)
    influence = _influence(passes, whiten, moved, _cells(height, width, side), factor)
    single = influence if side == 1 else _influence(passes, whiten, moved, _spread(height, width), factor)
    radius = single.radius.median().item()
    found = influence.global_cells()
    strongest = influence.strength[found[0]].item() if len(found) else 0.0
    figures: dict[str, Figure] = {
        "images": len(moved.images),
        "cell_sites": side,
        "radius_pixels": radius,
        "radius_sites": radius / factor,
        "far_share_median": influence.far_share.median().item(),
        "far_share_max": influence.far_share.max().item(),
        "global_sites": len(found),
        "global_rows": (found // columns * side).tolist()[:MOST_NAMED],
        "global_columns": (found % columns * side).tolist()[:MOST_NAMED],
    }
    share_map = influence.far_share.reshape(-1, columns).tolist()
    plots = [Plot("Share of a site's influence that falls far away", {"share": share_map}, kind="image")]
    judged = influence.far_pixels.median().item() > GLOBAL_SHARE  # a site spread evenly would be found
    verdict = _verdict(figures, strongest, factor, judged)
    more_figures, more_plots = _concentration(data, whiten)
    return Section("locality", figures | more_figures, [verdict], plots + more_plots)


def _concentration(data: LatentData, whiten: Whitening) -> tuple[dict[str, Figure], list[Plot]]:
    """Return figures and maps of energy, and of the posterior's variance where there is one."""
    energy = whiten(data.mean).double().square().mean(dim=(0, 1))
    figures = _energy_figures(energy)
    plots = [Plot("Energy of the latents by site", {"energy": energy.tolist()}, kind="image")]
    if data.std is not None:
        logvar = 2 * data.std.double().clamp(min=torch.finfo(torch.float32).tiny).log().mean(dim=(0, 1))
        figures |= {"logvar_site_min": logvar.min().item(), "logvar_site_max": logvar.max().item()}
        plots.append(Plot("Mean log-variance of the posterior by site", {"logvar": logvar.tolist()}, kind="image"))
    return figures, plots


def _cells(height: int, width: int, side: int) -> Tensor:
    """Return masks ``[K, h, w]`` of square cells of ``side`` sites that cover the latent, row by row."""
    rows = torch.arange(height) // side
    columns = torch.arange(width) // side
    cells = rows[:, None] * math.ceil(width / side) + columns
    return F.one_hot(cells.flatten()).T.reshape(-1, height, width).bool()


def _spread(height: int, width: int) -> Tensor:
    """Return masks ``[K, h, w]`` of single sites that are evenly spread over the latent."""
    rows, columns = _evenly(height), _evenly(width)
    masks = torch.zeros(len(rows), len(columns), height, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            masks[i, j, row, column] = True
    return masks.flatten(0, 1)


def _evenly(length: int) -> list[int]:
    count = min(RADIUS_SITES, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _influence(passes: Passes, whiten: Whitening, data: LatentData, cells: Tensor, factor: int) -> Influence:
    """Move every cell of ``cells [K, h, w]`` in every image."""
    clean = passes.decode(data.mean)
    # Block by block: distances and changes of all cells at once would be gigabytes for large images.
    blocks = [_moved(passes, whiten, data, clean, block, factor) for block in cells.split(passes.batch_size)]
    return Influence(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _moved(passes: Passes, whiten: Whitening, data: LatentData, clean: Tensor, cells: Tensor, factor: int) -> Influence:
    distance = _distances(cells, factor)
    sides = [factor * side for side in cells.shape[1:]]
    far = distance > max(FAR * max(sides), MIN_FAR_SITES * factor)
    order = distance.flatten(1).argsort(dim=1)
    latents = whiten(data.mean)
    signs = torch.randint(2, latents.shape[1:], generator=generator("locality")).mul(2).sub(1).float()
    totals, fars, radii = [], [], []
    for latent, unmoved in zip(latents, clean, strict=True):
        decoded = passes.decode(whiten.inverse(latent + signs * cells[:, None]))
        change = (decoded - unmoved).double().square().sum(dim=1)  # [K, H, W]
        totals.append(change.sum(dim=(1, 2)))
        fars.append((change * far).sum(dim=(1, 2)))
        radii.append(_radius(change.flatten(1), distance.flatten(1), order))
    total, far_total, radius = (torch.stack(values).mean(dim=0) for values in (totals, fars, radii))
    return Influence(total, far_total, radius, far.double().mean(dim=(1, 2)))


def _distances(cells: Tensor, factor: int) -> Tensor:
    """Return the distance of every pixel's centre from every cell's centre, in pixels, ``[K, H, W]``."""
    _, height, width = cells.shape
    y = torch.arange(height * factor, dtype=torch.float64) + 0.5
    x = torch.arange(width * factor, dtype=torch.float64) + 0.5
    counts = cells.sum(dim=(1, 2))
    site_y = (torch.arange(height) + 0.5) * factor
    site_x = (torch.arange(width) + 0.5) * factor
    center_y = (cells.sum(dim=2) * site_y).sum(dim=1) / counts
    center_x = (cells.sum(dim=1) * site_x).sum(dim=1) / counts
    return torch.hypot(y[:, None] - center_y[:, None, None], x - center_x[:, None, None])


def _radius(changes: Tensor, distance: Tensor, order: Tensor) -> Tensor:
    """Return the distance that contains `CONTAINED` of each row of ``changes [K, H * W]``: ``[K]``."""
    inside = changes.gather(1, order).cumsum(dim=1)
    index = (inside < CONTAINED * inside[:, -1:]).sum(dim=1, keepdim=True).clamp(max=changes.shape[1] - 1)
    return distance.gather(1, order).gather(1, index).flatten()


def _energy_figures(energy: Tensor) -> dict[str, Figure]:
    """Return how evenly a map ``[h, w]`` is spread: 1 and 1 where it is the same everywhere."""
    mean = energy.mean()
    if mean == 0:
        return {"energy_max_over_mean": None, "energy_participation": None}
    participation = mean.square() / energy.square().mean()
    return {
        "energy_max_over_mean": (energy.max() / mean).item(),
        "energy_participation": participation.item(),
        "energy_max_row": int(energy.argmax()) // energy.shape[1],
        "energy_max_column": int(energy.argmax()) % energy.shape[1],
    }


def _verdict(figures: Mapping[str, Any], strongest: float, factor: int, judged: bool) -> Verdict:
    side, count = figures["cell_sites"], figures["global_sites"]
    what = "site" if side == 1 else f"cell of {side}x{side} sites"
    reach = f"90 % of a site's influence lies within {figures['radius_pixels']:.1f} px ({factor} px per site)"
    level: Level = "ok"
    if not judged:
        text = f"The latent has too few sites to tell near from far; {reach}."
    elif count:
        level = "fault"
        named = zip(figures["global_rows"], figures["global_columns"], strict=True)
        places = ", ".join(f"(row {row}, column {column})" for row, column in named)
        more = f" and {count - MOST_NAMED} more" if count > MOST_NAMED else ""
        text = (
            f"{count} {what}{'s move' if count > 1 else ' moves'} the whole picture: {places}{more}; the strongest "
            f"changes what is far away {strongest:.1f} times as much as the median one changes in all; {reach}."
        )
    elif figures["far_share_median"] > GLOBAL_SHARE:
        level = "note"
        text = (
            f"Every {what} moves the whole picture: {figures['far_share_median']:.0%} of the median one's influence "
            f"falls far away; {reach}."
        )
    else:
        text = (
            f"No {what} moves the whole picture: at most {figures['far_share_max']:.1%} of a change falls far away; "
            f"{reach}."
        )
    return Verdict(
        level,
        "global_site",
        text,
        f"fault: a {what} of whose influence more than {GLOBAL_SHARE:.0%} falls far away (beyond {FAR:.0%} of the "
        f"longer side), which is more than the median one changes in all; note: the median one's is that far-reaching",
        "ours: a site spread evenly over the picture has 60 % to 80 % of its influence far away; of trained "
        "convolutional autoencoders we measured at most 25 %",
    )
