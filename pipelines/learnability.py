"""How well a small fixed denoiser learns the latents of an autoencoder: the health report's one section that trains.

It is stage two in miniature, the same for every autoencoder: network (but for its first and last convolution), noise
levels by the same rule (multiplied by sqrt(values of a latent / 4096), see :mod:`..stage2_diffusion.objectives`),
whitening per channel, optimiser, steps, batch size and seeds. Nothing is written to a disk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.feature_distances import FeatureStatistics, frechet_distance, kernel_distance
from ..common.images import to_uint8
from ..common.latent_loader import held_out_positions
from ..common.latents import LatentStatistics, Posterior
from ..common.randomness import generator
from ..stage1_autoencoder.health import Figure, LatentData, Plot, Section, Verdict
from ..stage1_autoencoder.health_passes import graded
from ..stage2_diffusion.generation import generate_latents
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.objectives import REFERENCE_SIZE, EDMConfig
from ..stage2_diffusion.sampling import Sampling
from ..stage2_diffusion.unet import UNetConfig
from ..stage2_diffusion.validation import SIGMA_BINS, Validation

NETWORK = UNetConfig(channels=32, multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=32)
"""0.7 M parameters at 4 channels: hundreds of latents of 16x16 per second and core."""
STEPS, BATCH_SIZE = 300, 32
LEARNING_RATE, WARMUP = 1e-3, 20
HELD_OUT, MOST_HELD_OUT = 10, 512
"""One in so many latents is held out, and no more than the other."""
MIN_LATENTS = 20
SEED = 0
SAMPLING = Sampling(sampler="heun", steps=18)
QUICK_SAMPLES = 256
"""Images of the quick FID and KID, and of their reference."""
DRAWS = 4
"""Noise levels, drawn as in training, at which each held-out latent is measured."""
LOSS_NOTE, LOSS_FAULT = 0.8, 0.95


class Extractor(Protocol):
    """Features on which a quick FID is taken: :class:`~..common.inception.InceptionFeatures`."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``[B, dim]`` on the CPU of uint8 images ``[B, 3, H, W]``."""
        ...


class Quick(NamedTuple):
    """What a quick FID needs.

    Attributes:
        extractor: of the features.
        decode: raw latents ``[B, C, h, w]`` on the section's device -> images ``[B, 3, H, W]`` in [-1, 1].
        num_samples: images generated, and at most as many of the data as reference.
    """

    extractor: Extractor
    decode: Callable[[Tensor], Tensor]
    num_samples: int = QUICK_SAMPLES


@dataclass(frozen=True)
class InMemoryLatents:
    """Posteriors in memory, drawn anew each time: what :class:`Validation` needs of a cache's ``TrainingLatents``."""

    data: LatentData

    def draw(self, positions: NDArray[np.int64], step: int) -> tuple[Tensor, None]:
        """Return raw latents ``[B, C, h, w]`` at ``positions``, a function of these and of ``step``; no labels."""
        index = torch.from_numpy(positions)
        std = None if self.data.std is None else self.data.std[index]
        draws = [generator("learnability", SEED, step, int(position)) for position in positions]
        return Posterior(self.data.mean[index], std).sample(draws), None


