"""What a study, or the rest of one, will take: hours and bytes, and how that is known.

A step of training takes what it took in cells of that recipe that have begun; where there are none, what a few steps on
noise take here; and where even those would take too long, what their operations take at the rate of a plain
convolution. That last is a lower bound: networks rarely reach the rate, and perceptual and adversarial networks are not
counted. Measuring takes what it took in finished cells, or its operations at that rate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..common.checkpoints import read_json
from ..common.metric_weights import MissingWeightsError
from ..stage1_autoencoder.bottlenecks import KLPenaltyConfig
from ..stage2_diffusion.generation import evaluations
from .study_cells import Task, Workbench, encoding_seconds
from .study_networks import Networks
from .study_results import last_logged
from .study_timing import TIMED_STEPS, convolution_rate, time_autoencoder, time_diffusion

AFFORDABLE_SECONDS = 60.0
"""Of timing, by what the operations are expected to take; above it nothing is timed."""
INCEPTION_FLOPS = 11.4e9
"""Of Inception v3 on an image of 299 pixels, a multiply-add counted as 2."""
HEALTH_PASSES = 3
"""Of the autoencoder over the images of the health report, an allowance."""


@dataclass(frozen=True)
class Estimate:
    """What the tasks still take.

    Attributes:
        seconds: wall time on one device by ``stage: step``, of what is not done.
        disk_bytes: by kind of folder, of all tasks when they are done.
        speeds: how often the speed of training was ``measured`` in cells that have begun, ``timed`` here, or comes from
            ``operations``, by number of tasks.
        notes: what the figures rest on.
    """

    seconds: Mapping[str, float]
    disk_bytes: Mapping[str, int]
    speeds: Mapping[str, int]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, with the sums."""
        sums = {"total_seconds": sum(self.seconds.values()), "total_disk_bytes": sum(self.disk_bytes.values())}
        return {**asdict(self), "notes": list(self.notes), **sums}


def estimate(tasks: Sequence[Task], bench: Workbench, networks: Mapping[str, Networks]) -> Estimate:
    """Return what ``tasks`` still take on this device; ``networks`` are by variant."""
    speeds = _Speeds(tasks, bench, networks)
    seconds: dict[str, float] = {}
    for task in tasks:
        for step in bench.unfinished(task):
            cost = speeds.training(task) if step == "train" else speeds.other(task, step)
            seconds[f"{task.stage}: {step}"] = seconds.get(f"{task.stage}: {step}", 0.0) + cost
    if "diffusion: measure" in seconds:
        seconds["features of the reference"] = len(bench.data.train) * INCEPTION_FLOPS / speeds.rate
    disk = {"autoencoders": 0, "latents": 0, "diffusions": 0}
    for task in tasks:
        for folder, size in _disk(task, bench, networks[task.variant]).items():
            disk[folder] += size
    if bench.config.data.size is not None:
        disk["data"] = sum(3 * data.size**2 * len(data) for data in (bench.data.train, bench.data.validation))
    return Estimate(seconds, disk, speeds.used, tuple(speeds.notes))


def describe(estimate: Mapping[str, Any]) -> str:
    """Return :meth:`Estimate.as_dict` as text."""
    lines = [f"{seconds / 3600:9.2f} h  {name}" for name, seconds in estimate["seconds"].items()]
    lines.append(f"{estimate['total_seconds'] / 3600:9.2f} h  in all, on one device like this one")
    lines += [f"{size / 1e9:9.2f} GB {name}" for name, size in estimate["disk_bytes"].items()]
    lines.append(f"{estimate['total_disk_bytes'] / 1e9:9.2f} GB in all")
    return "\n".join([*lines, *estimate["notes"]])


