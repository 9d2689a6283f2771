"""The peak memory of one pass, so measured that no other pass can hide in it: on a CPU in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import WavelatentError
from ..common.runtime import MixedPrecision, autocast, peak_memory_bytes
from .bench_models import Direction, build_half

CLI = Path(__file__).resolve().parent.parent / "cli.py"
START = (
    "import importlib, runpy, sys; runpy.run_path(sys.argv.pop(1)); "
    "importlib.import_module('wavelatent.pipelines.' + sys.argv.pop(1)).child()"
)
"""``cli.py`` makes the package importable from a bare checkout as well as from an install."""


def cpu_activation_bytes(
    model: str, direction: Direction, *, size: int, batch_size: int, precision: MixedPrecision, threads: int
) -> int:
    """Return by how many bytes one pass without a gradient raises a CPU process above its level with weights loaded.

    A pass over the smallest image goes first, for what is loaded once and has nothing to do with the model's size.
    """
    job = {"model": model, "direction": direction, "size": size, "batch_size": batch_size, "precision": precision}
    return in_own_process("bench_memory", {**job, "threads": threads}, f"{model} ({direction}, {precision})")


def in_own_process(module: str, job: Mapping[str, Any], what: str) -> int:
    """Return the bytes that ``child()`` of a module of this package prints, in a new process given ``job``.

    A new one that does nothing else, because memory that an earlier pass left with the allocator would be used again
    without being seen. Raises :class:`WavelatentError`, naming ``what``, where it fails.
    """
    command = [sys.executable, "-c", START, str(CLI), module, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, out of memory?"]
        raise WavelatentError(f"measuring the memory of {what} failed: {lines[-1]}")
    return int(done.stdout.splitlines()[-1])


def read_job() -> dict[str, Any]:
    """Return the job of this process, which :func:`in_own_process` started, and take its number of threads."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    return job


def child() -> None:
    """Measure what the job asks for and print it: the process that :func:`cpu_activation_bytes` starts."""
    job = read_job()
    half = build_half(job["model"], job["direction"], job["size"])
    channels, *sides = half.input_shape
    least = [side * 32 // job["size"] if job["size"] > 32 else side for side in sides]
    one_pass(half.compute, torch.zeros(1, channels, *least), job["precision"])
    inputs = torch.zeros(job["batch_size"], channels, *sides)
    print(cpu_rise(lambda: one_pass(half.compute, inputs, job["precision"])))


def cpu_rise(compute: Callable[[], object]) -> int:
    """Return by how many bytes a call raises the resident memory of this process at its peak.

    The peak is the kernel's high-water mark, so nothing is missed between samples. It is set back just before the call
    (Linux), since building a model leaves a mark of its own.
    """
    before = _restart_peak()
    compute()
    return max(0, _peak() - before)


def cuda_activation_bytes(compute: Callable[[Tensor], Tensor], inputs: Tensor, precision: MixedPrecision) -> int:
    """Return by how many bytes one pass without a gradient raises what PyTorch has allocated on the GPU."""
    return cuda_rise(lambda: one_pass(compute, inputs, precision), inputs.device)


def cuda_rise(compute: Callable[[], object], device: torch.device) -> int:
    """Return by how many bytes a call raises what PyTorch has allocated on a GPU at its peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def one_pass(compute: Callable[[Tensor], Tensor], inputs: Tensor, precision: MixedPrecision) -> None:
    """Compute once without a gradient, under an autocast of its own: weights are cast anew in every pass."""
    with torch.inference_mode(), autocast(inputs.device, precision):
        compute(inputs)


def _restart_peak() -> int:
    """Set the high-water mark of this process back to its present resident memory and return that, in bytes."""
    with contextlib.suppress(OSError):  # not Linux: the mark so far is the level, which building may have left too high
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak()


def _peak() -> int:
    """Return the high-water mark of this process's resident memory in bytes.

    From the kernel where it says: ``ru_maxrss`` starts at the parent's in a process that was forked from it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return peak_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
