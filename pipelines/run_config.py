"""The configuration of a stage-one run: what a CONFIG of ``train-ae`` holds."""

from __future__ import annotations

from ..common.config import Config, Seed
from ..stage1_autoencoder.autoencoder import AutoencoderConfig
from ..stage1_autoencoder.objective import ObjectiveConfig
from ..stage1_autoencoder.trainer import AutoencoderTrainConfig


class AutoencoderRunConfig(Config):
    """The autoencoder, what it is trained for, and how."""

    model: AutoencoderConfig = AutoencoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: AutoencoderTrainConfig = AutoencoderTrainConfig()
    seed: Seed = 0
