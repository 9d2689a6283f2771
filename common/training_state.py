"""What a checkpoint of either stage holds, restored before the first step and saved whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.optim import Optimizer

from .checkpoints import Checkpoint, save_checkpoint
from .run_folder import RunFolder
from .training import Clock

if TYPE_CHECKING:
    from accelerate import Accelerator


class SavedTraining(Protocol):
    """The settings of a training configuration that saving needs."""

    @property
    def steps(self) -> int:
        """Steps in all."""

    def images_at(self, step: int) -> int:
        """Return the images seen before ``step``, over all processes."""

    @property
    def keep(self) -> int:
        """Checkpoints kept."""


@dataclass
class TrainingState:
    """Modules, optimisers, the step and the seconds of a run, and the model that its ``model/`` folder shows."""

    run: RunFolder
    accelerator: Accelerator
    config: SavedTraining
    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    shown: PyTorchModelHubMixin
    step: int = 0
    seconds_before: float = 0.0
    restored_step: int | None = None
    """The step of the checkpoint that the run goes on from."""

    @property
    def images_seen(self) -> int:
        """Images of all steps so far."""
        return self.config.images_at(self.step)

    def restore(self) -> None:
        """Load the newest checkpoint, where there is one; before accelerate wraps the modules."""
        if (path := self.run.checkpoint) is None:
            return
        checkpoint = Checkpoint.open(path)
        checkpoint.restore(self.modules, self.optimizers)
        self.step = self.restored_step = checkpoint.step
        self.seconds_before = float(checkpoint.counters["seconds"])
        scaler = self.accelerator.scaler
        if scaler is not None and checkpoint.counters["scaler"]:
            scaler.load_state_dict(checkpoint.counters["scaler"])

    def begin(self) -> Clock:
        """Open the run folder for writing, say that it runs, and start its clock."""
        self.run.begin(mixed_precision=self.accelerator.mixed_precision, processes=self.accelerator.num_processes)
        self.run.set_status("running", self.step, self.config.steps)
        return Clock(self.seconds_before, self.step)

    def save(self, clock: Clock, state: str) -> None:
        """Write a checkpoint, the model folder and the status ``state``; every process must call it."""
        if self.accelerator.is_main_process:
            if self.step != self.restored_step:  # else it is there, and the only good copy is not to be touched
                self._save_checkpoint(clock)
            self.run.save_model(self.shown)
            self.run.set_status(state, self.step, self.config.steps, clock.eta(self.step, self.config.steps))
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, clock: Clock) -> None:
        scaler = self.accelerator.scaler
        save_checkpoint(
            self.run.path,
            self.step,
            modules=self.modules,
            optimizers=self.optimizers,
            counters={
                "images": self.images_seen,
                "seconds": clock.seconds,
                "scaler": None if scaler is None else scaler.state_dict(),
            },
            keep=self.config.keep,
        )

    def agree_on_bad(self, bad: str | None) -> str | None:
        """Return the bad term's name where any process has one, so that all of them stop."""
        if self.accelerator.num_processes == 1:
            return bad
        flag = torch.tensor([bad is not None], device=self.accelerator.device, dtype=torch.float32)
        return (bad or "a term of another process") if self.accelerator.reduce(flag, "sum").item() > 0 else None
