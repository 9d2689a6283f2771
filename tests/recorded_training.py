"""Two additions to a process that trains, for test_distributed.py.

Every process leaves the weights it began and ended its training with, as ``<rank>-start.pt`` and ``<rank>-end.pt``.
Noise levels and noise of stage two come from the image, not from (seed, process, step), so that they are the same
however many processes share a batch.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from wavelatent.stage1_autoencoder.trainer import AutoencoderTrainer
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.trainer import DiffusionTrainer


def record(trainer_class: type, folder: Path) -> None:
    train = trainer_class.train

    def save(trainer: object, moment: str) -> None:
        modules = {n: m for n in ("autoencoder", "discriminator", "model") if (m := getattr(trainer, n, None))}
        average = getattr(trainer.ema, "shown", None) or trainer.ema.model
        states = {name: module.state_dict() for name, module in {**modules, "ema": average}.items()}
        torch.save(states, folder / f"{os.environ.get('RANK', '0')}-{moment}.pt")

    def recorded(self: object, *arguments: object) -> None:
        save(self, "start")
        train(self, *arguments)
        save(self, "end")

    trainer_class.train = recorded


def noise_of_the_image(self: LatentDiffusion, raw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return raw.mean(dim=(1, 2, 3)).exp(), torch.sin(1000 * raw)


def add_to_trainings(folder: Path) -> None:
    """Record this process's trainings in ``folder``, and take the noise from the image."""
    folder.mkdir(parents=True, exist_ok=True)
    record(AutoencoderTrainer, folder)
    record(DiffusionTrainer, folder)
    LatentDiffusion.draw_noise = noise_of_the_image