class _Speeds:
    """What the steps of tasks take, and where that is known from."""

    def __init__(self, tasks: Sequence[Task], bench: Workbench, networks: Mapping[str, Networks]) -> None:
        self.tasks, self.bench, self.networks = tasks, bench, networks
        self.used = {"measured": 0, "timed": 0, "operations": 0}
        self.notes: list[str] = []
        self._timed: dict[str, float | None] = {}

    @cached_property
    def rate(self) -> float:
        """Operations per second in float32."""
        return self._rate("no")

    @cached_property
    def training_rate(self) -> float:
        """Operations per second in the precision of training."""
        return self._rate(self.bench.options.mixed_precision)

    def training(self, task: Task) -> float:
        """Return the seconds of the steps of training that a task has still to make."""
        done = read_json(task.folder / "status.json").get("step", 0)
        return max(0, task.config.train.steps - done) * self._per_step(task)

    def other(self, task: Task, step: str) -> float:
        """Return the seconds of measuring, diagnosing or encoding."""
        known = [seconds for other in self.tasks if (seconds := self._took(other, task.stage, step)) is not None]
        if known:
            self._note("Measuring takes what it took in cells that are measured.")
            return sum(known) / len(known)
        self._note(
            f"Measuring is taken to run at the {self.rate / 1e9:,.0f} GFLOP/s of a plain convolution in float32 here "
            "and now, which networks rarely reach: a lower bound."
        )
        return self._operations(task, step) / self.rate

    def _per_step(self, task: Task) -> float:
        if (measured := self._measured(task)) is not None:
            self.used["measured"] += 1
            self._note("Training takes what it took in cells of the same recipe that have begun.")
            return measured
        if (timed := self._time(task)) is not None:
            self.used["timed"] += 1
            self._note(
                f"Where no cell of a recipe has begun, {TIMED_STEPS} steps of it were timed here on noise; what a "
                "recipe turns on later (an adversarial term) is not in them."
            )
            return timed
        self.used["operations"] += 1
        self._note(
            f"Steps that take too long to be timed here are counted as operations, at the "
            f"{self.training_rate / 1e9:,.0f} GFLOP/s of a plain convolution here and now: a lower bound, without "
            "perceptual and adversarial networks."
        )
        return self._step_operations(task) / self.training_rate

    def _measured(self, task: Task) -> float | None:
        """Return the seconds per step of the runs of this recipe, whatever the seed, that have made any."""
        recipe = task.folder.name.rpartition("-seed")[0]
        last = [last_logged(run) for run in sorted(task.folder.parent.glob(f"{recipe}-seed*"))]
        steps = sum(line.get("step", 0) for line in last)
        return sum(line.get("seconds", 0.0) for line in last) / steps if steps else None

    def _time(self, task: Task) -> float | None:
        """Return the seconds per step as timed here, once per recipe; None where that is not affordable."""
        if not self._affordable:
            return None
        recipe = task.folder.name.rpartition("-seed")[0]
        if recipe not in self._timed:
            print(f"timing a step: {task.stage} of {task.variant}", file=sys.stderr)
            self._timed[recipe] = self._time_now(task)
        return self._timed[recipe]

    def _time_now(self, task: Task) -> float | None:
        bench = self.bench
        try:
            if task.stage == "autoencoder":
                return time_autoencoder(task.config, bench.data.train.size, bench.options)
            shape = self.networks[task.variant].latent_shape
            return time_diffusion(task.config, shape, bench.data.train.num_classes, bench.options)
        except MissingWeightsError as error:
            self._note(f"Not timed: {error}.")
            return None

    @cached_property
    def _affordable(self) -> bool:
        """Whether timing every recipe that no cell has begun takes no longer than a minute, by its operations."""
        recipes = {
            task.folder.name.rpartition("-seed")[0]: task
            for task in self.tasks
            if "train" in self.bench.unfinished(task) and self._measured(task) is None
        }
        operations = sum(self._step_operations(task) for task in recipes.values())
        return (TIMED_STEPS + 1) * operations / self.training_rate < AFFORDABLE_SECONDS

    def _step_operations(self, task: Task) -> float:
        """Return the operations of a training step, of which the backward pass is twice the forward's."""
        networks, train = self.networks[task.variant], task.config.train
        if task.stage == "diffusion":
            return 3.0 * networks.denoise_flops * train.batch_size
        images = train.images_at(train.steps) / train.steps
        return 3.0 * (networks.encode_flops + networks.decode_flops) * images

    def _operations(self, task: Task, step: str) -> float:
        networks, bench = self.networks[task.variant], self.bench
        both_ways = networks.encode_flops + networks.decode_flops
        if step == "encode":
            return len(bench.data.train) * (2.0 if bench.config.flips else 1.0) * networks.encode_flops
        if step == "diagnose":
            return bench.num_health * HEALTH_PASSES * both_ways
        if task.stage == "autoencoder":
            return bench.num_reconstructions * (both_ways + 2 * INCEPTION_FLOPS)
        calls = evaluations(bench.sample_options.sampling)
        each = calls * networks.denoise_flops + networks.decode_flops + INCEPTION_FLOPS
        return bench.config.evaluation.num_samples * each

    def _took(self, task: Task, stage: str, step: str) -> float | None:
        """Return the seconds of a step that is done in ``task``, where that was noted."""
        if task.stage != stage:
            return None
        if step == "measure":
            bench = self.bench
            result = bench.reconstruction(task.folder) if stage == "autoencoder" else bench.generation(task)
            return None if result is None else result.seconds
        if step == "encode":
            return encoding_seconds(task.folder) or None
        return self.bench.health(task.folder).get("seconds") if step == "diagnose" else None

    def _rate(self, mixed_precision: Any) -> float:
        return convolution_rate(self.bench.options.device, mixed_precision)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _disk(task: Task, bench: Workbench, networks: Networks) -> dict[str, int]:
    """Return what a finished task has on disk, in bytes, by kind of folder: weights and latents, nothing small."""
    train = task.config.train
    if task.stage == "diffusion":
        parameters, averages = networks.denoiser_parameters, len(train.ema.widths)
        snapshots = sum(train.ema.snapshot_due(step, train.steps) for step in range(1, train.steps + 1))
        snapshot_bytes = 2 if train.ema.snapshot_dtype == "float16" else 4
        best = int(train.validation.images > 0 or train.quick_evaluation.every > 0)
        whole = 4 * ((3 + averages) * train.keep + 1 + best) + snapshot_bytes * averages * snapshots
        return {"diffusions": parameters * whole}
    values = len(bench.data.train) * math.prod(networks.latent_shape) * (2 if bench.config.flips else 1)
    deviations = isinstance(task.config.model.bottleneck, KLPenaltyConfig)
    checkpoint = 4 * networks.autoencoder_parameters + 3 * networks.discriminator_parameters
    return {
        "autoencoders": 4 * (checkpoint * train.keep + networks.autoencoder_parameters),
        "latents": 4 * values * (2 if deviations else 1),
    }
