"""Which cells a study works on, in what order, and what it makes of failures: with steps that compute nothing."""

import json
import shutil
import signal
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, PartialState
from filelock import FileLock
from PIL import Image
from tiny_study import Steps, stand_in_for_networks, tiny_config

from wavelatent.common import claims
from wavelatent.common.errors import Diverged, Stopped, UsageError, WavelatentError
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.common.runtime import RuntimeOptions, utc_now
from wavelatent.pipelines import study as study_module
from wavelatent.pipelines import study_estimate
from wavelatent.pipelines.prepare import prepare
from wavelatent.pipelines.study import describe, study
from wavelatent.pipelines.study_cells import make_study_cells, tasks_of
from wavelatent.pipelines.study_config import StudyConfig
from wavelatent.pipelines.study_data import StudyData, UnpreparedImages
from wavelatent.pipelines.study_design import make_variants
from wavelatent.pipelines.study_networks import Networks, networks_of
from wavelatent.pipelines.study_text import changed_line
from wavelatent.pipelines.study_timing import (
    TIMED_STEPS,
    StepTimer,
    convolution_rate,
    time_autoencoder,
    time_diffusion,
)

CPU = RuntimeOptions(device="cpu")
AUTOENCODER = ["autoencoder", "measure autoencoder", "diagnose", "encode"]
DIFFUSION = ["diffusion", "measure diffusion"]
PATIENCE = 240
"""Seconds that a process may take; one that waits for another for ever is killed, and the test fails."""


@cache
def networks() -> Networks:
    return networks_of(make_variants(tiny_config())[0], 16, 0)


