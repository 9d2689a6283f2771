"""The training loop of stage two: one network, one optimiser, latents drawn anew from a cache at every step.

Order inside the loop: measure, report, sample, save, stop?, step - so the last state is always reported and saved.
Everything random is a function of (seed, rank, step), so a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.errors import Diverged, Stopped
from ..common.images import save_grid
from ..common.latent_cache import LatentCache
from ..common.latent_loader import Prefetched, TrainingLatents, held_out_positions, prefetched
from ..common.power_ema import SNAPSHOT_FOLDER, PowerEMA, drop_after, save_snapshot
from ..common.randomness import generator
from ..common.run_folder import RunFolder
from ..common.runtime import StopRequest, autocast
from ..common.training import (
    Clock,
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
from .model import LatentDiffusion, Losses
from .networks import DenoiserNetwork
from .sampling import Sampling
from .train_config import DiffusionTrainConfig
from .validation import SIGMA_BINS, Validation, sums_by_sigma

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = tuple[Tensor, Tensor | None]
"""Raw latents ``[B, C, h, w]`` and labels ``[B]`` or None."""
Decode = Callable[[Tensor], Tensor]
"""Raw latents ``[B, C, h, w]`` -> images ``[B, 3, H, W]`` in [-1, 1]: all that stage two knows of the autoencoder."""
Evaluate = Callable[[LatentDiffusion, int], dict[str, float] | None]
"""A model and its step -> figures such as ``quick_fid``, or None where they cannot be had; called by every process."""
BEST_BY = ("quick_fid", "validation/loss")
"""What decides which model is the best so far, the more telling first; lower is better."""


class DiffusionTrainer:
    """Holds the state of one run and advances it; :meth:`train` is the loop.

    Opened on a run folder with checkpoints, it goes on from the newest. ``decode`` turns raw latents into the images of
    the sample grids, and ``evaluate`` measures samples; without them there are none.
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
        evaluate: Evaluate | None = None,
    ) -> None:
        self.config, self.seed, self.decode, self.evaluate = train, seed, decode, evaluate
        self.run, self.accelerator = run, accelerator
        self.micro_batch = batch_per_process(train.batch_size, accelerator.num_processes, train.gradient_accumulation)
        held_out = train.held_out(len(cache))
        self.latents = TrainingLatents(
            cache,
            self.micro_batch,
            seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            held_out=held_out,
            pin_memory=accelerator.device.type == "cuda",
        )
        positions = held_out_positions(len(cache), held_out)
        self.validate = Validation(TrainingLatents(cache, 1, seed=0), positions.tolist(), self.micro_batch)
        self.model = model.to(accelerator.device).train()
        self.ema = PowerEMA(self.model, train.ema)  # copied before the model is compiled and wrapped
        self._means = RunningMeans()
        adam = torch.optim.Adam(self.model.parameters(), lr=0.0, betas=train.betas, fused=True)
        self.state = TrainingState(
            run,
            accelerator,
            train,
            modules={"model": self.model, **self.ema.modules()},
            optimizers={"optimizer": adam},
            shown=self.ema.shown,
        )
        self.state.restore()
        prepare_network(self.model.network, train)
        self.wrapped_model, self.optimizer = accelerator.prepare(self.model, adam)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    def train(self, stop: StopRequest) -> None:
        """Train to the last step.

        Raises :class:`Stopped` when asked to stop and :class:`Diverged` where the loss or the gradient is not
        finite; everything is saved then.
        """
        config, main = self.config, self.accelerator.is_main_process
        clock, speed = self.state.begin(), Speed(self.step)
        if main:
            drop_after(self.run.path / SNAPSHOT_FOLDER, self.step)
        bar = progress_bar("train-diffusion", self.step, config.steps, is_main=main)
        first_batch = self.step * config.gradient_accumulation
        threads = config.num_workers
        measured_at = self.step if self.step == 0 or self._is_logged() else -1
        with bar, prefetched(self.latents.batch, first_batch, depth=2 * threads, threads=threads) as batches:
            while True:
                done = self.step >= config.steps
                reason = None if done else stop.agreed(self.accelerator)
                last = done or reason is not None
                measured: dict[str, float] = {}
                if self.step != measured_at:
                    with speed.paused():
                        measured = self._measure(done, clock)
                if due(self.step, config.log_every) or measured or last:
                    speeds = speed.report(self.step, config.batch_size, batches.waited)
                    bar.set_postfix(self._report(clock, speeds, measured), refresh=False)
                with speed.paused():
                    if due(self.step, config.sample_every) or (done and config.sample_every):
                        self._save_samples()
                    if main and config.ema.snapshot_due(self.step, config.steps):
                        save_snapshot(self.run.path / SNAPSHOT_FOLDER, self.step, self.ema)
                    if due(self.step, config.checkpoint_every) or last:
                        self.state.save(clock, "done" if done else "stopped" if reason else "running")
                if done:
                    return
                if reason is not None:
                    raise Stopped(f"stopped by {reason} at step {self.step} of {config.steps}; run again to go on")
                self._step(batches, clock)
                bar.update()

    def _is_logged(self) -> bool:
        """Return whether the log has the present step, as the main process, which alone keeps the log, sees it.

        Other processes may still see what it has just cut off; if they decided by that, they would measure alone.
        """
        flag = torch.zeros(1, device=self.accelerator.device)
        if self.accelerator.is_main_process:
            flag += self.run.logged(self.step)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _step(self, batches: Prefetched[Batch], clock: Clock) -> None:
        """Take one optimiser step."""
        config, accelerator = self.config, self.accelerator
        set_learning_rate(self.optimizer, config.learning_rate.at(self.step, config.steps))
        loss = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation):
            raw, labels = next(batches)
            with accelerator.accumulate(self.wrapped_model):
                micro_loss = self._losses(raw, labels, micro).total.mean()
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
        self.model.after_step()
        self.state.step += 1
        self.ema.update(self.model, self.step)

    def _losses(self, raw: Tensor, labels: Tensor | None, micro: int) -> Losses:
        """Return the losses of every sample of a micro-batch."""
        device, rank = self.accelerator.device, self.accelerator.process_index
        micro_step = self.step * self.config.gradient_accumulation + micro
        seed_step(self.seed, rank, micro_step)  # for dropout
        draw = generator("noise", self.seed, rank, micro_step, device=device)
        raw = raw.to(device, non_blocking=True)
        sigma, noise = self.model.draw_noise(raw, draw)
        if not self.model.num_classes:
            labels = None
        elif labels is not None:
            hidden = torch.rand(len(raw), generator=draw, device=device) < self.config.label_dropout
            labels = torch.where(hidden, self.model.num_classes, labels.to(device))
        losses: Losses = self.wrapped_model(raw, sigma, noise, labels)
        sums, counts = sums_by_sigma(losses.denoising.detach(), sigma)
        self._means.add({f"loss/{name}": value for name, value in zip(SIGMA_BINS, sums, strict=True)})
        self._means.add({f"count/{name}": value for name, value in zip(SIGMA_BINS, counts, strict=True)})
        if self.model.uncertainty is not None:
            self._means.add({"loss/total": losses.total.mean()})
        return losses

    def _guard(self, loss: Tensor, norm: Tensor, clock: Clock) -> None:
        """Save the last good state and stop, before any weight changes, where loss or gradient is not finite."""
        name = "loss/denoising" if self.model.uncertainty is None else "loss/total"
        terms = {name: self.accelerator.reduce(loss, "mean")}  # of all processes: they stop together
        if self.accelerator.mixed_precision != "fp16":  # there the scaler skips a step whose gradients overflow
            terms["gradient_norm"] = norm
        if (bad := first_non_finite(terms)) is not None:
            self.state.save(clock, "failed")
            raise Diverged(
                f"{bad} is not finite at step {self.step}: the state before that step is saved in {self.run.path}; "
                "start again (--overwrite, or another --out) with a lower learning rate or without mixed precision"
            )

    def _measure(self, done: bool, clock: Clock) -> dict[str, float]:
        """Return what is due to be measured of the averaged weights, and keep them where they are the best so far.

        A quick evaluation takes minutes and is not interrupted, so the state before it is saved.
        """
        config, measured = self.config, {}
        with autocast(self.accelerator.device, self.accelerator.mixed_precision):
            if self.validate.positions and (done or due(self.step, config.validation.every)):
                measured.update(self.validate(self.ema.shown, self.accelerator))
        quick = config.quick_evaluation.every
        if self.evaluate is not None and quick and (done or due(self.step, quick)):
            self.state.save(clock, "running")
            measured.update(self.evaluate(self.ema.shown, self.step) or {})
        self.run.save_best(self.ema.shown, self.step, measured, BEST_BY)
        return measured

    def _report(self, clock: Clock, speeds: dict[str, float], measured: dict[str, float]) -> dict[str, str]:
        """Log the means since the last report and the status; return what the progress bar shows."""
        steps = self.config.steps
        self.run.set_status("running", self.step, steps, clock.eta(self.step, steps))
        values = _by_sigma(self._means.take(self.accelerator))
        if values:
            values |= {"learning_rate": self.config.learning_rate.at(max(0, self.step - 1), steps), **speeds}
        if values or measured:
            self.run.log(self.step, self.state.images_seen, clock.seconds, {**values, **measured})
        return {"loss": f"{values['loss/denoising']:.4f}"} if values else {}

    def _save_samples(self) -> None:
        """Write a grid of images of the averaged model, always from the same noise and classes."""
        if self.decode is not None and self.accelerator.is_main_process:
            model, seeds = self.ema.shown, range(self.config.num_samples)
            labels = draw_labels(seeds, model.num_classes) if model.num_classes else None
            with torch.no_grad(), autocast(self.accelerator.device, self.accelerator.mixed_precision):
                sampling = Sampling(steps=self.config.sample_steps)
                raw = generate_latents(model, seeds, labels=labels, sampling=sampling)
            with torch.no_grad():
                images = self.decode(raw)
            save_grid(self.run.sample_path(self.step), images, columns=math.isqrt(len(seeds) - 1) + 1)
        self.accelerator.wait_for_everyone()


def prepare_network(network: DenoiserNetwork, train: DiffusionTrainConfig) -> None:
    """Make ``network`` compute as the configuration says, which changes no result."""
    network.channels_last = train.channels_last
    network.gradient_checkpointing = train.gradient_checkpointing
    if train.compile:
        network.compile()


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


def _by_sigma(means: dict[str, float]) -> dict[str, float]:
    """Return the means with the sums and counts of losses by range of noise level turned into their quotients."""
    if not means:
        return {}
    sums = {name: (means.pop(f"loss/{name}"), means.pop(f"count/{name}")) for name in SIGMA_BINS}
    losses, counts = zip(*sums.values(), strict=True)
    by_range = {f"loss/denoising/sigma_{name}": loss / count for name, (loss, count) in sums.items() if count}
    return {"loss/denoising": sum(losses) / sum(counts), **by_range, **means}
