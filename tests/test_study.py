"""``study`` from end to end with real trainings of two steps: what is shared, goes on, is left alone and is written."""

import json
import shutil
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from html_page import parse
from tiny_study import stand_in_for_networks, tiny_config

import cli
from wavelatent.common.errors import Stopped
from wavelatent.common.runtime import RuntimeOptions, StopRequest
from wavelatent.pipelines import study_cells, study_report
from wavelatent.pipelines.study import describe, study

CPU = RuntimeOptions(device="cpu")
STEPS_BEFORE_THE_STOP = 3
"""Both of the first autoencoder, and one of the first denoiser."""
MEASURED = ("autoencoder", "reconstruction", "health", "encoding", "diffusion", "generation")


def stamps(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A study that was stopped in the middle of a training, gone on with, and run once more; and one that was not."""
    root = tmp_path_factory.mktemp("study")
    trained: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_networks(patch, root / "cache")
        for name in ("train_autoencoder", "train_diffusion"):
            train = getattr(study_cells, name)

            def record(config: Any, *, out: Path, train: Any = train, **options: Any) -> bool:
                trained.append(out.name)
                return train(config, out=out, **options)

            patch.setattr(study_cells, name, record)
        agreed, steps = StopRequest.agreed, count()

        def stop_once(self: StopRequest, accelerator: Any) -> str | None:
            return "SIGTERM" if next(steps) == STEPS_BEFORE_THE_STOP else agreed(self, accelerator)

        patch.setattr(StopRequest, "agreed", stop_once)
        with pytest.raises(Stopped, match="stopped by SIGTERM at step 1 of 2"):
            study(tiny_config(), out=root / "out", options=CPU)
        before = list(trained)
        result = study(tiny_config(), out=root / "out", options=CPU)
        whole, written = list(trained), stamps(root / "out")
        again = study(tiny_config(), out=root / "out", options=CPU)
        after = stamps(root / "out")
        alone = study(tiny_config("seeds=[0]"), out=root / "alone", options=CPU)
    return SimpleNamespace(
        root=root, result=result, again=again, alone=alone, before=before, trained=whole, written=written, after=after
    )


def results(result: dict[str, Any]) -> dict[str, Any]:
    return json.loads(Path(result["results"]).read_text())


def test_an_autoencoder_is_trained_once_for_all_that_need_it(finished):
    record = results(finished.result)
    assert [(cell["variant"], cell["seed"]) for cell in record["cells"]] == [
        ("plain", 0),
        ("unwhitened", 0),
        ("plain", 1),
        ("unwhitened", 1),
    ]
    folders = [cell["folders"] for cell in record["cells"]]
    for kind, number in (("autoencoder", 2), ("latents", 2), ("diffusion", 4)):
        assert len({each[kind] for each in folders}) == number
        assert all((finished.root / "out" / each[kind]).is_dir() for each in folders)
    names = [Path(each[kind]).name for each in folders for kind in ("autoencoder", "diffusion")]
    assert set(finished.trained) == set(names)
    stopped = finished.before[-1]
    assert len(finished.trained) == len(set(names)) + 1, "only the one that was stopped is gone on with"
    assert finished.trained.count(stopped) == 2


def test_after_a_stop_it_ends_where_it_would_have_without(finished):
    first, alone = results(finished.result), results(finished.alone)
    same = [cell for cell in first["cells"] if cell["seed"] == 0]
    for cell, other in zip(same, alone["cells"], strict=True):
        assert cell["metrics"] == other["metrics"]
        assert cell["folders"] == other["folders"]
        assert cell["health"] == other["health"]


def test_what_is_finished_is_left_alone(finished):
    assert finished.result["complete"]
    assert finished.again == finished.result
    assert finished.after == finished.written


def test_noise_is_the_same_for_all_variants_at_a_seed_and_other_at_another(finished):
    record = results(finished.result)
    seeds = {(cell["variant"], cell["seed"]): cell["protocol"]["generation"]["seeds"] for cell in record["cells"]}
    assert seeds == {
        ("plain", 0): "0-4",
        ("unwhitened", 0): "0-4",
        ("plain", 1): "5-9",
        ("unwhitened", 1): "5-9",
    }
    assert record["setting"]["sample_seeds"] == {"0": "0-4", "1": "5-9"}


def test_the_results_say_what_all_cells_share_and_no_path(finished):
    record = results(finished.result)
    assert set(record) == {"format", "config", "variants", "cells", "analysis", "setting"}
    assert record["variants"][1] == {
        "name": "unwhitened",
        "levels": {"bottleneck": "kl", "channels": "4", "whitening": "none"},
    }
    setting = record["setting"]
    assert setting["images_seen"] == {"autoencoder": 4, "diffusion": 8}
    assert setting["steps"] == {"autoencoder": 2, "diffusion": 2}
    assert (setting["data"]["train"]["count"], setting["data"]["validation"]["count"]) == (12, 6)
    assert setting["protocol"]["generation"]["weights_sha256"] == "of the stand-in"
    assert setting["protocol"]["generation"]["num_reference"] == 12, "all of the training images"
    assert "model_sha256" not in setting["protocol"]["generation"], "which is of one cell"
    networks = setting["networks"]["plain"]
    assert networks["latent_shape"] == [4, 8, 8]
    # 3x3 from 4 channels to 8 and back, with biases
    ends = networks["denoiser_parameters"] - networks["denoiser_parameters_inside"]
    assert ends == (9 * 4 * 8 + 8) + (9 * 8 * 4 + 4)
    assert (setting["unfinished"], setting["changed_since_the_first_start"]) == ([], [])
    assert str(finished.root) not in Path(finished.result["results"]).read_text()
    cell = record["cells"][0]
    assert {"fid", "kid_mean", "rfid", "psnr"} <= set(cell["metrics"])
    assert cell["health"]["scale.std"] > 0
    assert all(cell["cost"][f"{part}_seconds"] > 0 for part in MEASURED)
    assert set(finished.result["claims"]) == {"whitening"}
    assert "the report is" in describe(finished.result)


def test_the_report_of_a_study_that_moved_shows_all_that_its_folders_hold(finished, tmp_path, monkeypatch):
    """As after copying it from another machine: nothing of it is looked for where it was made."""
    stand_in_for_networks(monkeypatch, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, study_report.__name__, study_report)
    shutil.copytree(finished.root / "out", tmp_path / "moved")
    away = finished.root / "away"
    (finished.root / "out").rename(away)
    try:
        result = study(tiny_config(), out=tmp_path / "moved", options=CPU, report_only=True)
    finally:
        away.rename(finished.root / "out")
    page = parse(Path(result["report"]))
    alts = [image["alt"] or "" for image in page.images]
    for shown in ("sampled from plain", "sampled from unwhitened", "encoded and decoded by plain", "Histograms"):
        assert [alt for alt in alts if shown in alt], shown
    assert [alt for alt in alts if alt.startswith("Training loss over step")]
    assert "are not here" not in page.text
    assert "no histograms" not in page.text
    for written in ("report", "summary", "results"):
        text = Path(result[written]).read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert str(finished.root) not in text


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["study-tinny"], "did you mean 'study-tiny'"),
        (["study-tiny", "evaluation.num_sample=3"], "did you mean 'num_samples'"),
        (["study-tiny", "seeds=[1,1]"], "given twice"),
        (["study-tiny", "data.train=null"], "give --data"),
        (["study-tiny", "--data", "nowhere"], "nowhere"),
        (["study-tiny", "--shard", "2/2"], "--shard 2/2"),
        (["study-tiny", "data.size=15"], "15 px do not divide"),
        (["study-tiny", "evaluation.num_reconstructions=99"], "asked for 99 images of 16"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_written(
    arguments, fragment, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wavelatent", "study", *arguments, "--out", "x", "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert fragment in line
    assert list(tmp_path.iterdir()) == []
