"""Two processes train what one process with the whole batch trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = [
    "model.bottleneck.kind=bounded",
    "model.encoder.num_res_blocks=1",
    "objective.lpips.weight=0",
    "objective.adversarial={start: 0, discriminator: {kind: patchgan, width: 8, layers: 2}}",
    "train.batch_size=4",
    "train.log_every=1",
    "train.sample_every=0",
]


def train(out: Path, launcher: list[str]) -> list[dict]:
    command = [sys.executable, *launcher, str(ROOT / "cli.py"), "train-ae", "ae-tiny", *OVERRIDES]
    command += ["--data", "synthetic:12", "--size", "32", "--max-steps", "2", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    # A process may abort while it is torn down after all the work is done: what it left on disk is what counts.
    assert (out / "status.json").exists(), done.stderr
    assert json.loads((out / "status.json").read_text())["state"] == "done", done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path):
    one = train(tmp_path / "one", [])
    two = train(tmp_path / "two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])
    assert [line["images"] for line in one] == [line["images"] for line in two] == [4, 8]
    first_one, first_two = one[0], two[0]
    for name in (
        "loss/l1",
        "loss/latent_mean",  # statistics of the global batch, not of each process's part
        "loss/latent_variance",
        "loss/discriminator",
        "gradient_norm/autoencoder",
        "gradient_norm/discriminator",
    ):
        assert first_two[name] == pytest.approx(first_one[name], rel=2e-4, abs=1e-7), name
