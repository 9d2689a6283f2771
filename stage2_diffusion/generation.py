"""From seeds to raw latents: the start, the grid and the sampler put together for one trained model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.randomness import generator, image_noise
from .model import LatentDiffusion
from .samplers import SAMPLERS
from .schedules import karras_sigmas


@torch.no_grad()
def generate_latents(
    model: LatentDiffusion,
    seeds: Sequence[int],
    *,
    labels: Tensor | None = None,
    sampler: str = "heun",
    steps: int = 32,
) -> Tensor:
    """Return raw latents ``[len(seeds), C, h, w]`` on the model's device, ready for the autoencoder's decoder.

    Row i depends on ``seeds[i]`` and ``labels[i]`` alone: its start and every later draw come from generators of its
    own. ``labels [len(seeds)]``; None is unconditional.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    device = model.whitening.shift.device
    sigmas = karras_sigmas(steps, model.objective.sigma_min, model.objective.sigma_max)
    x = image_noise(seeds, model.latent_shape, stream="start").to(device) * sigmas[0].item()

    def noise(step: int) -> Tensor:
        return image_noise(seeds, model.latent_shape, stream=f"step-{step}")

    latents = SAMPLERS[sampler](model.denoise, x, sigmas, None if labels is None else labels.to(device), noise)
    return model.whitening.inverse(latents)


def draw_labels(seeds: Sequence[int], num_classes: int) -> Tensor:
    """Return one class per seed, drawn uniformly by the seed itself, ``[len(seeds)]`` int64."""
    return torch.stack([torch.randint(num_classes, (), generator=generator("label", seed)) for seed in seeds])
