"""The training loop of stage two: one network, one optimiser, latents drawn anew from a cache at every step.

Order inside the loop: report, sample, save, stop?, step - so the last state is always reported and saved. Everything
random is a function of (seed, rank, step), so a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from ..common.config import Config
from ..common.ema import EMA, EMAConfig
from ..common.errors import Stopped, WavelatentError
from ..common.images import save_grid
from ..common.latent_cache import LatentCache, training_latents
from ..common.randomness import generator
from ..common.run_folder import RunFolder
from ..common.runtime import StopRequest, autocast
from ..common.training import (
    Beta,
    Clock,
    LearningRateConfig,
    RunningMeans,
    batch_per_process,
    clip_gradients,
    due,
    first_non_finite,
    progress_bar,
    seed_step,
    set_learning_rate,
)
from ..common.training_state import TrainingState
from .generation import draw_labels, generate_latents
from .model import LatentDiffusion

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
LatentBatches = Iterator[tuple[Tensor, Tensor | None]]
"""Raw latents ``[B, C, h, w]`` and labels ``[B]`` or None."""
Decode = Callable[[Tensor], Tensor]
"""Raw latents ``[B, C, h, w]`` -> images ``[B, 3, H, W]`` in [-1, 1]: all that stage two knows of the autoencoder."""

SIGMA_BINS = {"0-0.2": 0.2, "0.2-1": 1.0, "1-5": 5.0, "5-inf": math.inf}
"""Names and upper ends of the ranges of noise level in which the loss is reported."""


class DiffusionTrainConfig(Config):
    """How long, how fast and how large the steps are, and how often the run writes."""

    steps: int = Field(100_000, ge=1)
    batch_size: int = Field(64, ge=1)
    """Images per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: LearningRateConfig = LearningRateConfig(peak=2e-4, warmup_steps=500)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Of Adam; EDM2's values."""
    clip_norm: float = Field(1.0, gt=0)
    """The gradient is clipped to this norm."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of labels hidden in training, from which a class-conditional model learns its unconditional output."""
    ema: EMAConfig = EMAConfig(half_life_images=50_000)
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(1_000, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    sample_every: int = Field(1_000, ge=0)
    """Steps between grids of images from fixed noise; 0 is never."""
    num_samples: int = Field(16, ge=1)
    """Images in a grid."""
    sample_steps: int = Field(18, ge=1)
    """Heun steps of a grid."""

    def images_at(self, step: int) -> int:
        """Return the images seen before ``step``."""
        return step * self.batch_size


class DiffusionTrainer:
    """Holds the state of one run and advances it; :meth:`train` is the loop.

    Opened on a run folder with checkpoints, it goes on from the newest. ``decode`` turns raw latents into the images of
    the sample grids; without it there are none.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        train: DiffusionTrainConfig,
        *,
        cache: LatentCache,
        seed: int,
        run: RunFolder,
        accelerator: Accelerator,
        decode: Decode | None = None,
    ) -> None:
        self.config, self.cache, self.seed, self.decode = train, cache, seed, decode
        self.run, self.accelerator = run, accelerator
        self.micro_batch = batch_per_process(train.batch_size, accelerator.num_processes, train.gradient_accumulation)
        self.model = model.to(accelerator.device).train()
        self.ema = EMA(self.model, train.ema)  # copied before accelerate wraps the forward pass
        self._means = RunningMeans()
        adam = torch.optim.Adam(self.model.parameters(), lr=0.0, betas=train.betas, fused=True)
        self.state = TrainingState(
            run,
            accelerator,
            train,
            modules={"model": self.model, "ema": self.ema.model},
            optimizers={"optimizer": adam},
            shown=self.ema.model,
        )
        self.state.restore()
        self.wrapped_model, self.optimizer = accelerator.prepare(self.model, adam)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    def train(self, stop: StopRequest) -> None:
        """Train to the last step.

        Raises :class:`Stopped` when asked to stop and :class:`WavelatentError` where the loss or the gradient is not
        finite; everything is saved then.
        """
        config = self.config
        clock, speed = self.state.begin(), Speed(self.step)
        bar = progress_bar("train-diffusion", self.step, config.steps, is_main=self.accelerator.is_main_process)
        with bar, prefetched(self._batches()) as batches:
            while True:
                done = self.step >= config.steps
                reason = None if done else stop.agreed(self.accelerator)
                last = done or reason is not None
                if due(self.step, config.log_every) or last:
                    speeds = speed.report(self.step, config.batch_size, batches.waited)
                    bar.set_postfix(self._report(clock, speeds), refresh=False)
                with speed.paused():
                    if due(self.step, config.sample_every) or (done and config.sample_every):
                        self._save_samples()
                    if due(self.step, config.checkpoint_every) or last:
                        self.state.save(clock, "done" if done else "stopped" if reason else "running")
                if done:
                    return
                if reason is not None:
                    raise Stopped(f"stopped by {reason} at step {self.step} of {config.steps}; run again to go on")
                self._step(batches, clock)
                bar.update()

    def _batches(self) -> LatentBatches:
        return training_latents(
            self.cache,
            batch_size=self.micro_batch,
            seed=self.seed,
            start_step=self.step * self.config.gradient_accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _step(self, batches: LatentBatches, clock: Clock) -> None:
        """Take one optimiser step."""
        config, accelerator = self.config, self.accelerator
        set_learning_rate(self.optimizer, config.learning_rate.at(self.step, config.steps))
        loss = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation):
            raw, labels = next(batches)
            with accelerator.accumulate(self.wrapped_model):
                micro_loss = self._loss(raw, labels, micro).mean()
                accelerator.backward(micro_loss)
                loss += micro_loss.detach() / config.gradient_accumulation
                if accelerator.sync_gradients:
                    norm = clip_gradients(
                        accelerator, self.optimizer, self.wrapped_model.parameters(), config.clip_norm
                    )
                    self._guard(loss, norm, clock)
                    self._means.add({"gradient_norm": norm})
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.state.step += 1
        self.ema.update(self.model, self.state.images_seen, config.batch_size)

    def _loss(self, raw: Tensor, labels: Tensor | None, micro: int) -> Tensor:
        """Return the loss of every sample of a micro-batch, ``[B]``."""
        device, rank = self.accelerator.device, self.accelerator.process_index
        micro_step = self.step * self.config.gradient_accumulation + micro
        seed_step(self.seed, rank, micro_step)  # for dropout
        draw = generator("noise", self.seed, rank, micro_step, device=device)
        raw = raw.to(device)
        sigma, noise = self.model.draw_noise(raw, draw)
        if not self.model.num_classes:
            labels = None
        elif labels is not None:
            hidden = torch.rand(len(raw), generator=draw, device=device) < self.config.label_dropout
            labels = torch.where(hidden, self.model.num_classes, labels.to(device))
        loss = self.wrapped_model(raw, sigma, noise, labels)
        self._means.add(_by_sigma(loss.detach(), sigma))
        return loss

    def _guard(self, loss: Tensor, norm: Tensor, clock: Clock) -> None:
        """Save the last good state and stop, before any weight changes, where loss or gradient is not finite."""
        terms = {"loss/denoising": self.accelerator.reduce(loss, "mean")}  # of all processes: they stop together
        if self.accelerator.mixed_precision != "fp16":  # there the scaler skips a step whose gradients overflow
            terms["gradient_norm"] = norm
        if (bad := first_non_finite(terms)) is not None:
            self.state.save(clock, "failed")
            raise WavelatentError(
                f"{bad} is not finite at step {self.step}: the state before that step is saved in {self.run.path}; "
                "start again (--overwrite, or another --out) with a lower learning rate or without mixed precision"
            )

    def _report(self, clock: Clock, speeds: dict[str, float]) -> dict[str, str]:
        """Log the means since the last report and the status; return what the progress bar shows."""
        steps = self.config.steps
        self.run.set_status("running", self.step, steps, clock.eta(self.step, steps))
        means = self._means.take(self.accelerator)
        if not means:
            return {}
        sums = {name: (means.pop(f"loss/{name}"), means.pop(f"count/{name}")) for name in SIGMA_BINS}
        losses, counts = zip(*sums.values(), strict=True)
        values = {"loss/denoising": sum(losses) / sum(counts)}
        values |= {f"loss/denoising/sigma_{name}": loss / count for name, (loss, count) in sums.items() if count}
        values |= means | {"learning_rate": self.config.learning_rate.at(max(0, self.step - 1), steps)} | speeds
        self.run.log(self.step, self.state.images_seen, clock.seconds, values)
        return {"loss": f"{values['loss/denoising']:.4f}"}

    def _save_samples(self) -> None:
        """Write a grid of images of the averaged model, always from the same noise and classes."""
        if self.decode is not None and self.accelerator.is_main_process:
            model, seeds = self.ema.model, range(self.config.num_samples)
            labels = draw_labels(seeds, model.num_classes) if model.num_classes else None
            with torch.no_grad(), autocast(self.accelerator.device, self.accelerator.mixed_precision):
                raw = generate_latents(model, seeds, labels=labels, steps=self.config.sample_steps)
            with torch.no_grad():
                images = self.decode(raw)
            save_grid(self.run.sample_path(self.step), images, columns=math.isqrt(len(seeds) - 1) + 1)
        self.accelerator.wait_for_everyone()


class Speed:
    """Images per second of training proper, and the share of it spent waiting for data, since the last report."""

    def __init__(self, step: int) -> None:
        self._step, self._waited, self._start = step, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block: saving and sampling."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def report(self, step: int, batch_size: int, waited: float) -> dict[str, float]:
        """Return the two at ``step``, given all seconds ``waited`` so far, and start again."""
        elapsed = time.perf_counter() - self._start
        images, waiting = (step - self._step) * batch_size, waited - self._waited
        self._step, self._waited, self._start = step, waited, time.perf_counter()
        return {"images_per_second": images / elapsed, "data_wait_share": waiting / elapsed}


class Prefetched(Iterator[T]):
    """An endless iterator whose next item is made in another thread while the present one is used."""

    def __init__(self, items: Iterator[T], pool: ThreadPoolExecutor) -> None:
        self._items, self._pool = items, pool
        self._next = pool.submit(next, items)
        self.waited = 0.0
        """Seconds that the caller has waited for items."""

    def __next__(self) -> T:
        start = time.perf_counter()
        item = self._next.result()
        self.waited += time.perf_counter() - start
        self._next = self._pool.submit(next, self._items)
        return item


@contextmanager
def prefetched(items: Iterator[T]) -> Iterator[Prefetched[T]]:
    """Open a :class:`Prefetched`, and end its thread with the block."""
    with ThreadPoolExecutor(1) as pool:
        yield Prefetched(items, pool)


def _by_sigma(loss: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Return the sum and the count of the losses ``[B]`` in every bin of noise level: the quotient is their mean."""
    edges = torch.tensor(list(SIGMA_BINS.values())[:-1], device=sigma.device)
    sums = torch.zeros(2, len(SIGMA_BINS), device=sigma.device)
    sums.index_add_(1, torch.bucketize(sigma, edges), torch.stack([loss.float(), torch.ones_like(sigma)]))
    losses = {f"loss/{name}": value for name, value in zip(SIGMA_BINS, sums[0], strict=True)}
    return losses | {f"count/{name}": value for name, value in zip(SIGMA_BINS, sums[1], strict=True)}
