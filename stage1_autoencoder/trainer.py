"""The training loop of stage one: a generator (the autoencoder) and a discriminator, each with its optimiser.

One ``accumulate(generator, discriminator)`` encloses each micro-step, so that both step together on the last one. The
discriminator is frozen while the generator's loss is differentiated: what that loss would leave in its gradients would
otherwise be trained on. Order inside the loop: report, save, stop?, step - so the last state is reported and saved.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.ema import EMA
from ..common.errors import Stopped, UsageError
from ..common.images import Batch, ImageData, read_batch, save_grid, training_batches
from ..common.run_folder import RunFolder
from ..common.runtime import StopRequest
from ..common.training import (
    Clock,
    RunningMeans,
    batch_per_process,
    clip_gradients,
    due,
    progress_bar,
    seed_step,
    set_learning_rate,
)
from ..common.training_state import TrainingState
from .adversarial import (
    Adversary,
    ReconstructionMonitor,
    adaptive_weight,
    last_layer_gradients,
)
from .autoencoder import Autoencoder, AutoencoderConfig, AutoencoderOutput
from .objective import ObjectiveConfig, health, reconstruction_distances, weighted_total
from .phases import Phase, phase_at, resize
from .step_guard import StepGuard
from .train_config import AutoencoderTrainConfig, check_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLE_IMAGES = 8


class AutoencoderTrainer:
    """Holds the state of one run and advances it; :meth:`train` is the loop.

    ``initial`` is the state of an autoencoder that a new run starts from; a resumed one goes on from its checkpoint.
    """

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
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.objective, self.config, self.data, self.seed = objective, train, data, seed
        self.run, self.accelerator = run, accelerator
        self.phases = train.resolved_phases()
        check_settings(objective, train, accelerator, data.size)
        torch.manual_seed(seed)  # the same initial weights in every process
        self.autoencoder = Autoencoder(model).to(accelerator.device)
        if run.checkpoint is None:
            self.autoencoder.load_source_weights()
            if initial is not None:
                self.autoencoder.load_state_dict(initial)
        self.ema = EMA(self.autoencoder, train.ema)  # copied before accelerate wraps the forward pass
        self.adversary = None if objective.adversarial is None else Adversary(objective.adversarial)
        if self.adversary is not None and self.adversary.config.adaptive is not None:
            _ = self.autoencoder.last_layer  # raises where it is frozen, and has no gradient to be weighed
        self.monitor = ReconstructionMonitor()  # stays on the CPU: what it says decides what is done
        if self.adversary is not None:
            self.adversary.to(accelerator.device)
        self.distances = reconstruction_distances(objective, accelerator.device)
        self.weights = objective.reconstruction_weights | model.bottleneck.penalty_weights
        self._try_sizes()
        self._means = RunningMeans()
        self._micro = 0
        """Micro-steps before the present one."""
        self._prepare()

    @torch.no_grad()
    def _try_sizes(self) -> None:
        """Run an image of every size through every network, so that one that does not fit fails before any writing."""
        factor = math.prod(getattr(p, "min_scale", 1.0) for p in self.autoencoder.config.perturbations)
        f = self.autoencoder.downsampling
        for size in {phase.size or self.data.size for phase in self.phases}:
            self.autoencoder.latent_shape(size)
            image = torch.zeros(1, 3, size, size, device=self.accelerator.device)
            self.ema.model(image)
            side = f * math.ceil(size // f * factor)  # the smallest that scale equivariance may draw
            smallest = image[..., :side, :side]
            for name, distance in self.distances.items():
                try:
                    distance(smallest, smallest)
                except ValueError as error:
                    smaller = "" if factor == 1 else f", or raise min_scale, which makes {side} px of {size}"
                    raise UsageError(
                        f"images of {size} px: {error}: set objective.{name}.weight=0, take larger ones{smaller}"
                    ) from error
            if self.adversary is not None:
                self.adversary.network.eval()(image)  # eval: spectral norm's power iteration stays as it was
                self.adversary.network.train()

    def _prepare(self) -> None:
        """Make the optimisers, restore the newest checkpoint, and hand models and optimisers to accelerate."""
        modules: dict[str, nn.Module] = {
            "autoencoder": self.autoencoder,
            "ema": self.ema.model,
            "monitor": self.monitor,
        }
        optimizers = {"autoencoder_optimizer": self._adam(self.autoencoder, self.config.betas)}
        if self.adversary is not None:
            modules |= self.adversary.modules()
            optimizers["discriminator_optimizer"] = self._adam(self.adversary.network, self.config.discriminator_betas)
        self.state = TrainingState(self.run, self.accelerator, self.config, modules, optimizers, shown=self.ema.model)
        self.state.restore()
        networks = [self.autoencoder, *({} if self.adversary is None else self.adversary.modules()).values()]
        self.guard = StepGuard(self.state, networks)
        prepare = self.accelerator.prepare
        self.wrapped_autoencoder = prepare(self.autoencoder)
        self.autoencoder_optimizer = prepare(optimizers["autoencoder_optimizer"])
        if self.adversary is not None:
            self.wrapped_discriminator = prepare(self.adversary.network)
            self.discriminator_optimizer = prepare(optimizers["discriminator_optimizer"])

    @staticmethod
    def _adam(module: nn.Module, betas: tuple[float, float]) -> torch.optim.Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            raise UsageError("nothing in this model is trained: set trainable of its encoder or decoder")
        return torch.optim.Adam(trained, lr=0.0, betas=betas, fused=True)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to, or the last step did where the run is done."""
        return phase_at(self.phases, min(self.step, self.config.steps - 1))

    def train(self, stop: StopRequest) -> None:
        """Train to the last step. Raises :class:`Stopped` when asked to stop; everything is saved then."""
        config = self.config
        clock = self.state.begin()
        batches, phase = self._batches(), self.phase
        for later in self.phases:
            if later.start >= config.steps:
                self._say(
                    f"train.phases.{later.index} begins with step {later.start}: {config.steps} steps end before it"
                )
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
                if self.phase is not phase:
                    batches, phase = self._batches(), self.phase
                self._step(batches, clock)
                bar.update()

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches of the present phase from the present step on."""
        phase, accumulation = self.phase, self.config.gradient_accumulation
        return training_batches(
            self.data,
            batch_size=batch_per_process(phase.batch_size, self.accelerator.num_processes, accumulation),
            seed=phase.data_seed(self.seed),
            start_step=(self.step - phase.start) * accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            flip=self.config.flip,
            num_workers=self.config.num_workers,
        )

    def _step(self, batches: Iterator[Batch], clock: Clock) -> None:
        """Advance by one optimiser step of both networks."""
        config, phase = self.config, self.phase
        step_in_phase = self.step - phase.start
        if step_in_phase == 0:
            self.monitor.begin_phase()
        self.autoencoder.perturbations.progress = self.step / config.steps
        set_learning_rate(self.autoencoder_optimizer, phase.learning_rate.at(self.step))
        wrapped = [self.wrapped_autoencoder]
        if self.adversary is not None:
            wrapped.append(self.wrapped_discriminator)
            rate = phase.discriminator_learning_rate.at(self.step)
            set_learning_rate(self.discriminator_optimizer, rate)
        if self._adversarial_on and self.adversary is not None:
            self.monitor.note_start(self.step, self.adversary.config, config.steps)
        heard = self._adversarial_scale() > 0
        self.guard.remember()
        losses = []
        for micro in range(config.gradient_accumulation):
            self._micro = self.step * config.gradient_accumulation + micro
            seed_step(self.seed, self.accelerator.process_index, self._micro)
            images = resize(next(batches).images.to(self.accelerator.device), phase.size)
            with self.accelerator.accumulate(*wrapped):
                losses.append(self._micro_step(images, clock))
        self._watch(torch.stack(losses).mean(), step_in_phase, heard=heard)
        self.state.step += 1
        self.ema.update(self.autoencoder, self.state.images_seen, phase.batch_size)

    def _adversarial_scale(self) -> float:
        """Return the share of the adversarial term's weight that the autoencoder has at this step."""
        if not self._adversarial_on or self.adversary is None:
            return 0.0
        if self.adversary.config.pause is not None and self.monitor.paused(self.step):
            return 0.0
        return self.monitor.timing(self.adversary.config, self.config.steps).scale(self.step)

    @property
    def _adversarial_on(self) -> bool:
        """Whether the discriminator learns at this step."""
        if self.adversary is None or not self.phase.has("adversarial"):
            return False
        return self.step >= self.monitor.timing(self.adversary.config, self.config.steps).start

    def _watch(self, reconstruction: Tensor, step_in_phase: int, *, heard: bool) -> None:
        """Follow the reconstruction loss of the global batch, and pause the adversarial term where it worsens."""
        if self.adversary is None:
            return
        loss = self.accelerator.reduce(reconstruction, "mean")
        self.monitor.update(loss.cpu(), step_in_phase, adversarial=heard)
        self._means.add(self.monitor.metrics(self.step))
        if heard and self.adversary.config.pause is not None:
            event = self.monitor.maybe_pause(self.step + 1, self.adversary.config.pause)
            if event is not None:
                self._say(event)
                self.run.log_event(self.step + 1, "adversarial_paused", event)

    def _say(self, text: str) -> None:
        """Print a line beside the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def _micro_step(self, images: Tensor, clock: Clock) -> Tensor:
        """Differentiate both losses; on the last micro-step both optimisers step. Return the reconstruction loss.

        Both are differentiated and looked at before either steps, so that what is saved where one is not finite is the
        state before the step. In fp16, where a step that overflows is skipped instead, and where the scaler may be used
        for one optimiser at a time only, the autoencoder steps first.
        """
        reconstruction, output = self._generator_backward(images, clock)
        real, fake, loss = output.target, output.images.detach(), None
        if self._adversarial_on:
            loss = self._discriminator_loss(self.wrapped_discriminator, real, fake, clock)
        step_first = self.accelerator.mixed_precision == "fp16"
        if step_first:
            _advance(self.autoencoder_optimizer)
        if loss is not None:
            self._discriminator_backward(loss, real, fake, clock)
        if not step_first:
            _advance(self.autoencoder_optimizer)
        if loss is not None:
            _advance(self.discriminator_optimizer)
        return reconstruction

    def _generator_backward(self, images: Tensor, clock: Clock) -> tuple[Tensor, AutoencoderOutput]:
        """Differentiate the autoencoder's loss; return its reconstruction part, detached, and the output."""
        self.wrapped_autoencoder.train()
        output = self.wrapped_autoencoder(images)
        terms = self._generator_terms(output)
        reconstruction = weighted_total({n: terms[n] for n in self.distances if n in terms}, self.weights)
        self.guard.check(terms, clock)
        weights: dict[str, float | Tensor] = dict(self.weights)
        if "adversarial" in terms and self.adversary is not None:
            factor = self._adaptive_weight(reconstruction, terms["adversarial"], clock)
            weights["adversarial"] = self._adversarial_scale() * self.adversary.config.weight * factor
        total = weighted_total(terms, weights)
        self.accelerator.backward(total)
        self._means.add({f"loss/{name}": value for name, value in terms.items()} | {"loss/total": total})
        self._means.add(health(output.images.detach(), output.target, output.raw.detach()) | output.metrics)
        if self.accelerator.sync_gradients:
            norm = self._clip("autoencoder", self.autoencoder_optimizer, self.autoencoder, self.config.clip_norm)
            again = partial(self._generator_terms_again, images)
            self.guard.check_gradient("autoencoder", norm, self.autoencoder.parameters(), clock, again)
        return reconstruction.detach(), output

    def _generator_terms(self, output: AutoencoderOutput) -> dict[str, Tensor]:
        """Return every term of the autoencoder's loss that is on, unweighted."""
        terms = {
            name: distance(output.images, output.target).mean()
            for name, distance in self.distances.items()
            if self.phase.has(name)
        }
        if self.adversary is not None and self._adversarial_scale() > 0:
            with self.accelerator.autocast():
                terms["adversarial"] = self.adversary.generator_term(output.images, output.target)
        return terms | output.penalties

    def _generator_terms_again(self, images: Tensor) -> dict[str, Tensor]:
        """Return the terms of this micro-step once more, from the same noise, for a gradient of each by itself."""
        seed_step(self.seed, self.accelerator.process_index, self._micro)
        return self._generator_terms(self.autoencoder(images))

    def _adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor, clock: Clock) -> float | Tensor:
        """Return the factor that balances the two terms' gradients at the decoder's last layer, or 1."""
        assert self.adversary is not None
        if (config := self.adversary.config.adaptive) is None:
            return 1.0
        gradients = last_layer_gradients((reconstruction, adversarial), self.autoencoder.last_layer)
        of_reconstruction, of_adversarial = self.accelerator.reduce(gradients, "mean")
        weight, clamped = adaptive_weight(of_reconstruction, of_adversarial, config)
        self.guard.check({"the adaptive weight of adversarial": weight}, clock)
        self._means.add({"gan/adaptive_weight": weight, "gan/adaptive_clamped": clamped})
        return weight

    def _discriminator_loss(self, network: nn.Module, real: Tensor, fake: Tensor, clock: Clock) -> Tensor:
        """Return the discriminator's loss from one forward pass on real and reconstructed images together."""
        assert self.adversary is not None
        output = self.adversary.discriminator_terms(network, real, fake, self.step)
        self.guard.check(output.terms, clock)
        if self.adversary.lecam is not None:
            means = torch.stack([output.metrics["gan/logit_real"], output.metrics["gan/logit_fake"]])
            self.adversary.lecam.update(*self.accelerator.reduce(means, "mean"))
        self._means.add({f"loss/{name}": value for name, value in output.terms.items()} | output.metrics)
        return weighted_total(output.terms, output.weights)

    def _discriminator_backward(self, loss: Tensor, real: Tensor, fake: Tensor, clock: Clock) -> None:
        """Differentiate the discriminator's loss."""
        assert self.adversary is not None
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return
        # A clipped penalty is no penalty: its gradient is far above the game's, the lazy one's many times over.
        limit = math.inf if self.adversary.config.has_gradient_penalty else self.config.clip_norm
        network = self.adversary.network
        norm = self._clip("discriminator", self.discriminator_optimizer, network, limit)

        def again() -> dict[str, Tensor]:
            assert self.adversary is not None
            return self.adversary.discriminator_terms(network, real, fake, self.step).terms

        self.guard.check_gradient("discriminator", norm, network.parameters(), clock, again)

    def _clip(self, network: str, optimizer: torch.optim.Optimizer, module: nn.Module, max_norm: float) -> Tensor:
        """Clip a network's gradient; log and return its norm before that."""
        norm = clip_gradients(self.accelerator, optimizer, module.parameters(), max_norm)
        self._means.add({f"gradient_norm/{network}": norm})
        return norm

    def _report(self, clock: Clock) -> dict[str, str]:
        """Log the means since the last report and the status; return what the progress bar shows."""
        values = self._means.take(self.accelerator)
        config = self.config
        if values:
            phase = phase_at(self.phases, max(0, self.step - 1))
            values["learning_rate"] = phase.learning_rate.at(max(0, self.step - 1))
            self.run.log(self.step, self.state.images_seen, clock.seconds, values)
        self.run.set_status("running", self.step, config.steps, clock.eta(self.step, config.steps))
        return {name.removeprefix("loss/"): f"{values[name]:.3g}" for name in values if name.startswith("loss/")}

    @torch.no_grad()
    def _save_samples(self) -> None:
        """Write a grid of the same images every time, originals above their reconstructions by the averaged weights."""
        if not self.accelerator.is_main_process:
            return
        count = min(SAMPLE_IMAGES, len(self.data))
        images = resize(read_batch(self.data, range(count)).images.to(self.accelerator.device), self.phase.size)
        reconstructions = self.ema.model(images).images
        save_grid(self.run.sample_path(self.step), torch.cat([images, reconstructions]).cpu(), columns=count)


def _advance(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
