"""Gather what `run.sh` measured into results.json and tables.md. Usage: make_tables.py OUT (of run.sh)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
LABELS = {
    "a": "the other half",
    "jpeg75": "JPEG, quality 75",
    "jpeg50": "JPEG, quality 50",
    "blur1": "blurred, sigma 1 px",
    "blur2": "blurred, sigma 2 px",
    "lanczos": "to half the size and back, Lanczos",
    "box": "to half the size and back, box and nearest",
}
THEIR_NAMES = {
    "frechet_inception_distance": "fid",
    "kernel_inception_distance_mean": "kid_mean",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}
LEFT_OUT = {"reference", "samples"}
"""Parts of a protocol that hold paths."""
GOALS = [
    ("first time", "ours, first time", "theirs, first time", "at least 1"),
    ("reference cached by both", "ours, reference cached", "theirs, reference cached", "at least 2"),
    ("reference cached by ours, their first time", "ours, reference cached", "theirs, first time", ""),
    (
        "reference cached by both, intervals by ours alone",
        "ours, reference cached, with intervals",
        "theirs, reference cached",
        "",
    ),
]
"""What is compared: in words, whose figures, and the goal for the ratio of the times."""


@dataclass(frozen=True)
class Pair:
    """One comparison: samples and reference, by their folders' names, N, and what both commands gave."""

    samples: str
    reference: str
    num: int
    ours: dict[str, Any]
    theirs: dict[str, float]

    @property
    def label(self) -> str:
        """What a table calls it."""
        return f"{LABELS[self.samples]} | {self.reference.upper()} | {self.num:,}"

    def of(self, name: str) -> tuple[float, float]:
        """Return a figure of ours and of theirs."""
        return self.ours["metrics"][name], self.theirs[name]


def main(out: Path) -> None:
    """Write the two files."""
    order = list(LABELS)
    pairs = sorted(read_pairs(out), key=lambda pair: (-pair.num, pair.reference != "b", order.index(pair.samples)))
    costs = [json.loads(path.read_text()) for path in sorted(out.glob("cost-*/cost.json"))]
    result = {"comparisons": [vars(pair) for pair in pairs], "costs": costs}
    text = json.dumps(result, indent=1) + "\n"
    if str(out.resolve()) in text:
        raise SystemExit("a path of this machine is left in the results: add its name to LEFT_OUT")
    (HERE / "results.json").write_text(text)
    tables = [agreement_table(pairs), interval_table(pairs), *(cost_tables(cost) for cost in costs)]
    (HERE / "tables.md").write_text("\n\n".join(tables) + "\n")


def read_pairs(out: Path) -> Iterable[Pair]:
    """Yield the comparisons that both commands have finished, without the paths of the machine."""
    for path in sorted((out / "ours").glob("*.json")):
        theirs = out / "theirs" / path.name
        if not theirs.is_file():
            continue
        samples, reference, num = path.stem.split("-")
        content = json.loads(path.read_text())
        protocol = {name: value for name, value in content["protocol"].items() if name not in LEFT_OUT}
        content = {"metrics": content["metrics"], "protocol": protocol, "seconds": content["seconds"]}
        figures = {ours: json.loads(theirs.read_text())[name] for name, ours in THEIR_NAMES.items()}
        yield Pair(samples, reference, int(num), content, figures)


def agreement_table(pairs: Sequence[Pair]) -> str:
    """Return a row per comparison: ours, theirs, and the difference of each figure."""
    head = ["images", "against", "N", "FID", "theirs", "relative difference", "KID x 1000", "theirs"]
    head += ["difference, standard errors", "precision", "theirs", "recall", "theirs"]
    rows = []
    for pair in pairs:
        fid, their_fid = pair.of("fid")
        kid, their_kid = pair.of("kid_mean")
        cells = [pair.label, f"{fid:.4f}", f"{their_fid:.4f}", f"{(fid - their_fid) / their_fid:+.1e}"]
        cells += [f"{1000 * kid:.4f}", f"{1000 * their_kid:.4f}", f"{kid_difference(pair):+.1f}"]
        cells += [f"{value:.4f}" for name in ("precision", "recall") for value in pair.of(name)]
        rows.append(cells)
    return table(head, rows)


def kid_difference(pair: Pair) -> float:
    """Return by how many standard errors the two means over subsets differ: other subsets are all that differs."""
    first, second = pair.of("kid_std")
    error = math.sqrt((first**2 + second**2) / pair.ours["protocol"]["kid"]["subsets"])
    return (pair.ours["metrics"]["kid_mean"] - pair.theirs["kid_mean"]) / error


def interval_table(pairs: Sequence[Pair]) -> str:
    """Return what ours says beyond that: intervals, FID for infinitely many samples, density and coverage."""
    head = ["images", "against", "N", "FID", "95 % interval", "without the bias of few samples", "95 % interval"]
    head += ["KID x 1000", "95 % interval", "density", "coverage"]
    rows = []
    for pair in pairs:
        found, cells = pair.ours["metrics"], [pair.label]
        for name, factor in (("fid", 1), ("fid_extrapolated", 1), ("kid_mean", 1000)):
            interval = [factor * bound for bound in found.get(f"{name}_interval", [])]
            cells += [f"{factor * found[name]:.2f}" if name in found else "", spread(interval, "{:.2f}")]
        rows.append([*cells, *(f"{found[name]:.3f}" for name in ("density", "coverage"))])
    return table(head, rows)


def cost_tables(cost: dict[str, Any]) -> str:
    """Return what each command took, and the ratios to the peer's, taken within each round."""
    names = list(dict.fromkeys(entry["name"] for entry in cost["processes"]))
    taken = {name: [entry for entry in cost["processes"] if entry["name"] == name] for name in names}
    head = [
        f"N = {cost['num']:,}",
        "wall seconds",
        "rounds",
        "user CPU seconds",
        "rounds",
        "peak memory (MB)",
        "rounds",
    ]
    rows = []
    for name, entries in taken.items():
        cells = [name]
        for key in ("wall_seconds", "user_seconds", "peak_mb"):
            values = [entry[key] for entry in entries]
            cells += [f"{median(values):.0f}", spread(values, "{:.0f}")]
        rows.append(cells)
    goals = []
    for title, ours, theirs, goal in GOALS:
        if taken.get(ours) and taken.get(theirs):
            cells = [title]
            for key in ("wall_seconds", "user_seconds", "peak_mb"):
                ratios = within_rounds(taken[ours], taken[theirs], lambda entry, key=key: entry[key])
                cells += [f"{median(ratios):.2f}", spread(ratios, "{:.2f}")]
            goals.append([*cells, goal])
    ratio_head = ["theirs over ours", "wall time", "rounds", "user CPU time", "rounds", "peak memory", "rounds", "goal"]
    return table(head, rows) + "\n\n" + table(ratio_head, goals)


def within_rounds(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> list[float]:
    """Return the ratio of theirs to ours of each round that has both."""
    of_theirs = {entry["round"]: value(entry) for entry in theirs}
    return [of_theirs[entry["round"]] / value(entry) for entry in ours if entry["round"] in of_theirs]


def spread(values: Sequence[float], form: str) -> str:
    """Return the least and the greatest value, where there are any."""
    return f"{form.format(min(values))} to {form.format(max(values))}" if values else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
