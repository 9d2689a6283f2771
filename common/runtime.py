"""How a command runs: its device and precision, what it ran on, and the ways in which it can be asked to stop."""

from __future__ import annotations

import gc
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from .errors import Stopped, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

MixedPrecision = Literal["no", "bf16", "fp16"]
Stop = TypeVar("Stop", bound="StopRequest")

PACKAGES = ("wavelatent", "torch", "torchvision", "accelerate", "ptwt", "lpips", "torch-fidelity", "datasets", "numpy")


@dataclass(frozen=True)
class RuntimeOptions:
    """How a command runs, as opposed to what it computes."""

    device: str = "auto"
    mixed_precision: MixedPrecision = "no"
    max_minutes: float | None = None
    overwrite: bool = False


def resolve_device(name: str) -> torch.device:
    """Return the device ``name`` (``auto``: the first GPU, else the CPU). Raises :class:`UsageError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(
            f"--device {name}: this machine, or this build of PyTorch, has {count} CUDA devices; use --device auto"
        )
    return device


def check_precision(device: torch.device, mixed_precision: MixedPrecision) -> None:
    """Refuse fp16 on a CPU, where it is many times slower than float32. Raises :class:`UsageError`."""
    if device.type == "cpu" and mixed_precision == "fp16":
        raise UsageError("--mixed-precision fp16 is slower than no on a CPU, many times over; use bf16 or no")


@contextmanager
def autocast(device: torch.device, mixed_precision: MixedPrecision) -> Iterator[None]:
    """Run the block under autocast in the named precision."""
    check_precision(device, mixed_precision)
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype, enabled=mixed_precision != "no"):
        yield


def make_accelerator(options: RuntimeOptions, gradient_accumulation_steps: int = 1) -> Accelerator:
    """Return an accelerator for the asked device and precision.

    A process may have several, one after the other: accelerate keeps the first one's precision for its whole life and
    refuses another, so that state is cleared; with one process its device is too.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    device = resolve_device(options.device)
    check_precision(device, options.mixed_precision)
    if device.index is not None:
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )


@contextmanager
def accelerated(options: RuntimeOptions, gradient_accumulation_steps: int = 1) -> Iterator[Accelerator]:
    """Give the block an accelerator, and take the process group down in order when it ends or is asked to stop.

    Without the order, a process may abort after all of its work is done. Of blocks within each other the outermost
    takes the group down, since one that is down does not come up again.
    """
    is_outermost = not torch.distributed.is_initialized()
    accelerator = make_accelerator(options, gradient_accumulation_steps)
    try:
        yield accelerator
    except Stopped:
        _take_down(accelerator, process_group=is_outermost)
        raise
    _take_down(accelerator, process_group=is_outermost)


def _take_down(accelerator: Accelerator, *, process_group: bool) -> None:
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    if process_group:
        accelerator.end_training()


def environment() -> dict[str, Any]:
    """Return versions, git commit, hardware and command line, for ``environment.json``."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "command_line": sys.argv,
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": _git_commit(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
        "started": utc_now(),
    }


def utc_now() -> str:
    """Return the time in UTC to the second, as text whose order is that of time: ``2026-01-31T23:59:59Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _git_commit() -> str | None:
    """Return the checkout's commit (``-dirty`` where files differ), or None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_bytes() -> int:
    """Return the peak memory of the GPU in use, or of this process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StopRequest:
    """Turns SIGTERM, SIGINT and a deadline into a flag that a loop reads between steps.

    A second SIGINT interrupts at once. Use it as a context manager; the former handlers come back at its end. Within
    another one it stops where that one does: a part of a longer work has no more time than the whole. In another
    thread than the main one it hears of signals from that one alone.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal: str | None = None
        self._former: dict[int, Any] = {}
        self._outer: StopRequest | None = None

    def __enter__(self: Stop) -> Stop:
        around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        self._outer = around if isinstance(around, StopRequest) else None
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not the main thread: signals reach the one around it, if any
            self._former.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._signal and self._outer is not None:
            # A part of a longer work may end without having looked: the signal was meant for all of it.
            self._outer._signal = self._signal

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why to stop (a signal's name or ``--max-minutes``), or None."""
        if self._signal:
            return self._signal
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "--max-minutes"
        return None if self._outer is None else self._outer.reason

    def agreed(self, accelerator: Accelerator) -> str | None:
        """Return the reason where any process has one, so that all stop after the same step."""
        reason = self.reason
        if accelerator.num_processes == 1:
            return reason
        flag = torch.tensor([reason is not None], device=accelerator.device, dtype=torch.float32)
        return (reason or "another process") if accelerator.reduce(flag, "sum").item() > 0 else None