def learnability(
    data: LatentData,
    *,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
    quick: Quick | None = None,
) -> Section:
    """Train the fixed denoiser on nine tenths of the latents and return its loss on the rest, by noise level.

    ``loss`` is the held-out loss at noise levels drawn as in training, which the noise shift is in; the verdict is on
    it. Its weight is EDM's: 1 is what knowing the variance of every channel and nothing else scores, and white noise
    scores 1 whatever the network. ``loss_sigma_<range>`` is stage two's validation loss (:class:`Validation`), of the
    same weight, at levels that are the same for every autoencoder. That makes these unequal tasks where latents differ
    in size: values that share their content are easier to denoise at the same level, and of small latents the upper
    ranges are hardly ever trained on.

    ``quick_fid`` and ``quick_kid`` are of few samples against as many of the data: they compare autoencoders measured
    with the same settings and stand for nothing else.

    Args:
        data: of at least 20 images; its posterior is drawn from anew at every step.
        steps: of 32 latents. Figures of another number than the default are comparable among themselves.
        device: where to train.
        quick: what the quick FID and KID need; without it there are none.
    """
    height, width = data.mean.shape[-2:]
    halvings = 2 ** (len(NETWORK.multipliers) - 1)
    if len(data.mean) < MIN_LATENTS or height % halvings or width % halvings:
        return _not_measured(data, halvings)
    device = torch.device(device)
    latents = InMemoryLatents(data)
    held_out = held_out_positions(len(data.mean), min(MOST_HELD_OUT, len(data.mean) // HELD_OUT))
    training = np.setdiff1d(np.arange(len(data.mean)), held_out)
    model = _fresh_model(data).to(device)
    start = time.monotonic()
    curve = _train(model, latents, training, steps)
    seconds = time.monotonic() - start
    model.eval()
    losses = _held_out_losses(model, latents, held_out)
    figures: dict[str, Figure] = {
        "loss": _loss_at_trained_levels(model, latents, held_out),
        **{f"loss_sigma_{name}": losses[f"validation/sigma_{name}"] for name in SIGMA_BINS},
        "noise_shift": model.objective.noise_shift,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "training_latents": len(training),
        "held_out_latents": len(held_out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        **(_quick_figures(model, data, quick) if quick else {}),
    }
    bins = {name: [losses[f"validation/sigma_{name}"]] for name in SIGMA_BINS}
    plots = [
        Plot("Held-out loss by noise level", bins, kind="bar", labels=("sigma", "weighted loss, 1 is white noise"))
    ]
    if curve:
        plots.append(Plot("Training loss", {"mean of 10 steps": curve}, labels=("tens of steps", "weighted loss")))
    return Section("learnability", figures, [_verdict(figures)], plots)


def _not_measured(data: LatentData, halvings: int) -> Section:
    count, _, height, width = data.mean.shape
    text = (
        f"Not measured: it needs at least {MIN_LATENTS} images and latents whose sides divide by {halvings}; these are "
        f"{count} of {height}x{width} sites."
    )
    return Section("learnability", {"loss": None}, [Verdict("note", "hard_to_learn", text, "measured", "ours")])


def _fresh_model(data: LatentData) -> LatentDiffusion:
    """Return the untrained model: its weights depend on the shape of the latents alone."""
    statistics = LatentStatistics(data.mean.shape[1])
    statistics.update(Posterior(data.mean, data.std))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        shape, known = data.mean.shape[1:], {"mean": statistics.mean, "std": statistics.std}
        # By the root of the number of values, where it is below the reference's too: what the thresholds are for.
        objective = EDMConfig(noise_shift=math.sqrt(math.prod(shape) / REFERENCE_SIZE))
        return LatentDiffusion(NETWORK, objective, shape, whitening="channel", statistics=known)


def _train(model: LatentDiffusion, latents: InMemoryLatents, positions: NDArray[np.int64], steps: int) -> list[float]:
    """Train in place; return the mean loss of every ten steps.

    The learning rate rises over the first steps and falls linearly to zero at ``steps``, in place of an average of the
    weights.
    """
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    device = model.whitening.shift.device
    order = np.random.default_rng(SEED)
    curve: list[list[float]] = []
    for step in range(steps):
        chosen = order.choice(positions, BATCH_SIZE, replace=len(positions) < BATCH_SIZE)
        raw = latents.draw(chosen, step + 1)[0].to(device)
        draw = generator("learnability-noise", SEED, step)
        sigma, noise = model.objective.draw_sigma(len(raw), draw), torch.randn(raw.shape, generator=draw)
        loss = model(raw, sigma.to(device), noise.to(device)).total.mean()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
        if step % 10 == 0:
            curve.append([])
        curve[-1].append(loss.item())
    return [sum(ten) / len(ten) for ten in curve]


def _held_out_losses(
    model: LatentDiffusion, latents: InMemoryLatents, positions: NDArray[np.int64]
) -> dict[str, float]:
    """Return what stage two's validation measures; it asks of the latents and of the process what these two have."""
    device = model.whitening.shift.device
    process: Any = SimpleNamespace(process_index=0, num_processes=1, device=device, reduce=lambda x, how: x)
    source: Any = latents
    return Validation(source, positions.tolist(), BATCH_SIZE)(model, process)


@torch.no_grad()
def _loss_at_trained_levels(model: LatentDiffusion, latents: InMemoryLatents, positions: NDArray[np.int64]) -> float:
    """Return the mean held-out loss at noise levels drawn as in training."""
    device = model.whitening.shift.device
    losses = []
    for start in range(0, len(positions), BATCH_SIZE):
        raw = latents.draw(positions[start : start + BATCH_SIZE], 0)[0]
        for repeat in range(DRAWS):
            draw = generator("learnability-held-out", SEED, start, repeat)
            sigma, noise = model.objective.draw_sigma(len(raw), draw), torch.randn(raw.shape, generator=draw)
            losses.append(model(raw.to(device), sigma.to(device), noise.to(device)).denoising.cpu())
    return torch.cat(losses).mean().item()


@torch.no_grad()
def _quick_figures(model: LatentDiffusion, data: LatentData, quick: Quick) -> dict[str, Figure]:
    """Return FID and KID of samples against the first images of the data; None where a sample is not finite."""
    count = min(quick.num_samples, len(data.images))
    reference = torch.cat([quick.extractor(to_uint8(images)) for images in data.images[:count].split(BATCH_SIZE)])
    features = []
    for start in range(0, quick.num_samples, BATCH_SIZE):
        seeds = range(start, min(start + BATCH_SIZE, quick.num_samples))
        images = quick.decode(generate_latents(model, seeds, sampling=SAMPLING))
        if not images.isfinite().all():  # 8 bits would show it as black, and measure that
            return {"quick_fid": None, "quick_kid": None}
        features.append(quick.extractor(to_uint8(images)))
    samples = torch.cat(features)
    return {
        "quick_fid": frechet_distance(FeatureStatistics.of(samples), FeatureStatistics.of(reference)),
        "quick_kid": kernel_distance(samples, reference).mean,
        "quick_samples": quick.num_samples,
        "quick_reference": count,
    }


def _verdict(figures: dict[str, Figure]) -> Verdict:
    loss = figures["loss"]
    assert isinstance(loss, float)
    by_level = ", ".join(f"{figures[f'loss_sigma_{name}']:.3f} at {name}" for name in SIGMA_BINS)
    text = (
        f"A fixed small denoiser reaches a held-out loss of {loss:.3f} after {figures['steps']} steps of {BATCH_SIZE} "
        f"({by_level}); 1 is white noise."
    )
    if figures.get("quick_fid", 0) is None:
        text += " No quick FID: what is decoded from its samples is not finite."
    return Verdict(
        graded(loss, LOSS_NOTE, LOSS_FAULT),
        "hard_to_learn",
        text,
        f"note: above {LOSS_NOTE:g}; fault: above {LOSS_FAULT:g}, little learnt beyond the variance of each channel",
        "ours: 1 is the best loss for white noise (EDM's weight for data of variance 1, arXiv 2206.00364); of trained "
        "autoencoders on photographs of 64 px we measured 0.62 (16 bounded channels) and 0.73 (4 channels, KL)",
    )
