"""The phases of a stage-one run: resolution, steps, learning rate, batch, and which losses are on, one after another.

LiteVAE (arXiv 2405.14477) trains at 128 pixels and then, more briefly, at 256; a phase is one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..common.config import Config
from ..common.randomness import key_seed
from ..common.training import LearningRateConfig


class PhaseConfig(Config):
    """What a phase has of its own; what it leaves out is as ``train`` says."""

    steps: int | None = Field(None, ge=1)
    """Its steps; the last phase may leave them out, and goes on to ``train.steps`` in any case."""
    size: int | None = Field(None, ge=8)
    """Side of its images in pixels: those of the data set, made smaller on the fly; by default the data set's own."""
    batch_size: int | None = Field(None, ge=1)
    learning_rate: LearningRateConfig | None = None
    """Over the phase's own steps: its warm-up starts, and its decay ends, with the phase. Without one, the run's
    schedule goes on over all steps, as if there were no phases."""
    discriminator_learning_rate: LearningRateConfig | None = None
    losses: tuple[str, ...] | None = None
    """The reconstruction terms and ``adversarial`` that are on, by their names in the log; all by default. A term needs
    its weight in ``objective`` too. The bottleneck's penalties are always on."""


@dataclass(frozen=True)
class Schedule:
    """A learning rate over ``steps`` steps that begin with step ``start``."""

    rate: LearningRateConfig
    start: int
    steps: int

    def at(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from the beginning of the run."""
        return self.rate.at(step - self.start, self.steps)


@dataclass(frozen=True)
class Phase:
    """One phase with nothing left open. It covers the steps ``start`` to ``start + steps``, exclusive."""

    index: int
    start: int
    steps: int
    images_before: int
    """Images seen in the phases before it."""
    size: int | None
    batch_size: int
    learning_rate: Schedule
    discriminator_learning_rate: Schedule
    losses: frozenset[str] | None

    def has(self, loss: str) -> bool:
        """Return whether the term ``loss`` is on."""
        return self.losses is None or loss in self.losses

    def data_seed(self, seed: int) -> int:
        """Return the seed of the order of its images; the first phase's is the run's own."""
        return seed if self.index == 0 else key_seed("phase", seed, self.index)


def resolve_phases(
    phases: Sequence[PhaseConfig],
    *,
    steps: int,
    batch_size: int,
    learning_rate: LearningRateConfig,
    discriminator_learning_rate: LearningRateConfig,
) -> tuple[Phase, ...]:
    """Return the phases of a run of ``steps`` steps, or the one that a run without phases is.

    A run that is shorter than its phases ends inside one of them; in a longer one the last is longer. Raises
    ``ValueError`` where a phase other than the last does not say how long it is.
    """
    resolved: list[Phase] = []
    start = images = 0

    def schedule(own: LearningRateConfig | None, of_run: LearningRateConfig) -> Schedule:
        return Schedule(of_run, 0, steps) if own is None else Schedule(own, start, length)

    for index, phase in enumerate(phases or (PhaseConfig(),)):
        is_last = index >= len(phases) - 1
        if phase.steps is None and not is_last:
            raise ValueError(f"train.phases.{index} needs steps: only the last phase may go on to the end")
        length = max(1, phase.steps or 0, steps - start if is_last else 0)
        batch = phase.batch_size or batch_size
        resolved.append(
            Phase(
                index=index,
                start=start,
                steps=length,
                images_before=images,
                size=phase.size,
                batch_size=batch,
                learning_rate=schedule(phase.learning_rate, learning_rate),
                discriminator_learning_rate=schedule(phase.discriminator_learning_rate, discriminator_learning_rate),
                losses=None if phase.losses is None else frozenset(phase.losses),
            )
        )
        start, images = start + length, images + length * batch
    return tuple(resolved)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase that step ``step`` (from 0) belongs to."""
    return next(phase for phase in reversed(phases) if step >= phase.start)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Return ``[B, 3, H, W]`` in [-1, 1] with both sides ``size`` (None, or as they are: unchanged).

    Bicubic with an antialiasing filter, clamped back to [-1, 1] where it overshoots.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    smaller = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return smaller.clamp(-1, 1)
