"""The loss on held-out latents by range of noise level: the same measure for every objective, seed and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..common.denoising import EDMPreconditioning, denoising_loss, expand_like
from ..common.latent_loader import TrainingLatents
from ..common.randomness import image_noise
from .model import LatentDiffusion

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGMA_BINS = {"0-0.2": 0.2, "0.2-1": 1.0, "1-5": 5.0, "5-inf": math.inf}
"""Names and upper ends of the ranges of noise level in which losses are reported."""
LOWEST, HIGHEST = 0.02, 50.0
"""Ends of the outer ranges in validation: beyond them all denoisers of whitened latents are alike."""


class Validation:
    """Measures a model on fixed latents with fixed noise at fixed levels; every process takes its share.

    Each latent is noised once in every range of :data:`SIGMA_BINS`, at levels that are evenly spread in ln(sigma) over
    the range. The error is weighted as in EDM for data of unit variance, by ``(1 + sigma^2) / sigma^2``, whatever the
    objective: 1 is what a network scores that knows the variance of the data and nothing else. A level outside those
    that the objective trains is moved to the nearest that it does.

    Args:
        latents: where they are drawn from.
        positions: which.
        batch_size: latents in a pass.
    """

    def __init__(self, latents: TrainingLatents, positions: Sequence[int], batch_size: int) -> None:
        self.latents, self.positions, self.batch_size = latents, list(positions), batch_size

    @torch.no_grad()
    def __call__(self, model: LatentDiffusion, accelerator: Accelerator) -> dict[str, float]:
        """Return ``validation/loss``, the mean over the ranges, and ``validation/sigma_<range>``, on every process."""
        sums = torch.zeros(len(SIGMA_BINS), dtype=torch.float64)
        mine = range(accelerator.process_index, len(self.positions), accelerator.num_processes)
        for start in range(0, len(mine), self.batch_size):
            places = list(mine[start : start + self.batch_size])
            sums += self._losses(model, places, accelerator.device).double().sum(1)
        means = accelerator.reduce(sums.float().to(accelerator.device), "sum").cpu() / len(self.positions)
        by_range = {f"validation/sigma_{name}": mean for name, mean in zip(SIGMA_BINS, means.tolist(), strict=True)}
        return {"validation/loss": means.mean().item(), **by_range}

    def _losses(self, model: LatentDiffusion, places: list[int], device: torch.device) -> Tensor:
        """Return the losses ``[ranges, B]`` of the latents at ``places``, on the CPU."""
        raw, labels = self.latents.draw(np.array([self.positions[place] for place in places]), step=0)
        latents = model.whitening(raw.to(device))
        labels = None if labels is None or not model.num_classes else labels.to(device)
        spread = [_fraction(place) for place in places]
        losses = []
        for number in range(len(SIGMA_BINS)):
            sigma = torch.tensor([self._sigma(model, number, share) for share in spread], device=device)
            noise = image_noise(places, latents.shape[1:], f"validation-{number}").to(device)
            denoised = model.denoise(latents + expand_like(sigma, latents) * noise, sigma, labels)
            losses.append(denoising_loss(denoised, latents, EDMPreconditioning(1.0).weight(sigma)).cpu())
        return torch.stack(losses)

    @staticmethod
    def _sigma(model: LatentDiffusion, number: int, share: float) -> float:
        """Return the level at ``share`` of range ``number`` in ln(sigma)."""
        ends = [LOWEST, *list(SIGMA_BINS.values())[:-1], HIGHEST]
        sigma = ends[number] ** (1 - share) * ends[number + 1] ** share
        return min(max(sigma, model.objective.sigma_min), model.objective.sigma_max)


def sums_by_sigma(loss: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of losses ``[B]`` and their counts in each of :data:`SIGMA_BINS`, both ``[bins]`` float32."""
    edges = _inner_edges(sigma.device)
    sums = torch.zeros(2, len(SIGMA_BINS), device=sigma.device)
    sums.index_add_(1, torch.bucketize(sigma, edges), torch.stack([loss.float(), torch.ones_like(loss)]))
    return sums[0], sums[1]


@lru_cache
def _inner_edges(device: torch.device) -> Tensor:
    """Return the ends of the ranges but the last, copied to ``device`` once: a copy makes a GPU's queue wait."""
    return torch.tensor(list(SIGMA_BINS.values())[:-1], device=device)


def _fraction(place: int) -> float:
    """Return the ``place``-th of a sequence that fills [0, 1] evenly however long it is: van der Corput's, base 2."""
    share, unit = 0.0, 0.5
    while place:
        share += unit * (place & 1)
        place, unit = place >> 1, unit / 2
    return share
