"""Two processes do what one process with the whole batch does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_commands import ForkedCommands
from torch import Tensor

from wavelatent.common.latent_cache import LatentCache
from wavelatent.pipelines.encode import encode
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = ["--data", "synthetic:12", "--size", "32", "--device", "cpu"]
TRAIN = ["train.batch_size=4", "train.log_every=1", "train.sample_every=0", "train.learning_rate={peak: 1e-3}"]
TRAIN_AE = [
    "train-ae", "ae-tiny", *TRAIN, *DATA,
    "model.bottleneck.kind=bounded",  # its forward pass draws no noise
    "model.encoder.num_res_blocks=1",
    "objective.lpips.weight=0",
    "objective.adversarial={start: 0, discriminator: {kind: patchgan, width: 8, layers: 2}}",
]  # fmt: skip
TRAIN_DIFFUSION = [
    "train-diffusion", "unet-tiny", *TRAIN, "--device", "cpu",
    "model.channels=32", "model.multipliers=[1,2]", "model.attention_levels=[1]", "train.validation.every=1",
]  # fmt: skip

States = dict[str, dict[str, Tensor]]


Trained = tuple[list[dict], States, States]
Train = Callable[..., Trained]


@pytest.fixture
def train(forked_commands: ForkedCommands) -> Train:
    """Train into ``out``; return the log, and the weights that every process began and, all alike, ended with."""

    def train_into(out: Path, processes: int, *arguments: object) -> Trained:
        said, recorded = out / "said", out / "recorded"
        command = [*arguments, "--out", out / "run"]
        codes = forked_commands.run(command, said, processes=processes, record=recorded)
        assert codes == [0] * processes, "".join(path.read_text() for path in said.glob("*.err"))
        assert json.loads((out / "run" / "status.json").read_text())["state"] == "done"
        ranks = range(processes)
        starts, ends = [[load(recorded / f"{rank}-{when}.pt") for rank in ranks] for when in ("start", "end")]
        assert distance(starts[0], starts[-1]) == 0
        assert distance(ends[0], ends[-1]) == 0, "the processes have come apart"
        log = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        return log, starts[0], ends[0]

    return train_into


def load(path: Path) -> States:
    return torch.load(path, weights_only=True)


def distance(one: States, other: States) -> float:
    """Return the Euclidean distance of two sets of weights."""
    assert one.keys() == other.keys()
    squares = [(x - other[m][n]).double().square().sum() for m, state in one.items() for n, x in state.items()]
    return float(torch.stack(squares).sum().sqrt())


def assert_same_training(one: Trained, two: Trained) -> None:
    """Compare log and final weights, the averaged ones among them.

    The sums over a batch are taken in another order, so the gradients of the first step differ by rounding. Adam makes
    steps of one size of them, also where a gradient is nothing but rounding error: those weights may go another way,
    and with them, a little, all that follows. Measured against the way that the weights have gone, the difference is
    0.003 in stage one and 0.00001 in stage two; where both processes take the same half of each batch it is above 1.
    """
    (log_one, start_one, end_one), (log_two, start_two, end_two) = one, two
    assert [line["images"] for line in log_one] == [line["images"] for line in log_two] == [4, 8, 12]
    for line_one, line_two, tolerance in zip(log_one, log_two, (2e-4, 1e-2, 1e-2), strict=True):
        assert line_one.keys() == line_two.keys()
        compared = [name for name in line_one if name.startswith(("loss/", "gradient_norm", "validation/"))]
        assert len(compared) > 1
        for name in compared:
            assert line_two[name] == pytest.approx(line_one[name], rel=tolerance, abs=1e-6), name
    assert distance(start_one, start_two) == 0
    assert distance(end_one, end_two) < 0.02 * distance(start_one, end_one)


def write_cache(folder: Path) -> Path:
    """Encode with an untrained autoencoder."""
    torch.manual_seed(0)
    config = {"encoder": {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1}, "channels": 3}
    Autoencoder(AutoencoderConfig.model_validate({**config, "decoder": {"width": "tiny"}})).save_pretrained(
        folder / "ae"
    )
    encode(str(folder / "ae"), "synthetic:12", folder / "cache", size=32, shard_size=5, batch_size=2, device="cpu")
    return folder / "cache"


def test_stage_one(train: Train, tmp_path: Path) -> None:
    runs = [train(tmp_path / str(count), count, *TRAIN_AE, "--max-steps", 3) for count in (1, 2)]
    assert_same_training(*runs)
    # The bottleneck's are statistics of the global batch, not of each process's part.
    names = {"loss/latent_mean", "loss/latent_variance", "loss/discriminator", "gradient_norm/discriminator"}
    assert names <= runs[0][0][0].keys()


def test_stage_one_with_adaptive_weight_gradient_penalties_lecam_and_phases(train: Train, tmp_path: Path) -> None:
    game = (
        "objective.adversarial={start: 0, loss: relativistic, adaptive: {}, r1_weight: 1, r2_weight: 1, "
        "lecam: {weight: 0.1}, discriminator: {kind: patchgan, width: 8, layers: 2}}"
    )
    phases = "train.phases=[{steps: 2, size: 16}, {losses: [l1, adversarial]}]"
    command = [*TRAIN_AE, game, phases, "objective.high_pass.weight=1", "--max-steps", 3]
    runs = [train(tmp_path / str(count), count, *command) for count in (1, 2)]
    assert_same_training(*runs)
    log = runs[0][0]
    assert {"loss/r1", "loss/r2", "loss/lecam", "gan/adaptive_weight", "loss/high_pass"} <= log[1].keys()
    assert "loss/high_pass" not in log[2]  # the second phase has it off
    for one, two in zip(*(log for log, _, _ in runs), strict=True):
        assert two["gan/adaptive_weight"] == pytest.approx(one["gan/adaptive_weight"], rel=0.02)


def test_stage_two_also_where_it_is_resumed(train: Train, tmp_path: Path) -> None:
    command = [*TRAIN_DIFFUSION, "--latents", write_cache(tmp_path)]
    one = train(tmp_path / "1", 1, *command, "--max-steps", 3)
    _, start, _ = train(tmp_path / "2", 2, *command, "--max-steps", 2)
    with (tmp_path / "2" / "run" / "metrics.jsonl").open("a") as log_file:
        log_file.write('{"step": 3}\n')  # of a step that is taken again: cut off by one process, seen by both
    log, _, end = train(tmp_path / "2", 2, *command, "--max-steps", 3)
    assert_same_training(one, (log, start, end))


def test_encode_shares_the_shards(tmp_path: Path) -> None:
    """Started by torchrun itself."""
    one = write_cache(tmp_path)
    arguments = ["encode", "--ae", tmp_path / "ae", *DATA, "--shard-size", "5", "--batch-size", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, ROOT / "cli.py", *arguments, "--out", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=600)
    assert (tmp_path / "two" / "manifest.json").exists(), done.stderr
    assert LatentCache.open(tmp_path / "two").read(range(12)).index.tolist() == list(range(12))
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, tmp_path / "two")]
    assert contents[0] == contents[1]
