"""Runs the demo's variants at the same time, each in a process of its own with its share of the cores."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from ..common.errors import Stopped, WavelatentError
from ..common.runtime import StopRequest

CLI = Path(__file__).resolve().parent.parent / "cli.py"
START = "import runpy, sys; runpy.run_path(sys.argv.pop(1)); from wavelatent.pipelines import demo; demo.run_child()"
"""``cli.py`` makes the package importable from a bare checkout as well as from an install."""


@dataclass
class _Child:
    name: str
    log: Path
    process: subprocess.Popen[bytes]

    def last_line(self) -> str:
        """Return what the child wrote last, as a progress bar would show it."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())
        return lines[-1]


def run_children(arguments: Mapping[str, list[str]], logs: Path, *, threads: int) -> None:
    """Run one child per name, with ``arguments`` for it, until all are done; their output goes to ``logs``/<name>.log.

    Raises :class:`WavelatentError` where one fails, and :class:`Stopped` on SIGTERM or SIGINT; the others are asked to
    save and stop, and waited for.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop:
        children = [_start(name, given, logs / f"{name}.log", threads) for name, given in arguments.items()]
        try:
            _wait(children, stop)
        finally:
            for child in children:
                if child.process.poll() is None:
                    child.process.terminate()
            for child in children:
                child.process.wait()
    if stop.reason:
        raise Stopped(f"stopped by {stop.reason} with everything saved; run the same command to go on")
    for child in children:
        if (code := child.process.returncode) not in (0, -signal.SIGTERM, Stopped.exit_code):
            raise WavelatentError(f"{child.name} failed (exit code {code}): {child.last_line()}; see {child.log}")
    if any(child.process.returncode for child in children):
        raise Stopped("a variant was stopped from outside, with everything saved; run the same command to go on")


def _start(name: str, arguments: list[str], log: Path, threads: int) -> _Child:
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(CLI), *arguments],
            stdin=subprocess.PIPE,  # never written to: its end tells the child that this process is gone
            stdout=file,
            stderr=file,
            env={**os.environ, **limits},
        )
    return _Child(name, log, process)


def _wait(children: list[_Child], stop: StopRequest) -> None:
    """Show how far the children are, until all are done, one fails, or a stop is asked for."""
    quiet = not sys.stderr.isatty()
    bars = [tqdm(bar_format="{desc}", position=n, file=sys.stderr, disable=quiet) for n in range(len(children))]
    shown = time.monotonic()
    while any(child.process.poll() is None for child in children) and not stop.reason:
        time.sleep(0.5)
        if any(child.process.returncode for child in children):
            break
        for child, bar in zip(children, bars, strict=True):
            bar.set_description_str(f"{child.name}: {child.last_line()}"[:160])
        if quiet and time.monotonic() > shown + 30:
            shown = time.monotonic()
            print("\n".join(f"{child.name}: {child.last_line()}" for child in children), file=sys.stderr, flush=True)
    for bar in bars:
        bar.close()


def stop_with_parent(stdin: IO[bytes]) -> None:
    """Send this process SIGTERM when ``stdin`` ends, which is when the process that started it does, however it ends.

    A demo that was killed would otherwise go on writing behind the back of the one that is started next.
    """

    def watch() -> None:
        while os.read(stdin.fileno(), 1):  # not stdin.read(): its lock would abort the interpreter's shutdown
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