@pytest.fixture(autouse=True)
def steps(monkeypatch, tmp_path) -> Steps:
    stand_in_for_networks(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(study_module, "networks_of", lambda variant, size, classes: networks())
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    return Steps(monkeypatch)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return study(tiny_config(*overrides), out=out, **{"options": CPU, **options})


def states(result: dict[str, Any]) -> list[str]:
    return [cell["state"] for cell in result["cells"]]


def test_all_variants_of_the_first_seed_come_first_each_autoencoder_before_what_needs_it(out, steps):
    result = run(out)
    assert result["complete"]
    one_seed = [*AUTOENCODER, *DIFFUSION, *DIFFUSION]
    assert steps.done == [f"{step} {seed}" for seed in ("seed0", "seed1") for step in one_seed]


def test_shards_part_the_autoencoders_with_their_cells_and_the_last_one_writes_the_results(out, steps):
    """Two that trained the same autoencoder on two machines would not come to the same weights."""
    half = run(out, shard=(0, 2))
    assert states(half) == ["finished", "finished", "new", "new"]
    assert "results" not in half
    assert "2 of 4 cells are still to be" in describe(half)
    steps.done.clear()
    whole = run(out, shard=(1, 2))
    assert whole["complete"]
    assert Path(whole["results"]).is_file()
    assert steps.done == [f"{step} seed1" for step in [*AUTOENCODER, *DIFFUSION, *DIFFUSION]]


def test_a_cell_that_diverges_is_noted_once_and_the_others_go_on(out, steps, monkeypatch):
    def diverge(step: str, folder: Path) -> None:
        if step == "autoencoder" and folder.name.endswith("seed1"):
            raise Diverged(f"loss/l1 is not finite at step 1: the state before is saved in {folder}; start again")

    steps.fails = diverge
    result = run(out)
    assert states(result) == ["finished", "finished", "failed", "failed"]
    assert result["complete"]
    record = json.loads(Path(result["results"]).read_text())
    failed = [cell["failed"] for cell in record["cells"]]
    assert failed == [None, None, *["autoencoder, train: loss/l1 is not finite at step 1"] * 2]
    assert record["cells"][2]["metrics"] == {}
    assert "failed: plain, seed 1" in describe(result)
    steps.done.clear()
    steps.fails = lambda step, folder: pytest.fail("tried again")
    assert run(out) == result
    (out / result["cells"][2]["autoencoder"] / "failure.json").unlink()
    steps.fails = lambda step, folder: None
    assert states(run(out)) == ["finished"] * 4
    assert steps.done == [f"{step} seed1" for step in [*AUTOENCODER, *DIFFUSION, *DIFFUSION]]


def test_what_would_meet_every_cell_ends_the_study(out, steps):
    def fail(step: str, folder: Path) -> None:
        if step == "encode":
            raise WavelatentError("the disk is full")

    steps.fails = fail
    with pytest.raises(WavelatentError, match="the disk is full"):
        run(out)
    assert not list(out.rglob("failure.json"))
    steps.fails = lambda step, folder: None
    steps.done.clear()
    run(out)
    assert steps.done[:2] == ["encode seed0", "diffusion seed0"], "what was done before stays"


def test_a_report_of_what_is_finished(out, steps):
    def stop(step: str, folder: Path) -> None:
        if step == "measure diffusion" and folder.name.endswith("seed1"):
            raise Stopped("stopped by a test")

    with pytest.raises(WavelatentError, match="no cell is finished"):
        run(out, report_only=True)
    assert not out.exists()
    steps.fails = stop
    with pytest.raises(Stopped):
        run(out)
    assert not (out / "results.json").exists()
    steps.fails = lambda step, folder: pytest.fail("nothing is done for a report")
    result = run(out, report_only=True, photographs=False)
    assert (out / "report.html").read_text() == "report without photographs"
    assert states(result) == ["finished", "finished", "trained", "new"]
    record = json.loads((out / "results.json").read_text())
    assert [(cell["variant"], cell["seed"]) for cell in record["cells"]] == [("plain", 0), ("unwhitened", 0)]
    assert record["setting"]["unfinished"] == [
        {"variant": "plain", "seed": 1, "state": "trained"},
        {"variant": "unwhitened", "seed": 1, "state": "new"},
    ]
    assert "2 of 4 cells are not in it yet" in describe(result)
    cell = record["cells"][0]
    assert cell["metrics"] == {"rfid": 2.0, "fid": 4.0, "kid_mean": 0.5}
    assert cell["health"] == {"scale.std": 2.0, "scale.rank": 2.0}
    assert cell["verdicts"] == ["scale: note", "scale: fault"]
    took = [cell["cost"][f"{part}_seconds"] for part in ("diffusion", "generation", "encoding")]
    assert took == [7.0, 11.0, 5.0]
    assert str(out) not in (out / "results.json").read_text()


def test_an_autoencoder_that_another_process_holds_is_waited_for_when_nothing_else_is_left(out, steps, monkeypatch):
    run(out, "seeds=[2]")  # so that the data, and with it the names, are there
    held = out / run(out, dry_run=True)["cells"][0]["autoencoder"]
    lock = FileLock(held.with_name(f".{held.name}.lock"), thread_local=False)
    lock.acquire()
    done_by_then = []

    def release(seconds: float) -> None:
        done_by_then.extend(steps.done)
        lock.release()

    monkeypatch.setattr(claims.time, "sleep", release)
    steps.done.clear()
    assert run(out)["complete"]
    assert done_by_then == [f"{step} seed1" for step in [*AUTOENCODER, *DIFFUSION, *DIFFUSION]]
    assert steps.done == [*done_by_then, *(f"{step} seed0" for step in [*AUTOENCODER, *DIFFUSION, *DIFFUSION])]


def test_no_time_left_stops_before_the_first_cell(out, steps):
    with pytest.raises(Stopped, match="run the same command again"):
        run(out, options=RuntimeOptions(device="cpu", max_minutes=-1))
    assert steps.done == []


def test_a_dry_run_lists_and_estimates_and_writes_nothing(out, steps, monkeypatch, capsys):
    monkeypatch.setattr(study_estimate, "time_autoencoder", lambda *_: 0.5)
    monkeypatch.setattr(study_estimate, "time_diffusion", lambda *_: 0.25)
    monkeypatch.setattr(study_estimate, "convolution_rate", lambda *_: 1e9)
    new = run(out, dry_run=True)
    assert not out.exists()
    assert steps.done == []
    assert states(new) == ["new"] * 4
    assert [cell["shares_with"] for cell in new["cells"]] == [["unwhitened"], ["plain"]] * 2
    assert "(autoencoder shared with plain)" in describe(new)
    assert new["power"] in describe(new)
    assert new["config"]["autoencoder"]["train"]["steps"] == 2
    seconds = new["estimate"]["seconds"]
    assert seconds["autoencoder: train"] == 2 * 2 * 0.5
    assert seconds["diffusion: train"] == 4 * 2 * 0.25
    assert new["estimate"]["speeds"] == {"measured": 0, "timed": 6, "operations": 0}
    shape, count = networks().latent_shape, 12
    assert shape == (4, 8, 8)
    # two autoencoders, mean and standard deviation in float32, no mirror images
    assert new["estimate"]["disk_bytes"]["latents"] == 2 * count * 4 * 8 * 8 * 2 * 4
    images = 5 * (2 * networks().denoise_flops + networks().decode_flops + study_estimate.INCEPTION_FLOPS)
    assert seconds["diffusion: measure"] == pytest.approx(4 * images / 1e9)
    monkeypatch.setattr(study_estimate, "AFFORDABLE_SECONDS", 0.0)
    counted = run(out, dry_run=True)["estimate"]
    assert counted["speeds"] == {"measured": 0, "timed": 0, "operations": 6}
    # forward once and backward twice, of a batch of 4
    assert counted["seconds"]["diffusion: train"] == pytest.approx(4 * 2 * 3 * 4 * networks().denoise_flops / 1e9)
    assert "lower bound" in describe(run(out, dry_run=True))
    run(out, "seeds=[0]")
    part = run(out, dry_run=True)
    assert states(part) == ["finished", "finished", "new", "new"]
    seconds = part["estimate"]["seconds"]
    assert part["estimate"]["speeds"] == {"measured": 3, "timed": 0, "operations": 0}
    assert seconds["diffusion: train"] == 2 * 7.0
    assert seconds["diffusion: measure"] == 2 * 11.0
    assert len(run(out, dry_run=True, shard=(0, 2))["cells"]) == 2
    assert "listed as new" not in capsys.readouterr().err
    shutil.rmtree(out / "data")  # as where cells alone were copied from another machine
    assert states(run(out, dry_run=True)) == ["new"] * 4
    assert "finished ones are listed as new" in capsys.readouterr().err


def test_a_configuration_that_was_changed_after_the_first_start_is_kept_and_named(out):
    run(out)
    first = (out / "config.yaml").read_text()
    result = run(out, "rule.level=0.1")
    assert (out / "config.1.yaml").read_text() == first
    record = json.loads(Path(result["results"]).read_text())
    assert record["setting"]["changed_since_the_first_start"] == ["rule"]
    assert record["config"]["rule"]["level"] == 0.1


def test_a_configuration_that_comes_with_the_report_alone_is_kept_and_named_too(out):
    run(out)
    first = (out / "config.yaml").read_text()
    result = run(out, "rule.level=0.1", report_only=True)
    assert (out / "config.1.yaml").read_text() == first
    record = json.loads(Path(result["results"]).read_text())
    assert record["setting"]["changed_since_the_first_start"] == ["rule"]


def test_other_images_are_a_change_and_named(out, steps, tmp_path):
    for count in (6, 9):
        prepare(f"synthetic:{count}", 16, tmp_path / f"prepared-{count}")
    run(out, f"data.validation={tmp_path / 'prepared-6'}")
    steps.done.clear()
    result = run(out, f"data.validation={tmp_path / 'prepared-9'}")
    assert set(steps.done) == {f"{step} {seed}" for step in AUTOENCODER[1:3] for seed in ("seed0", "seed1")}
    record = json.loads(Path(result["results"]).read_text())
    assert record["setting"]["changed_since_the_first_start"] == ["data"]
    assert changed_line(record["setting"]) == "The images are not those of the first start."


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("evaluation.num_samples=6", "measure diffusion"),
        ("evaluation.steps=3", "measure diffusion"),
        ("evaluation.num_reconstructions=4", "measure autoencoder"),
        ("evaluation.health_images=3", "diagnose"),
    ],
)
def test_a_measurement_of_something_else_is_made_again(override, again, out, steps):
    run(out, "seeds=[0]")
    steps.done.clear()
    run(out, "seeds=[0]", override)
    assert steps.done == [f"{again} seed0"] * (2 if again == "measure diffusion" else 1)


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("diffusion/model", "diffusion"),
        ("diffusion/evaluation-generation/metrics.json", "measure diffusion"),
        ("autoencoder/status.json", "autoencoder"),
        ("autoencoder/health/health.json", "diagnose"),
    ],
)
def test_of_a_task_whose_files_are_not_all_there_the_rest_is_done(lost, again, out, steps):
    """As after a kill at any moment: each step's last file says that it is done."""
    cell = run(out, "seeds=[0]")["cells"][0]
    stage, _, name = lost.partition("/")
    file = out / cell[stage] / name
    file.rename(file.with_name("lost"))
    steps.done.clear()
    assert run(out, "seeds=[0]")["complete"]
    assert steps.done == [f"{again} seed0"]


