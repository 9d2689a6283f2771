"""Averages of a model's weights under power functions of time, several widths at once, and any other width afterwards.

From the equations of Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C. After step ``t`` the
average is ``integral of p(tau) theta(tau)`` over the training so far, with the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 <= tau <= t,

which stretches with the training: unlike an exponential profile it never remembers the initialisation, and has no time
scale to choose. Its *width* sigma_rel is the standard deviation of ``p`` in units of ``t``.

The averages are linear in the weights, so one that was not tracked is a combination of stored ones: least squares
over their profiles gives its coefficients (:func:`fit`), without looking at a weight.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import Config
from .errors import UsageError, WavelatentError
from .files import write_atomically

M = TypeVar("M", bound=nn.Module)
Floats = NDArray[np.float64]

SNAPSHOT_FOLDER = "ema"
"""Where a run folder keeps its snapshots."""
MAX_WIDTH = 0.28
"""Below the width of the plain mean of all weights, ``12 ** -0.5`` = 0.289: gamma stays above 0."""
MAX_RESIDUAL = 0.5
"""A rebuilt average whose profile is further than this share from the one asked for is refused: our choice; a quarter
of the profile's energy is missing then."""

Width = Annotated[float, Field(gt=0, lt=MAX_WIDTH)]

_NAME = re.compile(r"step-(\d+)-width-([\d.e-]+)\.safetensors")


class PowerEMAConfig(Config):
    """Which averages a run keeps, and how often it stores them for later.

    The defaults rebuild any width from 0.025 to 0.25 at the end of training with a residual below 0.08.
    """

    widths: tuple[Width, ...] = Field((0.10, 0.05), min_length=1)
    """The widths sigma_rel, all different; the first is the one that the model folder and the sample grids show."""
    snapshot_every: int | None = Field(None, ge=0)
    """Steps between stored snapshots; None is a 16th of all steps, 0 is never."""
    snapshot_dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored weights. bfloat16 is not offered: its 8 significant bits are lost on an average, whose changes
    between snapshots are small, and a fit multiplies the rounding by its coefficients."""

    @field_validator("widths")
    @classmethod
    def _different(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(widths)) < len(widths):
            raise ValueError("the widths must all be different")
        return widths

    def snapshot_due(self, step: int, steps: int) -> bool:
        """Return whether a snapshot is stored after ``step`` of ``steps``: every so often, and always after the last.

        Never where ``snapshot_every`` is 0.
        """
        if self.snapshot_every == 0 or step < 1:
            return False
        every = self.snapshot_every or max(1, steps // 16)
        return step % every == 0 or step >= steps


def width_of(gamma: float) -> float:
    """Return the width sigma_rel of the profile of exponent ``gamma`` > -1, in units of the training time."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(width: float) -> float:
    """Return the exponent of the profile of ``width`` in (0, MAX_WIDTH), the inverse of :func:`width_of`.

    It is the largest root of ``gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s`` with ``s = width^-2``.
    """
    assert 0 < width < MAX_WIDTH, f"the width {width} is not in (0, {MAX_WIDTH})"
    precision = width**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def decay(step: int, gamma: float) -> float:
    """Return beta, the share of the old average that step number ``step`` (from 1) keeps: 0 at the first step."""
    assert step >= 1, f"steps are counted from 1, not {step}"
    return (1 - 1 / step) ** (gamma + 1)


