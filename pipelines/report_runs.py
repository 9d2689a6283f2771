"""What a report reads of finished runs, and how a stage-1 and a stage-2 run become one variant."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from ..common.checkpoints import read_json
from ..common.config import parse_yaml
from ..common.errors import UsageError, WavelatentError
from ..stage1_autoencoder.autoencoder import Autoencoder
from .diffusion_run import load_diffusion
from .info import info
from .loading import load_autoencoder
from .sample_folder import MANIFEST
from .sample_images import weights_sha256

STAGES = {"autoencoder": 1, "diffusion": 2}
EVALUATIONS = {1: "evaluation-reconstruction", 2: "evaluation-generation"}


@dataclass(frozen=True)
class Run:
    """A run folder as it is on disk; what is missing is empty, and said where it is shown."""

    path: Path
    stage: int
    config: dict[str, Any]
    inputs: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    curves: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    """What ``evaluate`` saved beside the run, else of samples of it; None where it saved nothing."""
    evaluation_folder: Path
    """Where that is, or would be."""
    sample_folders: tuple[Path, ...] = ()
    """Folders of samples that ``sample`` drew from it: those in the run folder, and those that were given."""

    @classmethod
    def read(cls, path: Path, samples: Sequence[Path] = ()) -> Run:
        """Read a run folder, of which ``samples`` were drawn. Raises :class:`UsageError` where ``path`` is none."""
        inputs = read_json(path / "inputs.json")
        if not (path / "config.yaml").is_file() or inputs.get("kind") not in STAGES:
            raise UsageError(f"{path} is not a run folder: give folders that train-ae or train-diffusion wrote")
        stage = STAGES[inputs["kind"]]
        inside = sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
        folders = tuple({folder.resolve(): folder for folder in [*samples, *inside]}.values())
        measured = [path / EVALUATIONS[stage], *folders]
        results = [(folder, read_json(folder / "metrics.json")) for folder in measured]
        where, evaluation = next(((folder, found) for folder, found in results if found), (measured[0], None))
        return cls(
            path=path,
            stage=stage,
            config=parse_yaml((path / "config.yaml").read_text(encoding="utf-8"), str(path / "config.yaml")),
            inputs=inputs,
            environment=read_json(path / "environment.json"),
            status=read_json(path / "status.json"),
            curves=_read_lines(path / "metrics.jsonl"),
            evaluation=evaluation,
            evaluation_folder=where,
            sample_folders=folders,
        )

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters per part; empty where the configuration is of another version."""
        return self._info.get("parameters", {})

    @cached_property
    def flops(self) -> dict[str, int]:
        """Floating-point operations per image of ``encode`` and ``decode``, or of ``denoise``; empty likewise."""
        return self._info.get("flops", {})

    @cached_property
    def _info(self) -> dict[str, Any]:
        try:
            return info(str(self.path))
        except (WavelatentError, KeyError):
            return {}

    @cached_property
    def best(self) -> dict[str, Any]:
        """The step of the best model that the run kept, and the figure that chose it; empty where it kept none."""
        return read_json(self.path / "best" / "best.json")

    def logged(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and the values of one logged quantity; lines without a finite one are left out."""
        values = [(line["step"], line.get(name)) for line in self.curves]
        return [(step, float(value)) for step, value in values if _is_finite(value)]

    @property
    def unfinished(self) -> str | None:
        """Say how far a run came that is not done, else None."""
        if self.status.get("state") == "done":
            return None
        state, step, of = (self.status.get(key, "unknown") for key in ("state", "step", "of"))
        return f"{state} at step {step} of {of}"


@dataclass
class Variant:
    """A way through both stages, or as much of it as there are runs; ``notes`` say what does not fit together."""

    first: Run | None
    second: Run | None
    name: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """The runs there are, in order of stage."""
        return [run for run in (self.first, self.second) if run is not None]

    def stage(self, number: int) -> Run | None:
        """Return the run of stage 1 or 2."""
        return self.first if number == 1 else self.second

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The stage-1 model, or None where it cannot be loaded."""
        try:
            return None if self.first is None else load_autoencoder(self.first.path)
        except WavelatentError:
            return None


def read_variants(paths: Sequence[Path]) -> list[Variant]:
    """Read runs of either stage and group them; a stage-1 run that only a given stage-2 run names is read too.

    A path may also be a folder of samples: it belongs to the run that it was drawn from, which need not be given.

    Raises :class:`UsageError` where a path is neither, the run of samples is not there, or there are no paths.
    """
    if not paths:
        raise UsageError("a report needs at least one run folder")
    folders: dict[Path, list[Path]] = {}  # run -> samples of it
    for path in map(Path, paths):
        run_path = path if (path / "config.yaml").is_file() else _run_of_samples(path)
        same = next((known for known in folders if known.resolve() == run_path.resolve()), run_path)
        folders.setdefault(same, []).extend([] if run_path is path else [path])
    runs = [Run.read(path, samples) for path, samples in folders.items()]
    firsts = {run.path.resolve(): run for run in runs if run.stage == 1}
    variants, used = [], set()
    for run in runs:
        if run.stage == 2:
            first = _named_first(run, firsts)
            used.add(first.path.resolve() if first else None)
            variants.append(Variant(first, run))
    variants += [Variant(run, None) for path, run in firsts.items() if path not in used]
    order = {run.path.resolve(): number for number, run in enumerate(runs)}
    variants.sort(key=lambda v: min(order.get(run.path.resolve(), len(order)) for run in v.runs))
    for variant, name in zip(variants, _names(variants), strict=True):
        variant.name = name
        variant.notes += _doubts(variant)
    return variants


def by_run(variants: Sequence[Variant], stage: int) -> dict[str, Variant]:
    """Return one variant for every run of one stage, by the names of all that share the run; others are left out."""
    sharing: dict[Path, list[Variant]] = {}
    for variant in variants:
        if (run := variant.stage(stage)) is not None:
            sharing.setdefault(run.path.resolve(), []).append(variant)
    return {joined([variant.name for variant in group]): group[0] for group in sharing.values()}


def joined(names: Sequence[str]) -> str:
    """Return the names of variants that share something, as a heading."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _run_of_samples(path: Path) -> Path:
    """Return the run that a folder of samples records; a path that is no such folder is returned as it is."""
    recorded = read_json(path / MANIFEST).get("run")
    if recorded is None:
        return path
    if not (Path(recorded) / "config.yaml").is_file():
        raise UsageError(f"{path} holds samples of {recorded}, which is not there: give the run folder alone")
    return Path(recorded)


def _named_first(run: Run, firsts: dict[Path, Run]) -> Run | None:
    """Return the stage-1 run that ``run`` records, from the given ones or from where it says it is."""
    recorded = Path(run.inputs["autoencoder"]["path"])
    for path in (recorded, recorded.parent):  # AE may name the run or its model folder
        if (found := firsts.get(path.resolve())) is not None:
            return found
        if (path / "inputs.json").is_file() and (path / "config.yaml").is_file():
            return firsts.setdefault(path.resolve(), Run.read(path))
    by_fingerprint = {ae.fingerprint(): first for first in firsts.values() if (ae := Variant(first, None).autoencoder)}
    return by_fingerprint.get(run.inputs["autoencoder"]["fingerprint"])  # one that has moved


def _doubts(variant: Variant) -> list[str]:
    """Say what a reader must know about the state of the runs."""
    notes = [f"{run.path} is {run.unfinished}" for run in variant.runs if run.unfinished]
    for run in variant.runs:
        others = [folder for folder in run.sample_folders if folder != run.evaluation_folder]
        if measured := ", ".join(folder.name for folder in others if (folder / "metrics.json").is_file()):
            notes.append(f"the metrics of {run.path} are those in {run.evaluation_folder.name}; not shown: {measured}")
    notes += [
        f"the metrics of {run.path} are not of the weights that it has now; run evaluate again"
        for run in variant.runs
        if _has_changed(variant, run)
    ]
    if variant.second is None:
        return notes
    if variant.first is None:
        path = variant.second.inputs["autoencoder"]["path"]
        return [*notes, f"the stage-1 run of {variant.second.path} is not there (recorded: {path})"]
    autoencoder = variant.autoencoder
    if autoencoder and autoencoder.fingerprint() != variant.second.inputs["autoencoder"]["fingerprint"]:
        notes.append(f"{variant.first.path} has been trained further since {variant.second.path} used its latents")
    return notes


def _has_changed(variant: Variant, run: Run) -> bool:
    """Return whether a run's metrics are of other weights than it has now; False where that cannot be told."""
    protocol = (run.evaluation or {}).get("protocol", {})
    if run.stage == 1:
        measured, autoencoder = protocol.get("autoencoder", {}).get("fingerprint"), variant.autoencoder
        return None not in (measured, autoencoder) and autoencoder.fingerprint() != measured  # type: ignore[union-attr]
    ema = run.config.get("train", {}).get("ema")
    widths = ema.get("widths", []) if isinstance(ema, dict) else []
    in_model_folder = protocol.get("ema") in widths[:1] and protocol.get("ema_step") is None
    if "model_sha256" not in protocol or not in_model_folder:
        return False
    try:
        return weights_sha256(load_diffusion(run.path)) != protocol["model_sha256"]
    except WavelatentError:
        return False


def _names(variants: Sequence[Variant]) -> list[str]:
    """Return the shortest names that tell the variants apart: one folder of their paths, or as many as it takes."""
    candidates: list[Callable[[Path], str]] = [lambda p, n=n: p.parts[-n] for n in (1, 2, 3)]  # type: ignore[misc]
    candidates += [lambda p, n=n: "/".join(p.parts[-n:]) for n in (2, 3)]  # type: ignore[misc]
    for runs in ([v.runs[0] for v in variants], [v.runs[-1] for v in variants]):
        paths = [run.path.resolve() for run in runs]
        for name in candidates:
            names = [name(path) if len(path.parts) > 3 else str(path) for path in paths]
            if len(set(names)) == len(names):
                return names
    return [" + ".join(str(run.path) for run in variant.runs) for variant in variants]


def _is_finite(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # cut short by a crash
                continue
    except OSError:
        return []
    return lines
