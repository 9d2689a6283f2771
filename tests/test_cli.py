"""The command line end to end in one process: results on stdout, progress on stderr, exit codes, nothing lost."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

import cli

ROOT = Path(__file__).resolve().parent.parent
DATA = ["--data", "synthetic:16", "--size", "32"]
AE = ["train-ae", "ae-tiny", "objective.lpips.weight=0", "model.encoder.num_res_blocks=1", *DATA, "--device", "cpu"]
UNET = ["train-diffusion", "unet-tiny", "model.channels=32", "model.multipliers=[1,2]", "model.attention_levels=[1]"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line; return its exit code, its stdout and its stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wavelatent", *map(str, arguments)])
        code, handler = 0, signal.getsignal(signal.SIGTERM)
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


def test_the_pipeline_command_by_command(run, folder, monkeypatch):
    """Train, encode, train again, sample and measure, each twice: the second time it has nothing to do."""
    monkeypatch.setenv("WAVELATENT_CACHE", str(folder / "no-weights-here"))
    monkeypatch.setenv("WAVELATENT_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(folder / "nor-here"))
    monkeypatch.delenv("WAVELATENT_WEIGHTS", raising=False)
    train_ae = [*AE, "--out", folder / "ae", "--max-steps", 3, "--batch-size", 4, "--checkpoint-every", 2, "--json"]
    for finished in (False, True):
        code, out, _ = run(*train_ae)
        assert code == 0
        result = json.loads(out)
        assert (result["state"], result["step"], result["already_finished"]) == ("done", 3, finished)

    encode = ["encode", "--ae", folder / "ae", *DATA, "--out", folder / "cache", "--json", "--seed", 1]
    for finished in (False, True):
        code, out, _ = run(*encode)
        assert code == 0
        assert json.loads(out)["already_complete"] is finished

    train_unet = [*UNET, "--latents", folder / "cache", "--out", folder / "unet", "--max-steps", 3, "--batch-size", 4]
    for finished in (False, True):
        code, out, _ = run(*train_unet, "--json")
        assert code == 0
        assert json.loads(out)["already_finished"] is finished

    sample = ["sample", "--run", folder / "unet", "--out", folder / "samples", "--steps", 3, "--json"]
    code, out, _ = run(*sample, "--num", 3, "--seed", 4)
    assert code == 0
    assert json.loads(out)["written"] == 3
    extras = ["--npz", folder / "samples.npz", "--contact-sheet", "--interpolate", 4, 9, "--points", 3]
    code, out, _ = run(*sample, "--seeds", "4-6,9", *extras)
    result = json.loads(out)
    assert (code, result["written"], len(result["interpolation"])) == (0, 1, 4)
    assert Path(result["npz"]).stat().st_size > 4 * 32 * 32 * 3
    assert Path(result["contact_sheet"]) == folder / "samples" / "contact-sheet.png"
    names = sorted(path.name for path in (folder / "samples").glob("0*.png"))
    assert names == ["000004.png", "000005.png", "000006.png", "000009.png"]
    assert Image.open(folder / "samples" / names[0]).size == (32, 32)

    code, out, err = run("evaluate", "reconstruction", "--ae", folder / "ae", *DATA, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert 0 < result["metrics"]["psnr"] < 60
    assert "rfid" not in result["metrics"]
    assert result["not_computed"]["rfid"]
    assert result["paper_line"].startswith(f"PSNR {result['metrics']['psnr']:.2f} [")
    code, out, err = run("evaluate", "generation", "--samples", folder / "samples", *DATA)
    assert code == 1  # without the weights there is nothing it could measure
    assert "WAVELATENT_OFFLINE" in err
    assert err.strip().count("\n") == 0


def test_another_autoencoder_or_data_set_is_refused_by_name(run, folder):
    code, _, err = run(
        "encode", "--ae", folder / "ae", "--data", "synthetic:15", "--size", 32, "--out", folder / "cache"
    )
    assert code == 1
    assert "data" in err
    code, _, err = run(*AE, "model.channels=8", "--out", folder / "ae")
    assert code == 2
    assert "model.channels" in err


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["train-ae", "ae-tiny", "train.stpes=1", *DATA, "--out", "x"], 2, "did you mean 'steps'"),
        (["train-ae", "ae-tinny", *DATA, "--out", "x"], 2, "did you mean 'ae-tiny'"),
        (["train-ae", "ae-tiny", "--data", "nowhere", "--out", "x"], 2, "nowhere"),
        (["train-ae", "ae-tiny", *DATA], 2, "--out"),
        ([*AE, "--out", "x", "--mixed-precision", "fp16"], 2, "use bf16 or no"),
        ([*AE, "--out", "x", "train.gradient_accumulation=3"], 2, "train.batch_size"),
        (["train-ae", "litevae-s", "--data", "synthetic:4", "--size", "36", "--out", "x"], 2, "36 px do not divide"),
        (["encode", "--ae", "nowhere", *DATA, "--out", "x"], 2, "nowhere"),
        (["sample", "--run", "nowhere", "--out", "x", "--num", "1"], 1, "nowhere"),
        (["sample", "--run", "nowhere", "--out", "x"], 2, "--num N or --seeds"),
        (["sample", "--run", "nowhere", "--out", "x", "--seeds", "5-1"], 2, "empty"),
        (["sample", "--run", "nowhere", "--out", "x", "--seeds", "0-99999999999"], 2, "give at most 10,000,000"),
        (["sample", "--run", "nowhere", "--out", "x", "--seeds", "-3"], 2, "0-49999"),
        (["sample", "--run", "nowhere", "--out", "x", "--num", "1", "--sampler", "heum"], 2, "heun"),
        (["sample", "--run", "nowhere", "--out", "x", "--num", "1", "--grid", "karas"], 2, "karras"),
        (["sample", "--run", "nowhere", "--out", "x", "--num", "1", "--guide", "y"], 2, "--guidance 2"),
        (["sample", "--run", "nowhere", "--out", "x", "--num", "1", "--eta", "0.5"], 2, "no effect"),
        (["sample", "--run", "nowhere", "--out", "x", "--seeds", "some"], 2, "0-49999"),
        (["smaple"], 2, "smaple"),
    ],
)
def test_wrong_input_gets_one_line_and_its_exit_code(run, tmp_path, monkeypatch, arguments, code, fragment):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(*arguments)
    assert got == code
    assert fragment in err
    assert out == ""
    assert err.strip().splitlines()[-1].lower().startswith(("error:", "error "))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", ["prepare", "train-ae", "encode", "evaluate reconstruction", "evaluate generation", "report"]
)
def test_whatever_reads_images_can_be_told_how_many_may_be_bad(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "--max-bad-fraction" in out


@pytest.mark.parametrize("command", ["sample", "evaluate generation"])
def test_whatever_samples_takes_every_option_of_sampling(run, command):
    from dataclasses import fields

    from wavelatent.pipelines.sample_images import SampleOptions
    from wavelatent.stage2_diffusion.sampling import Sampling

    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    names = [field.name for kind in (Sampling, SampleOptions) for field in fields(kind) if field.name != "sampling"]
    assert [name for name in names if f"--{name.replace('_', '-')} " not in out] == []


def test_the_options_of_sampling_reach_it(run, monkeypatch, tmp_path):
    asked = {}

    def sample(**arguments):
        asked.update(arguments)
        return {"samples": "", "count": 0, "written": 0}

    monkeypatch.setattr("wavelatent.pipelines.sample.sample", sample)
    options = ["--sampler", "heun", "--churn", 20, "--churn-max", 5, "--guidance", 2, "--guidance-interval", 0.2, 3]
    more = ["--guide", tmp_path, "--guide-ema", 0.2, "--guide-step", 3, "--ema", 0.05, "--ema-step", 4, "--label", 1]
    more += ["--pass-rows", 8, "--tile", 32]
    code, _, err = run("sample", "--run", "r", "--out", "o", "--num", 2, *options, *more, "--mixed-precision", "bf16")
    assert (code, err) == (0, "")
    got = asked["options"]
    assert (got.sampling.churn, got.sampling.churn_max, got.sampling.churn_min) == (20, 5, 0)
    assert (got.sampling.guidance, got.sampling.guidance_interval) == (2, (0.2, 3))
    assert (got.guide, got.guide_ema, got.ema, got.label) == (tmp_path, 0.2, 0.05, 1)
    assert (got.guide_step, got.ema_step) == (3, 4)
    assert (got.pass_rows, got.tile, got.mixed_precision) == (8, 32, "bf16")
    assert asked["seeds"] == [0, 1]


def test_a_dry_run_prints_the_resolved_config_and_writes_nothing(run, tmp_path):
    code, out, _ = run(*AE, "--out", tmp_path / "x", "--max-steps", 7, "--seed", 3, "--json", "--dry-run")
    config = json.loads(out)
    assert code == 0
    assert (config["train"]["steps"], config["seed"], config["model"]["encoder"]["num_res_blocks"]) == (7, 3, 1)
    assert not (tmp_path / "x").exists()


def test_a_signal_before_there_is_anything_to_save_exits_75(run, monkeypatch):
    def interrupted(fetch):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("wavelatent.pipelines.doctor.doctor", interrupted)
    code, out, err = run("doctor")
    assert (code, out) == (75, "")
    assert err.strip().startswith("stopped")


def test_an_unexpected_error_is_one_line_that_names_the_way_to_the_traceback(run, monkeypatch):
    def fail(fetch):
        raise LookupError("a bug\nof ours")

    monkeypatch.setattr("wavelatent.pipelines.doctor.doctor", fail)
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert err == "error: LookupError: a bug of ours (unexpected: put --debug before the command for the traceback)\n"
    with pytest.raises(LookupError):
        run("--debug", "doctor")