@pytest.mark.parametrize(
    ("field", "value", "stage"),
    [
        ("autoencoder", {"mixed_precision": "bf16"}, "autoencoder"),
        ("lpips_net", "vgg", "autoencoder"),
        ("guidance", 2.0, "diffusion"),
        ("ema", 0.05, "diffusion"),
        ("ema_step", 2, "diffusion"),
        ("pass_rows", 3, "diffusion"),
        ("mixed_precision", "bf16", "diffusion"),
        ("guide_sha256", "of another run", "diffusion"),
    ],
)
def test_what_someone_measured_in_another_way_since_is_measured_again(field, value, stage, out, steps):
    cell = run(out, "seeds=[0]")["cells"][0]
    name = "reconstruction" if stage == "autoencoder" else "generation"
    file = out / cell[stage] / f"evaluation-{name}" / "metrics.json"
    content = json.loads(file.read_text())
    content["protocol"][field] = value
    file.write_text(json.dumps(content))
    steps.done.clear()
    assert run(out, "seeds=[0]")["complete"]
    assert steps.done == [f"measure {stage} seed0"]


def test_what_was_made_with_other_weights_of_the_autoencoder_is_not_taken_for_done(out, steps):
    """Trained again, in a folder of the same name, it has others: on other hardware, or another number of threads."""

    def record(name: str) -> None:
        file = out / cell["autoencoder"] / name
        content = json.loads(file.read_text())
        content["protocol"]["autoencoder"]["fingerprint"] = "other"
        file.write_text(json.dumps(content))

    cell = run(out, "seeds=[0]")["cells"][0]
    record("evaluation-reconstruction/metrics.json")
    with pytest.raises(WavelatentError, match="no cell is finished"):
        run(out, "seeds=[0]", report_only=True)

    def refuse(step: str, folder: Path) -> None:
        raise WavelatentError(f"{step}: it was made from another autoencoder")

    steps.fails = refuse
    with pytest.raises(WavelatentError, match="diagnose: it was"):
        run(out, "seeds=[0]")
    record("health/health.json")
    with pytest.raises(WavelatentError, match="encode: it was"):
        run(out, "seeds=[0]")
    (manifest,) = out.glob("latents/*/manifest.json")
    manifest.write_text(json.dumps({"autoencoder": {"fingerprint": "other"}}))
    with pytest.raises(WavelatentError, match="measure diffusion: it was"):
        run(out, "seeds=[0]")


