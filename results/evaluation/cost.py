"""Measure time and peak memory of an evaluation by `wavelatent` and by torch-fidelity's command, side by side.

One process after another on one core and one thread, ROUNDS times in turn, so that whatever else the machine does meets
all of them alike. The numbers are the kernel's (wait4) of the whole process: start, imports and reading the images
included; helper processes that read images count in the CPU time, and only the largest process in the memory. Every
process is written down as it ends; run again, the script goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = tuple[list[str], dict[str, str]]
"""Words, and what is added to the environment."""


class Peers:
    """The commands that are measured, over the same images, figures and settings.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.commands: dict[str, Callable[[], Command]] = {
            "ours, first time": lambda: self._ours(["--no-intervals"], fresh=True),
            "theirs, first time": lambda: self._theirs(fresh=True),
            "ours, reference cached": lambda: self._ours(["--no-intervals"]),
            "theirs, reference cached": lambda: self._theirs(),
            "ours, reference cached, with intervals": lambda: self._ours([]),
        }

    def _ours(self, more: list[str], *, fresh: bool = False) -> Command:
        cache = self.options.work / "our-cache"
        if fresh:
            _clear(cache)
            shutil.copytree(self.options.weights, cache / "metric-weights")
        words = [*shlex.split(self.options.wavelatent), "evaluate", "generation", "--json", "--device", "cpu"]
        words += ["--samples", str(self.options.samples), "--data", str(self.options.reference)]
        words += ["--overwrite", "--out", str(self.options.work / "ours.json"), *more]
        return words, {"WAVELATENT_CACHE": str(cache)}

    def _theirs(self, *, fresh: bool = False) -> Command:
        cache = self.options.work / "their-cache"
        if fresh:
            _clear(cache)
        command = Path(__file__).with_name("fidelity_command.py")
        words = [sys.executable, str(command), "--json", "--silent", "--cpu", "--fid", "--kid", "--prc"]
        words += ["--feature-extractor", "inception-v3-compat", "--feature-layer-prc", "2048"]
        words += ["--feature-extractor-weights-path", str(self.options.inception)]
        words += ["--kid-subset-size", str(self.options.kid_subset_size)]
        words += ["--input1", str(self.options.samples), "--input2", str(self.options.reference)]
        return [*words, "--cache-root", str(cache), "--input2-cache-name", "reference"], {}


def measure(command: Command, log: Path) -> dict[str, Any]:
    """Run a command to its end; return what it took and the figures that it printed."""
    words, environment = command
    load = os.getloadavg()[0]
    printed = log.with_suffix(".json")
    begin = time.monotonic()
    with printed.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(words, env={**os.environ, **environment}, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode} of {shlex.join(words)}: see {log}")
    figures = json.loads(printed.read_text())
    return {
        "wall_seconds": round(wall, 2),
        "user_seconds": round(usage.ru_utime, 2),
        "system_seconds": round(usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),  # of KiB, as Linux counts
        "load_before": round(load, 2),
        "figures": figures.get("metrics", figures),
    }


def main(options: argparse.Namespace) -> None:
    """Do the rounds that are missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "cost.json"
    done = json.loads(path.read_text())["processes"] if path.is_file() else []
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    peers = Peers(options)
    for number in range(options.rounds):
        for name, command in peers.commands.items():
            if any((entry["round"], entry["name"]) == (number, name) for entry in done):
                continue
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            done.append({"round": number, "name": name, **measure(command(), options.work / "log.txt")})
            _write(path, {"num": len(list(options.samples.glob("*.png"))), "machine": _machine(), "processes": done})


def _machine() -> dict[str, Any]:
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "cpus_used": 1, "threads": 1}


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=Path, required=True, help="folder of PNG images")
    parser.add_argument("--reference", type=Path, required=True, help="the same, that they are held against")
    parser.add_argument("--weights", type=Path, required=True, help="metric-weights in wavelatent's cache")
    parser.add_argument("--work", type=Path, required=True, help="folder for caches, logs and cost.json")
    parser.add_argument("--wavelatent", required=True, help="our command")
    parser.add_argument("--inception", type=Path, required=True, help="what inception_file.py wrote")
    parser.add_argument("--kid-subset-size", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
