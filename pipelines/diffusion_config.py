"""What a stage-two run is made from, as its preset or YAML file gives it."""

from __future__ import annotations

from ..common.config import Config, Seed
from ..stage2_diffusion.model import WhiteningKind
from ..stage2_diffusion.networks import DenoiserConfig
from ..stage2_diffusion.objectives import FlowConfig, ObjectiveConfig
from ..stage2_diffusion.train_config import DiffusionTrainConfig
from ..stage2_diffusion.unet import UNetConfig


class DiffusionRunConfig(Config):
    """The denoiser, its objective and its training; the latents' shape and statistics come from the cache."""

    model: DenoiserConfig = UNetConfig()
    objective: ObjectiveConfig = FlowConfig()
    whitening: WhiteningKind = "channel"
    """How raw latents become the zero-mean, unit-variance latents of the denoiser."""
    class_conditional: bool = False
    """Whether the model learns the cache's labels."""
    train: DiffusionTrainConfig = DiffusionTrainConfig()
    seed: Seed = 0
