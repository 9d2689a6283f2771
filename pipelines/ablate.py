"""``ablate``: variants times seeds of stage one under one recipe, measured alike, and a table that knows its spread.

Below ``--out``: ``cells/<hash>-seed<seed>`` are ordinary run folders of ``train-ae``, each with its
``evaluation-reconstruction``; ``tables/<title>.json`` and ``.md`` are what they say together. Ablations with the same
``--out`` share the cells they have in common. One process trains one cell at a time; to use more cores or machines, run
the same command in several processes, which take turns at the cells, or give each a ``--shard``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.checkpoints import read_json
from ..common.errors import Diverged, UsageError
from ..common.evaluation import Result
from ..common.files import write_atomically
from ..common.images import ImageData, open_data
from ..common.inception import FEATURES_NAME
from ..common.reference_features import choose_images
from ..common.runtime import RuntimeOptions, StopRequest
from .ablate_config import AblationConfig
from .ablate_tables import Run, make_table, markdown
from .cells import (
    Cell,
    fail,
    failure,
    make_cells,
    result_key,
    take_shard,
    variant_configs,
    work_through,
)
from .evaluate import evaluate_reconstruction
from .evaluation_files import RECONSTRUCTED_PLAINLY, measured_as
from .run_config import AutoencoderRunConfig
from .train_autoencoder import train_autoencoder

AutoencoderCell = Cell[AutoencoderRunConfig]
CELL_FORMAT = 1
"""To be raised where the same configuration comes to train otherwise than before: older cells are not taken then."""
FINAL_STATES = {"measured", "failed"}


def ablate(
    config: AblationConfig,
    *,
    data: str,
    eval_data: str,
    out: Path,
    options: RuntimeOptions | None = None,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train and measure every cell that is not there yet; once all are, write the table.

    A cell whose loss or gradient is no longer finite is reported, the others go on, and the table names it. Evaluation
    is in float32 whatever the training's precision.

    Args:
        config: the ablation.
        data: what is trained on, as on the command line.
        eval_data: what is measured on.
        out: the folder of cells and tables.
        options: device, precision of the training, and ``max_minutes`` for all of it. ``overwrite`` is not looked at:
            a cell is named by what is computed in it, so none is ever in the way of another.
        shard: ``(i, n)``: work on every ``n``-th cell from the ``i``-th on only.
        batch_size: of the evaluation.
        dry_run: only list the cells of the shard; nothing is written.

    Returns:
        ``{"cells": [{"variant", "seed", "folder", "state"}], "complete": bool}``, where ``state`` is ``measured``,
        ``trained``, ``failed``, ``started`` or ``new``; once complete also ``table`` (see
        :func:`~.ablate_tables.make_table`) and the paths ``json`` and ``markdown``.

    Raises:
        UsageError: the configuration is at fault, the variants differ in steps or images, or the data cannot serve.
        Stopped: by ``max_minutes``, SIGTERM or SIGINT; the same command goes on from there.
    """
    options = options or RuntimeOptions()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("ablate trains a cell in one process: start it several times instead, with the same --out")
    images = open_data(data)
    bench = _Bench(config, images, EvaluationData(eval_data, config.num_images), options, batch_size)
    cells = bench.cells(out / "cells")
    mine = take_shard(cells, shard)
    if not dry_run:
        with StopRequest(options.max_minutes) as stop:
            work_through(mine, lambda cell: bench.work(cell, f"[{mine.index(cell) + 1}/{len(mine)}]"), stop)
    listed = [
        {"variant": cell.variant, "seed": cell.seed, "folder": str(cell.folder), "state": bench.state(cell)}
        for cell in (mine if dry_run else cells)
    ]
    complete = all(cell["state"] in FINAL_STATES for cell in listed)
    if dry_run or not complete:
        return {"cells": listed, "complete": complete}
    runs = [bench.summary(cell) for cell in cells]
    table = make_table(config, runs, bench.setting(cells, runs))
    path = out / "tables" / f"{config.file_name}.json"
    write_atomically(path, json.dumps(table, indent=2, allow_nan=False) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(table))
    return {
        "cells": listed,
        "complete": True,
        "table": table,
        "json": str(path),
        "markdown": str(path.with_suffix(".md")),
    }


def describe(result: Mapping[str, Any]) -> str:
    """Return what :func:`ablate` returned as text: the table, or the cells and how far they are."""
    if "table" in result:
        return f"{markdown(result['table'])}\nwritten to {result['markdown']} and {result['json']}"
    lines = [f"{c['state']:8}  {c['variant']}, seed {c['seed']}: {c['folder']}" for c in result["cells"]]
    left = sum(cell["state"] not in FINAL_STATES for cell in result["cells"])
    return "\n".join([*lines, f"{left} of {len(lines)} cells are still to be trained or measured"])


class EvaluationData:
    """What every cell is measured on."""

    def __init__(self, spec: str, num_images: int | None) -> None:
        self.spec, self.images = spec, open_data(spec)
        self.num_images = len(choose_images(len(self.images), num_images, seed=0))
        self.fingerprint = self.images.fingerprint()


