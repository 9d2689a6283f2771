"""The demo from end to end, with seconds of everything and no metric weights, and what surrounds it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from wavelatent.common import metric_weights
from wavelatent.common.config import load_config
from wavelatent.common.downloads import DownloadError
from wavelatent.common.errors import WavelatentError
from wavelatent.pipelines import demo as demo_module
from wavelatent.pipelines.demo import VARIANTS, Plan, commands, demo
from wavelatent.pipelines.demo_processes import run_children
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.run_config import AutoencoderRunConfig

STAGES = ("autoencoder", "latents", "diffusion", "samples")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of a few images and steps on a machine without metric weights and without a network."""
    out = tmp_path_factory.mktemp("demo") / "out"

    def unreachable(source: object) -> None:
        raise DownloadError("there is no network here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAVELATENT_CACHE", str(out.parent / "cache"))
        patch.setenv("TORCH_HOME", str(out.parent / "hub"))
        patch.delenv("WAVELATENT_WEIGHTS", raising=False)
        patch.setattr(metric_weights, "_fetch_standard", unreachable)
        patch.setattr(metric_weights, "_fetch_carrier", unreachable)
        assert demo(out, scale=0.001, processes=1) == out / "report" / "index.html"
        stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        (out / "bounded-16" / "samples" / "000003.png").unlink()
        (out / "report" / "index.html").unlink()
        demo(out, scale=0.001, processes=1)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps  # nothing was redone
    return out


def test_it_ends_with_a_report_of_both_variants(finished: Path) -> None:
    record = json.loads((finished / "report" / "report.json").read_text())
    assert [variant["name"] for variant in record["variants"]] == list(VARIANTS)
    for variant in record["variants"]:
        assert [run["state"] for run in variant["runs"]] == ["done", "done"]
        assert set(variant["metrics"]) == {"psnr", "ssim"}
        assert set(variant["not_computed"]) == {"rfid", "lpips", "fid", "kid_mean", "precision", "recall"}
        assert variant["notes"] == []
    kl, bounded = (variant["latents"] for variant in record["variants"])
    assert (len(kl["channels"]), len(bounded["channels"])) == (4, 16)
    assert kl["saturated"] is None
    assert all(-3 < channel["min"] < channel["max"] < 3 for channel in bounded["channels"])
    page = (finished / "report" / "index.html").read_text()
    assert "LPIPS was left out of the training" in page
    assert "through the posterior&#39;s mode" in page
    assert "saved no sample grids" not in page


def test_every_step_leaves_its_folder(finished: Path) -> None:
    for variant in VARIANTS:
        assert all((finished / variant / stage).is_dir() for stage in STAGES)
        assert len(list((finished / variant / "samples").glob("*.png"))) == 16
    assert json.loads((finished / "demo.json").read_text())["lpips"] is False


def test_the_commands_it_lists_are_those_of_what_it_ran(finished: Path) -> None:
    plan = Plan(**json.loads((finished / "demo.json").read_text()))
    lines = [shlex.split(line)[1:] for line in commands(plan)]
    assert len(lines) == 1 + 6 * len(VARIANTS) + 1
    for line in lines:
        command = cli.cli
        for part in line:
            if not hasattr(command, "commands"):
                break
            command, line = command.commands[part], line[1:]
        command.make_context(command.name, list(line))  # every option is one that the command has
    for variant in VARIANTS:
        for stage, model, name in [
            ("autoencoder", AutoencoderRunConfig, "train-ae"), ("diffusion", DiffusionRunConfig, "train-diffusion"),
        ]:  # fmt: skip
            (line,) = (line for line in lines if line[0] == name and f"{variant}/{stage}" in line)
            printed = CliRunner().invoke(cli.cli, [*line, "--dry-run", "--json"])
            run = load_config(model, str(finished / variant / stage / "config.yaml"))
            recorded = run.model_dump(mode="json")
            if stage == "diffusion":  # a run records what `auto` came to
                recorded["objective"]["noise_shift"] = "auto"
            assert json.loads(printed.stdout) == recorded


def test_the_budget_is_scaled_but_every_step_is_taken() -> None:
    whole, tiny = Plan.scaled(1), Plan.scaled(0)
    assert whole == Plan()
    assert tiny.images >= tiny.evaluated >= 8
    assert min(tiny.autoencoder_steps, tiny.diffusion_steps) >= 2


def test_the_faster_precision_is_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    for bf16, expected in ((0.5, "bf16"), (0.95, "no")):
        times[:] = [*[0.0, bf16] * 10, *[0.0, 1.0] * 10][::-1]
        monkeypatch.setattr(demo_module.time, "thread_time", times.pop)
        assert demo_module.faster_precision() == expected


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that do what their first argument says instead of a variant."""
    program = "import sys, time; sys.argv.pop(1); print('started', flush=True); exec(sys.argv[1])"
    monkeypatch.setattr("wavelatent.pipelines.demo_processes.START", program)


def test_a_child_that_fails_stops_the_others_and_is_named(child: None, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(WavelatentError, match=r"one failed \(exit code 1\): no disk; see .*one\.log"):
        run_children({"one": ["sys.exit('no disk')"], "two": ["time.sleep(60)"]}, tmp_path, threads=1)
    assert time.monotonic() - begin < 30


def test_children_have_their_share_of_the_cores(child: None, tmp_path: Path) -> None:
    run_children({"one": ["import os; print(os.environ['OMP_NUM_THREADS'])"]}, tmp_path, threads=3)
    assert (tmp_path / "one.log").read_text().split() == ["started", "3"]


@pytest.mark.parametrize(("seconds", "code"), [(60, -signal.SIGTERM), (0, 0)])
def test_a_child_stops_when_its_parent_is_gone_and_ends_well_when_it_is_not(seconds: int, code: int) -> None:
    """Its end of the pipe closes, however the parent ended; a child that is done exits with the pipe still open."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import cli\n"
        "from wavelatent.pipelines.demo_processes import stop_with_parent\n"
        f"stop_with_parent(sys.stdin.buffer); print('ready', flush=True); time.sleep({seconds})"
    )
    root = Path(cli.__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    if seconds:
        assert process.poll() is None
        process.stdin.close()
    assert process.wait(timeout=30) == code
    process.stdin.close()
    process.stdout.close()
