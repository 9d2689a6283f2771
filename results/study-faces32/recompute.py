"""Work the deciding intervals out again, from the kept measurements and by least squares, without the package.

    python recompute.py

Prints a table of the comparisons: the interval as ``results.json`` has it, which ``again`` has to equal, and the one
that follows if a seed's variants that share an autoencoder are not taken for independent: from the residuals of the
first variant of each autoencoder alone. Comparisons of two variants that share theirs have no such interval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

HERE = Path(__file__).resolve().parent
FILES = {
    "kid_mean": ("diffusion", "generation"),
    "fid": ("diffusion", "generation"),
    "rfid": ("autoencoder", "reconstruction"),
}
"""By metric, whose measurement it is and which."""
LABELS = {"kid_mean": "KID", "rfid": "rFID"}


class Interval(NamedTuple):
    """Bounds of a ratio."""

    low: float
    high: float


class Comparison(NamedTuple):
    """A deciding comparison: its metric and pairs of variants, and its intervals."""

    label: str
    stored: Interval
    again: Interval
    by_autoencoder: Interval | None


def comparisons() -> list[Comparison]:
    """Return all of them, in the order of the claims."""
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    parts = [part for claim in results["analysis"]["claims"] for part in claim["parts"]]
    level = results["config"]["rule"]["level"] / len(parts)
    of = {cell["variant"]: Path(cell["folders"]["autoencoder"]).name.partition("-")[0] for cell in results["cells"]}
    first = [name for name in of if next(other for other in of if of[other] == of[name]) == name]
    found = []
    for effect in (part["effect"] for part in parts):
        metric, pairs = effect["metric"], effect["contexts"]
        logarithms = {name: logarithms_of(results["cells"], name, metric) for name in of}
        shared = any(of[one] == of[other] for one, other in pairs)
        apart = None if shared else interval(logarithms, first, pairs, level)
        again = interval(logarithms, list(of) if metric == "kid_mean" else first, pairs, level)
        label = f"{LABELS[metric]}, {' and '.join(' / '.join(pair) for pair in pairs)}"
        found.append(Comparison(label, Interval(*effect["simultaneous"]), again, apart))
    return found


def logarithms_of(cells: Sequence[dict[str, Any]], variant: str, metric: str) -> npt.NDArray[np.float64]:
    """Return the logarithms of a variant's metric, by seed, from its kept measurements."""
    stage, kind = FILES[metric]
    paths = [
        HERE / "cells" / cell["folders"][stage] / f"evaluation-{kind}" / "metrics.json"
        for cell in sorted(cells, key=lambda cell: int(cell["seed"]))
        if cell["variant"] == variant
    ]
    return np.log([json.loads(path.read_text(encoding="utf-8"))["metrics"][metric] for path in paths])


def interval(
    logarithms: dict[str, npt.NDArray[np.float64]], variants: Sequence[str], pairs: list[list[str]], level: float
) -> Interval:
    """Fit variant plus seed by least squares and return the mean difference's interval at ``1 - level``."""
    values = np.concatenate([logarithms[name] for name in variants])
    count, seeds = len(variants), len(values) // len(variants)
    design = np.hstack([np.kron(np.eye(count), np.ones((seeds, 1))), np.tile(np.eye(seeds)[:, 1:], (count, 1))])
    coefficients, squares, rank, _ = np.linalg.lstsq(design, values)
    contrast = np.zeros(design.shape[1])
    for one, other in pairs:
        contrast[variants.index(one)] += 1 / len(pairs)
        contrast[variants.index(other)] -= 1 / len(pairs)
    degrees = len(values) - rank
    error = np.sqrt(squares[0] / degrees * contrast @ np.linalg.inv(design.T @ design) @ contrast)
    half = stats.t.ppf(1 - level / 2, degrees) * error
    return Interval(*(float(np.exp(contrast @ coefficients + sign * half)) for sign in (-1, 1)))


def table(rows: Sequence[Comparison]) -> str:
    """Return the Markdown table."""
    lines = ["| comparison | interval of the rule | from the eight autoencoders' first variants |", "|---|---|---|"]
    lines += [f"| {row.label} | {text_of(row.stored)} | {text_of(row.by_autoencoder)} |" for row in rows]
    return "\n".join(lines)


def text_of(bounds: Interval | None) -> str:
    """Return an interval as a table shows it."""
    return "share their autoencoder" if bounds is None else f"[{bounds.low:.3f}, {bounds.high:.3f}]"


if __name__ == "__main__":
    found = comparisons()
    for row in found:
        if not np.allclose(row.stored, row.again, rtol=1e-9):
            raise SystemExit(f"{row.label}: {row.again} here, {row.stored} in results.json")
    print(table(found))
