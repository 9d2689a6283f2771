"""``bench``: speed and memory of our models side by side with the peers', measured in one run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.errors import UsageError
from ..common.files import write_atomically
from ..common.runtime import MixedPrecision, environment, resolve_device
from .bench_memory import cpu_activation_bytes, cuda_activation_bytes, one_pass
from .bench_models import MODELS, PEER, Direction, Half, arithmetic, build_half
from .costs import count_flops, count_parameters

Precision = Literal["fp32", "bf16"]
MIXED: dict[str, MixedPrecision] = {"fp32": "no", "bf16": "bf16"}
DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")

CPU_BATCH, GPU_BATCH = 1, 32
"""Images in a pass; the paper's table of costs has 32."""
SAMPLE_SECONDS = 1.0
"""A timing repeats the pass until it is about this long, so that what else the machine does strikes all alike."""

METHOD = (
    "Rounds: in each, every model is timed once, the peer first. A timing is of as many passes without a gradient as "
    f"fill about {SAMPLE_SECONDS:g} s (one, where a pass takes longer), after an untimed pass. A row's speed is its "
    "fastest round's; a ratio is the quotient of two rows' speeds, and its range is over the rounds. Memory is that of "
    "the weights plus what one pass adds to it at its peak; on a CPU in a process of its own. Models are as they come, "
    "with random weights; bf16 is autocast. Models with the same decoder share one measurement of it."
)
CLOCKS = {
    "cpu": "the process's CPU time, which with one thread is what the pass takes on a core that nobody else uses",
    "wall": "wall time",
    "events": "CUDA events",
}


