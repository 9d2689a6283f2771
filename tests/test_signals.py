"""A request to stop that reaches a whole process group, as Ctrl-C, GNU timeout and Slurm send it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.utils.data import DataLoader

import cli
from wavelatent.common.worker_processes import leave_signals_to_parent, started

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LOADING = """
import sys
sys.path.insert(0, sys.argv[1])
import cli
from wavelatent.common.images import open_data, training_batches

batches = training_batches(open_data("synthetic:8", size=8), batch_size=2, seed=0, num_workers=2)
next(batches)
print("ready", flush=True)
sys.stdin.read()
next(batches)
print("still reading", flush=True)
raise RuntimeError("an error whose traceback keeps the loader alive to the end")
"""
SMALL_SHARDS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import cli
from wavelatent.pipelines import prepare

prepare.SHARD_IMAGES = 50
cli.main()
"""


@contextlib.contextmanager
def group(*command: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a process group of its own, and leave nothing of it behind."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 240
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def is_gone(group_id: int) -> bool:
    """Return whether nothing of a process group runs any more; what has ended may still wait for init to take note."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    states = [state for pgid, state in map(str.split, listed.splitlines()) if int(pgid) == group_id]
    return all(state.startswith("Z") for state in states)


def test_sigterm_to_the_group_stops_a_training_that_reads_with_workers_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    train = ["train-ae", "ae-tiny", "objective.lpips.weight=0", "model.encoder.num_res_blocks=1", "train.num_workers=2"]
    train += [
        "train.log_every=1",
        "train.sample_every=0",
        "--batch-size",
        "2",
        "--data",
        "synthetic:16",
        "--size",
        "32",
    ]
    train += ["--device", "cpu", "--out", str(out)]
    with group(ROOT / "cli.py", *train, "--max-steps", "100000") as it:
        wait_until((out / "metrics.jsonl").exists, it)
        os.killpg(it.pid, signal.SIGTERM)
        _, err = it.communicate(timeout=240)
        assert it.returncode == 75, err
        assert "Traceback" not in err
        assert "stopped by SIGTERM" in err
        status = json.loads((out / "status.json").read_text())
        assert status["state"] == "stopped"
        assert (out / "checkpoints" / f"checkpoint-{status['step']}").is_dir()
        wait_until(lambda: is_gone(it.pid), seconds=60)
    end = status["step"] + 2
    done = CliRunner().invoke(cli.cli, [*train, "--max-steps", str(end)])
    assert done.exit_code == 0, done.output
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, end + 1))


def test_ctrl_c_stops_a_prepare_that_decodes_with_workers(tmp_path: Path) -> None:
    out = tmp_path / "faces"
    prepare = ["prepare", "--data", "synthetic:1000000", "--size", "16", "--num-workers", "2", "--out", out]
    with group("-c", SMALL_SHARDS, ROOT, *prepare) as it:
        wait_until((out / "images-00000.npy").exists, it)
        os.killpg(it.pid, signal.SIGINT)
        _, err = it.communicate(timeout=240)
        assert it.returncode == 75, err
        assert "Traceback" not in err
        assert "stopped by SIGINT" in err
        assert json.loads((out / "progress.json").read_text())["consumed"] > 0
        wait_until(lambda: is_gone(it.pid), seconds=60)


def test_workers_outlive_signals_and_end_with_their_parent() -> None:
    with group("-c", LOADING, ROOT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n", parent.communicate()[1]
        for worker in workers_of(parent):
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker, number)
        out, err = parent.communicate("go on", timeout=240)
        assert out == "still reading\n", err
        assert parent.returncode == 1
        assert "keeps the loader alive" in err
        wait_until(lambda: is_gone(parent.pid), seconds=60)


def slow_to_start(worker: int) -> None:
    time.sleep(1)
    leave_signals_to_parent(worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_that_comes_while_a_worker_starts_does_not_kill_it(number: signal.Signals) -> None:
    batches = started(DataLoader([3, 5, 8], batch_size=None, num_workers=1, worker_init_fn=slow_to_start))
    worker = batches._workers[0].pid  # type: ignore[attr-defined]
    subprocess.run(["kill", "-s", str(int(number)), str(worker)], check=True)  # not by its parent, whom it obeys
    assert [int(batch) for batch in batches] == [3, 5, 8]
    assert not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_end_when_their_parent_is_killed() -> None:
    with group("-c", LOADING, ROOT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n", parent.communicate()[1]
        parent.kill()
        parent.wait()
        wait_until(lambda: is_gone(parent.pid), seconds=60)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the other processes of its group."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
    pairs = (map(int, line.split()) for line in listed.splitlines())
    members = [pid for pid, group_id in pairs if group_id == process.pid and pid != process.pid]
    assert len(members) == 2, listed
    return members
