"""The committed studies: their results follow from their measurements, and the READMEs say of them what they say."""

import json
import runpy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from wavelatent.common.config import PRESETS, load_config, parse_yaml
from wavelatent.pipelines.study_analysis import analyse
from wavelatent.pipelines.study_config import StudyConfig
from wavelatent.pipelines.study_design import make_variants
from wavelatent.pipelines.study_findings import Analysis
from wavelatent.pipelines.study_markdown import verdict_table
from wavelatent.pipelines.study_records import CellRecord
from wavelatent.pipelines.study_text import AT_THIS_SCALE

ROOT = PRESETS.parent.parent
FOLDER = ROOT / "results" / "study-faces32"
FOLLOW_UP = ROOT / "results" / "study-faces32-noise-shift"
CELLS = FOLDER / "cells"
EVALUATIONS = (("autoencoder", "evaluation-reconstruction"), ("diffusion", "evaluation-generation"))


@lru_cache
def results(folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@lru_cache
def config(folder: Path = FOLDER) -> StudyConfig:
    return StudyConfig.model_validate(results(folder)["config"])


@lru_cache
def records(folder: Path = FOLDER) -> tuple[CellRecord, ...]:
    return tuple(CellRecord(**cell) for cell in results(folder)["cells"])


@lru_cache
def analysed_again(folder: Path = FOLDER) -> Analysis:
    return analyse(config(folder), make_variants(config(folder)), records(folder))


def alike(found: Any, stored: Any) -> bool:
    """Whether both are the same but for rounding."""
    if isinstance(stored, dict):
        return found.keys() == stored.keys() and all(alike(found[key], stored[key]) for key in stored)
    if isinstance(stored, list):
        return len(found) == len(stored) and all(map(alike, found, stored))
    if isinstance(stored, float):
        return found == pytest.approx(stored, rel=1e-9, abs=1e-12)
    return found == stored


def test_every_cell_of_the_preset_is_there_and_finished():
    wanted = {(variant.name, seed) for variant in make_variants(config()) for seed in config().seeds}
    assert len(records()) == len(wanted) == 33
    assert {(record.variant, record.seed) for record in records() if record.failed is None} == wanted
    samples = {record.protocol["generation"]["num_samples"] for record in records()}
    assert samples == {config().evaluation.num_samples} == {2000}


def test_the_configuration_is_the_one_that_was_there_before_the_first_cell():
    kept = CELLS / "config.yaml"
    first = parse_yaml(kept.read_text(encoding="utf-8"), str(kept))
    for name in ("train", "validation"):
        first["data"][name] = Path(first["data"][name]).name  # PHOTOGRAPHS/train
    assert first == results()["config"]
    assert sorted(CELLS.glob("config*.yaml")) == [kept]
    assert results()["setting"]["changed_since_the_first_start"] == []


def measured_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]


def test_figures_are_the_kept_measurements():
    for record in records():
        measured: dict[str, float] = {}
        for stage, folder in EVALUATIONS:
            metrics = measured_in(CELLS / record.folders[stage] / folder)
            measured |= {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert {"kid_mean", "fid", "rfid", "lpips"} <= measured.keys()
        assert {name: measured[name] for name in measured if name in record.metrics} == record.metrics


@pytest.mark.parametrize("folder", [FOLDER, FOLLOW_UP], ids=lambda folder: folder.name)
def test_the_stored_analysis_is_what_its_cells_say(folder):
    again = json.loads(json.dumps(analysed_again(folder).as_dict()))
    for part, stored in results(folder)["analysis"].items():
        assert alike(again[part], stored), part


def test_the_follow_up_is_what_its_configuration_says_beside_cells_of_the_study():
    given = load_config(StudyConfig, str(FOLLOW_UP / "config.yaml"), ["data.train=train", "data.validation=val"])
    assert given == config(FOLLOW_UP)
    assert len(records(FOLLOW_UP)) == len(make_variants(given)) * len(given.seeds)
    metrics = {(record.variant, record.seed): record.metrics for record in records()}
    for record in records(FOLLOW_UP):
        if record.variant.endswith("-shifted"):
            measured = measured_in(FOLLOW_UP / "cells" / record.folders["diffusion"] / "evaluation-generation")
            samples = {name: value for name, value in record.metrics.items() if name in measured}
            assert {"kid_mean", "fid"} <= samples.keys()
            assert samples == {name: measured[name] for name in samples}
        else:
            assert record.metrics == metrics[record.variant, record.seed]


def test_autoencoders_that_were_trained_again_measured_the_same():
    again = sorted((FOLLOW_UP / "cells" / "autoencoders").iterdir())
    assert len(again) == 4
    for folder in again:
        name = EVALUATIONS[0][1]
        assert measured_in(folder / name) == measured_in(CELLS / "autoencoders" / folder.name / name)


def test_least_squares_on_the_kept_measurements_give_the_same_intervals():
    recompute = runpy.run_path(str(FOLDER / "recompute.py"))
    found = recompute["comparisons"]()
    assert len(found) == sum(len(claim.comparisons) for claim in config().claims.values())
    for comparison in found:
        assert comparison.again == pytest.approx(comparison.stored, rel=1e-9), comparison.label
    assert recompute["table"](found) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_figures_beside_the_report_are_what_its_cells_say(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    beside = runpy.run_path(str(FOLDER / "beside.py"))
    assert beside["table"](beside["rows"]()) in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "pages"),
    [(FOLDER, [ROOT, FOLDER]), (FOLLOW_UP, [FOLLOW_UP])],
    ids=["study", "follow-up"],
)
def test_the_readmes_and_the_summary_show_the_verdicts(folder, pages):
    table = verdict_table(config(folder), analysed_again(folder), records(folder)).splitlines()
    assert AT_THIS_SCALE in table[0]
    assert len(table) == 2 + len(config(folder).claims)
    for page in (*(place / "README.md" for place in pages), folder / "summary.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        assert table == lines[(start := lines.index(table[0])) : start + len(table)], page


@pytest.mark.parametrize("folder", [FOLDER, FOLLOW_UP], ids=lambda folder: folder.name)
def test_the_published_pages_show_samples_and_no_photographs(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    parts = {part.partition("</h2>")[0]: part for part in page.split("<h2>")}
    assert results(folder)["setting"]["photographs"] is False
    assert parts["Samples"].count("<img") >= len(make_variants(config(folder)))
    assert "<img" not in parts["Reconstructions"]
