"""How a stage-two run is trained: the ``train`` section of its configuration."""

from __future__ import annotations

from pydantic import Field

from ..common.config import Config
from ..common.power_ema import PowerEMAConfig
from ..common.training import Beta, LearningRateConfig
from .uncertainty import UncertaintyConfig


class ValidationConfig(Config):
    """The loss on latents that training never sees, by range of noise level, of the averaged weights."""

    images: int = Field(256, ge=0)
    """Held out of the cache, at most a tenth of it; the same ones whatever the seed. 0 holds out none."""
    every: int = Field(1_000, ge=1)
    """Steps between measurements."""


class QuickEvaluationConfig(Config):
    """A FID and KID of few samples of the averaged weights, to see where a run is heading.

    Of so few samples FID is biased upwards: compare it within a run, and with ``evaluate`` for anything else.
    """

    every: int = Field(0, ge=0)
    """Steps between measurements; 0 is never."""
    num_samples: int = Field(1_000, ge=2)
    num_reference: int | None = Field(5_000, ge=2)
    """Images of the cache's data that they are compared with, or as many as there are; None is all."""
    sample_steps: int = Field(18, ge=1)
    """Steps of DPM-Solver++ (2M), each one evaluation."""
    batch_size: int = Field(64, ge=1)
    """Samples at a time, per process."""


class DiffusionTrainConfig(Config):
    """How long, how fast and how large the steps are, and how often the run writes."""

    steps: int = Field(100_000, ge=1)
    batch_size: int = Field(64, ge=1)
    """Images per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: LearningRateConfig = LearningRateConfig(peak=2e-4, warmup_steps=500)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Of Adam; EDM2's values."""
    clip_norm: float = Field(1.0, gt=0)
    """The gradient is clipped to this norm."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of labels hidden in training, from which a class-conditional model learns its unconditional output."""
    uncertainty: UncertaintyConfig | None = None
    """A weight of every noise level that is learned beside the network (EDM2); None is none."""
    ema: PowerEMAConfig = PowerEMAConfig()
    validation: ValidationConfig = ValidationConfig()
    quick_evaluation: QuickEvaluationConfig = QuickEvaluationConfig()
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
    compile: bool = False
    """Compile the network with ``torch.compile``: for GPUs; on a CPU it costs minutes and gains nothing."""
    channels_last: bool = True
    """Keep the network's feature maps channels last: faster on a CPU, and on GPUs with bf16 or fp16."""
    num_workers: int = Field(2, ge=1)
    """Threads of each process that draw latents ahead; more for large latents, see :mod:`..common.latent_loader`."""
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(1_000, ge=1)
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    sample_every: int = Field(1_000, ge=0)
    """Steps between grids of images from fixed noise; 0 is never."""
    num_samples: int = Field(16, ge=1)
    """Images in a grid."""
    sample_steps: int = Field(18, ge=1)
    """Steps of DPM-Solver++ (2M) for a grid."""

    def images_at(self, step: int) -> int:
        """Return the images seen before ``step``."""
        return step * self.batch_size

    def held_out(self, count: int) -> int:
        """Return how many of a cache of ``count`` latents are held out for validation."""
        return min(self.validation.images, count // 10)
