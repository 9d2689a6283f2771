"""The cells of a study: their folders, what is still to be done in each, and how it is done.

A cell is one variant at one seed. Its work is two tasks, one per stage, each in a folder that is named by what is
computed in it; cells with the same autoencoder share that task. What is done is known from the folders alone:

::

    OUT/autoencoders/<hash>-seed<k>/  a run of train-ae, with evaluation-reconstruction/ and health/
    OUT/latents/<hash>-seed<k>/       the latent cache that this autoencoder made
    OUT/diffusions/<hash>-seed<k>/    a run of train-diffusion on it, with evaluation-generation/

A task whose loss, gradient, latents or images are not finite has failed: ``failure.json`` in its folder says how, and
it is not tried again until that file is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..common.checkpoints import read_json, write_json
from ..common.errors import Diverged
from ..common.evaluation import Result
from ..common.latent_cache import MANIFEST
from ..common.reference_features import choose_images
from ..common.runtime import RuntimeOptions
from ..stage2_diffusion.sampling import Sampling
from .cells import Cell, fail, failure, make_cells, take_shard
from .diagnose import RECORD, diagnose
from .encode import encode
from .evaluate import evaluate_generation, evaluate_reconstruction
from .evaluation_files import RECONSTRUCTED_PLAINLY, measured_as
from .health_sections import choose_sections
from .sample_images import SampleOptions
from .sample_sources import describe_seeds
from .study_config import StudyConfig
from .study_data import StudyData
from .study_design import Variant
from .train_autoencoder import train_autoencoder
from .train_diffusion import train_diffusion

CELL_FORMAT = 1
"""To be raised where the same configuration comes to train otherwise than before: older cells are not taken then."""
ENCODING = "encoding.json"
"""Beside an autoencoder: the ``seconds`` that its latents took."""
FINAL_STATES = {"finished", "failed"}
Stage = Literal["autoencoder", "diffusion"]


@dataclass(frozen=True)
class Task(Cell[Any]):
    """What is done of one stage for a cell; ``variant`` is the first that needs it."""

    stage: Stage
    latents: Path
    autoencoder: Path
    """The folder of the autoencoder's task."""


@dataclass(frozen=True)
class StudyCell:
    """One variant at one seed."""

    variant: Variant
    seed: int
    autoencoder: Task
    diffusion: Task


class Step(NamedTuple):
    """A part of a task. ``by_main``: of several processes the main one does it alone."""

    name: str
    is_done: Callable[[], bool]
    do: Callable[[], object]
    by_main: bool = False


def make_study_cells(
    config: StudyConfig, variants: Sequence[Variant], root: Path, data: StudyData, mixed_precision: str
) -> list[StudyCell]:
    """Return the study's cells, all variants of the first seed first."""
    context = {"format": CELL_FORMAT, "data": data.train.fingerprint(), "mixed_precision": mixed_precision}
    by_variant = [_cells_of(variant, config, root, context) for variant in variants]
    return [cells[index] for index in range(len(config.seeds)) for cells in by_variant]


def _cells_of(variant: Variant, config: StudyConfig, root: Path, context: Mapping[str, Any]) -> list[StudyCell]:
    first = make_cells({variant.name: variant.recipe.autoencoder}, config.seeds, root / "autoencoders", context)
    # The name of the autoencoder's folder says how it was made: with it, nothing else of stage one is needed here.
    made_by = first[0].folder.name.removesuffix(f"-seed{first[0].seed}")
    on_top = {**context, "autoencoder": made_by, "flips": config.flips}
    second = make_cells({variant.name: variant.recipe.diffusion}, config.seeds, root / "diffusions", on_top)
    cells = []
    for autoencoder, diffusion in zip(first, second, strict=True):
        name = autoencoder.folder.name if config.flips else f"{autoencoder.folder.name}-unflipped"
        latents = root / "latents" / name
        cells.append(
            StudyCell(
                variant,
                autoencoder.seed,
                _task(autoencoder, "autoencoder", latents, autoencoder.folder),
                _task(diffusion, "diffusion", latents, autoencoder.folder),
            )
        )
    return cells


def _task(cell: Cell[Any], stage: Stage, latents: Path, autoencoder: Path) -> Task:
    return Task(cell.variant, cell.seed, cell.config, cell.folder, stage, latents, autoencoder)


