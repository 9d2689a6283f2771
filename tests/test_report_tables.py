"""The figures of the comparison page: metrics and what they may be compared with, progress, cost, curves."""

import json
from pathlib import Path
from typing import Any

import pytest
from finished_runs import (
    MEASURED,
    RECONSTRUCTION,
    result,
    write,
    write_first,
    write_second,
    write_two,
)
from html_page import parse

from wavelatent.pipelines.info import info
from wavelatent.pipelines.report import report
from wavelatent.pipelines.report_figures import curve_figures, interval_figures
from wavelatent.pipelines.report_metrics import metric_rows
from wavelatent.pipelines.report_runs import Run, Variant, read_variants
from wavelatent.pipelines.report_tables import COST_HEAD, cost_rows, progress_table, sampling_flops, setting_table


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_two(tmp_path)


def test_only_what_another_protocol_defines_is_not_comparable(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "one", two[1]

    def marked(**changes: Any) -> dict[str, str]:
        write(second / "evaluation-reconstruction" / "metrics.json", result(**changes))
        row = metric_rows(read_variants([first, second]))[1]
        return {key: cell.not_comparable for key, cell in row.items() if cell.not_comparable}

    assert marked(autoencoder={"path": "two", "fingerprint": "b" * 64, "mixed_precision": "no"}) == {}
    assert marked(lpips_net="vgg") == {"lpips": "not comparable with one: lpips_net (vgg against alex)"}
    assert marked(weights_sha256="def").keys() == {"rfid"}
    assert marked(num_samples=32).keys() == {"psnr", "ssim", "lpips", "rfid"}
    assert marked(autoencoder={"path": "two", "fingerprint": "b" * 64, "mixed_precision": "bf16"}).keys() == {
        "psnr", "ssim", "lpips", "rfid"
    }  # fmt: skip
    page = parse(report([first, second], tmp_path / "report"))
    assert "not comparable with one: autoencoder.mixed_precision (bf16 against no)" in page.text
    assert page.text.count("not comparable") > 4


def test_the_settings_that_differ_are_shown_with_both_values_and_no_others(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "one", two[1]
    rows = dict(setting_table(read_variants([first, second]), 1))
    assert rows["model.bottleneck.kind"] == ["bounded", "kl"]
    assert rows["model.bottleneck.bound"] == ["3", "-"]
    assert all(len(set(values)) == 2 for values in rows.values())
    page = parse(report([first, second], tmp_path / "report"))
    assert "model.bottleneck.kind" in page.text
    assert "train.steps" not in page.text
    assert "None: the runs have the same settings." not in page.text
    again = parse(report([second, write_first(tmp_path / "three")], tmp_path / "again"))
    assert "None: the runs have the same settings." in again.text


def test_a_metric_that_could_not_be_computed_says_why(two: tuple[Path, Path], tmp_path: Path) -> None:
    partial = {**result(), "metrics": {"psnr": 20.0}, "not_computed": {"rfid": "no weights here"}}
    write(two[1] / "evaluation-reconstruction" / "metrics.json", partial)
    page = parse(report([two[1]], tmp_path / "report"))
    assert "two - rFID: not computed: no weights here" in page.text
    assert "20.00" in page.text


def test_intervals_stand_beside_their_figures(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "one", two[1]
    metrics = {**RECONSTRUCTION["metrics"], "rfid_interval": [31.04, 35.55], "psnr_interval": None}
    metrics |= {"rfid_extrapolated": 25.126, "fd_dinov2": 301.25, "fd_dinov2_interval": [290, 312]}
    write(first / "evaluation-reconstruction" / "metrics.json", {**RECONSTRUCTION, "metrics": metrics})
    write(second / "evaluation-reconstruction" / "metrics.json", result(weights_sha256="other"))
    variants = read_variants([first, second])
    rows = metric_rows(variants)
    assert rows[0]["rfid"].interval == (31.04, 35.55)
    assert rows[0]["psnr"].interval is None
    assert (rows[0]["rfd_dinov2"].text, rows[0]["rfd_dinov2"].interval) == ("301.2", (290, 312))
    figure, _ = interval_figures([variant.name for variant in variants], rows)
    assert "one 33.25 between 31.04 and 35.55; two 33.25 without interval, not comparable" in figure.alt
    page = parse(report([first, second], tmp_path / "report"))
    assert "[31.04, 35.55]N → ∞: 25.13" in page.text
    assert "not comparable: weights_sha256" in page.text
    assert "the intervals say how much it depends on the images that were measured, no more" in page.text
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["variants"][0]["intervals"] == {"rfid": [31.04, 35.55], "rfd_dinov2": [290, 312]}
    assert record["variants"][0]["extrapolated"] == {"rfid": 25.126}


def test_optional_metrics_are_columns_only_where_there_are_any(two: tuple[Path, Path]) -> None:
    second = two[0]
    file = second / "evaluation-generation" / "metrics.json"
    write(file, {"metrics": {"fid": 9.0}, "not_computed": {"density": "too few"}, "protocol": {}})
    assert "density" not in metric_rows(read_variants([second]))[0]
    write(file, {"metrics": {"fid": 9.0, "density": 0.875}, "protocol": {}})
    row = metric_rows(read_variants([second]))[0]
    assert row["density"].text == "0.875"
    assert "fd_dinov2" not in row


def test_progress_and_cost_of_stage_two(two: tuple[Path, Path], tmp_path: Path) -> None:
    second = two[0]
    lines = [{"step": s, "images": 8 * s, "seconds": 2.0 * s, "validation/loss": v} for s, v in ((10, 0.25), (20, 0.5))]
    write(second / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(second / "best" / "best.json", {"step": 10, "validation/loss": 0.25})
    protocol = {"evaluations": 35, "sampler": "heun", "steps": 18, "guidance": 1.0, "ema": 0.05}
    write(second / "evaluation-generation" / "metrics.json", {"metrics": {"fid": 9.0}, "protocol": protocol})
    (variant,) = read_variants([second])
    head, rows = progress_table({"one": second_of(variant)})
    assert dict(zip(head, rows[0], strict=True)) == {
        "variant": "one",
        "Validation loss, last": "0.5 at step 20",
        "Validation loss, best": "0.25 at step 10",
        "kept as best": "step 10, by Validation loss 0.25",
        "EMA widths": "0.1, 0.05; measured: 0.05",
    }
    denoise = info(str(second))["flops"]["denoise"]
    assert second_of(variant).flops == {"denoise": denoise}
    decode = info(str(tmp_path / "one"))["flops"]["decode"]
    assert sampling_flops(variant) == 35 * denoise + decode
    row = dict(zip(COST_HEAD, cost_rows([variant])[1], strict=True))
    assert row["per sample"].startswith("35 evaluations (heun, 18 steps): ")
    assert (row["training"], row["speed"], row["peak memory"]) == ("40 s (40 s)", "4 / s", "300 MiB")
    write(
        second / "evaluation-generation" / "metrics.json",
        {"protocol": {**protocol, "guidance": 2.0, "guide_sha256": "f"}},
    )
    (variant,) = read_variants([second])
    assert cost_rows([variant])[1][4] == "35 evaluations (heun, 18 steps, guidance 2 by another run)"
    assert sampling_flops(variant) is None  # how large the other network is does not stand there


def second_of(variant: Variant) -> Run:
    assert variant.second is not None
    return variant.second


def test_losses_by_noise_level_are_one_plot(two: tuple[Path, Path], tmp_path: Path) -> None:
    second = write_second(tmp_path / "measured", tmp_path / "one", measured=MEASURED)
    run = second_of(read_variants([second])[0])
    figures = curve_figures({"one": run})
    assert [figure.title for figure in figures] == [
        "Validation loss", "Quick FID (few samples: only within this page)", "Training loss",
        "Validation loss by noise level, at the end", "Validation loss over steps by noise level",
    ]  # fmt: skip
    assert "one 0-0.2: 0.05, 0.2-1: 0.05, 1-5: 0.05, 5-inf: 0.05" in figures[3].alt
