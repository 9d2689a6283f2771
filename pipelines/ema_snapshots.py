"""The model of a stage-two run with an average of its weights that training did not show, or did not keep."""

from __future__ import annotations

import sys
from pathlib import Path

from ..common.checkpoints import Checkpoint, latest_checkpoint
from ..common.errors import WavelatentError
from ..common.power_ema import SNAPSHOT_FOLDER, Rebuilt, module_name, rebuild
from ..stage2_diffusion.model import LatentDiffusion
from .diffusion_run import load_diffusion

DOUBTFUL_RESIDUAL = 0.1
"""Above this a rebuilt average is used with a warning. Our choice: the profile of an average 7 % (at width 0.2) to 14 %
(at 0.05) too wide is as far from the one asked for, and of weights that only jitter, that share of the average is
error."""


def load_diffusion_at_width(run: Path, width: float, *, at_step: int | None = None) -> LatentDiffusion:
    """Return the run's model with its weights averaged at ``width``, eval mode, float32, on the CPU.

    A width that training kept is taken from the newest checkpoint, where its average lies in full precision; every
    other one, and one ``at_step`` that is not that checkpoint's, is rebuilt from the snapshots in ``RUN/ema``, by
    default at the newest one's step. A poor fit is said on stderr.

    Raises :class:`UsageError` for a width or a step that cannot be, and :class:`WavelatentError` where the run has no
    model yet or its snapshots are missing, damaged or too few.
    """
    model = load_diffusion(run)
    if (checkpoint := _checkpoint_with(run, width, at_step)) is not None:
        checkpoint.restore({module_name(width): model}, {})
        return model
    rebuilt = rebuild(run / SNAPSHOT_FOLDER, width, at_step=at_step)
    if rebuilt.residual > DOUBTFUL_RESIDUAL:
        print(_doubt(run, rebuilt), file=sys.stderr)
    try:
        model.load_state_dict(rebuilt.state)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise WavelatentError(f"{run}: its EMA snapshots do not fit its model: {text}") from error
    return model


def _checkpoint_with(run: Path, width: float, at_step: int | None) -> Checkpoint | None:
    """Return the newest checkpoint where it holds the average of ``width`` after ``at_step`` (None: after any)."""
    path = latest_checkpoint(run)
    if path is None or not (path / f"{module_name(width)}.safetensors").is_file():
        return None
    checkpoint = Checkpoint.open(path)
    return checkpoint if at_step in (None, checkpoint.step) else None


def _doubt(run: Path, rebuilt: Rebuilt) -> str:
    return (
        f"{run}: the average of width {rebuilt.profile.width} at step {rebuilt.profile.step} comes from "
        f"{rebuilt.snapshots} snapshots with a residual of {rebuilt.residual:.2f}; a width or step nearer to theirs, "
        "or training with a smaller snapshot_every, makes it more exact"
    )
