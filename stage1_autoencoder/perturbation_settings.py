"""What every perturbation of the latents has: a probability, and the part of the training in which it acts."""

from __future__ import annotations

from pydantic import Field, model_validator

from ..common.config import Config


class ScheduleConfig(Config):
    """The part of the training in which a perturbation acts, as shares of it; the default is all of it."""

    start: float = Field(0.0, ge=0, le=1)
    ramp: float = Field(0.0, ge=0, le=1)
    """From ``start`` on, the factor rises linearly from 0 to 1 over this share."""
    end: float = Field(1.0, ge=0, le=1)
    """From here on the factor is 0; at 1 it never ends."""

    @model_validator(mode="after")
    def _in_order(self) -> ScheduleConfig:
        if self.end <= self.start:
            raise ValueError(f"end {self.end:g} must come after start {self.start:g}")
        return self

    def factor(self, progress: float) -> float:
        """Return the factor in [0, 1] of the probability at ``progress``, the share of the training that is done."""
        if progress < self.start or (self.end < 1 and progress >= self.end):
            return 0.0
        return min(1.0, (progress - self.start) / self.ramp) if self.ramp > 0 else 1.0


class PerturbationSettings(Config):
    """The settings that every perturbation shares."""

    probability: float = Field(1.0, ge=0, le=1)
    """The chance that an image's latent is perturbed."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Its factor multiplies the probability."""
