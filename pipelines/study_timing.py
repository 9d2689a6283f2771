"""How fast this device trains a network of a study: a few real steps on noise, or a plain convolution's rate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ..common.errors import Stopped
from ..common.latent_cache import AutoencoderRecord, DataRecord, LatentCache
from ..common.latent_cache_writer import CachePlan, CacheWriter
from ..common.latents import Posterior
from ..common.run_folder import RunFolder
from ..common.runtime import MixedPrecision, RuntimeOptions, StopRequest, accelerated, autocast, resolve_device
from ..stage1_autoencoder.pretrained import resolve_pretrained
from ..stage1_autoencoder.trainer import AutoencoderTrainer
from ..stage2_diffusion.trainer import DiffusionTrainer
from .diffusion_config import DiffusionRunConfig
from .run_config import AutoencoderRunConfig
from .study_data import NOISE_IMAGES, NoiseImages
from .train_diffusion import build_model, resolved

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMED_STEPS = 2
RATE_SECONDS = 0.3
"""How long the convolution runs."""


class StepTimer(StopRequest):
    """Lets a training make one step and then :data:`TIMED_STEPS` more, and takes the time of these."""

    def __init__(self) -> None:
        super().__init__()
        self._times: list[float] = []

    def agreed(self, accelerator: Accelerator) -> str | None:
        """Note the time before a step; ask to stop after the last, or where a signal asks for it."""
        if reason := super().agreed(accelerator):
            return reason
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())
        return "timing" if len(self._times) > TIMED_STEPS + 1 else None

    def seconds_per_step(self) -> float:
        """Return the mean of the timed steps; a training that is shorter is timed with its first step and its end.

        Raises :class:`Stopped` where a signal ended it.
        """
        if self.reason:
            raise Stopped(f"stopped by {self.reason} while steps were timed; nothing was written")
        times = [*self._times, time.perf_counter()] if len(self._times) < 3 else self._times[1:]
        return (times[-1] - times[0]) / (len(times) - 1)


def time_autoencoder(config: AutoencoderRunConfig, size: int, options: RuntimeOptions) -> float:
    """Return the seconds of a training step on images of ``size`` pixels. Errors are those of training."""
    model = resolve_pretrained(config.model)
    with _trial(options, config.train.gradient_accumulation) as (folder, accelerator), StepTimer() as timer:
        run = RunFolder(folder / "run", config, {"kind": "autoencoder"})
        trainer = AutoencoderTrainer(
            model, config.objective, config.train, data=NoiseImages(size), seed=0, run=run, accelerator=accelerator
        )
        with run, contextlib.suppress(Stopped):
            trainer.train(timer)
        return timer.seconds_per_step()


def time_diffusion(
    config: DiffusionRunConfig, latent_shape: tuple[int, int, int], num_classes: int, options: RuntimeOptions
) -> float:
    """Return the seconds of a training step on latents of ``latent_shape``. Errors are those of training."""
    with _trial(options, config.train.gradient_accumulation) as (folder, accelerator), StepTimer() as timer:
        cache = noise_cache(folder / "latents", latent_shape, num_classes)
        config = resolved(config, cache)
        run = RunFolder(folder / "run", config, {"kind": "diffusion"})
        trainer = DiffusionTrainer(
            build_model(config, cache), config.train, cache=cache, seed=0, run=run, accelerator=accelerator
        )
        with run, contextlib.suppress(Stopped):
            trainer.train(timer)
        return timer.seconds_per_step()


def convolution_rate(device: str, mixed_precision: MixedPrecision) -> float:
    """Return the floating-point operations per second of a plain convolution's forward and backward pass."""
    place = resolve_device(device)
    take, flops = convolution_pass(place, mixed_precision)

    def once() -> None:
        take()
        if place.type == "cuda":
            torch.cuda.synchronize()

    once()
    begin, rounds = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < RATE_SECONDS or not rounds:
        once()
        rounds += 1
    return flops * rounds / elapsed


def convolution_pass(device: torch.device, mixed_precision: MixedPrecision) -> tuple[Callable[[], None], int]:
    """Return the forward and backward pass of a 3x3 convolution on ``device``, and its floating-point operations."""
    batch, channels, side = (64, 256, 32) if device.type == "cuda" else (8, 64, 32)
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device)
    x = torch.randn(batch, channels, side, side, device=device, requires_grad=True)

    def once() -> None:
        with autocast(device, mixed_precision):
            layer(x).sum().backward()

    return once, 3 * 2 * batch * side**2 * channels**2 * 9


@contextlib.contextmanager
def _trial(options: RuntimeOptions, accumulation: int) -> Iterator[tuple[Path, Any]]:
    """Give the block a folder that is removed after it, and an accelerator."""
    with TemporaryDirectory(prefix="wavelatent-timing-") as folder, accelerated(options, accumulation) as accelerator:
        yield Path(folder), accelerator


def noise_cache(
    path: Path, shape: tuple[int, int, int], num_classes: int = 0, *, posterior_std: bool = False
) -> LatentCache:
    """Write :data:`NOISE_IMAGES` latents of noise, with standard deviations where asked, and return their cache."""
    plan = CachePlan(
        autoencoder=AutoencoderRecord(fingerprint="noise", path="noise"),
        data=DataRecord(fingerprint="noise", spec="noise", transform={}, num_classes=num_classes),
        shape=shape,
        count=NOISE_IMAGES,
        shard_size=NOISE_IMAGES,
    )
    writer = CacheWriter(path, plan)
    index = torch.tensor(writer.remaining(0))
    mean = torch.randn(NOISE_IMAGES, *shape)
    posterior = Posterior(mean, torch.ones_like(mean) if posterior_std else None)
    writer.add(0, index, posterior, None, index % num_classes if num_classes else None)
    writer.finish()
    return LatentCache.open(path)
