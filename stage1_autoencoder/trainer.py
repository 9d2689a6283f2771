"""The training loop of stage one: a generator (the autoencoder) and a discriminator, each with its optimiser.

One ``accumulate(generator, discriminator)`` encloses each micro-step, so that both step together on the last one. The
discriminator is frozen while the generator's loss is differentiated: what that loss would leave in its gradients would
otherwise be trained on. Order inside the loop: report, save, stop?, step - so the last state is reported and saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from ..common.checkpoints import Checkpoint, save_checkpoint
from ..common.config import Config
from ..common.ema import EMA, EMAConfig
from ..common.errors import Stopped, WavelatentError
from ..common.images import Batch, ImageData, read_batch, save_grid, training_batches
from ..common.lpips_metric import PerceptualDistance
from ..common.runtime import RunFolder, StopRequest
from ..common.training import (
    Clock,
    LearningRateConfig,
    RunningMeans,
    batch_per_process,
    clip_gradients,
    due,
    first_non_finite,
    progress_bar,
    restore_scaler,
    scaler_state,
    seed_step,
    set_learning_rate,
)
from .autoencoder import Autoencoder, AutoencoderConfig
from .discriminators import DISCRIMINATORS
from .losses import hinge_discriminator
from .objective import ObjectiveConfig, adversarial_term, reconstruction_terms, term_weights, weighted_total

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLE_IMAGES = 8


class AutoencoderTrainConfig(Config):
    """How long, how fast and how large the steps are, and how often the run writes."""

    steps: int = Field(100_000, ge=1)
    batch_size: int = Field(16, ge=1)
    """Images per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: LearningRateConfig = LearningRateConfig()
    betas: tuple[float, float] = (0.5, 0.9)
    discriminator_learning_rate: LearningRateConfig = LearningRateConfig()
    clip_norm: float = Field(1.0, gt=0)
    """Gradients of each optimiser are clipped to this norm."""
    flip: bool = True
    ema: EMAConfig = EMAConfig()
    num_workers: int = Field(0, ge=0)
    log_every: int = Field(50, ge=1)
    sample_every: int = Field(1000, ge=0)
    checkpoint_every: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""


