"""Command lines in processes of their own, also in several that train together, without a start of Python for each.

Run as a script, this is a server: it imports what the commands need once and forks for every request that it reads from
stdin. Every process has the environment that ``torchrun`` would give it. A test asks by :class:`ForkedCommands`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

PATIENCE = 300
"""Seconds that a command may take; a process that waits for another for ever is killed, and the test fails."""

IMPORTED = (
    "accelerate",
    "torch._dynamo",  # which every optimiser imports
    "torch.utils.tensorboard",
    *(f"wavelatent.pipelines.{name}" for name in ("encode", "sample", "train_autoencoder", "train_diffusion")),
)


class ForkedCommands:
    """The server; ``close`` ends it."""

    def __init__(self) -> None:
        environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        self._server = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(
        self, arguments: Sequence[object], said: Path, *, processes: int = 1, record: Path | None = None
    ) -> list[int]:
        """Run ``cli.py ARGUMENTS`` in that many processes; return their exit codes.

        ``said`` is a folder for what each wrote: ``<rank>.out`` and ``<rank>.err``. With ``record`` the processes do
        what `recorded_training` adds, into that folder.
        """
        request = {
            "arguments": [*map(str, arguments)],
            "said": str(said),
            "processes": processes,
            "record": None if record is None else str(record),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        codes: list[int] = json.loads(self._server.stdout.readline())
        return codes

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


def serve() -> None:
    """Answer every line of stdin, a request, by a line of exit codes."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        request = json.loads(line)

        def command(request: dict[str, Any] = request) -> None:
            if request["record"] is not None:
                from recorded_training import add_to_trainings

                add_to_trainings(Path(request["record"]))
            cli.main()

        print(json.dumps(_forked(command, request)), flush=True)


def _forked(command: Callable[[], None], request: dict[str, Any]) -> list[int]:
    processes, said = request["processes"], Path(request["said"])
    said.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            os._exit(_in_child(command, request["arguments"], said / str(rank), _torchrun(rank, processes, port)))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _torchrun(rank: int, processes: int, port: int) -> dict[str, str]:
    if processes == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def _in_child(command: Callable[[], None], arguments: list[str], said: Path, environment: dict[str, str]) -> int:
    signal.alarm(PATIENCE)
    os.environ.update(environment)
    sys.argv = ["cli.py", *arguments]
    for stream, suffix in ((sys.stdin, None), (sys.stdout, ".out"), (sys.stderr, ".err")):
        target = os.open(os.devnull if suffix is None else f"{said}{suffix}", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, stream.fileno())
    code: object = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


if __name__ == "__main__":
    serve()
