"""What a report reads of finished runs, and how a stage-1 and a stage-2 run become one variant."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.config import parse_yaml
from ..common.errors import UsageError, WavelatentError
from ..stage1_autoencoder.autoencoder import Autoencoder
from .info import info
from .loading import load_autoencoder

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
    """What ``evaluate`` saved beside the run, or None."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run folder. Raises :class:`UsageError` where ``path`` is none."""
        inputs = read_json(path / "inputs.json")
        if not (path / "config.yaml").is_file() or inputs.get("kind") not in STAGES:
            raise UsageError(f"{path} is not a run folder: give folders that train-ae or train-diffusion wrote")
        stage = STAGES[inputs["kind"]]
        return cls(
            path=path,
            stage=stage,
            config=parse_yaml((path / "config.yaml").read_text(encoding="utf-8"), str(path / "config.yaml")),
            inputs=inputs,
            environment=read_json(path / "environment.json"),
            status=read_json(path / "status.json"),
            curves=_read_lines(path / "metrics.jsonl"),
            evaluation=read_json(path / EVALUATIONS[stage] / "metrics.json") or None,
        )

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters per part; empty where the configuration is of another version."""
        try:
            return info(str(self.path))["parameters"]
        except (WavelatentError, KeyError):
            return {}

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

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The stage-1 model, or None where it cannot be loaded."""
        try:
            return None if self.first is None else load_autoencoder(self.first.path)
        except WavelatentError:
            return None


def read_variants(paths: Sequence[Path]) -> list[Variant]:
    """Read runs of either stage and group them; a stage-1 run that only a given stage-2 run names is read too.

    Raises :class:`UsageError` where a path is not a run folder, or there are none.
    """
    if not paths:
        raise UsageError("a report needs at least one run folder")
    runs = [Run.read(path) for path in dict.fromkeys(Path(path) for path in paths)]
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
    if variant.second is None:
        return notes
    if variant.first is None:
        path = variant.second.inputs["autoencoder"]["path"]
        return [*notes, f"the stage-1 run of {variant.second.path} is not there (recorded: {path})"]
    autoencoder = variant.autoencoder
    if autoencoder and autoencoder.fingerprint() != variant.second.inputs["autoencoder"]["fingerprint"]:
        notes.append(f"{variant.first.path} has been trained further since {variant.second.path} used its latents")
    return notes


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


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
