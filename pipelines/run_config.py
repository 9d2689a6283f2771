"""The configuration of a stage-one run: what a CONFIG of ``train-ae`` holds."""

from __future__ import annotations

from pydantic import model_validator

from ..common.config import Config, Seed
from ..stage1_autoencoder.autoencoder import AutoencoderConfig
from ..stage1_autoencoder.objective import ObjectiveConfig
from ..stage1_autoencoder.train_config import AutoencoderTrainConfig, check_phase_losses


class AutoencoderRunConfig(Config):
    """The autoencoder, what it is trained for, and how."""

    model: AutoencoderConfig = AutoencoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: AutoencoderTrainConfig = AutoencoderTrainConfig()
    init: str | None = None
    """An autoencoder to start from, as ``--ae`` takes it; its weights must be those of ``model``. None starts anew."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _phases_have_losses(self) -> AutoencoderRunConfig:
        check_phase_losses(self.objective, self.train.resolved_phases())
        return self
