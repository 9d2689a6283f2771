"""Keep what a study's folder says of its finished cells, small enough to be committed, or lay it out again.

    wavelatent study ... --out OUT --dry-run --json | cells.py keep OUT PHOTOGRAPHS [CELLS]
    cells.py lay-out OUT PHOTOGRAPHS [CELLS]

The first copies finished cells into CELLS, by default ``cells/`` beside this script; the second copies that into OUT,
where the same study takes them as finished. Kept are texts and the few samples that the report shows: the study's
configuration and when it was first started, and of the cells configurations, logs, measurements, health reports and the
manifests of latent caches, but no weights, latents or photographs. An autoencoder is kept once all of its cells are
finished: without its weights no other could be trained on it. OUT and PHOTOGRAPHS, the folder of train/ and val/, stand
in the files by name in place of their paths.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

CELLS = Path(__file__).resolve().parent / "cells"
OF_THE_STUDY = ("config*.yaml", "first-*.json")
OF_A_RUN = (
    "config.yaml",
    "environment.json",
    "inputs.json",
    "metrics.jsonl",
    "status.json",
    "failure.json",
    "encoding.json",
    "evaluation-*/metrics.json",
    "health/health.json",
    "model/config.json",
    "samples-shown/*",
)


def keep(out: Path, photographs: Path, to: Path, cells: list[dict[str, str]]) -> None:
    """Copy what is to be kept, of the cells whose autoencoder no unfinished one needs."""
    paths = {str(out): "OUT", str(photographs): "PHOTOGRAPHS", str(photographs.resolve()): "PHOTOGRAPHS"}
    for file in (found for pattern in OF_THE_STUDY for found in out.glob(pattern)):
        copy(file, to / file.name, paths)
    needed = {cell["autoencoder"] for cell in cells if cell["state"] not in ("finished", "failed")}
    kept = [cell for cell in cells if cell["autoencoder"] not in needed]
    for cell in kept:
        for file in files_of(cell, out):
            copy(file, to / file.relative_to(out), paths)
    print(f"{len(kept)} of {len(cells)} cells are kept")


def files_of(cell: dict[str, str], out: Path) -> Iterator[Path]:
    """Yield the files of a cell; those of an autoencoder that several have, for each of them."""
    for folder in (cell["autoencoder"], cell["diffusion"]):
        for pattern in OF_A_RUN:
            yield from (out / folder).glob(pattern)
    yield from (out / "latents").glob(f"{Path(cell['autoencoder']).name}*/manifest.json")


def lay_out(out: Path, photographs: Path, kept: Path) -> None:
    """Copy what was kept to where a study looks for it."""
    for file in (path for path in kept.rglob("*") if path.is_file()):
        copy(file, out / file.relative_to(kept), {"OUT": str(out), "PHOTOGRAPHS": str(photographs)})


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
    if source.name == "environment.json":
        content = json.loads(text)
        for session in (content, *content.get("resumed", [])):
            session["command_line"][0] = Path(session["command_line"][0]).name
        text = json.dumps(content, indent=2) + "\n"
    to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ("keep", "lay-out"):
        sys.exit(__doc__)
    what, *folders = sys.argv[1:]
    # The photographs are named as the study was given them.
    places = (Path(folders[0]).resolve(), Path(folders[1]), Path(folders[2]) if len(folders) > 2 else CELLS)
    if what == "keep":
        keep(*places, json.load(sys.stdin)["cells"])
    else:
        lay_out(*places)
