"""Keep what a study's folder says of its finished cells, small enough to be committed, or lay it out again.

    wavelatent study ... --out OUT --dry-run --json | cells.py keep OUT PHOTOGRAPHS
    cells.py lay-out OUT PHOTOGRAPHS

The first copies finished cells into ``cells/``, beside this script; the second copies that into OUT, where the same
study takes them as finished. Kept are texts and the few samples that the report shows: configurations, logs,
measurements, health reports and the manifests of latent caches, but no weights, latents or photographs. An autoencoder
is kept once all of its cells are finished: without its weights no other could be trained on it. OUT and PHOTOGRAPHS,
the folder of train/ and val/, stand in the files by name in place of their paths.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent / "cells"
OF_A_RUN = (
    "config.yaml",
    "environment.json",
    "inputs.json",
    "metrics.jsonl",
    "status.json",
    "failure.json",
    "evaluation-*/metrics.json",
    "health/health.json",
    "model/config.json",
    "samples-shown/*",
)
OF_A_CACHE = ("manifest.json",)


def keep(out: Path, photographs: Path, cells: list[dict[str, str]]) -> None:
    """Copy what is to be kept, of the cells whose autoencoder no unfinished one needs."""
    needed = {cell["autoencoder"] for cell in cells if cell["state"] not in ("finished", "failed")}
    kept = [cell for cell in cells if cell["autoencoder"] not in needed]
    for cell in kept:
        for file in files_of(cell, out):
            copy(file, HERE / file.relative_to(out), {str(out): "OUT", str(photographs): "PHOTOGRAPHS"})
    print(f"{len(kept)} of {len(cells)} cells are kept")


def files_of(cell: dict[str, str], out: Path) -> Iterator[Path]:
    """Yield the files of a cell; those of an autoencoder that several have, for each of them."""
    latents = cell["autoencoder"].replace("autoencoders/", "latents/", 1)
    for folder, patterns in ((cell["autoencoder"], OF_A_RUN), (latents, OF_A_CACHE), (cell["diffusion"], OF_A_RUN)):
        for pattern in patterns:
            yield from (out / folder).glob(pattern)


def lay_out(out: Path, photographs: Path) -> None:
    """Copy what was kept to where a study looks for it."""
    for file in (path for path in HERE.rglob("*") if path.is_file()):
        copy(file, out / file.relative_to(HERE), {"OUT": str(out), "PHOTOGRAPHS": str(photographs)})


def copy(source: Path, to: Path, paths: dict[str, str]) -> None:
    """Copy a file; in a text, with the paths replaced."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".png":
        shutil.copyfile(source, to)
        return
    text = source.read_text(encoding="utf-8")
    for path, name in paths.items():
        for before, after in (('"', "/"), ('"', '"'), (": ", "/")):  # in JSON, and in YAML
            text = text.replace(f"{before}{path}{after}", f"{before}{name}{after}")
    to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    places = tuple(Path(folder).resolve() for folder in folders)
    if what == "keep":
        keep(*places, json.load(sys.stdin)["cells"])
    else:
        lay_out(*places)