class _Bench:
    """What is done for a cell, and what is known of it: its state is in its folder alone."""

    def __init__(
        self,
        config: AblationConfig,
        data: ImageData,
        evaluation: EvaluationData,
        options: RuntimeOptions,
        batch_size: int,
    ) -> None:
        self.config, self.data, self.evaluation = config, data, evaluation
        self.options, self.batch_size = options, batch_size
        self.configs = variant_configs(config.autoencoder, config.variants)
        _all_different(self.configs)
        trains = {name: variant.train for name, variant in self.configs.items()}
        self.steps = _equal("steps", {name: train.steps for name, train in trains.items()})
        self.num_images = _equal("images", {name: train.images_at(train.steps) for name, train in trains.items()})
        self._begin = time.monotonic()
        if data.size != evaluation.images.size:
            raise UsageError(
                f"the training images are {data.size} px and those to measure on {evaluation.images.size} px; "
                "prepare both at one size"
            )

    def cells(self, root: Path) -> list[AutoencoderCell]:
        """Return every cell of the ablation."""
        context = {
            "format": CELL_FORMAT,
            "data": self.data.fingerprint(),
            "mixed_precision": self.options.mixed_precision,
        }
        return make_cells(self.configs, self.config.seeds, root, context)

    def work(self, cell: AutoencoderCell, number: str) -> None:
        """Train and measure ``cell`` where it is not yet; what is not finite is noted as failed."""
        if (result := self._result(cell)) is not None and result.is_final:
            return print(f"{number} {cell}: there already", file=sys.stderr)
        if (why := failure(cell.folder)) is not None:
            return print(f"{number} {cell}: {why}", file=sys.stderr)
        if self.state(cell) != "trained":
            print(f"{number} {cell}: training", file=sys.stderr)
        minutes = self.options.max_minutes
        left = None if minutes is None else max(0.0, minutes - (time.monotonic() - self._begin) / 60)
        options = replace(self.options, max_minutes=left, overwrite=False)
        step = "training"
        try:
            train_autoencoder(cell.config, data=self.data, out=cell.folder, options=options)
            step = "measuring"
            print(f"{number} {cell}: {step}", file=sys.stderr)
            evaluate_reconstruction(
                str(cell.folder),
                self.evaluation.spec,
                num_images=self.evaluation.num_images,
                lpips_net=self.config.lpips_net,
                batch_size=self.batch_size,
                device=self.options.device,
            )
        except Diverged as error:
            print(f"{number} {cell}: failed: {error}", file=sys.stderr)
            fail(cell.folder, step, "autoencoder", error)
        return None

    def state(self, cell: AutoencoderCell) -> str:
        """Return how far ``cell`` is, in one word."""
        if self._result(cell) is not None:
            return "measured"
        if failure(cell.folder) is not None:
            return "failed"
        state = read_json(cell.folder / "status.json").get("state", "new")
        return {"new": "new", "done": "trained"}.get(state, "started")

    def summary(self, cell: AutoencoderCell) -> Run:
        """Return what the table needs of a cell that is measured or failed."""
        log = cell.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        last = json.loads(lines[-1]) if lines else {}
        return Run(
            variant=cell.variant,
            seed=cell.seed,
            cell=cell.folder.name,
            result=self._result(cell),
            train_seconds=last.get("seconds", 0.0),
            steps=last.get("step", 0),
            images=last.get("images", 0),
        )

    def setting(self, cells: Sequence[AutoencoderCell], runs: Sequence[Run]) -> dict[str, Any]:
        """Return what all cells have in common, for the table. No paths: data is named by its fingerprint."""
        data, evaluation = self.data, self.evaluation
        protocol: dict[str, Any] = next((run.result.protocol for run in runs if run.result), {})
        return {
            "steps": self.steps,
            "images": self.num_images,
            "mixed_precision": self.options.mixed_precision,
            "train": {"count": len(data), "size": data.size, "fingerprint": data.fingerprint()},
            "evaluation": {
                "num_images": evaluation.num_images,
                "size": evaluation.images.size,
                "fingerprint": evaluation.fingerprint,
                "lpips_net": self.config.lpips_net,
                "features": FEATURES_NAME,
                "weights_sha256": protocol.get("weights_sha256"),
                "library versions": protocol.get("library versions"),
                "are_training_images": evaluation.fingerprint == data.fingerprint(),
            },
            "autoencoder": self.config.autoencoder.model_dump(mode="json"),
            "git_commits": sorted({commit for cell in cells if (commit := _commit(cell))}),
        }

    def _result(self, cell: AutoencoderCell) -> Result | None:
        """Return the cell's measurement, where it is of these images and this network."""
        wanted = {
            "num_samples": self.evaluation.num_images,
            "reference_fingerprint": self.evaluation.fingerprint,
            "lpips_net": self.config.lpips_net,
            **RECONSTRUCTED_PLAINLY,
        }
        return measured_as(cell.folder / "evaluation-reconstruction", wanted)


def _all_different(configs: Mapping[str, AutoencoderRunConfig]) -> None:
    """Raise :class:`UsageError` where two variants are the same, and a comparison would be of a cell with itself."""
    names = list(configs)
    for index, name in enumerate(names):
        for other in names[:index]:
            if result_key(configs[name], {}) == result_key(configs[other], {}):
                raise UsageError(f"variants: {other!r} and {name!r} come to the same configuration")


def _commit(cell: AutoencoderCell) -> str | None:
    """Return the commit that the cell was first trained at, where it was trained in a checkout."""
    return read_json(cell.folder / "environment.json").get("git_commit")


def _equal(what: str, by_variant: Mapping[str, int]) -> int:
    """Return the one value of all variants. Raises :class:`UsageError` where they differ."""
    if len(set(by_variant.values())) > 1:
        listed = ", ".join(f"{name} {value}" for name, value in by_variant.items())
        raise UsageError(f"variants: all must be trained on the same number of {what}, and these are not: {listed}")
    return next(iter(by_variant.values()))
