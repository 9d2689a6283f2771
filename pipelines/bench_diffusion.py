"""``bench diffusion``: training and sampling with our UNet beside diffusers' UNet2DModel, measured in one run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.errors import UsageError
from ..common.latent_loader import TrainingLatents
from ..common.runtime import environment, resolve_device
from ..stage2_diffusion.unet import UNetConfig
from .bench import MIXED, Precision, conditions, digits, load_average, time_passes, write_result
from .bench_diffusion_models import (
    CHANNELS,
    COMPILED,
    OURS,
    PEER,
    SIZES,
    Task,
    build_model,
    build_network,
    network_calls,
    preset_of,
    sampling_pass,
    training_step,
)
from .bench_memory import cpu_rise, cuda_rise, in_own_process, read_job
from .costs import count_flops, count_parameters
from .diffusion_config import DiffusionRunConfig
from .study_timing import convolution_pass, noise_cache

TASKS: tuple[Task, ...] = get_args(Task)
DEFAULT_SIZE = 32
CPU_PIXELS, GPU_PIXELS = 4096, 262_144
"""Sites of all latents of a batch together, which decide the default batch: 16 of 16x16 or 4 of 32x32 on a CPU."""
NUM_STEPS = 4

METHOD = (
    "Rounds: in each, every network is timed once, the peer first; a timing is of as many passes as fill about a "
    "second, after untimed ones. A training pass is one optimiser step as the trainer takes it: noise, loss, backward "
    "pass, clipping, fused Adam, all averages of the preset; a sampling pass draws a batch with Heun's method. Only "
    "the network differs between the rows of a group; all else is the same code. A row's speed is its fastest "
    "round's, a ratio is the quotient of two rows' speeds, and its range is over the rounds. Memory is what building "
    "and two passes add at their peak, on a CPU in a process of its own. Weights are random; bf16 is autocast. FLOPs: "
    "a multiply-add is 2, and a training step is 3 forward passes. mfu is FLOPs over the time and over the FLOPs per "
    "second, in the same precision in the same run, of a large square matrix product or of a 3x3 convolution's forward "
    "and backward pass (on a CPU 64 channels, 8 maps of 32x32, on a GPU 256 and 64), whichever is more. Other "
    "convolutions may be faster still, and on a GPU those of fp32 are TF32 where PyTorch's default is left alone: mfu "
    "is no bound. loader_share is the time in "
    "which one thread of the training loader makes a batch, from a small cache on disk with standard deviations, over "
    "the time of a training step: prefetching hides it while it is below the number of threads."
)

SMALL = DiffusionRunConfig(
    model=UNetConfig(channels=32, multipliers=(1, 1), num_res_blocks=1, attention_levels=(1,), head_channels=32)
)

Passes = dict[str, Callable[[], None]]


def bench_diffusion(
    models: Sequence[str] | None = None,
    *,
    size: int | None = None,
    batch_size: int | None = None,
    num_steps: int = NUM_STEPS,
    device: str = "auto",
    precisions: Sequence[Precision] = ("fp32", "bf16"),
    repeats: int = 3,
    memory: bool = True,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure training steps and sampling with our UNet and with diffusers' UNet2DModel of the same sizes, in one run.

    On a GPU in bf16 our network is measured compiled too, against the peer's eager passes.

    Args:
        models: presets of kind unet; by default ``unet-tiny`` and ``unet-s``.
        size: side of the latents, which have 4 channels; by default 16 for ``unet-tiny`` and 32 for others.
        batch_size: latents in a pass; by default as many as have 4096 sites together on a CPU, 262144 on a GPU.
        num_steps: Heun steps of a sample.
        device: ``auto``, ``cpu`` or ``cuda``.
        precisions: ``fp32``, ``bf16`` (autocast) or both.
        repeats: rounds.
        memory: whether to measure memory too, on a CPU with one process per figure.
        out: a JSON file to write the result to.

    Returns:
        ``rows``, one per task (``train``, ``sample``), precision, model and network: ``per_second`` (training steps or
        images), ``seconds`` per pass of every round, ``parameters`` of the network, ``flops`` of a pass, ``mfu``,
        ``loader_share`` (None but for ``train``) and ``peak_memory_bytes`` (None without ``memory``).
        Against the peer, each as ``{"train_fp32": {model: ...}, ...}`` with ``..._compiled`` groups beside them on a
        GPU: ``ratios`` (speed, higher is faster), ``ratio_ranges`` (lowest and highest round), ``memory_ratios`` (lower
        is smaller). And ``protocol``, with the rates of the matrix product and the convolution, and which of the two
        ``mfu`` is against, by precision.

    Raises:
        UsageError: diffusers is missing, or a model, precision or size is not one that can be measured.
    """
    unknown = [p for p in precisions if p not in get_args(Precision)]
    if unknown or not precisions or min(repeats, num_steps, batch_size or 1, size or 1) < 1:
        raise UsageError("bench takes the precisions fp32 and bf16, and at least one round, step, latent and site")
    where = resolve_device(device)
    about, load = environment(), load_average()  # as it begins
    names = list(dict.fromkeys(models or SIZES))
    sizes = {model: size or SIZES.get(model, DEFAULT_SIZE) for model in names}
    costs = {model: _costs(model, side) for model, side in sizes.items()}
    rates = {precision: reference_rates(where, precision, repeats) for precision in precisions}
    rows: list[dict[str, Any]] = []
    for model, side in sizes.items():
        batch = batch_size or max(1, (CPU_PIXELS if where.type == "cpu" else GPU_PIXELS) // side**2)
        loader = loader_seconds(side, batch, repeats)
        for task in TASKS:
            for precision in precisions:
                job = Job(model, side, batch, num_steps, task, precision, str(where))
                rows += _rows(job, costs[model], max(rates[precision].values()), loader, repeats, memory)
    protocol = {
        "peer": PEER,
        "method": METHOD,
        "sampler": "heun",
        "num_steps": num_steps,
        "network_calls_per_sample": network_calls(num_steps),
        "flops_per_second": rates,
        "mfu_against": {precision: max(found, key=found.__getitem__) for precision, found in rates.items()},
    }
    result = {"rows": rows, **compare(rows), "protocol": protocol | conditions(about, where, repeats, load)}
    if out is not None:
        write_result(out, result)
    return result


@dataclass(frozen=True)
class Job:
    """One group of rows: a task with a preset's model in one precision, on the named device."""

    model: str
    size: int
    batch: int
    num_steps: int
    task: Task
    precision: Precision
    device: str

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks to measure, the peer first."""
        compiled = self.device != "cpu" and self.precision == "bf16"
        return (PEER, OURS, COMPILED) if compiled else (PEER, OURS)

    def build(self, network: str, config: DiffusionRunConfig | None = None) -> Callable[[], None]:
        """Return the pass to be measured, its model in place: the preset's, or another's."""
        config = config or preset_of(self.model)
        model, device, mixed = build_model(config, network, self.size), torch.device(self.device), MIXED[self.precision]
        if self.task == "train":
            return training_step(model, config.train, self.batch, device, mixed)
        return sampling_pass(model, self.batch, self.num_steps, device, mixed)

    def memory(self, network: str) -> int:
        """Return by how many bytes building the pass and calling it twice raises the memory in use at its peak."""
        what = f"{network} ({self.model}, {self.task}, {self.precision})"
        print(f"bench: memory of {what}", file=sys.stderr, flush=True)
        if self.device != "cpu":
            return cuda_rise(lambda: self._build_and_call(network), torch.device(self.device))
        arguments = {"job": asdict(self), "network": network, "threads": torch.get_num_threads()}
        return in_own_process("bench_diffusion", arguments, what)

    def memory_here(self, network: str) -> int:
        """Return the same of this process, which must be a new one, on a CPU."""
        # For what is loaded once and has nothing to do with the model: a small one goes first.
        replace(self, size=4, batch=1)._build_and_call(network, SMALL)
        return cpu_rise(lambda: self._build_and_call(network))

    def _build_and_call(self, network: str, config: DiffusionRunConfig | None = None) -> None:
        take = self.build(network, config)
        take()
        take()  # the optimiser's state is there from the first step on


def child() -> None:
    """Measure what the job asks for and print it: the process that :meth:`Job.memory` starts on a CPU."""
    arguments = read_job()
    print(Job(**arguments["job"]).memory_here(arguments["network"]))


def _rows(
    job: Job, costs: Mapping[str, Mapping[str, int]], rate: float, loader: float, repeats: int, memory: bool
) -> Iterator[dict[str, Any]]:
    peaks = {network: job.memory(network) if memory else None for network in job.networks}
    passes: Passes = {network: job.build(network) for network in job.networks}
    what = f"{job.model}, {job.task}, {job.precision}"
    for network, seconds in time_passes(passes, torch.device(job.device), repeats, what).items():
        calls = 3 if job.task == "train" else network_calls(job.num_steps)
        flops = costs[network]["flops"] * calls * job.batch
        yield {
            "model": job.model,
            "network": network,
            "task": job.task,
            "precision": job.precision,
            "latent_shape": [CHANNELS, job.size, job.size],
            "batch_size": job.batch,
            "per_second": (1 if job.task == "train" else job.batch) / min(seconds),
            "seconds": seconds,
            "parameters": costs[network]["parameters"],
            "flops": flops,
            "mfu": flops / min(seconds) / rate,
            "loader_share": loader / min(seconds) if job.task == "train" else None,
            "peak_memory_bytes": peaks[network],
        }


def _costs(model: str, size: int) -> dict[str, dict[str, int]]:
    """Return the parameters of each network and the operations of its forward pass on one latent."""
    config, costs = preset_of(model), {}
    for network in (OURS, PEER):
        with FakeTensorMode():
            built, x, noise_label = build_network(config, network), torch.zeros(1, CHANNELS, size, size), torch.zeros(1)
            try:
                flops = count_flops(partial(built, x, noise_label))
            except ValueError as error:  # a size that does not suit the network, and how to fix it
                raise UsageError(f"{model}: {error}") from error
        costs[network] = {"parameters": count_parameters(built), "flops": flops}
    return costs | {COMPILED: costs[OURS]}


def reference_rates(device: torch.device, precision: Precision, repeats: int) -> dict[str, float]:
    """Return the FLOPs per second that the device reaches in operations by name, each the fastest of the rounds.

    A large square ``matrix product`` and a plain ``convolution``, which may be the faster one: on a CPU, and where TF32
    is allowed for convolutions alone, as is PyTorch's default.
    """
    side = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    passes: dict[str, Callable[[], object]] = {"matrix product": lambda: a @ b}
    flops = {"matrix product": 2 * side**3}
    passes["convolution"], flops["convolution"] = convolution_pass(device, MIXED[precision])
    seconds = time_passes(passes, device, repeats, f"reference, {precision}")
    return {name: flops[name] / min(taken) for name, taken in seconds.items()}


def loader_seconds(size: int, batch_size: int, repeats: int) -> float:
    """Return the seconds in which the training loader makes a batch, in the fastest round."""
    with TemporaryDirectory(prefix="wavelatent-bench-") as folder:
        cache = noise_cache(Path(folder) / "latents", (CHANNELS, size, size), posterior_std=True)
        latents, steps = TrainingLatents(cache, batch_size, seed=0), count()
        passes = {"loader": lambda: latents.batch(next(steps))}
        return min(time_passes(passes, torch.device("cpu"), repeats, f"loader, {size}x{size}")["loader"])


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return every comparison of :func:`bench_diffusion` against the peer's row of the same group."""
    peers = {(row["task"], row["precision"], row["model"]): row for row in rows if row["network"] == PEER}
    result: dict[str, dict[str, dict[str, Any]]] = {"ratios": {}, "ratio_ranges": {}, "memory_ratios": {}}
    for row in rows:
        if row["network"] == PEER:
            continue
        peer, model = peers[row["task"], row["precision"], row["model"]], row["model"]
        group = _group(row)
        by_round = [p / r for p, r in zip(peer["seconds"], row["seconds"], strict=True)]
        found = {"ratios": row["per_second"] / peer["per_second"], "ratio_ranges": [min(by_round), max(by_round)]}
        if row["peak_memory_bytes"] is not None:
            found["memory_ratios"] = row["peak_memory_bytes"] / peer["peak_memory_bytes"]
        for table, value in found.items():
            result[table].setdefault(group, {})[model] = value
    return result


def _group(row: Mapping[str, Any]) -> str:
    return f"{row['task']}_{row['precision']}" + ("_compiled" if row["network"] == COMPILED else "")


def describe(result: Mapping[str, Any]) -> str:
    """Return the result of :func:`bench_diffusion` as a Markdown table; ratios are against diffusers' UNet2DModel."""
    lines = [
        "| | model | network | steps/s or images/s | ratio | rounds | MFU | loader's share of a step | memory (MB) "
        "| memory ratio | parameters (M) | GFLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        of_row = {
            table: None if row["network"] == PEER else result[table].get(_group(row), {}).get(row["model"])
            for table in ("ratios", "ratio_ranges", "memory_ratios")
        }
        spread, peak = of_row["ratio_ranges"], row["peak_memory_bytes"]
        figures = (
            digits(row["per_second"], 2),
            digits(of_row["ratios"], 2),
            "" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}",
            digits(row["mfu"], 2),
            digits(row["loader_share"], 4),
            digits(None if peak is None else peak / 1e6, 0),
            digits(of_row["memory_ratios"], 2),
            digits(row["parameters"] / 1e6, 2),
            digits(row["flops"] / 1e9, 1),
        )
        head = f"{row['task']} {row['precision']} | {row['model']} | {row['network']}"
        lines.append(f"| {head} | {' | '.join(figures)} |")
    return "\n".join(lines)