class PowerEMA(Generic[M]):
    """Keeps an averaged copy of ``model`` per width, in eval mode and without gradients; buffers are copied.

    Buffers (the whitening, say) are no trajectory of training, so every copy has those of the model.
    """

    def __init__(self, model: M, config: PowerEMAConfig) -> None:
        self.config = config
        self.models: dict[float, M] = {
            width: copy.deepcopy(model).eval().requires_grad_(False) for width in config.widths
        }
        self._gammas = {width: gamma_of(width) for width in config.widths}

    @property
    def shown(self) -> M:
        """The average of the first width."""
        return self.models[self.config.widths[0]]

    def modules(self) -> dict[str, nn.Module]:
        """Return the averages as ``ema-<width>``, for a checkpoint: they are the whole state."""
        return {module_name(width): model for width, model in self.models.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights of ``model`` after optimiser step number ``step``; after step 1 the averages equal it."""
        current: list[Tensor] = list(model.parameters())
        for width, copied in self.models.items():
            averaged: list[Tensor] = list(copied.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay(step, self._gammas[width]))
            for mine, theirs in zip(copied.buffers(), model.buffers(), strict=True):
                mine.copy_(theirs)


def module_name(width: float) -> str:
    """Return the name under which a checkpoint holds the average of ``width``."""
    return f"ema-{width}"


@dataclass(frozen=True)
class Profile:
    """The weighting of an average: of which step, and how wide."""

    step: int
    width: float


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Floats:
    """Return ``integral p_i p_j``, ``[len(first), len(second)]``.

    With ``s <= t`` the two steps and ``gamma_t`` the exponent of the later, it is
    ``(gamma_i + 1) (gamma_j + 1) / (gamma_i + gamma_j + 1) * (s / t)^gamma_t / t``.
    """
    step_i, gamma_i = (column[:, None] for column in _columns(first))
    step_j, gamma_j = (column[None, :] for column in _columns(second))
    earlier, later = np.minimum(step_i, step_j), np.maximum(step_i, step_j)
    exponent = np.where(step_i > step_j, gamma_i, gamma_j)
    scale = (gamma_i + 1) * (gamma_j + 1) / (gamma_i + gamma_j + 1)
    return scale * (earlier / later) ** exponent / later


def _columns(profiles: Sequence[Profile]) -> tuple[Floats, Floats]:
    gammas = {width: gamma_of(width) for width in {profile.width for profile in profiles}}
    return (
        np.array([profile.step for profile in profiles], np.float64),
        np.array([gammas[profile.width] for profile in profiles], np.float64),
    )


def fit(profiles: Sequence[Profile], target: Profile) -> tuple[Floats, float]:
    """Return the combination of ``profiles`` nearest to ``target`` in the mean square, and its relative residual.

    The coefficients ``[len(profiles)]`` sum to 1. That constraint is ours: weights that did not move are rebuilt as
    they are, where the free fit shrinks wide averages by some per cent, at next to no cost in the residual
    ``|fit - target| / |target|``.
    """
    if target in profiles:
        return np.array([float(profile == target) for profile in profiles]), 0.0
    gram, aim = inner_products(profiles, profiles), inner_products(profiles, [target])[:, 0]
    norms, norm = np.sqrt(np.diag(gram)), math.sqrt(inner_products([target], [target])[0, 0])
    gram, aim = gram / np.outer(norms, norms), aim / (norms * norm)  # of profiles of unit norm
    sums = norm / norms  # the integral of each, in units that make the target's 1
    # Stationary points of the Lagrangian: gram y + multiplier * sums = aim, and sums . y = 1.
    system = np.block([[gram, sums[:, None]], [sums[None, :], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(aim, 1.0), rcond=None)[0][:-1]
    squared = 1 - 2 * solution @ aim + solution @ gram @ solution
    return solution * sums, math.sqrt(max(0.0, squared))


def save_snapshot(folder: Path, step: int, ema: PowerEMA[Any]) -> None:
    """Write each average after ``step`` to ``folder/step-<step>-width-<width>.safetensors``, whole or not at all.

    Parameters are stored as ``snapshot_dtype`` (one with a value that float16 cannot hold as it is), buffers as they
    are. Call it on the main process only.
    """
    dtype = getattr(torch, ema.config.snapshot_dtype)
    for width, model in ema.models.items():
        parameters = dict(model.named_parameters())
        state = {
            name: (_stored(tensor, dtype) if name in parameters else tensor).detach().cpu().contiguous()
            for name, tensor in model.state_dict().items()
        }
        buffers = [name for name in state if name not in parameters]
        record = json.dumps({"step": step, "width": width, "buffers": buffers})
        metadata = {"snapshot": record}  # one entry: safetensors writes several in any order
        write_atomically(_path(folder, Profile(step, width)), save(state, metadata))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    return rounded if rounded.isfinite().all() else tensor


def _path(folder: Path, profile: Profile) -> Path:
    return folder / f"step-{profile.step}-width-{profile.width}.safetensors"


def snapshots(folder: Path) -> list[Profile]:
    """Return what is stored in ``folder``, oldest step first."""
    matches = [_NAME.fullmatch(path.name) for path in folder.glob("step-*.safetensors")]
    found = [Profile(int(match[1]), float(match[2])) for match in matches if match]
    return sorted(found, key=lambda profile: (profile.step, profile.width))


def drop_after(folder: Path, step: int) -> None:
    """Delete the snapshots of steps after ``step``: a run that goes on from there makes them again."""
    for profile in snapshots(folder):
        if profile.step > step:
            _path(folder, profile).unlink()


@dataclass(frozen=True)
class Rebuilt:
    """An average made from snapshots.

    Attributes:
        state: the model's state dict, parameters in float32, buffers as stored.
        profile: what it is the average of.
        residual: distance of its profile from the one asked for, relative to that one's norm.
        snapshots: how many it was made from.
    """

    state: dict[str, Tensor]
    profile: Profile
    residual: float
    snapshots: int


def rebuild(folder: Path, width: float, *, at_step: int | None = None) -> Rebuilt:
    """Return the average of ``width`` after ``at_step`` (None: the newest snapshot's) from the snapshots in ``folder``.

    One that is stored is returned as it is. Of a step between two snapshots the residual is larger, 0.13 to 0.45 with
    the defaults, as no stored profile ends there. Raises :class:`UsageError` for a width or a step that cannot be, and
    :class:`WavelatentError` where there are no snapshots, one cannot be read, or all of them cannot express what is
    asked (a residual above :data:`MAX_RESIDUAL`).
    """
    if not 0 < width < MAX_WIDTH:
        raise UsageError(f"the EMA width {width} is not between 0 and {MAX_WIDTH}; give a width in between")
    stored = snapshots(folder)
    if not stored:
        raise WavelatentError(f"{folder} holds no EMA snapshots; train with a snapshot_every other than 0")
    newest = stored[-1].step
    target = Profile(newest if at_step is None else at_step, width)
    if not 1 <= target.step <= newest:
        raise UsageError(f"there is no average of step {at_step} in {folder}; give a step from 1 to {newest}")
    coefficients, residual = fit(stored, target)
    if residual > MAX_RESIDUAL:
        widths = ", ".join(str(kept) for kept in sorted({profile.width for profile in stored}))
        raise WavelatentError(
            f"{len(stored)} EMA snapshots of width {widths} in {folder} cannot express width {width} at step "
            f"{target.step} (residual {residual:.2f}): give a width or step nearer to theirs, or train with a smaller "
            "snapshot_every"
        )
    used = {profile: float(c) for profile, c in zip(stored, coefficients, strict=True) if c != 0}
    return Rebuilt(_combine(folder, used), target, residual, len(used))


def _combine(folder: Path, coefficients: dict[Profile, float]) -> dict[str, Tensor]:
    """Return the sum of the snapshots' parameters and the newest one's buffers, one tensor at a time."""
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        try:
            files = [
                (stack.enter_context(safe_open(_path(folder, profile), "pt")), coefficient)
                for profile, coefficient in coefficients.items()
            ]
            newest = files[-1][0]
            buffers = set(json.loads(newest.metadata()["snapshot"])["buffers"])
            for name in newest.keys():  # noqa: SIM118 - the file is no mapping
                if name in buffers:
                    state[name] = newest.get_tensor(name)
                else:
                    parts = (file.get_tensor(name).double() * coefficient for file, coefficient in files)
                    state[name] = sum(parts, start=torch.zeros((), dtype=torch.float64)).float()
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise WavelatentError(
                f"an EMA snapshot in {folder} cannot be read ({error}); delete it to do without"
            ) from error
    return state
