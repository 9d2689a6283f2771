"""The nouns that both training loops share: the learning rate, running means of metrics, the clock, the guards."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from .config import Config
from .errors import UsageError
from .randomness import key_seed

if TYPE_CHECKING:
    from accelerate import Accelerator


Beta = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate of Adam."""


class LearningRateConfig(Config):
    """A linear warm-up to ``peak``, then a ``decay``.

    ``none`` is constant; ``cosine`` a half cosine down to zero at the last step; ``inverse_sqrt`` (Karras et al. 2024,
    arXiv 2312.02696, equation 67) constant to step ``decay_start`` and then ``peak * sqrt(decay_start / step)``.
    """

    peak: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["none", "cosine", "inverse_sqrt"] = "none"
    decay_start: int = Field(10_000, ge=1)
    """Of ``inverse_sqrt``, in steps."""

    def at(self, step: int, steps: int) -> float:
        """Return the learning rate of step ``step`` (from 0) of ``steps``."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "none":
            return self.peak
        if self.decay == "inverse_sqrt":
            return self.peak / math.sqrt(max(1.0, step / self.decay_start))
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def batch_per_process(batch_size: int, processes: int, accumulation: int) -> int:
    """Return the images of one process in one micro-step. Raises :class:`UsageError` where they do not divide."""
    parts = processes * accumulation
    if batch_size % parts:
        raise UsageError(
            f"train.batch_size={batch_size} is the whole batch of a step; it must divide by {processes} processes x "
            f"{accumulation} accumulation steps: use {max(1, batch_size // parts) * parts}"
        )
    return batch_size // parts


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed PyTorch's global generators for one micro-step, so that a resumed run draws the same noise and dropout."""
    torch.manual_seed(key_seed("step", seed, rank, step))


def due(step: int, period: int) -> bool:
    """Return whether something that happens every ``period`` steps (0: never) happens at ``step``."""
    return period > 0 and step > 0 and step % period == 0


class RunningMeans:
    """Means of named scalars since the last report, over micro-steps and processes; no synchronisation until asked."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one value per name."""
        for name, value in values.items():
            number = torch.as_tensor(value, dtype=torch.float32).detach()
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all processes and start anew. Every process must have added the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        means = torch.stack([self._sums[n].to(accelerator.device) / self._counts[n] for n in names])
        means = accelerator.reduce(means, "mean")
        self._sums, self._counts = {}, {}
        return dict(zip(names, means.tolist(), strict=True))


class Clock:
    """Seconds of training over all sessions of a run, the speed, and the time that is left."""

    def __init__(self, seconds_before: float, first_step: int) -> None:
        self._before = seconds_before
        self._start = time.monotonic()
        self._first = first_step

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions included."""
        return self._before + time.monotonic() - self._start

    def eta(self, step: int, steps: int) -> float | None:
        """Return the seconds left at this session's speed, or None before its first step."""
        done = step - self._first
        return (steps - step) * (time.monotonic() - self._start) / done if done > 0 else None


def progress_bar(name: str, step: int, steps: int, *, is_main: bool) -> tqdm:
    """Return a progress bar on stderr with ETA; it stays silent on all but the main process."""
    return tqdm(
        total=steps, initial=step, desc=name, unit="step", file=sys.stderr, disable=not is_main, mininterval=1.0,
        dynamic_ncols=True,
    )  # fmt: skip


def first_non_finite(terms: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first term with a value that is not finite; one synchronisation for all of them."""
    finite = torch.stack([torch.isfinite(value.detach()).all() for value in terms.values()]).tolist()
    return next((name for name, good in zip(terms, finite, strict=True) if not good), None)


def terms_of_non_finite_gradient(terms: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> list[str]:
    """Return the names of the terms whose own gradient is not finite, differentiating one after the other."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    blamed = []
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        gradients = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None):
            blamed.append(name)
    return blamed


def clip_gradients(
    accelerator: Accelerator, optimizer: Optimizer, parameters: Iterable[Tensor], max_norm: float
) -> Tensor:
    """Clip the gradients of one optimiser to ``max_norm`` on a synchronised step; return the norm before clipping.

    accelerate's own function would, in fp16, unscale the gradients of every optimiser, and so those that another
    network is still accumulating.
    """
    accelerator.unscale_gradients(optimizer)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
