"""Cells: the variants of one configuration times seeds, each in a folder that is named by what is computed in it.

Comparisons that share a root share the cells they have in common, whatever each of them calls the variant, and a cell
that is finished is not computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from ..common import claims
from ..common.checkpoints import read_json
from ..common.config import merge, validate
from ..common.errors import Diverged, Stopped, UsageError
from ..common.files import write_atomically
from ..common.run_folder import MAY_CHANGE
from ..common.runtime import StopRequest

C = TypeVar("C", bound=BaseModel)

NOT_IN_RESULT = MAY_CHANGE - {"train.steps"}
"""Settings that change when and what a run shows, and nothing that it computes: they do not name a cell."""
FAILURE = "failure.json"
"""In a cell's folder: what could not be finished, and why."""


@dataclass(frozen=True)
class Cell(Generic[C]):
    """One variant at one seed: its resolved configuration, seed included, and its folder."""

    variant: str
    seed: int
    config: C
    folder: Path

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed} ({self.folder.name})"


K = TypeVar("K", bound=Cell[Any])
T = TypeVar("T")


def fail(folder: Path, step: str, stage: str, error: Diverged) -> None:
    """Note in a cell's ``folder`` that its work cannot be finished, because ``step`` ended in ``error``."""
    what = " ".join(str(error).split()).partition(": ")[0].replace(str(folder), folder.name)
    record = {"step": step, "error": f"{stage}, {step}: {what}"}
    write_atomically(folder / FAILURE, json.dumps(record, indent=2) + "\n")


def failure(folder: Path) -> str | None:
    """Return what :func:`fail` noted in ``folder``; None where nothing failed."""
    return read_json(folder / FAILURE).get("error")


def variant_configs(base: C, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, C]:
    """Return each variant's configuration: ``base`` with the variant's changes over it.

    Changes are nested mappings, or dotted keys (``train.steps: 5``), merged as a configuration file over its base.
    Raises :class:`UsageError` naming the variant and the key.
    """
    plain = base.model_dump(mode="json")
    return {
        name: validate(type(base), merge(plain, nested(changes)), f"variants.{name}")
        for name, changes in variants.items()
    }


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``changes`` with dotted keys (``train.steps: 5``) as nested mappings (``train: {steps: 5}``)."""
    result: dict[str, Any] = {}
    for dotted, value in changes.items():
        for key in reversed(dotted.split(".")):
            value = {key: value}
        result = merge(result, value)
    return result


def make_cells(configs: Mapping[str, C], seeds: Sequence[int], root: Path, context: Mapping[str, Any]) -> list[Cell[C]]:
    """Return a cell per seed and variant, all variants of the first seed first.

    Args:
        configs: a configuration per variant; its ``seed`` is replaced by the cell's.
        seeds: the seeds.
        root: cells are folders ``<hash>-seed<seed>`` in it.
        context: what else decides the result (fingerprints of the data, the precision), as JSON values.
    """
    return [
        Cell(name, seed, config.model_copy(update={"seed": seed}), root / f"{result_key(config, context)}-seed{seed}")
        for seed in seeds
        for name, config in configs.items()
    ]


def result_key(config: BaseModel, context: Mapping[str, Any]) -> str:
    """Return the hash of everything that decides a cell's result but its seed."""
    content = config.model_dump(mode="json")
    for dotted in ("seed", *NOT_IN_RESULT):
        *sections, last = dotted.split(".")
        section = content
        for name in sections:
            section = section.get(name, {})
        section.pop(last, None)
    text = json.dumps({"config": content, "context": dict(context)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def take_shard(cells: Sequence[T], shard: tuple[int, int]) -> list[T]:
    """Return every ``n``-th cell from the ``i``-th on, for ``shard = (i, n)`` with ``0 <= i < n``."""
    index, count = shard
    if not 0 <= index < count:
        raise UsageError(
            f"--shard {index}/{count}: the first of {count} shards is 0/{count}, the last {count - 1}/{count}"
        )
    return list(cells[index::count])


def work_through(cells: Iterable[K], work: Callable[[K], None], stop: StopRequest) -> None:
    """Call ``work`` on every cell while holding the cell's lock; order and errors are those of :func:`claim`."""
    for cell in claim(cells, stop):
        work(cell)


def claim(
    cells: Iterable[K], stop: StopRequest, needs: Callable[[K], Sequence[K]] = lambda cell: ()
) -> Generator[K, None, None]:
    """Yield every cell once, by :func:`..common.claims.claim`: processes with the same root share the work.

    Raises :class:`Stopped` when ``stop`` asks for it, between cells or while waiting.
    """
    return claims.claim(cells, _lock_of, lambda: _check(stop), needs)


def _lock_of(cell: Cell[Any]) -> Path:
    return cell.folder.with_name(f".{cell.folder.name}.lock")


def _check(stop: StopRequest) -> None:
    if stop.reason:
        raise Stopped(f"stopped by {stop.reason}; finished cells are kept: run the same command again")
