"""How long, how fast and how large the steps of stage one are, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..common.config import Config
from ..common.ema import EMAConfig
from ..common.errors import UsageError
from ..common.training import Beta, LearningRateConfig, batch_per_process
from .objective import ObjectiveConfig, check_losses
from .phases import Phase, PhaseConfig, phase_at, resolve_phases

if TYPE_CHECKING:
    from accelerate import Accelerator


class AutoencoderTrainConfig(Config):
    """How long, how fast and how large the steps are, and how often the run writes."""

    steps: int = Field(100_000, ge=1)
    batch_size: int = Field(16, ge=1)
    """Images per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: LearningRateConfig = LearningRateConfig()
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    discriminator_learning_rate: LearningRateConfig = LearningRateConfig()
    discriminator_betas: tuple[Beta, Beta] = (0.5, 0.9)
    clip_norm: float = Field(1.0, gt=0)
    """Gradients of each optimiser are clipped to this norm; the discriminator's not where it has a gradient penalty, of
    which clipping would leave next to nothing."""
    phases: tuple[PhaseConfig, ...] = ()
    """One after another, for ``steps`` steps in all; none: a single one with the settings above."""
    flip: bool = True
    ema: EMAConfig = EMAConfig()
    num_workers: int = Field(0, ge=0)
    log_every: int = Field(50, ge=1)
    sample_every: int = Field(1000, ge=0)
    checkpoint_every: int = Field(1000, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""

    @model_validator(mode="before")
    @classmethod
    def _as_long_as_the_phases(cls, data: Any) -> Any:
        """Take the sum of the phases' steps where ``steps`` is not given and each says its own."""
        if not isinstance(data, dict) or "steps" in data or not isinstance(data.get("phases"), list | tuple):
            return data
        lengths = [phase.get("steps") if isinstance(phase, dict) else phase.steps for phase in data["phases"]]
        whole = bool(lengths) and all(isinstance(length, int) for length in lengths)
        return {**data, "steps": sum(lengths)} if whole else data

    @model_validator(mode="after")
    def _phases_have_steps(self) -> AutoencoderTrainConfig:
        self.resolved_phases()
        return self

    def resolved_phases(self) -> tuple[Phase, ...]:
        """Return the run's phases with nothing left open; at least one."""
        return resolve_phases(
            self.phases,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            discriminator_learning_rate=self.discriminator_learning_rate,
        )

    def images_at(self, step: int) -> int:
        """Return the images seen before ``step``."""
        phase = phase_at(self.resolved_phases(), step)
        return phase.images_before + (step - phase.start) * phase.batch_size


def check_phase_losses(objective: ObjectiveConfig, phases: Iterable[Phase]) -> None:
    """Raise ``ValueError`` for a phase that names a loss that has no weight, or that has no reconstruction loss."""
    for phase in phases:
        check_losses(phase.losses or (), objective, f"train.phases.{phase.index}.losses")
        if not any(phase.has(name) for name in objective.reconstruction_weights):
            raise ValueError(
                f"train.phases.{phase.index} has no reconstruction loss: give one a weight in objective, l1_weight say"
            )


def check_settings(
    objective: ObjectiveConfig, train: AutoencoderTrainConfig, accelerator: Accelerator, size: int
) -> None:
    """Raise :class:`UsageError` where settings do not suit how the run is executed, or images of ``size`` pixels."""
    adversarial = objective.adversarial
    if accelerator.mixed_precision == "fp16" and adversarial is not None:
        if train.gradient_accumulation > 1:
            raise UsageError(
                "train.gradient_accumulation with an adversarial loss needs --mixed-precision bf16 or no: in fp16 the "
                "loss scale may change between the discriminator's micro-steps"
            )
        if adversarial.has_gradient_penalty or adversarial.adaptive is not None:
            raise UsageError(
                "objective.adversarial.r1_weight, r2_weight and adaptive need --mixed-precision bf16 or no: they "
                "differentiate outside the loss scale, where fp16 gradients vanish"
            )
    for phase in train.resolved_phases():
        where = f"train.phases.{phase.index}"
        batch_per_process(phase.batch_size, accelerator.num_processes, train.gradient_accumulation)
        if phase.size is not None and phase.size > size:
            raise UsageError(f"{where}.size={phase.size} is larger than the data's {size} px; prepare it larger")