class AutoencoderTrainer:
    """Holds the state of one run and advances it; :meth:`train` is the loop."""

    def __init__(
        self,
        model: AutoencoderConfig,
        objective: ObjectiveConfig,
        train: AutoencoderTrainConfig,
        *,
        data: ImageData,
        seed: int,
        run: RunFolder,
        accelerator: Accelerator,
    ) -> None:
        self.objective, self.config, self.data, self.seed = objective, train, data, seed
        self.run, self.accelerator = run, accelerator
        self.micro_batch = batch_per_process(train.batch_size, accelerator.num_processes, train.gradient_accumulation)
        torch.manual_seed(seed)  # the same initial weights in every process
        self.autoencoder = Autoencoder(model)
        self.autoencoder.latent_shape(data.size)  # refuses a size that does not divide before anything is trained
        self.discriminator = self._build_discriminator()
        self.perceptual = self._build_perceptual()
        self.weights = term_weights(objective, model.bottleneck.penalty_weights)
        self.ema = EMA(self.autoencoder, train.ema)
        self.ema.model.to(accelerator.device)
        self.step = 0
        self._seconds_before = 0.0
        self._means = RunningMeans()
        self._prepare()

    def _build_discriminator(self) -> nn.Module | None:
        adversarial = self.objective.adversarial
        if adversarial is None:
            return None
        discriminator = DISCRIMINATORS[adversarial.discriminator.kind](adversarial.discriminator)
        with torch.no_grad():
            discriminator(torch.zeros(1, 3, self.data.size, self.data.size))  # refuses a size that does not divide
        return discriminator

    def _build_perceptual(self) -> PerceptualDistance | None:
        if self.objective.lpips.weight == 0:
            return None
        return PerceptualDistance(self.objective.lpips.net).to(self.accelerator.device)

    def _prepare(self) -> None:
        """Make the optimisers, restore the newest checkpoint, and hand models and optimisers to accelerate."""

        def adam(module: nn.Module) -> torch.optim.Adam:
            return torch.optim.Adam(module.parameters(), lr=0.0, betas=self.config.betas)

        self._modules: dict[str, nn.Module] = {"autoencoder": self.autoencoder, "ema": self.ema.model}
        self._optimizers: dict[str, torch.optim.Optimizer] = {"autoencoder_optimizer": adam(self.autoencoder)}
        if self.discriminator is not None:
            self._modules["discriminator"] = self.discriminator
            self._optimizers["discriminator_optimizer"] = adam(self.discriminator)
        if (path := self.run.checkpoint) is not None:
            checkpoint = Checkpoint.open(path)
            checkpoint.restore(self._modules, self._optimizers)
            self.step = checkpoint.step
            self._seconds_before = float(checkpoint.counters["seconds"])
            restore_scaler(self.accelerator, checkpoint.counters["scaler"])
        prepare = self.accelerator.prepare
        self.wrapped_autoencoder = prepare(self.autoencoder)
        self.autoencoder_optimizer = prepare(self._optimizers["autoencoder_optimizer"])
        if self.discriminator is not None:
            self.wrapped_discriminator = prepare(self.discriminator)
            self.discriminator_optimizer = prepare(self._optimizers["discriminator_optimizer"])

    @property
    def images_seen(self) -> int:
        """Images of all steps so far."""
        return self.step * self.config.batch_size

    def train(self, stop: StopRequest) -> None:
        """Train to the last step. Raises :class:`Stopped` when asked to stop; everything is saved then."""
        config = self.config
        self.run.begin()
        clock = Clock(self._seconds_before, self.step)
        batches = self._batches()
        with progress_bar("train-ae", self.step, config.steps, is_main=self.accelerator.is_main_process) as bar:
            while True:
                done = self.step >= config.steps
                reason = None if done else stop.agreed(self.accelerator)
                last = done or reason is not None
                if due(self.step, config.log_every) or last:
                    bar.set_postfix(self._report(clock), refresh=False)
                if due(self.step, config.sample_every) or done:
                    self._save_samples()
                if due(self.step, config.checkpoint_every) or last:
                    self._save(clock, "done" if done else "stopped" if reason else "running")
                if done:
                    return
                if reason is not None:
                    raise Stopped(f"stopped by {reason} at step {self.step} of {config.steps}; run again to go on")
                self._step(batches, clock)
                bar.update()

    def _batches(self) -> Iterator[Batch]:
        return training_batches(
            self.data,
            batch_size=self.micro_batch,
            seed=self.seed,
            start_step=self.step * self.config.gradient_accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            flip=self.config.flip,
            num_workers=self.config.num_workers,
        )

    def _step(self, batches: Iterator[Batch], clock: Clock) -> None:
        """Advance by one optimiser step of both networks."""
        config = self.config
        set_learning_rate(self.autoencoder_optimizer, config.learning_rate.at(self.step, config.steps))
        if self.discriminator is not None:
            rate = config.discriminator_learning_rate.at(self.step, config.steps)
            set_learning_rate(self.discriminator_optimizer, rate)
        for micro in range(config.gradient_accumulation):
            seed_step(self.seed, self.accelerator.process_index, self.step * config.gradient_accumulation + micro)
            images = next(batches).images.to(self.accelerator.device)
            wrapped = [self.wrapped_autoencoder]
            if self.discriminator is not None:
                wrapped.append(self.wrapped_discriminator)
            with self.accelerator.accumulate(*wrapped):
                reconstruction = self._generator_step(images, clock)
                if self._adversarial_on:
                    self._discriminator_step(images, reconstruction, clock)
        self.step += 1
        self.ema.update(self.autoencoder, self.images_seen, config.batch_size)

    @property
    def _adversarial_on(self) -> bool:
        adversarial = self.objective.adversarial
        return adversarial is not None and self.step >= adversarial.start

    def _generator_step(self, images: Tensor, clock: Clock) -> Tensor:
        """Differentiate the autoencoder's loss and step on the last micro-step; return the detached reconstruction."""
        self.wrapped_autoencoder.train()
        output = self.wrapped_autoencoder(images)
        terms = reconstruction_terms(self.objective, output.images, images, self.perceptual) | output.penalties
        if self._adversarial_on:
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)
            with self.accelerator.autocast():
                terms |= adversarial_term(self.discriminator(output.images))
            self.discriminator.requires_grad_(True)
        self._guard(terms, clock)
        total = weighted_total(terms, self.weights)
        self.accelerator.backward(total)
        self._means.add({f"loss/{name}": value for name, value in terms.items()} | {"loss/total": total})
        self._means.add(_health(output.images.detach(), images, output.raw.detach()))
        if self.accelerator.sync_gradients:
            norm = clip_gradients(self.accelerator, self.wrapped_autoencoder.parameters(), self.config.clip_norm)
            self._guard_norm({"gradient_norm/autoencoder": norm}, clock)
        self.autoencoder_optimizer.step()
        self.autoencoder_optimizer.zero_grad()
        return output.images.detach()

    def _discriminator_step(self, images: Tensor, reconstruction: Tensor, clock: Clock) -> None:
        """One forward on real and reconstructed images together, and a step on the last micro-step."""
        logits = self.wrapped_discriminator(torch.cat([images, reconstruction]))
        real, fake = zip(*(part.chunk(2) for part in logits), strict=True)
        loss = hinge_discriminator(real, fake).mean()
        self._guard({"discriminator": loss}, clock)
        self.accelerator.backward(loss)
        real_mean, fake_mean = (torch.stack([m.float().mean() for m in maps]).mean() for maps in (real, fake))
        self._means.add({"loss/discriminator": loss, "gan/logit_real": real_mean, "gan/logit_fake": fake_mean})
        if self.accelerator.sync_gradients:
            norm = clip_gradients(self.accelerator, self.wrapped_discriminator.parameters(), self.config.clip_norm)
            self._guard_norm({"gradient_norm/discriminator": norm}, clock)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()

    def _guard(self, terms: dict[str, Tensor], clock: Clock) -> None:
        """Save the last good state and stop where a term of any process is not finite, naming it."""
        bad = first_non_finite(terms)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([bad is not None], device=self.accelerator.device, dtype=torch.float32)
            if self.accelerator.reduce(flag, "sum").item() > 0:
                bad = bad or "a term of another process"
        if bad is not None:
            self._save(clock, "failed")
            raise WavelatentError(
                f"{bad} is not finite at step {self.step}: the state before that step is saved in {self.run.path}; "
                "start again (--overwrite, or another --out) with a lower learning rate or a lower weight of that term"
            )

    def _guard_norm(self, norms: dict[str, Tensor], clock: Clock) -> None:
        self._means.add(norms)
        if self.accelerator.mixed_precision != "fp16":  # there the scaler skips a step whose gradients overflow
            self._guard(norms, clock)

    def _report(self, clock: Clock) -> dict[str, str]:
        """Log the means since the last report and the status; return what the progress bar shows."""
        values = self._means.take(self.accelerator)
        config = self.config
        if values:
            values["learning_rate"] = config.learning_rate.at(max(0, self.step - 1), config.steps)
            self.run.log(self.step, self.images_seen, clock.seconds, values)
        self.run.set_status("running", self.step, config.steps, clock.eta(self.step, config.steps))
        return {name.removeprefix("loss/"): f"{values[name]:.3g}" for name in values if name.startswith("loss/")}

    def _save(self, clock: Clock, state: str) -> None:
        """Write a checkpoint and the model folder; ``state`` goes into status.json."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.run.path,
                self.step,
                modules=self._modules,
                optimizers=self._optimizers,
                counters={
                    "images": self.images_seen,
                    "seconds": clock.seconds,
                    "scaler": scaler_state(self.accelerator),
                },
                keep=self.config.keep,
            )
            self.run.save_model(self.ema.model)
            self.run.set_status(state, self.step, self.config.steps, clock.eta(self.step, self.config.steps))
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _save_samples(self) -> None:
        """Write a grid of the same images every time, originals above their reconstructions by the averaged weights."""
        if not self.accelerator.is_main_process:
            return
        count = min(SAMPLE_IMAGES, len(self.data))
        images = read_batch(self.data, range(count)).images.to(self.accelerator.device)
        reconstructions = self.ema.model(images).images
        save_grid(self.run.sample_path(self.step), torch.cat([images, reconstructions]).cpu(), columns=count)


def _health(reconstruction: Tensor, images: Tensor, raw: Tensor) -> dict[str, Tensor]:
    """Return what tells a healthy run: PSNR in dB, and the scale and extremes of the raw latents."""
    mse = (reconstruction.float().clamp(-1, 1) - images).square().flatten(1).mean(dim=1)
    return {
        "psnr": (10 * torch.log10(4 / mse.clamp_min(1e-10))).mean(),
        "latent/mean": raw.mean(),
        "latent/std": raw.std(),
        "latent/max_abs": raw.abs().max(),
    }