def test_a_finished_study_is_reported_again_without_photographs(out):
    run(out, "seeds=[0]")
    assert (out / "report.html").read_text() == "report"
    run(out, "seeds=[0]", photographs=False)
    assert (out / "report.html").read_text() == "report without photographs"


def test_cells_that_were_begun_before_the_folder_had_a_configuration_are_counted(out):
    """Such as those that were copied: claims may have been written after looking at them."""

    def counted() -> list[str]:
        return json.loads(Path(run(out, "seeds=[0]")["results"]).read_text())["setting"]["begun_before_the_first_start"]

    cell = run(out, "seeds=[0]")["cells"][0]
    environment = out / cell["diffusion"] / "environment.json"
    environment.write_text(json.dumps({"started": utc_now()}))
    assert counted() == []
    environment.write_text(json.dumps({"started": "2020-01-01T00:00:00Z"}))
    assert counted() == [cell["diffusion"]]
    (out / "first-start-a-machine.json").write_text(json.dumps({"started": "2019-12-31T23:59:59Z"}))
    assert counted() == []  # a shard that was copied here brought its own


def test_a_report_says_by_what_cells_are_found(out):
    run(out, "seeds=[0]", options=RuntimeOptions(device="cpu", mixed_precision="bf16"))
    with pytest.raises(WavelatentError, match=r"no cell is finished .* --mixed-precision no"):
        run(out, "seeds=[0]", report_only=True)


def test_lpips_that_cannot_be_had_is_known_at_once_and_ends_what_rests_on_it(out, steps, monkeypatch, capsys):
    def load_weights(name: str) -> None:
        if name == "alex":
            raise MissingWeightsError("AlexNet is not here")

    monkeypatch.setattr(study_module, "load_weights", load_weights)
    run(out, "seeds=[0]")
    assert "LPIPS" not in capsys.readouterr().err, "there is none of 16 px"
    larger = ["seeds=[0]", "data.size=32"]
    run(out.with_name("32"), *larger)
    assert "no cell that is measured now will have LPIPS: AlexNet is not here" in capsys.readouterr().err
    steps.done.clear()
    with pytest.raises(MissingWeightsError):
        run(out.with_name("claimed"), *larger, "claims.whitening.comparisons=[{factor: whitening, level: channel, "
            "against: none, metric: lpips}]")  # fmt: skip
    assert not steps.done


