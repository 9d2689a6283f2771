"""Gather what `pilot.sh` measured into pilot.json, pilot.md and pilot.png. Usage: tabulate_pilot.py OUT [TO].

OUT is that of pilot.sh, TO the folder of the three files, by default the one that this script is in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
OF_STAGE_ONE = ("loss/total", "loss/l1", "loss/lpips", "psnr")
OF_STAGE_TWO = ("loss/denoising", "validation/loss", "quick_kid", "quick_fid", "quick_seconds")
LABELS = {"loss/denoising": "denoising loss", "validation/loss": "validation loss", "quick_kid": "quick KID"}


def main(out: Path, to: Path = HERE) -> None:
    """Write the three files into the folder ``to``."""
    runs = [read_run(folder) for folder in sorted(out.glob("*-*")) if (folder / "ae" / "metrics.jsonl").is_file()]
    whole = [run for run in runs if run["diffusion"]]
    if not whole:
        sys.exit(f"{out}: pilot.sh has not come to a second stage there yet")
    (to / "pilot.json").write_text(json.dumps(runs, indent=1) + "\n")
    (to / "pilot.md").write_text("\n\n".join([reconstructions(runs), *map(progress, whole)]) + "\n")
    draw(whole, to / "pilot.png")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the curves of both stages and the figures of the reconstructions, without the machine's paths."""
    size, ae_steps = map(int, folder.name.split("-"))
    measured = folder / "ae" / "evaluation-reconstruction" / "metrics.json"
    return {
        "size": size,
        "autoencoder steps": ae_steps,
        "reconstruction": json.loads(measured.read_text())["metrics"] if measured.is_file() else {},
        "autoencoder": curve(folder / "ae", OF_STAGE_ONE),
        "diffusion": curve(folder / "unet", OF_STAGE_TWO),
    }


def curve(run: Path, names: tuple[str, ...]) -> list[dict[str, float]]:
    """Return the lines of a log that hold any of ``names``, with the minutes of training up to each.

    ``minutes`` are wall time, that of measuring and saving left out where the log has the speed of training proper.
    """
    points, minutes, images = [], 0.0, 0
    if not (run / "metrics.jsonl").is_file():
        return []
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "images_per_second" in line:
            minutes += (line["images"] - images) / line["images_per_second"] / 60
            images = line["images"]
        elif not any(key.startswith(("validation/", "quick_")) for key in line):
            minutes = line["seconds"] / 60
        if found := {name: line[name] for name in names if name in line}:
            points.append({"step": line["step"], "images": line["images"], "minutes": round(minutes, 3), **found})
    return points


def reconstructions(runs: list[dict[str, Any]]) -> str:
    """Return a row per autoencoder."""
    lines = ["| px | steps of stage one | minutes | rFID | PSNR | LPIPS |", "|---|---|---|---|---|---|"]
    for run in runs:
        figures = [run["reconstruction"].get(name, float("nan")) for name in ("rfid", "psnr", "lpips")]
        minutes = run["autoencoder"][-1]["minutes"]
        lines.append(
            f"| {run['size']} | {run['autoencoder steps']:,} | {minutes:.1f} | {figures[0]:.2f} | {figures[1]:.2f} "
            f"| {figures[2]:.4f} |"
        )
    return "\n".join(lines)


def progress(run: dict[str, Any]) -> str:
    """Return a row per quick evaluation: KID, and what the second half of the steps so far changed of it."""
    points = [point for point in run["diffusion"] if "quick_kid" in point]
    kids = {point["step"]: point["quick_kid"] for point in points}
    lines = [
        f"{run['size']} px, {run['autoencoder steps']:,} steps of stage one:",
        "",
        "| steps of stage two | minutes | quick KID x 1000 | against half the steps | validation loss |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        half = kids.get(point["step"] // 2)
        change = f"{point['quick_kid'] / half - 1:+.0%}".replace("-", "−") if half else ""
        loss = f"{point['validation/loss']:.4f}" if "validation/loss" in point else ""
        lines.append(
            f"| {point['step']:,} | {point['minutes']:.1f} | {1000 * point['quick_kid']:.1f} | {change} | {loss} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw loss, validation loss and quick KID against steps, and the last against minutes."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    shown = [(name, "step") for name in LABELS] + [("quick_kid", "minutes")]
    for axes, (name, against) in zip(panels.flat, shown, strict=True):
        for run in runs:
            points = [point for point in run["diffusion"] if name in point]
            label = f"{run['size']} px, {run['autoencoder steps']:,} steps of stage one"
            axes.plot([p[against] for p in points], [p[name] for p in points], marker=".", label=label)
        axes.set(xlabel="steps" if against == "step" else "minutes of training", ylabel=LABELS[name])
        if name == "quick_kid":
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    panels.flat[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