def bench_autoencoder(
    size: int = 256,
    *,
    batch_size: int | None = None,
    device: str = "auto",
    precisions: Sequence[Precision] = ("fp32", "bf16"),
    models: Sequence[str] | None = None,
    repeats: int = 3,
    memory: bool = True,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure encoding and decoding of our autoencoders and of diffusers' AutoencoderKL, in one run.

    Args:
        size: side of the square images in pixels.
        batch_size: images in a pass; by default 1 on a CPU and 32 on a GPU.
        device: ``auto``, ``cpu`` or ``cuda``.
        precisions: ``fp32``, ``bf16`` (autocast) or both.
        models: presets; by default LiteVAE in four sizes and KL-f8. The peer is always among them.
        repeats: rounds.
        memory: whether to measure memory too, on a CPU with one process per figure.
        out: a JSON file to write the result to.

    Returns:
        ``rows``, one per direction, precision and model: ``images_per_second``, ``seconds_per_image`` of every round,
        ``parameters`` of that half, ``flops_per_image`` (a multiply-add is 2), ``peak_memory_bytes`` (weights and
        activations) and its part ``activation_bytes`` (both None without ``memory``), and ``measured_as``: the model
        with the same arithmetic that was measured in its place, or itself.
        Against the peer, each as ``{"encode_fp32": {model: ...}, ...}``: ``ratios`` (speed, higher is faster),
        ``ratio_ranges`` (lowest and highest round), ``flop_ratios`` (the peer's operations over the model's),
        ``ratio_to_flop_ratio`` (below 1, a model runs at fewer operations per second than the peer) and
        ``memory_ratios`` (lower is smaller). And ``protocol``.

    Raises:
        UsageError: diffusers is missing, or a model, precision or size is not one that can be measured.
    """
    unknown = [p for p in precisions if p not in get_args(Precision)]
    if unknown or not precisions or repeats < 1 or (batch_size is not None and batch_size < 1):
        raise UsageError("bench takes the precisions fp32 and bf16, and at least one round and one image")
    where = resolve_device(device)
    batch = batch_size or (CPU_BATCH if where.type == "cpu" else GPU_BATCH)
    names = [PEER, *(name for name in dict.fromkeys(models or MODELS) if name != PEER)]
    about, load = environment(), load_average()  # as it begins
    rows: list[dict[str, Any]] = []
    for direction in DIRECTIONS:
        measured_as = _measured_as(names, direction)
        halves = {name: build_half(name, direction, size) for name in names if measured_as[name] == name}
        costs = {name: _costs(name, direction, size) for name in halves}
        for precision in precisions:
            seconds = time_rounds(halves, batch, where, MIXED[precision], repeats)
            peaks = _memory(halves, direction, size, batch, where, MIXED[precision]) if memory else {}
            rows += [
                _row(name, measured_as[name], direction, precision, batch, seconds, costs, peaks) for name in names
            ]
    protocol = {"peer": PEER, "method": METHOD, "size": size, "batch_size": batch}
    result = {"rows": rows, **compare(rows), "protocol": protocol | conditions(about, where, repeats, load)}
    if out is not None:
        write_result(out, result)
    return result


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a benchmark as JSON."""
    write_atomically(out, json.dumps(result, indent=1) + "\n")


def time_rounds(
    halves: Mapping[str, Half], batch_size: int, device: torch.device, precision: MixedPrecision, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds per image of every model in every round."""
    passes: dict[str, Callable[[], None]] = {}
    for name, half in halves.items():
        half.modules.to(device)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(batch_size, *half.input_shape, generator=generator).to(device)
        passes[name] = partial(one_pass, half.compute, inputs, precision)
    seconds = time_passes(passes, device, rounds, precision)
    return {name: [taken / batch_size for taken in values] for name, values in seconds.items()}


def time_passes(
    passes: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, what: str
) -> dict[str, list[float]]:
    """Return the seconds per pass of every function in every round; ``what`` says in the log what is timed."""
    counts = {}
    for name, compute in passes.items():
        _time(compute, device, 1)  # the first pass chooses kernels, or compiles
        counts[name] = max(1, round(SAMPLE_SECONDS / _time(compute, device, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds):
        print(f"bench: round {number + 1} of {rounds} ({what}, {len(passes)} models)", file=sys.stderr, flush=True)
        for name, compute in passes.items():
            seconds[name].append(_time(compute, device, counts[name]) / counts[name])
    return seconds


def _clock(device: torch.device) -> str:
    """Return which of ``CLOCKS`` measures on ``device``.

    One thread's own time is not lengthened by other processes on a busy machine. With several threads, some of which
    wait for others, it would mean nothing.
    """
    if device.type == "cuda":
        return "events"
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def _time(compute: Callable[[], object], device: torch.device, passes: int) -> float:
    """Return the seconds that so many passes take."""

    def run() -> None:
        for _ in range(passes):
            compute()

    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000
    now = time.process_time if _clock(device) == "cpu" else time.perf_counter
    began = now()
    run()
    return now() - began


def _measured_as(names: Sequence[str], direction: Direction) -> dict[str, str]:
    """Return for each model the first one whose half computes the same."""
    first: dict[str, str] = {}
    return {name: first.setdefault(arithmetic(name, direction), name) for name in names}


def _costs(name: str, direction: Direction, size: int) -> dict[str, int]:
    with FakeTensorMode():
        half = build_half(name, direction, size)
        flops = count_flops(lambda: half.compute(torch.randn(1, *half.input_shape)))
    return {"parameters": count_parameters(half.modules), "flops_per_image": flops}


def _memory(
    halves: Mapping[str, Half],
    direction: Direction,
    size: int,
    batch_size: int,
    device: torch.device,
    precision: MixedPrecision,
) -> dict[str, dict[str, int]]:
    peaks = {}
    for name, half in halves.items():
        print(f"bench: memory of {name} ({direction}, {precision})", file=sys.stderr, flush=True)
        if device.type == "cuda":
            inputs = torch.zeros(batch_size, *half.input_shape, device=device)
            activations = cuda_activation_bytes(half.compute, inputs, precision)
        else:
            activations = cpu_activation_bytes(
                name, direction, size=size, batch_size=batch_size, precision=precision, threads=torch.get_num_threads()
            )
        weights = sum(p.numel() * p.element_size() for p in half.modules.parameters())
        peaks[name] = {"peak_memory_bytes": weights + activations, "activation_bytes": activations}
    return peaks


def _row(
    name: str,
    measured_as: str,
    direction: Direction,
    precision: str,
    batch_size: int,
    seconds: Mapping[str, list[float]],
    costs: Mapping[str, dict[str, int]],
    peaks: Mapping[str, dict[str, int]],
) -> dict[str, Any]:
    return {
        "model": name,
        "direction": direction,
        "precision": precision,
        "batch_size": batch_size,
        "images_per_second": 1 / min(seconds[measured_as]),
        **peaks.get(measured_as, {"peak_memory_bytes": None, "activation_bytes": None}),
        **costs[measured_as],
        "seconds_per_image": seconds[measured_as],
        "measured_as": measured_as,
    }


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return every comparison of :func:`bench_autoencoder` against the peer's row of the same group."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['direction']}_{row['precision']}", {})[row["model"]] = row
    tables = ("ratios", "ratio_ranges", "flop_ratios", "ratio_to_flop_ratio", "memory_ratios")
    result: dict[str, dict[str, dict[str, Any]]] = {table: {group: {} for group in groups} for table in tables}
    for group, by_model in groups.items():
        peer = by_model[PEER]
        for name, row in by_model.items():
            if name == PEER:
                continue
            speed = row["images_per_second"] / peer["images_per_second"]
            by_round = [p / r for p, r in zip(peer["seconds_per_image"], row["seconds_per_image"], strict=True)]
            flops = peer["flops_per_image"] / row["flops_per_image"]
            result["ratios"][group][name] = speed
            result["ratio_ranges"][group][name] = [min(by_round), max(by_round)]
            result["flop_ratios"][group][name] = flops
            result["ratio_to_flop_ratio"][group][name] = speed / flops
            if row["peak_memory_bytes"] is not None:
                result["memory_ratios"][group][name] = row["peak_memory_bytes"] / peer["peak_memory_bytes"]
    return result


def describe(result: Mapping[str, Any]) -> str:
    """Return the result of :func:`bench_autoencoder` as a Markdown table; ratios are against diffusers' KL-f8."""
    lines = [
        "| | model | images/s | ratio | FLOP ratio | ratio to FLOP ratio | memory (MB) | memory ratio | parameters (M) "
        "| GFLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        group, name = f"{row['direction']}_{row['precision']}", row["model"]
        tables = ("ratios", "flop_ratios", "ratio_to_flop_ratio", "memory_ratios")
        speed, flops, share, memory = (result[table][group].get(name) for table in tables)
        peak = row["peak_memory_bytes"]
        figures = (
            digits(row["images_per_second"], 2),
            digits(speed, 2),
            digits(flops, 2),
            digits(share, 2),
            digits(None if peak is None else peak / 1e6, 0),
            digits(memory, 2),
            digits(row["parameters"] / 1e6, 2),
            digits(row["flops_per_image"] / 1e9, 1),
        )
        lines.append(f"| {row['direction']} {row['precision']} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def digits(value: float | None, digits: int) -> str:
    """Return a table's cell: a number to so many decimals, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def conditions(
    about: Mapping[str, Any], device: torch.device, rounds: int, load_before: float | None
) -> dict[str, Any]:
    """Return the part of a benchmark's protocol that says where, when and by which clock it was measured."""
    return {
        "rounds": rounds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "clock": CLOCKS[_clock(device)],
        "tf32_convolutions": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "load_average": [load_before, load_average()],
        "versions": {**about["versions"], "diffusers": metadata.version("diffusers")},
        "git_commit": about["git_commit"],
        "hardware": about["hardware"],
        "started": about["started"],
    }


def load_average() -> float | None:
    """Return how many processes wanted a core in the last minute, where the system says."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
