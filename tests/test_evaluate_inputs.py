"""What ``evaluate`` takes and leaves: ADM's .npz, DINOv2, refused samples, figures per image, intervals, text."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import COUNT, SIZE, HalfSize, TinyInception, pixels, write_folder
from torch import Tensor

from wavelatent.common import evaluation, reference_cache
from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.evaluation import Result
from wavelatent.common.feature_distances import FeatureStatistics
from wavelatent.common.image_metrics import psnr
from wavelatent.common.images import open_data, to_float, to_uint8
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.pipelines import evaluate
from wavelatent.pipelines.comparison import protocol_differences
from wavelatent.pipelines.evaluate import evaluate_generation, evaluate_reconstruction
from wavelatent.pipelines.evaluation_text import describe, paper_line
from wavelatent.pipelines.prepare import prepare


class TinyDino(TinyInception):
    """Three others."""

    name, dim, weights_sha256 = "dinov2-vit-tiny", 3, "of another stand-in"

    def __init__(self, source: str, device: object = "cpu") -> None:
        assert source == "some/folder"

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().std(dim=(2, 3)) / 255


def _missing(*_: object) -> None:
    raise MissingWeightsError("not here")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate, "InceptionFeatures", TinyInception)
    monkeypatch.setattr(evaluate, "Dinov2Features", TinyDino)
    monkeypatch.setattr(evaluate, "PerceptualDistance", _missing)
    monkeypatch.setattr(evaluate, "load_autoencoder", lambda spec: HalfSize())
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", pixels(0))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "samples", pixels(1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_and_reference_may_be_adm_archives(data, samples, tmp_path, save):
    save(tmp_path / "s.npz", pixels(1), arr_1=np.zeros(COUNT, np.int64))
    save(tmp_path / "d.npz", pixels(0))
    from_folders = evaluate_generation(samples=samples, data=str(data))
    from_files = evaluate_generation(samples=tmp_path / "s.npz", data=str(tmp_path / "d.npz"), batch_size=4)
    for name in ("fid", "kid_mean", "precision", "density", "fid_extrapolated"):
        assert from_files.metrics[name] == pytest.approx(from_folders.metrics[name], rel=1e-3, abs=1e-9), name
    assert Result.load(tmp_path / "s.metrics.json") == from_files
    assert from_files.protocol["num_samples"] == from_files.protocol["num_reference"] == COUNT
    assert from_files.protocol["crop"] is None, "nobody knows how they were cut"
    for num in (7, 6):  # a file is the same whatever is taken of it
        assert evaluate_generation(samples=tmp_path / "s.npz", data=str(data), num=num).protocol["num_samples"] == num
    with pytest.raises(WavelatentError, match="holds 13 images, 14 asked for"):
        evaluate_generation(samples=tmp_path / "s.npz", data=str(data), num=14)
    reconstruction = evaluate_reconstruction("half", str(tmp_path / "d.npz"), num_images=6)
    assert reconstruction.metrics["psnr"] == pytest.approx(
        evaluate_reconstruction("half", str(data), num_images=6).metrics["psnr"]
    )


def _statistics_of(pixels: np.ndarray) -> dict[str, np.ndarray]:
    statistics = FeatureStatistics.of(TinyInception()(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    return {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}


def test_given_statistics_are_accepted_for_fid_alone_and_flagged(data, samples, tmp_path, capsys):
    of_images = evaluate_generation(samples=samples, data=str(data), dinov2="some/folder")
    np.savez(tmp_path / "stats.npz", **_statistics_of(pixels(0)))
    given = str(tmp_path / "stats.npz")
    result = evaluate_generation(samples=samples, data=given, dinov2="some/folder", out=tmp_path / "out")
    assert set(result.metrics) == {"fid", "fid_extrapolated"}
    assert result.metrics["fid"] == pytest.approx(of_images.metrics["fid"], rel=1e-6)
    others = {"kid_mean", "kid_std", "precision", "recall", "density", "coverage", "fd_dinov2"}
    assert set(result.not_computed) == others
    assert "without images" in result.not_computed["kid_mean"]
    assert "6 features, not 3" in result.not_computed["fd_dinov2"]
    assert result.protocol["num_reference"] is None
    assert result.protocol["reference_statistics"]
    assert evaluate_generation(samples=samples, data=given, dinov2="some/folder", out=tmp_path / "out") == result
    assert "already measured" in capsys.readouterr().err, "there is nothing more to be had"
    assert any(note.startswith("given-statistics:") for note in result.protocol["notes"])
    assert any(
        line.startswith("reference_statistics")
        for line in protocol_differences(of_images.protocol, result.protocol, "fid")
    )
    assert "against given statistics" in describe(result)
    with pytest.raises(UsageError, match="leave out --num-reference"):
        evaluate_generation(samples=samples, data=given, num_reference=5)
    with pytest.raises(UsageError, match="holds statistics: give the images"):
        evaluate_reconstruction("half", given)
    with pytest.raises(WavelatentError, match="give it as --data"):
        evaluate_generation(samples=tmp_path / "stats.npz", data=str(data))


def test_samples_of_two_sizes_are_not_comparable_though_the_statistics_have_none(samples, tmp_path, capsys):
    np.savez(tmp_path / "stats.npz", **_statistics_of(pixels(0)))
    larger = write_folder(tmp_path / "larger", pixels(1).repeat(2, axis=1).repeat(2, axis=2))
    given = str(tmp_path / "stats.npz")
    first, other = (evaluate_generation(samples=each, data=given).protocol for each in (samples, larger))
    assert f"size ({2 * SIZE} against {SIZE})" in protocol_differences(first, other, "fid")


def test_a_result_that_another_takes_the_place_of_is_named(data, samples, capsys):
    evaluate_generation(samples=samples, data=str(data))
    evaluate_generation(samples=samples, data=str(data), num=COUNT - 1)
    told = capsys.readouterr().err
    assert f"in the place of {samples / 'metrics.json'}, which has another" in told
    assert "num_samples" in told


def test_an_archive_with_images_and_statistics_gives_fid_by_these_and_the_rest_by_those(samples, tmp_path):
    np.savez(tmp_path / "both.npz", pixels(0), **_statistics_of(pixels(2, 40)))
    np.savez(tmp_path / "images.npz", pixels(0))
    np.savez(tmp_path / "more.npz", pixels(2, 40))
    both, images, more = (
        evaluate_generation(samples=samples, data=str(tmp_path / f"{name}.npz"), intervals=False).metrics
        for name in ("both", "images", "more")
    )
    assert both["fid"] == pytest.approx(more["fid"], rel=1e-6)
    assert both["fid"] != pytest.approx(images["fid"], rel=1e-2)
    assert (both["kid_mean"], both["recall"]) == (images["kid_mean"], images["recall"])
    reconstructed = [
        evaluate_reconstruction("half", str(tmp_path / f"{name}.npz"), intervals=False).metrics
        for name in ("both", "images")
    ]
    assert reconstructed[0] == reconstructed[1], "the reference of a reconstruction is its own originals"


def test_archives_that_cannot_be_read_are_refused_by_name(data, tmp_path):
    def refused(match: str) -> None:
        with pytest.raises(WavelatentError, match=match):
            evaluate_generation(samples=tmp_path / "bad.npz", data=str(data))

    refused("no such file")
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    refused("cannot be read as .npz")
    np.savez(tmp_path / "bad.npz", something=np.zeros(3))
    refused("holds neither arr_0")
    np.savez(tmp_path / "bad.npz", np.zeros((2, 3, SIZE, SIZE), np.uint8))
    refused(r"arr_0 is uint8 \[2, 3, 16, 16\], expected uint8 \[N, H, W, 3\]")
    np.savez(tmp_path / "bad.npz", np.zeros((2, SIZE, SIZE, 3), np.float32))
    refused("arr_0 is float32")
    np.savez(tmp_path / "bad.npz", np.array([{}]))
    refused("Python objects")
    np.savez(tmp_path / "bad.npz", np.zeros((2, SIZE, SIZE + 2, 3), np.uint8))
    refused("18x16 px and the reference .* is 16")
    with pytest.raises(UsageError, match="18x16 px: they are not resized"):
        evaluate_generation(samples=data, data=str(tmp_path / "bad.npz"))


def test_samples_that_are_not_what_their_ending_says_are_refused(data, samples):
    def refused(match: str) -> None:
        with pytest.raises(WavelatentError, match=match):
            evaluate_generation(samples=samples, data=str(data))

    last = samples / f"{COUNT - 1:06d}.png"
    image = Image.open(last).copy()
    image.save(last, format="jpeg")
    refused("000012.png holds JPEG data")
    image.save(last.with_suffix(".tif"), compression="jpeg")
    last.unlink()
    refused("000012.tif holds TIFF data")
    last.with_suffix(".tif").unlink()
    for mode, word in (("P", "palette"), ("RGBA", "alpha"), ("LA", "alpha"), ("1", "black and white")):
        image.convert(mode).save(last)
        refused(rf"000012.png has mode {mode} \({word}|000012.png has mode {mode} \(a {word}")


def test_grey_samples_are_flagged(data, samples):
    Image.open(samples / "000005.png").convert("L").save(samples / "000005.png")
    result = evaluate_generation(samples=samples, data=str(data))
    assert "grey-samples: 1 of the samples are grey (000005.png is the first)" in result.protocol["notes"]


def test_dinov2_has_a_name_of_its_own_and_needs_no_inception(data, samples, monkeypatch):
    without = evaluate_generation(samples=samples, data=str(data))
    with_both = evaluate_generation(samples=samples, data=str(data), dinov2="some/folder")
    assert set(with_both.metrics) - set(without.metrics) == {"fd_dinov2", "fd_dinov2_extrapolated"}
    assert with_both.metrics["fid"] == without.metrics["fid"]
    assert with_both.intervals["fd_dinov2"][0] <= with_both.metrics["fd_dinov2"] <= with_both.intervals["fd_dinov2"][1]
    assert with_both.protocol["dinov2"]["features"] == "dinov2-vit-tiny"
    assert "FD-DINOv2" in paper_line(with_both)
    again = evaluate_generation(samples=samples, data=str(data), dinov2="some/folder")
    assert again == with_both, "finished"
    monkeypatch.setattr(TinyDino, "weights_sha256", "of a third one")
    again = evaluate_generation(samples=samples, data=str(data), dinov2="some/folder")
    assert again.protocol["dinov2"]["weights_sha256"] == "of a third one", "in the same folder"
    assert evaluate_reconstruction("half", str(data), dinov2="some/folder").metrics["fd_dinov2"] > 0
    monkeypatch.setattr(evaluate, "InceptionFeatures", _missing)
    alone = evaluate_generation(samples=samples, data=str(data), dinov2="some/folder", overwrite=True)
    assert alone.metrics["fd_dinov2"] == with_both.metrics["fd_dinov2"]
    others = {"fid", "kid_mean", "kid_std", "precision", "recall", "density", "coverage"}
    assert alone.not_computed == dict.fromkeys(others, "not here")
    assert "fid" not in alone.metrics
    monkeypatch.undo()
    assert not Result.load(samples / "metrics.json").is_final, "what was missing may be here next time"


def test_every_image_has_its_figures_and_the_worst_are_listed_and_shown(data, tmp_path):
    noisy = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(noisy).save(data / "000007.png")  # which the autoencoder keeps least of
    result = evaluate_reconstruction("half", str(data), num_images=10, out=tmp_path / "out")
    images = open_data(str(data))
    rows = list(csv.DictReader((tmp_path / "out" / "per-image.csv").open()))
    assert len(rows) == 10
    assert [int(row["index"]) for row in rows] == sorted(int(row["index"]) for row in rows)
    original = torch.from_numpy(np.stack([images.image(int(row["index"])) for row in rows])).permute(0, 3, 1, 2)
    decoded = to_uint8(HalfSize().decode(HalfSize().encode(to_float(original)).mode()))
    values = [float(row["psnr"]) for row in rows]
    assert values == pytest.approx(psnr(decoded, original).tolist())
    assert np.mean(values) == pytest.approx(result.metrics["psnr"])
    assert rows[3]["name"] == f"{int(rows[3]['index']):06d}.png"
    worst = result.worst["psnr"]
    assert len(worst) == 8
    assert [image["value"] for image in worst] == pytest.approx(sorted(values)[:8])
    assert (worst[0]["index"], worst[0]["name"]) == (7, "000007.png")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["worst"]["psnr"] == worst
    with Image.open(tmp_path / "out" / "worst-reconstructions.png") as picture:
        assert picture.size == (8 * SIZE + 7 * 2, 2 * SIZE + 2)
        shown = np.asarray(picture)
    assert np.array_equal(shown[:SIZE, :SIZE], noisy), "the worst original is first, above"
    place = [int(row["index"]) for row in rows].index(7)
    assert np.array_equal(shown[SIZE + 2 :, :SIZE], decoded[place].permute(1, 2, 0).numpy())
    assert "worst by psnr: 000007.png" in describe(result)


def test_images_without_a_file_are_named_by_their_place(data, tmp_path):
    prepare(str(data), SIZE, tmp_path / "prepared", num_workers=0)
    np.savez(tmp_path / "d.npz", pixels(0))
    for spec, first in (("prepared", "images-00000.npy[0]"), ("d.npz", "arr_0[0]")):
        out = tmp_path / f"{spec}-out"
        result = evaluate_reconstruction("half", str(tmp_path / spec), out=out, intervals=False)
        assert next(csv.DictReader((out / "per-image.csv").open()))["name"] == first
        assert result.worst["psnr"][0]["name"] == first.replace("[0]", f"[{result.worst['psnr'][0]['index']}]")


def test_the_warning_of_few_images_begins_below_its_limit_on_either_side(data, samples, monkeypatch):
    def warned(limit: int, **options: object) -> bool:
        monkeypatch.setattr(evaluation, "SMALL_SAMPLE", limit)
        result = evaluate_generation(samples=samples, data=str(data), overwrite=True, intervals=False, **options)
        return any(note.startswith("small-sample: fid") for note in result.protocol.get("notes", []))

    assert not warned(COUNT)
    assert warned(COUNT + 1)
    assert warned(COUNT, num=COUNT - 1)
    assert warned(COUNT, num_reference=COUNT - 1)


def test_several_results_in_one_folder_keep_their_figures_apart(data, tmp_path):
    for count in (4, 6):
        evaluate_reconstruction("half", str(data), num_images=count, out=tmp_path / f"n{count}.json", intervals=False)
        assert len((tmp_path / f"n{count}-per-image.csv").read_text().splitlines()) == count + 1


def test_without_intervals_there_is_no_interval_nor_extrapolation(data, samples):
    result = evaluate_generation(samples=samples, data=str(data), intervals=False)
    assert result.intervals == {}
    assert "fid_extrapolated" not in result.metrics
    assert result.protocol["intervals"] is None
    with_them = evaluate_generation(samples=samples, data=str(data))
    assert with_them.metrics["fid"] == result.metrics["fid"]
    assert "fid" in with_them.intervals, "measured again, as it was not asked for before"
    assert protocol_differences(result.protocol, with_them.protocol, "fid") == [], (
        "how sure a figure is does not define it"
    )


def test_a_rerun_gives_the_same_bits_whatever_was_cached(data, samples):
    first, second = (evaluate_generation(samples=samples, data=str(data), overwrite=True) for _ in range(2))
    assert first.metrics == second.metrics
    assert first.intervals == second.intervals
    assert first.protocol == second.protocol


def test_the_text_shows_figure_interval_and_n_and_one_line_for_a_paper(data, samples):
    result = evaluate_generation(samples=samples, data=str(data), num=11)
    *lines, paper = describe(result).splitlines()
    fid, (low, high) = result.metrics["fid"], result.intervals["fid"]
    assert f"fid: {fid:.6g} [{low:.6g}, {high:.6g}]" in lines
    assert f"N = 11 against {COUNT}" in lines
    assert any(
        re.match(r"fid_extrapolated: .* \[.*\] \(estimated for infinitely many samples, error ", line) for line in lines
    )
    assert any(line.startswith("warning: small-sample: fid of 11 images") for line in lines)
    assert paper.startswith(f"FID {fid:.2f} [{low:.2f}, {high:.2f}], KID ")
    for part in ("Inception 2015-12-05", "16 px", "lanczos", "adm-center", f"KID of 100 subsets of {11 // 2}"):
        assert part in paper
    assert f"N = 11 against {COUNT} of {data.name}, " in paper, "and not where it lies on this machine"
    assert "estimated" not in paper
    assert "extrapolated" not in paper


def test_a_result_survives_the_disk_and_intervals_stand_beside_their_figures(tmp_path):
    result = Result(metrics={"fid": 3.0, "recall": 0.5}, intervals={"fid": (2.0, 4.0)}, protocol={}, seconds=1)
    content = result.to_dict()
    assert list(content["metrics"].items()) == [("fid", 3.0), ("fid_interval", [2.0, 4.0]), ("recall", 0.5)]
    assert set(content) == {"metrics", "protocol", "seconds"}
    result.save(tmp_path / "metrics.json")
    assert Result.load(tmp_path / "metrics.json") == result
