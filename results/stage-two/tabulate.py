"""Gather what `run.sh` measured into results.json, tables.md and the figure. Usage: tabulate.py OUT (of run.sh)."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from wavelatent.pipelines.study_statistics import AdditiveModel

HERE = Path(__file__).resolve().parent
LABELS = {
    "edm": "EDM",
    "flow": "rectified flow, logit-normal times",
    "flow-uniform": "rectified flow, uniform times",
    "eps": "noise prediction, LDM's schedule",
    "v": "v prediction, cosine schedule",
    "edm-unshifted": "EDM, 4 channels, no shift",
    "flow-unshifted": "rectified flow, logit-normal times, no shift",
    "edm-32": "EDM, 32 channels",
    "edm-32-unshifted": "EDM, 32 channels, no shift",
}
COMPARED = ("edm", "flow", "flow-uniform", "eps", "v", "edm-unshifted", "flow-unshifted")
"""On the same latents; the first is what the others are compared with."""
TOP = 90
"""Where the figure's axis ends."""
LEFT_OUT = {"run", "guide", "library versions", "reference"}


def main(out: Path) -> None:
    """Write the three files beside this one."""
    runs = {path.parent.name: read(path) for path in sorted(out.glob("*/evaluation.json"))}
    samplers = [read(path) for path in sorted(out.glob("edm-seed0/sampler-*.json"))]
    validation = {name: last_validation(out / name) for name in runs}
    waits = {name: data_wait(out / name) for name in runs}
    result = {"runs": runs, "validation": validation, "data wait, share of a step": waits, "samplers": samplers}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    tables = [objectives_table(runs, validation), effects_table(runs), samplers_table(samplers)]
    (HERE / "tables.md").write_text("\n\n".join(tables) + "\n")
    draw(samplers)


def read(path: Path) -> dict[str, Any]:
    """Return a measurement without the paths of the machine it was made on."""
    result = json.loads(path.read_text())
    protocol = {name: value for name, value in result["protocol"].items() if name not in LEFT_OUT}
    return {"metrics": result["metrics"], "protocol": protocol, "seconds": result["seconds"]}


def last_validation(run: Path) -> dict[str, float]:
    """Return the last validation losses of a run and what its training took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation/loss" in line)
    return {name: last[name] for name in last if name.startswith("validation/") or name in ("step", "seconds")}


def data_wait(run: Path) -> dict[str, float]:
    """Return the share of a training step that waiting for data took: the mean, and the largest of 50 steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait_share"] for line in lines if "data_wait_share" in line]
    return {"mean": mean(shares), "largest": max(shares)}


def objectives_table(runs: dict[str, dict[str, Any]], validation: dict[str, dict[str, float]]) -> str:
    """Return a row per variant: each seed's figures and their mean."""
    seeds: dict[str, list[str]] = defaultdict(list)
    for name in runs:
        seeds[re.sub(r"-seed\d+$", "", name)].append(name)
    lines = [
        "| | FID of each seed | mean | KID x 1000 of each seed | mean | precision | recall | validation loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in LABELS:
        if names := seeds.get(variant):
            fids = [runs[name]["metrics"]["fid"] for name in names]
            kids = [1000 * runs[name]["metrics"]["kid_mean"] for name in names]
            losses = [validation[name]["validation/loss"] for name in names]
            cells = [figures(fids, 2), f"{mean(fids):.2f}", figures(kids, 2), f"{mean(kids):.2f}"]
            cells += [
                figures([runs[name]["metrics"][metric] for name in names], 3) for metric in ("precision", "recall")
            ]
            cells.append(figures(losses, 4))
            lines.append(f"| {LABELS[variant]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def effects_table(runs: dict[str, dict[str, Any]]) -> str:
    """Return KID and FID of every variant on the same latents over those of the first, with 95 % intervals.

    As in `study`: logarithms, variant plus seed, the residuals pooled over all variants.
    """
    seeds = sorted({name.rpartition("-seed")[2] for name in runs})
    lines = [f"| against {LABELS[COMPARED[0]]} | KID | FID |", "|---|---|---|"]
    for variant in COMPARED[1:]:
        weights = np.array([(name == variant) - (name == COMPARED[0]) for name in COMPARED], dtype=float)
        cells = []
        for metric in ("kid_mean", "fid"):
            values = [[runs[f"{name}-seed{seed}"]["metrics"][metric] for seed in seeds] for name in COMPARED]
            effect = AdditiveModel(np.log(values)).contrast(weights)
            assert effect is not None, "no cell is missing"
            low, high = effect.interval()
            cells.append(f"×{np.exp(effect.value):.3f} [{np.exp(low):.3f}, {np.exp(high):.3f}]")
        lines.append(f"| {LABELS[variant]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(values: list[float], digits: int) -> str:
    """Return values side by side."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def samplers_table(samplers: list[dict[str, Any]]) -> str:
    """Return a row per sampler and number of evaluations of the network."""
    lines = [
        "| sampler | steps | evaluations | FID | 95 % interval over images | KID x 1000 | precision | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measured in sorted(samplers, key=lambda m: (m["protocol"]["sampler"], m["protocol"]["evaluations"])):
        p, m = measured["protocol"], measured["metrics"]
        lines.append(
            f"| {p['sampler']} | {p['steps']} | {p['evaluations']} | {m['fid']:.2f} "
            f"| {m['fid_interval'][0]:.2f}-{m['fid_interval'][1]:.2f} | {1000 * m['kid_mean']:.2f} "
            f"| {m['precision']:.3f} | {m['recall']:.3f} |"
        )
    return "\n".join(lines)


def draw(samplers: list[dict[str, Any]]) -> None:
    """Draw FID against evaluations of the network; what is above the axis is written beside its line."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for measured in samplers:
        curves[measured["protocol"]["sampler"]].append(
            (measured["protocol"]["evaluations"], measured["metrics"]["fid"])
        )
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for sampler, points in sorted(curves.items()):
        (line,) = axes.plot(*zip(*sorted(points), strict=True), marker="o", label=sampler)
        for evaluations, fid in points:
            if fid > TOP:
                place = (14, TOP - 1)
                axes.annotate(f"{fid:.0f} with {evaluations}", place, color=line.get_color(), va="top", ha="right")
    axes.set(xscale="log", xlabel="evaluations of the network", ylabel="FID, N = 5,000", ylim=(55, TOP))
    axes.xaxis.set_major_locator(FixedLocator([8, 16, 32]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "samplers.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
