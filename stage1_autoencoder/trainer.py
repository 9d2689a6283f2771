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

from ..common.config import Config
from ..common.ema import EMA, EMAConfig
from ..common.errors import Stopped, UsageError, WavelatentError
from ..common.images import Batch, ImageData, read_batch, save_grid, training_batches
from ..common.lpips_metric import MIN_SIZE, PerceptualDistance
from ..common.run_folder import RunFolder
from ..common.runtime import StopRequest
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
    betas: tuple[Beta, Beta] = (0.5, 0.9)
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
        if accelerator.mixed_precision == "fp16" and train.gradient_accumulation > 1 and objective.adversarial:
            raise UsageError(
                "train.gradient_accumulation with an adversarial loss needs --mixed-precision bf16 or no: in fp16 the "
                "loss scale may change between the discriminator's micro-steps"
            )
        torch.manual_seed(seed)  # the same initial weights in every process
        self.autoencoder = Autoencoder(model).to(accelerator.device)
        self.ema = EMA(self.autoencoder, train.ema)  # copied before accelerate wraps the forward pass
        self.discriminator = self._build_discriminator()
        self._try_size()
        self.perceptual = self._build_perceptual()
        self.weights = term_weights(objective, model.bottleneck.penalty_weights)
        self._means = RunningMeans()
        self._prepare()

    def _build_discriminator(self) -> nn.Module | None:
        adversarial = self.objective.adversarial
        if adversarial is None:
            return None
        discriminator = DISCRIMINATORS[adversarial.discriminator.kind](adversarial.discriminator)
        return discriminator.to(self.accelerator.device)

    @torch.no_grad()
    def _try_size(self) -> None:
        """Run one image through every network, so that a size that does not fit fails before anything is written."""
        self.autoencoder.latent_shape(self.data.size)
        image = torch.zeros(1, 3, self.data.size, self.data.size, device=self.accelerator.device)
        self.ema.model(image)
        if self.discriminator is not None:
            self.discriminator.eval()(image)  # eval: spectral norm's power iteration stays as it was
            self.discriminator.train()

    def _build_perceptual(self) -> PerceptualDistance | None:
        if self.objective.lpips.weight == 0:
            return None
        if self.data.size < MIN_SIZE:
            raise UsageError(
                f"LPIPS needs images of at least {MIN_SIZE} px, these have {self.data.size}: "
                "set objective.lpips.weight=0, or give a larger --size"
            )
        return PerceptualDistance(self.objective.lpips.net).to(self.accelerator.device)

    def _prepare(self) -> None:
        """Make the optimisers, restore the newest checkpoint, and hand models and optimisers to accelerate."""

        def adam(module: nn.Module) -> torch.optim.Adam:
            return torch.optim.Adam(module.parameters(), lr=0.0, betas=self.config.betas, fused=True)

        modules: dict[str, nn.Module] = {"autoencoder": self.autoencoder, "ema": self.ema.model}
        optimizers: dict[str, torch.optim.Optimizer] = {"autoencoder_optimizer": adam(self.autoencoder)}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
            optimizers["discriminator_optimizer"] = adam(self.discriminator)
        self.state = TrainingState(self.run, self.accelerator, self.config, modules, optimizers, shown=self.ema.model)
        self.state.restore()
        prepare = self.accelerator.prepare
        self.wrapped_autoencoder = prepare(self.autoencoder)
        self.autoencoder_optimizer = prepare(optimizers["autoencoder_optimizer"])
        if self.discriminator is not None:
            self.wrapped_discriminator = prepare(self.discriminator)
            self.discriminator_optimizer = prepare(optimizers["discriminator_optimizer"])

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    def train(self, stop: StopRequest) -> None:
        """Train to the last step. Raises :class:`Stopped` when asked to stop; everything is saved then."""
        config = self.config
        clock = self.state.begin()
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
                    self.state.save(clock, "done" if done else "stopped" if reason else "running")
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
                self._micro_step(images, clock)
        self.state.step += 1
        self.ema.update(self.autoencoder, self.state.images_seen, config.batch_size)

    @property
    def _adversarial_on(self) -> bool:
        adversarial = self.objective.adversarial
        return adversarial is not None and self.step >= adversarial.start

    def _micro_step(self, images: Tensor, clock: Clock) -> None:
        """Differentiate both losses; on the last micro-step both optimisers step.

        The discriminator's loss is looked at before the autoencoder steps, so that what is saved where it is not finite
        is the state before the step.
        """
        reconstruction = self._generator_backward(images, clock)
        loss = self._discriminator_loss(images, reconstruction, clock) if self._adversarial_on else None
        self.autoencoder_optimizer.step()
        self.autoencoder_optimizer.zero_grad()
        if loss is None:
            return
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = {"gradient_norm/discriminator": self._clip(self.discriminator_optimizer, self.wrapped_discriminator)}
            self._guard_norm(norm, clock, save=False)  # the autoencoder has stepped already
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()

    def _generator_backward(self, images: Tensor, clock: Clock) -> Tensor:
        """Differentiate the autoencoder's loss; return the detached reconstruction."""
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
            norm = {"gradient_norm/autoencoder": self._clip(self.autoencoder_optimizer, self.wrapped_autoencoder)}
            self._guard_norm(norm, clock)
        return output.images.detach()

    def _discriminator_loss(self, images: Tensor, reconstruction: Tensor, clock: Clock) -> Tensor:
        """Return the discriminator's loss from one forward pass on real and reconstructed images together."""
        logits = self.wrapped_discriminator(torch.cat([images, reconstruction]))
        real, fake = zip(*(part.chunk(2) for part in logits), strict=True)
        loss = hinge_discriminator(real, fake).mean()
        self._guard({"discriminator": loss}, clock)
        real_mean, fake_mean = (torch.stack([m.float().mean() for m in maps]).mean() for maps in (real, fake))
        self._means.add({"loss/discriminator": loss, "gan/logit_real": real_mean, "gan/logit_fake": fake_mean})
        return loss

    def _clip(self, optimizer: torch.optim.Optimizer, wrapped: nn.Module) -> Tensor:
        return clip_gradients(self.accelerator, optimizer, wrapped.parameters(), self.config.clip_norm)

    def _guard(self, terms: dict[str, Tensor], clock: Clock, *, save: bool = True) -> None:
        """Stop where a term of any process is not finite, naming it; with ``save``, the state before the step is kept.

        Without it, in the middle of a step, the run is left as its newest checkpoint has it.
        """
        bad = self.state.agree_on_bad(first_non_finite(terms))
        if bad is None:
            return
        if save:
            self.state.save(clock, "failed")
        kept = "the state before that step is saved" if save else "the newest checkpoint is kept"
        raise WavelatentError(
            f"{bad} is not finite at step {self.step}: {kept} in {self.run.path}; "
            "start again (--overwrite, or another --out) with a lower learning rate or a lower weight of that term"
        )

    def _guard_norm(self, norm: dict[str, Tensor], clock: Clock, *, save: bool = True) -> None:
        self._means.add(norm)
        if self.accelerator.mixed_precision != "fp16":  # there the scaler skips a step whose gradients overflow
            self._guard(norm, clock, save=save)

    def _report(self, clock: Clock) -> dict[str, str]:
        """Log the means since the last report and the status; return what the progress bar shows."""
        values = self._means.take(self.accelerator)
        config = self.config
        if values:
            values["learning_rate"] = config.learning_rate.at(max(0, self.step - 1), config.steps)
            self.run.log(self.step, self.state.images_seen, clock.seconds, values)
        self.run.set_status("running", self.step, config.steps, clock.eta(self.step, config.steps))
        return {name.removeprefix("loss/"): f"{values[name]:.3g}" for name in values if name.startswith("loss/")}

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
