"""``study``: variants times seeds through both stages under one protocol, then the comparison report.

::

    OUT/config.yaml                        the resolved configuration; config.1.yaml, ... those before that differ
    OUT/first-start-TIME.json              when the first of them was written; several where shards were copied together
    OUT/first-data.json                    fingerprints of the images of the first start
    OUT/data/train, validation             the images at data.size, where the configuration asks for one
    OUT/autoencoders, latents, diffusions  the cells, see :mod:`.study_cells`
    OUT/results.json                       configuration, a record per cell, analysis, and what all cells share
    OUT/report.html, OUT/summary.md        the same to read

Everything goes on by the same command, and what is finished is left alone. Processes that are given the same ``--out``
share the cells by locks; ``accelerate launch`` or ``torchrun`` puts several processes to work on one cell at a time. On
machines without a file system in common give each a ``--shard``, then copy the folders together (names never clash, as
each is named by what is computed in it) and run the command once more with ``--report-only``. All cells of an
autoencoder are in one shard. Copy what is finished: a latent cache knows its autoencoder by an absolute path, so that a
cell goes on only where it was begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..common.checkpoints import read_json, write_json
from ..common.config import dump_yaml, parse_yaml
from ..common.distributed_features import by_main
from ..common.errors import Diverged, UsageError, WavelatentError
from ..common.files import write_atomically
from ..common.lpips_metric import MIN_SIZE as LPIPS_MIN_SIZE
from ..common.metric_weights import MissingWeightsError, load_weights
from ..common.runtime import RuntimeOptions, StopRequest, accelerated, utc_now
from .cells import Cell, claim, take_shard
from .study_cells import FINAL_STATES, StudyCell, Task, Workbench, cells_of_shard, make_study_cells, tasks_of
from .study_config import StudyConfig
from .study_data import StudyData, open_study_data, prepare_study_data
from .study_design import Variant, make_variants
from .study_effects import claimed_effects
from .study_networks import Networks, networks_of
from .study_results import public_config, record_of, setting_of, state_of

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

RESULTS, SUMMARY, PAGE, CONFIG = "results.json", "summary.md", "report.html", "config.yaml"
FIRST_START, FIRST_DATA = "first-start-{}.json", "first-data.json"
FORMAT = 1
"""Of ``results.json``; rises when a reader of it would have to change."""


def study(
    config: StudyConfig,
    *,
    out: Path,
    options: RuntimeOptions | None = None,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    dry_run: bool = False,
    report_only: bool = False,
    photographs: bool = True,
) -> dict[str, Any]:
    """Train and measure every cell that is not there yet; once all are, analyse them and write the report.

    A cell whose loss, gradient or latents are not finite is reported as failed, and the others go on. Everything is
    measured in float32, whatever the training's precision.

    Args:
        config: the study; ``data.train`` must be set.
        out: its folder.
        options: device, precision of the training, and ``max_minutes`` for all of it. ``overwrite`` is not looked at:
            a cell is named by what is computed in it, so none is ever in the way of another.
        shard: ``(i, n)``: work on the cells of every ``n``-th autoencoder from the ``i``-th on only.
        batch_size: images per pass, of everything but training and sampling.
        dry_run: only list the cells of the shard with the time and the disk that they will take; nothing is written.
        report_only: train nothing; analyse and report what is finished.
        photographs: show reconstructions beside the images themselves in the report; a page that is to be published
            may have to do without.

    Returns:
        ``{"study", "cells": [{"variant", "seed", "state", "autoencoder", "diffusion"}], "complete": bool}``, where
        ``state`` is ``new``, ``started``, ``trained``, ``finished`` or ``failed``. After a dry run also ``config``,
        resolved, ``estimate`` and ``power``, what the study can find, and of each cell ``shares_with``, the variants
        with the same autoencoder; where there are results also their paths ``results``, ``summary`` and ``report``, and
        ``claims``, the verdict by name.

    Raises:
        UsageError: the configuration is at fault, there is no data, or the data cannot serve.
        MissingWeightsError: the weights of Inception are not to be had; before anything is trained.
        WavelatentError: nothing is finished that could be reported.
        Stopped: by ``max_minutes``, SIGTERM or SIGINT; the same command goes on from there.
    """
    options = options or RuntimeOptions()
    variants = make_variants(config)
    take_shard(variants, shard)  # raises where there is no such shard
    if dry_run and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--dry-run: start it without accelerate launch; it trains nothing")
    # Everything that does not fit together is refused here, before the first file is written.
    plan = Plan.make(config, variants, out, open_study_data(config, out, prepared=False), options, batch_size)
    if dry_run:
        return _dry_run(plan, shard)
    with StopRequest(options.max_minutes) as stop, _together(options) as team:
        if not report_only:
            team.decide(lambda: _begin(plan, stop))
            plan = plan.over_prepared_data(options, batch_size)
            team.decide(lambda: _keep_fingerprints(plan))
            _work(plan, tasks_of(cells_of_shard(plan.cells, shard)), team, stop)
        return team.decide(lambda: _finish(plan, report_only, photographs))


@dataclass(frozen=True)
class Plan:
    """A study over given data: its cells, how they are worked on, and their networks by variant."""

    config: StudyConfig
    variants: Sequence[Variant]
    out: Path
    cells: list[StudyCell]
    bench: Workbench
    networks: Mapping[str, Networks]
    mixed_precision: str

    @classmethod
    def make(
        cls,
        config: StudyConfig,
        variants: Sequence[Variant],
        out: Path,
        data: StudyData,
        options: RuntimeOptions,
        batch_size: int,
    ) -> Plan:
        """Plan a study. Errors are those of :class:`Workbench` and :func:`networks_of`."""
        bench = Workbench(config, data, options, batch_size)
        networks = {v.name: networks_of(v, data.train.size, data.train.num_classes) for v in variants}
        cells = make_study_cells(config, variants, out, data, options.mixed_precision)
        return cls(config, variants, out, cells, bench, networks, options.mixed_precision)

    def over_prepared_data(self, options: RuntimeOptions, batch_size: int) -> Plan:
        """Return the plan with the data itself, where something stood for it until it was prepared."""
        if self.bench.data.is_prepared:
            return self
        data = open_study_data(self.config, self.out)
        bench = Workbench(self.config, data, options, batch_size)
        cells = make_study_cells(self.config, self.variants, self.out, data, options.mixed_precision)
        return replace(self, bench=bench, cells=cells)

    def listed(self, cells: Sequence[StudyCell] | None = None) -> list[dict[str, Any]]:
        """Return the cells, or ``cells``, with how far they are."""
        return [
            {
                "variant": cell.variant.name,
                "seed": cell.seed,
                "state": state_of(cell, self.bench),
                **{
                    task.stage: task.folder.relative_to(self.out).as_posix()
                    for task in (cell.autoencoder, cell.diffusion)
                },
            }
            for cell in (self.cells if cells is None else cells)
        ]


class Team:
    """The processes that work on one cell together: the main one decides, and all follow."""

    def __init__(self, options: RuntimeOptions, accelerator: Accelerator) -> None:
        self._options = options
        self._is_alone, self._is_main = accelerator.num_processes == 1, accelerator.is_main_process

    def decide(self, work: Callable[[], T]) -> T:
        """Return in every process what ``work`` returns in the main one, which alone does it, however long it takes."""
        if self._is_alone:
            return work()
        with accelerated(self._options) as accelerator:
            return by_main(accelerator, work)

    def say(self, text: str) -> None:
        """Print a line on stderr, once."""
        if self._is_main:
            print(text, file=sys.stderr)


@contextlib.contextmanager
def _together(options: RuntimeOptions) -> Iterator[Team]:
    """Give the block its :class:`Team`, whose process group stays up between the parts of the work."""
    options = RuntimeOptions(device=options.device)
    with accelerated(options) as accelerator:
        yield Team(options, accelerator)


def _begin(plan: Plan, stop: StopRequest) -> None:
    """Do what comes before all cells: keep the configuration, prepare the data, find the metric weights."""
    config, out = plan.config, plan.out
    out.mkdir(parents=True, exist_ok=True)
    for _ in claim([Cell("data", 0, config, out / "data")], stop):
        _keep_config(config, out)
        prepare_study_data(config, out)
    load_weights("inception")  # without them nothing decides a claim: better known now than after the training
    if plan.bench.data.train.size >= LPIPS_MIN_SIZE:
        _find_lpips(config)


def _find_lpips(config: StudyConfig) -> None:
    """Fetch the weights of LPIPS. Where they are not to be had, only a claim that rests on them ends the study."""
    try:
        load_weights(config.evaluation.lpips_net)
    except MissingWeightsError as error:
        if any(metric == "lpips" for _, metric in claimed_effects(config)):
            raise
        print(f"no cell that is measured now will have LPIPS: {error}", file=sys.stderr)


def _keep_fingerprints(plan: Plan) -> None:
    """Write which images the study was begun with, once: a change of them must stay known, and a path says little."""
    file = plan.out / FIRST_DATA
    if not file.is_file():
        write_json(file, _fingerprints(plan))


def _fingerprints(plan: Plan) -> dict[str, str]:
    data = plan.bench.data
    return {"train": data.train.fingerprint(), "validation": data.validation.fingerprint()}


def _keep_config(config: StudyConfig, out: Path) -> None:
    """Write ``config.yaml``. One that differs is kept, numbered: what is decided beforehand must stay known."""
    file, text = out / CONFIG, dump_yaml(config)
    if not _first_starts(out):
        now = utc_now()
        write_json(out / FIRST_START.format(now.replace(":", "")), {"started": now})
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    if file.is_file():
        file.rename(out / f"config.{len(_earlier(out)) + 1}.yaml")
    write_atomically(file, text)


def _earlier(out: Path) -> list[Path]:
    """Return the configurations of earlier starts, the first first."""
    return sorted(out.glob("config.[0-9]*.yaml"), key=lambda path: int(path.suffixes[0][1:]))


def _changed_since(plan: Plan) -> list[str]:
    """Return which sections of the configuration are not as at the first start; of the data its images count."""
    now, found = plan.config.model_dump(mode="json"), []
    if earlier := _earlier(plan.out):
        first = parse_yaml(earlier[0].read_text(encoding="utf-8"), str(earlier[0]))
        found = [name for name in now if name != "data" and first.get(name) != now[name]]
    images = read_json(plan.out / FIRST_DATA)
    return ["data", *found] if images and images != _fingerprints(plan) else found


def _first_starts(out: Path) -> list[str]:
    """Return when a first configuration was written, on each machine whose folder was copied here."""
    return sorted(read_json(file)["started"] for file in out.glob(FIRST_START.format("*")))


def _begun_before(out: Path, plan: Plan) -> list[str]:
    """Return the folders whose training began before the first configuration lay in ``out``: they came from elsewhere.

    Of such nothing says that claims and rule were fixed beforehand.
    """
    first = _first_starts(out)[0]
    folders = {task.folder for cell in plan.cells for task in (cell.autoencoder, cell.diffusion)}
    begun = {folder: read_json(folder / "environment.json").get("started", first) for folder in folders}
    return sorted(folder.relative_to(out).as_posix() for folder, when in begun.items() if when < first)


def _work(plan: Plan, tasks: Sequence[Task], team: Team, stop: StopRequest) -> None:
    """Do all tasks; the main process holds the lock of the one that is worked on."""
    numbers = {task.folder: number for number, task in enumerate(tasks, start=1)}
    with contextlib.closing(claim(tasks, stop, plan.bench.needs)) as claimed:

        def take() -> tuple[int, list[str]] | None:
            task = next(claimed, None)
            return None if task is None else (numbers[task.folder], plan.bench.unfinished(task))

        while (taken := team.decide(take)) is not None:
            number, steps = taken
            task = tasks[number - 1]
            _do(task, steps, f"[{number}/{len(tasks)}] {task.stage} of {task}", plan.bench, team)


def _do(task: Task, names: Sequence[str], label: str, bench: Workbench, team: Team) -> None:
    """Do the steps of a task that are named; one that fails for good is noted, and the others are left."""
    if not names:
        return team.say(f"{label}: {bench.failure(task) or 'there already'}")
    for step in bench.steps(task):
        if step.name not in names:
            continue
        team.say(f"{label}: {step.name}")
        try:
            team.decide(partial(_without_result, step.do)) if step.by_main else step.do()
        except Diverged as error:  # anything else, such as a full disk, would meet every other task too
            team.say(f"{label}: failed: {error}")
            team.decide(partial(bench.fail, task, step.name, error))
            return None
    return None


def _without_result(do: Callable[[], object]) -> None:
    """Call ``do``, whose result the other processes have no need of."""
    do()


def _finish(plan: Plan, report_only: bool, photographs: bool) -> dict[str, Any]:
    """Write the results where all cells are there, or those that are where that was asked for."""
    result = _summary(plan, plan.listed())
    if not (result["complete"] or report_only):
        return result
    return {**result, **write_results(plan, again=report_only, photographs=photographs)}


def _summary(plan: Plan, listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    complete = all(cell["state"] in FINAL_STATES for cell in listed)
    return {"study": str(plan.out), "cells": listed, "complete": complete}


def write_results(plan: Plan, *, again: bool, photographs: bool = True) -> dict[str, Any]:
    """Analyse the cells that are there, write results, summary and report, and return their paths and the verdicts.

    Where the results are there already and the same, nothing is written, unless ``again``.
    """
    from .study_analysis import analyse
    from .study_report import write_report

    config, variants, out = plan.config, plan.variants, plan.out
    found = (record_of(cell, plan.bench, out, plan.networks[cell.variant.name]) for cell in plan.cells)
    records = [record for record in found if record is not None]
    if not any(record.failed is None for record in records):
        raise WavelatentError(
            f"{out}: no cell is finished that has this configuration, these images and --mixed-precision "
            f"{plan.mixed_precision}, so that there is nothing to report"
        )
    _keep_config(config, out)  # a report of what is there may come by another one than the cells
    analysis = analyse(config, variants, records)
    setting = setting_of(plan.cells, records, plan.bench, plan.networks, plan.mixed_precision)
    setting["changed_since_the_first_start"] = _changed_since(plan)
    setting["begun_before_the_first_start"] = _begun_before(out, plan)
    setting["photographs"] = photographs
    content = {
        "format": FORMAT,
        "config": public_config(config),
        "variants": [{"name": variant.name, "levels": variant.levels} for variant in variants],
        "cells": [record.as_dict() for record in records],
        "analysis": analysis.as_dict(),
        "setting": setting,
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    paths = {"results": str(out / RESULTS), "summary": str(out / SUMMARY), "report": str(out / PAGE)}
    whole = all(Path(path).is_file() for path in paths.values())
    if again or not whole or (out / RESULTS).read_text(encoding="utf-8") != text:
        device = plan.bench.options.device
        write_report(out, config, variants, records, analysis, setting, photographs=photographs, device=device)
        write_atomically(out / RESULTS, text)
    return {**paths, "claims": {claim.name: claim.verdict for claim in analysis.claims}}


def _dry_run(plan: Plan, shard: tuple[int, int]) -> dict[str, Any]:
    from .study_analysis import power_in_words
    from .study_estimate import estimate

    if not plan.bench.data.is_prepared and (plan.out / "autoencoders").is_dir():
        what = "the images are not prepared in it yet, and cells are named by them: finished ones are listed as new"
        print(f"{plan.out}: {what} until the study has been started here", file=sys.stderr)
    mine = cells_of_shard(plan.cells, shard)
    cells = plan.listed(mine)
    listed = [{**cell, "shares_with": _sharing(cell, cells)} for cell in cells]
    return {
        **_summary(plan, listed),
        "config": public_config(plan.config),
        "estimate": estimate(tasks_of(mine), plan.bench, plan.networks).as_dict(),
        "power": power_in_words(plan.config, plan.variants),
    }


def _sharing(cell: Mapping[str, Any], listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the other variants that have the cell's autoencoder."""
    same = [other["variant"] for other in listed if other["autoencoder"] == cell["autoencoder"]]
    return [variant for variant in same if variant != cell["variant"]]


def describe(result: Mapping[str, Any]) -> str:
    """Return what :func:`study` returned as text."""
    cells = result["cells"]
    if "results" in result:
        verdicts = [f"{verdict:13} {name}" for name, verdict in result["claims"].items()]
        failed = [f"failed: {c['variant']}, seed {c['seed']}" for c in cells if c["state"] == "failed"]
        left = sum(cell["state"] not in FINAL_STATES for cell in cells)
        partial = [f"{left} of {len(cells)} cells are not in it yet"] if left else []
        return "\n".join([*verdicts, *failed, *partial, f"the report is {result['report']}"])
    lines = [
        f"{c['state']:8}  {c['variant']}, seed {c['seed']}: {c['autoencoder']}, {c['diffusion']}"
        + (f" (autoencoder shared with {', '.join(c['shares_with'])})" if c.get("shares_with") else "")
        for c in cells
    ]
    left = sum(cell["state"] not in FINAL_STATES for cell in cells)
    lines.append(f"{left} of {len(cells)} cells are still to be trained or measured")
    if "estimate" in result:
        from .study_estimate import describe as describe_estimate

        lines += [describe_estimate(result["estimate"]), result["power"]]
    return "\n".join(lines)
