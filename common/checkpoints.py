"""Complete training state on disk, written whole or not at all.

``RUN/checkpoints/checkpoint-<step>/`` holds one safetensors file per module, one file per optimiser (loaded without
running any code) and ``state.json`` with the counters. A checkpoint is written beside its final name, flushed and
renamed, so a folder of that name is always complete; the newest is the one with the highest step, not the largest or
the last written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from .errors import WavelatentError
from .files import write_atomically

_NAME = re.compile(r"checkpoint-(\d+)")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def checkpoints(run: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest step first."""
    found = [(int(m[1]), p) for p in (run / "checkpoints").glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None."""
    return next(reversed(checkpoints(run)), None)


def replace_folder(temporary: Path, final: Path) -> None:
    """Flush every file of ``temporary`` to disk and give the folder its ``final`` name, replacing what was there."""
    for file in [p for p in temporary.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(
    run: Path,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    counters: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``checkpoint-<step>`` and delete all but the ``keep`` newest. Call it on the main process only."""
    final = run / "checkpoints" / f"checkpoint-{step}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, module in modules.items():
        state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(state, temporary / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        torch.save(optimizer.state_dict(), temporary / f"{name}.pt")
    write_json(temporary / "state.json", {"step": step, **counters})
    replace_folder(temporary, final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its counters."""

    path: Path
    counters: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimiser steps done."""
        return int(self.counters["step"])

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the counters; raises :class:`WavelatentError` where the folder is not a checkpoint."""
        try:
            return cls(path, json.loads((path / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise WavelatentError(
                f"{path}: not a complete checkpoint ({error}); delete it to use an earlier one"
            ) from error

    def restore(self, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
        """Load every part strictly; raises :class:`WavelatentError` naming the one that does not fit."""
        for name, module in modules.items():
            with self._reading(name):
                module.load_state_dict(load_file(self.path / f"{name}.safetensors"))
        for name, optimizer in optimizers.items():
            with self._reading(name):
                state = torch.load(self.path / f"{name}.pt", map_location="cpu", weights_only=True)
                optimizer.load_state_dict(state)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, UnpicklingError, EOFError) as error:
            raise WavelatentError(
                f"{self.path}: {name} cannot be read ({error}); delete this checkpoint to go on from an earlier one"
            ) from error
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise WavelatentError(f"{self.path}: {name} does not fit this configuration: {text}") from error