def cells_of_shard(cells: Sequence[StudyCell], shard: tuple[int, int]) -> list[StudyCell]:
    """Return the cells of every ``n``-th autoencoder from the ``i``-th on: no two shards train the same one."""
    own = set(take_shard(list(dict.fromkeys(cell.autoencoder.folder for cell in cells)), shard))
    return [cell for cell in cells if cell.autoencoder.folder in own]


def tasks_of(cells: Sequence[StudyCell]) -> list[Task]:
    """Return the tasks of the cells in order, each once, an autoencoder's before those that need it."""
    tasks: dict[Path, Task] = {}
    for cell in cells:
        for task in (cell.autoencoder, cell.diffusion):
            tasks.setdefault(task.folder, task)
    return list(tasks.values())


class Workbench:
    """Does the steps of a task, and knows from the folders what is done. Measuring is in float32.

    Raises :class:`UsageError` at once for settings of the evaluation that are wrong or do not fit the data.
    """

    def __init__(self, config: StudyConfig, data: StudyData, options: RuntimeOptions, batch_size: int) -> None:
        self.config, self.data, self.batch_size = config, data, batch_size
        self.options = replace(options, max_minutes=None, overwrite=False)  # the whole study's time, not each step's
        evaluation = config.evaluation
        sampling = Sampling(sampler=evaluation.sampler, steps=evaluation.steps, grid=evaluation.grid)
        self.sample_options = SampleOptions(sampling, pass_rows=evaluation.pass_rows)
        self.sections = choose_sections(only=evaluation.health) if evaluation.health else []
        self.num_reconstructions = len(choose_images(len(data.validation), evaluation.num_reconstructions, seed=0))
        self.num_health = min(evaluation.health_images, len(data.validation))

    def steps(self, task: Task) -> list[Step]:
        """Return the steps of a task in order."""
        return self._autoencoder_steps(task) if task.stage == "autoencoder" else self._diffusion_steps(task)

    def unfinished(self, task: Task) -> list[str]:
        """Return the names of the steps that are still to be done; none of a task that has failed."""
        return [] if self.failure(task) else [step.name for step in self.steps(task) if not step.is_done()]

    def needs(self, task: Task) -> list[Task]:
        """Return the task's autoencoder's, where something of that is still to be done."""
        first = self._of_autoencoder(task)
        return [first] if task.stage == "diffusion" and self.unfinished(first) else []

    def state(self, task: Task) -> str:
        """Return how far a task is: ``new``, ``started``, ``trained``, ``finished`` or ``failed``."""
        if self.failure(task):
            return "failed"
        left = self.unfinished(task)
        if "train" in left:
            return "started" if (task.folder / "status.json").is_file() else "new"
        return "trained" if left else "finished"

    def failure(self, task: Task) -> str | None:
        """Return why a task has failed, or its autoencoder's; None where neither has."""
        own = failure(task.folder)
        return own if own or task.folder == task.autoencoder else self.failure(self._of_autoencoder(task))

    def fail(self, task: Task, step: str, error: Diverged) -> None:
        """Note that a task cannot be finished."""
        fail(task.folder, step, task.stage, error)

    def reconstruction(self, folder: Path) -> Result | None:
        """Return the measurement of an autoencoder's reconstructions, where it is of these images and this network."""
        wanted = {
            "num_samples": self.num_reconstructions,
            "reference_fingerprint": self.data.validation.fingerprint(),
            "lpips_net": self.config.evaluation.lpips_net,
            **RECONSTRUCTED_PLAINLY,
        }
        return measured_as(folder / "evaluation-reconstruction", wanted)

    def generation(self, task: Task) -> Result | None:
        """Return the measurement of a run's samples, where it is of these seeds, this sampler and this reference.

        And of this autoencoder: one that was trained again has other weights.
        """
        wanted = {
            "num_samples": self.config.evaluation.num_samples,
            "num_reference": len(self.data.train),
            "reference_fingerprint": self.data.train.fingerprint(),
            "seeds": describe_seeds(self.seeds(task.seed)),
            "autoencoder_fingerprint": self._fingerprint(task.autoencoder),
            "ema": task.config.train.ema.widths[0],
            "ema_step": None,
            "guide_sha256": None,
            **self.sample_options.protocol(),
        }
        return measured_as(task.folder / "evaluation-generation", wanted)

    def health(self, folder: Path) -> dict[str, Any]:
        """Return an autoencoder's health report, where it is of these weights, images and sections; else nothing."""
        record = read_json(folder / "health" / RECORD)
        protocol = record.get("protocol", {})
        found = protocol.get("sections"), protocol.get("num_images")
        of_what = [protocol.get(name, {}).get("fingerprint") for name in ("data", "autoencoder")]
        wanted = [self.data.validation.fingerprint(), self._fingerprint(folder)]
        return record if found == (self.sections, self.num_health) and of_what == wanted else {}

    def seeds(self, seed: int) -> range:
        """Return the seeds of the samples: the same for all variants at a seed, others at another."""
        count = self.config.evaluation.num_samples
        return range(seed * count, (seed + 1) * count)

    def _fingerprint(self, autoencoder: Path) -> str | None:
        """Return the fingerprint of the autoencoder whose reconstructions were measured."""
        result = self.reconstruction(autoencoder)
        return None if result is None else result.protocol.get("autoencoder", {}).get("fingerprint")

    def _is_encoded(self, task: Task) -> bool:
        """Return whether the latents are there; not those of other weights, which ``encode`` refuses."""
        manifest = task.latents / MANIFEST
        recorded = read_json(manifest).get("autoencoder", {}).get("fingerprint")
        return manifest.is_file() and recorded == self._fingerprint(task.folder)

    def _of_autoencoder(self, task: Task) -> Task:
        return replace(task, stage="autoencoder", folder=task.autoencoder)

    def _autoencoder_steps(self, task: Task) -> list[Step]:
        folder, ae = task.folder, str(task.folder)
        validation, device = self.data.validation.spec, self.options.device
        steps = [
            Step(
                "train",
                partial(_is_trained, folder),
                lambda: train_autoencoder(task.config, data=self.data.train, out=folder, options=self.options),
            ),
            Step(
                "measure",
                lambda: self.reconstruction(folder) is not None,
                lambda: evaluate_reconstruction(
                    ae,
                    validation,
                    num_images=self.num_reconstructions,
                    lpips_net=self.config.evaluation.lpips_net,
                    batch_size=self.batch_size,
                    device=device,
                ),
            ),
            Step(
                "diagnose",
                lambda: bool(self.health(folder)),
                lambda: diagnose(
                    ae,
                    validation,
                    folder / "health",
                    num_images=self.num_health,
                    batch_size=self.batch_size,
                    only=self.sections,
                    device=device,
                ),
                by_main=True,
            ),
            Step(
                "encode",
                partial(self._is_encoded, task),
                lambda: self._encode(task),
            ),
        ]
        return [step for step in steps if step.name != "diagnose" or self.sections]

    def _encode(self, task: Task) -> None:
        """Cache the latents, and note what that took, which a cache does not say."""
        summary = encode(
            str(task.folder),
            self.data.train.spec,
            task.latents,
            flips=self.config.flips,
            batch_size=self.batch_size,
            device=self.options.device,
        )
        if os.environ.get("RANK", "0") == "0":
            seconds = encoding_seconds(task.folder) + summary["seconds"]
            write_json(task.folder / ENCODING, {"seconds": seconds})

    def _diffusion_steps(self, task: Task) -> list[Step]:
        folder = task.folder
        return [
            Step(
                "train",
                partial(_is_trained, folder),
                lambda: train_diffusion(task.config, latents=task.latents, out=folder, options=self.options),
            ),
            Step(
                "measure",
                lambda: self.generation(task) is not None,
                lambda: evaluate_generation(
                    run=folder,
                    seeds=self.seeds(task.seed),
                    data=self.data.train.spec,
                    options=self.sample_options,
                    autoencoder=str(task.autoencoder),  # the cache knows where it was, and the study may have moved
                    batch_size=self.batch_size,
                    device=self.options.device,
                ),
            ),
        ]


def encoding_seconds(folder: Path) -> float:
    """Return how long the latents of the autoencoder in ``folder`` took; 0 where that was not noted."""
    return float(read_json(folder / ENCODING).get("seconds", 0.0))


def _is_trained(folder: Path) -> bool:
    return read_json(folder / "status.json").get("state") == "done" and (folder / "model").is_dir()