def test_a_signal_while_steps_are_timed_ends_the_dry_run():
    with StepTimer() as timer:
        signal.raise_signal(signal.SIGTERM)
        assert timer.agreed(AcceleratorState()) == "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM"):
        timer.seconds_per_step()


def folder_of_images(path: Path, count: int = 12) -> Path:
    path.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(path / f"{number}.png")
    return path


def test_data_that_was_prepared_need_not_be_there_any_more(out, tmp_path):
    source = folder_of_images(tmp_path / "images")
    data = f"data.train={source}"
    result = run(out, data)
    shutil.rmtree(source)
    again = run(out, data)
    assert again == result
    assert json.loads((out / "results.json").read_text())["config"]["data"]["train"] == "images"


def test_data_that_was_prepared_is_known_by_its_files_and_other_data_is_refused(out, steps, tmp_path):
    source = folder_of_images(tmp_path / "images")
    run(out, f"data.train={source}")
    steps.done.clear()
    moved = source.rename(tmp_path / "moved")
    result = run(out, f"data.train={moved}")
    assert (steps.done, states(result)) == ([], ["finished"] * 4)
    record = json.loads((out / "results.json").read_text())
    assert record["setting"]["changed_since_the_first_start"] == []
    config, other = (out / "config.yaml").read_text(), folder_of_images(tmp_path / "other", 11)
    for refused, what in ((f"data.train={other}", "other at 16 px"), ("data.size=32", "32 px: give another --out")):
        with pytest.raises(UsageError, match=f"train holds .*images at 16 px, not .*{what}"):
            run(out, f"data.train={moved}", refused)
    assert (out / "config.yaml").read_text() == config


def cells_of(config: StudyConfig, precision: str = "no") -> list:
    data = StudyData(UnpreparedImages("synthetic:5", 16), UnpreparedImages("synthetic:4", 16))
    return make_study_cells(config, make_variants(config), Path("root"), data, precision)


def names_of(*overrides: str, precision: str = "no") -> tuple[str, str]:
    cell = cells_of(tiny_config(*overrides), precision)[0]
    return cell.autoencoder.folder.name, cell.diffusion.folder.name


def test_a_task_is_named_by_what_decides_its_result():
    autoencoder, diffusion = names_of()
    assert names_of("autoencoder.train.keep=1", "diffusion.train.log_every=9", "rule.level=0.1") == (
        autoencoder,
        diffusion,
    )
    of_stage_two = [names_of("diffusion.train.steps=3"), names_of("flips=true")]
    assert [name for name, _ in of_stage_two] == [autoencoder] * 2
    of_both = [names_of("autoencoder.model.channels=5"), names_of(precision="bf16")]
    assert autoencoder not in {name for name, _ in of_both}
    assert len({diffusion, *(name for _, name in [*of_stage_two, *of_both])}) == 5
    assert names_of("seeds=[3]") == (autoencoder.replace("seed0", "seed3"), diffusion.replace("seed0", "seed3"))


def test_seeds_reach_both_stages_and_tasks_are_listed_once():
    cells = cells_of(tiny_config())
    assert [(task.stage, task.seed, task.config.seed) for task in tasks_of(cells)] == [
        (stage, seed, seed) for seed in (0, 1) for stage in ("autoencoder", "diffusion", "diffusion")
    ]


def test_processes_that_were_launched_together_do_what_the_main_one_decides(out, steps, tmp_path):
    def work() -> None:
        signal.alarm(PATIENCE)
        result = run(out, "seeds=[0]")
        (tmp_path / f"{PartialState().process_index}.json").write_text(json.dumps([steps.done, result]))

    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(work, num_processes=2)
    (done, result), (followed, same) = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert done == [f"{step} seed0" for step in [*AUTOENCODER, *DIFFUSION, *DIFFUSION]]
    assert followed == [step for step in done if not step.startswith("diagnose")], "which one process does"
    assert result == same
    assert result["complete"]


def test_steps_are_timed_on_noise_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = make_variants(tiny_config("autoencoder.train.steps=9", "diffusion.train.steps=9"))[0].recipe
    begin = time.monotonic()
    seconds = [
        time_autoencoder(recipe.autoencoder, 16, CPU),
        time_diffusion(recipe.diffusion, networks().latent_shape, 0, CPU),
    ]
    assert 0 < TIMED_STEPS * sum(seconds) < time.monotonic() - begin
    assert convolution_rate("cpu", "no") > 1e6
    assert list(tmp_path.iterdir()) == []


def test_several_processes_make_no_estimate(out, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without accelerate launch"):
        run(out, dry_run=True)
