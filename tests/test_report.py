"""The comparison page: whole in one file, every variant on it, and honest about what is missing or differs."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import (
    RECONSTRUCTION,
    SIDE,
    TINY,
    colour,
    result,
    write,
    write_first,
    write_health,
    write_samples,
    write_second,
    write_two,
)
from html_page import parse
from PIL import Image

from wavelatent.common.errors import UsageError
from wavelatent.pipelines import report_runs
from wavelatent.pipelines.report import report
from wavelatent.pipelines.report_health import Health, health_link, health_of, health_rows
from wavelatent.pipelines.report_latents import distinct_latents, latents_of
from wavelatent.pipelines.report_metrics import metric_rows
from wavelatent.pipelines.report_paths import hide_paths, shorten
from wavelatent.pipelines.report_pictures import LARGEST_PNG, embed, tile, untile
from wavelatent.pipelines.report_reconstructions import reconstruction_strips, worst_strips
from wavelatent.pipelines.report_runs import by_run, read_variants
from wavelatent.pipelines.report_samples import sample_sheets
from wavelatent.pipelines.sample_images import weights_sha256
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write_two(tmp_path)


def test_the_page_needs_nothing_but_itself(two: tuple[Path, Path], tmp_path: Path) -> None:
    path = report(two, tmp_path / "report", title="<b>Runs</b>", notes=["one & two"])
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "report.json"}
    assert path.stat().st_size < 2_000_000
    text, page = path.read_text(encoding="utf-8"), parse(path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert str(tmp_path.parent) not in text  # whose machine it is
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or (tag, name) == ("img", "src"), (tag, name, value)
    assert len(page.images) >= 3 + 4 + 1  # reconstructions and samples, curves, a histogram
    for attributes in page.images:
        scheme, _, encoded = (attributes["src"] or "").partition(",")
        assert scheme == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
            image.verify()
        assert attributes["alt"]
    assert "<b>Runs</b>" in page.text  # escaped: text, not a tag
    assert "one & two" in page.text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_every_variant_and_every_gap_is_named(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = parse(report(two, tmp_path / "report"))
    for text in ("one", "two", "21.50", "33.25", "0.123", "not computed", "there is no stage-2 run"):
        assert text in page.text
    assert "no evaluation-reconstruction/metrics.json; run: wavelatent evaluate reconstruction --ae" in page.text
    assert "not comparable" not in page.text
    assert "Reconstructions were measured on 64 against 64 reference images. So few images bias rFID" in page.text
    assert "They are training images" in page.text
    assert "No variant is claimed to be better" in page.text
    assert "python cli.py train 'a b'" in page.text
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    one, other = record["variants"]
    assert one["metrics"] == RECONSTRUCTION["metrics"]
    assert one["latents"]["saturated"] == pytest.approx(0.5)  # 2.9 of 3 in one of two channels
    assert [c["std"] for c in one["latents"]["channels"]] == pytest.approx([2.9, 0.0])
    assert other["latents"] is None
    assert set(other["not_computed"]) == {
        "psnr", "ssim", "lpips", "rfid", "fid", "kid_mean", "precision", "recall"
    }  # fmt: skip


def test_runs_become_variants(two: tuple[Path, Path], tmp_path: Path) -> None:
    second, other = two
    first = tmp_path / "one"
    for given in ([first, second], [second, first], [second]):  # the last: the stage-1 run is where it is recorded
        (variant,) = read_variants(given)
        assert variant.first is not None
        assert variant.second is not None
        assert (variant.first.path.name, variant.second.path) == ("one", second)
    assert [v.name for v in read_variants([other, first, second])] == ["two", "one"]
    (tmp_path / "one").rename(tmp_path / "moved")
    (lonely,) = read_variants([second])
    assert lonely.first is None
    assert f"recorded: {tmp_path}/one" in lonely.notes[0]
    with pytest.raises(UsageError, match="not a run folder"):
        read_variants([tmp_path])
    with pytest.raises(UsageError, match="at least one"):
        read_variants([])


def test_variants_are_named_by_the_folder_that_tells_them_apart(tmp_path: Path) -> None:
    paths = [write_first(tmp_path / name / "autoencoder") for name in ("kl", "bounded")]
    assert [v.name for v in read_variants(paths)] == ["kl", "bounded"]


def test_an_unfinished_run_is_said_to_be(two: tuple[Path, Path], tmp_path: Path) -> None:
    write(two[1] / "status.json", {"state": "stopped", "step": 7, "of": 20})
    assert "two is stopped at step 7 of 20." in parse(report([two[1]], tmp_path / "report")).text


def test_lost_pieces_are_stated(two: tuple[Path, Path], tmp_path: Path) -> None:
    second = two[0]
    for folder in (second, tmp_path / "one"):
        for grid in (folder / "samples").iterdir():
            grid.unlink()
    (tmp_path / "one-diffusion-cache" / "manifest.json").unlink()
    (second / "metrics.jsonl").unlink()
    page = parse(report([second], tmp_path / "report"))
    assert page.text.count("saved no sample grids") == 2
    assert "no histograms" in page.text
    assert "none that logged anything" in page.text
    assert "2.900" in page.text  # the statistics are in the run's own record


def test_bad_images_are_skipped_up_to_the_fraction_that_is_allowed(two: tuple[Path, Path], tmp_path: Path) -> None:
    Autoencoder(AutoencoderConfig.model_validate(TINY)).save_pretrained(two[1] / "model")
    for number in range(3):
        write(tmp_path / "photos" / f"{number}.png", "")
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "photos" / f"{number}.png")
    write(tmp_path / "photos" / "3.png", "not an image")
    options = {"out": tmp_path / "report", "data": str(tmp_path / "photos")}
    assert "1 of 4 images" in parse(report(two[1:], **options)).text
    page = parse(report(two[1:], **options, max_bad_fraction=0.25))
    assert "1 of 4 images" not in page.text
    assert f"from .../{tmp_path.name}/photos" in page.text


def pixels(attributes: dict[str, str | None]) -> np.ndarray:
    """Return the pixels of an ``img``."""
    _, _, encoded = (attributes["src"] or "").partition(",")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return np.asarray(image.convert("RGB"))


def colours(sheet: np.ndarray, count: int) -> list[tuple[int, ...]]:
    """Return the colours in the middles of the first ``count`` tiles of a sheet."""
    return [tuple(cell[SIDE // 2, SIDE // 2].tolist()) for cell in untile(sheet, min(count, 4), count)]


def test_samples_are_of_the_seeds_that_all_have(two: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_second(tmp_path / "two-diffusion", two[1], num_samples=3)
    sheets, same = sample_sheets(read_variants([two[0], third]))
    assert same
    for sheet in sheets:
        assert sheet.source == "seeds 0-2; 3 steps, by the averaged weights at training step 20"
        assert colours(pixels({"src": sheet.uri}), 3) == [colour(seed) for seed in range(3)]


def test_folders_of_samples_are_shown_side_by_side(two: tuple[Path, Path], tmp_path: Path) -> None:
    second = two[0]
    plain = write_samples(second / "samples-32", second, range(8))
    guided = write_samples(tmp_path / "guided", second, range(3, 12), guidance=2.0, guide_sha256="f")
    (guided / "000004.png").write_text("broken")
    sheets, same = sample_sheets(read_variants([guided]))  # the run is where the samples say
    assert same
    assert [sheet.source for sheet in sheets] == [
        "seeds 3, 5, 6, 7; heun, 18 steps, guidance 2 by another run, EMA 0.05, in guided",
        "seeds 3, 5, 6, 7; heun, 18 steps, EMA 0.05, in samples-32",
    ]
    for sheet in sheets:
        assert colours(pixels({"src": sheet.uri}), 4) == [colour(seed) for seed in (3, 5, 6, 7)]
    for seed in range(3, 12):
        (guided / f"{seed:06d}.png").rename(guided / f"{seed + 100:06d}.png")
    sheets, same = sample_sheets(read_variants([second, guided]))
    assert not same
    assert [sheet.source.partition(";")[0] for sheet in sheets] == [
        "seeds 103, 105, 106, 107, 108, 109, 110, 111", "seeds 0-7"
    ]  # fmt: skip
    write(plain / "metrics.json", {"metrics": {"fid": 12.5}, "protocol": {"num_samples": 8}})
    (variant,) = read_variants([second])
    assert metric_rows([variant])[0]["fid"].value == 12.5
    write(guided / "samples.json", {"run": str(tmp_path / "gone")})
    with pytest.raises(UsageError, match="gone, which is not there"):
        read_variants([guided])


def test_a_link_leads_to_a_folder_of_any_name(tmp_path: Path) -> None:
    page = tmp_path / "lr 1e-3 #2?" / "health.html"
    assert health_link(Health({}, page=page), tmp_path / "report") == "../lr%201e-3%20%232%3F/health.html"


def test_faults_of_the_latents_stand_first_and_link_to_their_page(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "one", two[1]
    write_health(first / "latent-health", saturation="ok", dead_channel="note", heavy_tail="ok")
    write_health(second, saturation="ok", heavy_tail="fault")
    found = {variant.name: health_of(variant) for variant in read_variants([first, second])}
    rows = health_rows(found)
    assert [(row.name, row.worst) for row in rows] == [
        ("scale: heavy_tail", "fault"), ("scale: dead_channel", "note"), ("scale: saturation", "ok")
    ]  # fmt: skip
    assert [cell and cell.level for cell in rows[1].cells] == ["note", None]
    page = parse(report([first, second], tmp_path / "report"))
    assert "heavy_tail measured 3. Threshold: below 2 (ours)." in page.text
    assert "scale: heavy tail" in page.text
    assert "two, locality: not computed: too small" in page.text
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["../one/latent-health/health.html", "../two/health.html"]
    assert all((tmp_path / "report" / (link or "")).is_file() for link in links)
    assert "not diagnosed" not in page.text


def test_health_of_another_autoencoder_is_doubted(two: tuple[Path, Path]) -> None:
    Autoencoder(AutoencoderConfig.model_validate(TINY)).save_pretrained(two[1] / "model")
    write_health(two[1], saturation="ok")
    health = health_of(read_variants(two[1:])[0])
    assert health is not None
    assert health.doubt == "two: the autoencoder has changed since it was diagnosed; run diagnose again"


def test_health_that_was_measured_otherwise_is_not_comparable(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "one", two[1]
    for run, images, spec in ((first, 2000, "here/faces"), (second, 500, "there/faces")):
        write_health(run, dead_channel="ok")
        record = json.loads((run / "health.json").read_text())
        record["protocol"] |= {"num_images": images, "data": {"spec": spec, "fingerprint": "d"}, "sections": [spec]}
        write(run / "health.json", record)
    page = parse(report([first, second], tmp_path / "report"))
    assert "two: not comparable with one: num_images (500 against 2000)" in page.text
    assert page.text.count("not comparable with") == 1
    variants = json.loads((tmp_path / "report" / "report.json").read_text())["variants"]
    assert [bool(variant["health"]["not_comparable"]) for variant in variants] == [False, True]


def test_metrics_of_other_weights_are_doubted(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = Autoencoder(AutoencoderConfig.model_validate(TINY))
    autoencoder.save_pretrained(two[1] / "model")
    denoiser = torch.nn.Linear(2, 3)
    monkeypatch.setattr(report_runs, "load_diffusion", lambda run: denoiser)

    def doubts(fingerprint: str, weights: str, ema: float = 0.1, ema_step: int | None = None) -> list[str]:
        content = result(autoencoder={"fingerprint": fingerprint})
        write(two[1] / "evaluation-reconstruction" / "metrics.json", content)
        protocol = {"model_sha256": weights, "ema": ema, "ema_step": ema_step}
        content = {"metrics": {"fid": 3.0}, "protocol": protocol}
        write(two[0] / "evaluation-generation" / "metrics.json", content)
        notes = [note for variant in read_variants(two) for note in variant.notes]
        return [note for note in notes if note.endswith("are not of the weights that it has now; run evaluate again")]

    now = autoencoder.fingerprint(), weights_sha256(denoiser)
    assert doubts(*now) == []
    assert [note.partition(" are")[0] for note in doubts("b" * 64, "c" * 64)] == [
        f"the metrics of {run}" for run in two
    ]
    assert doubts(now[0], "c" * 64, ema=0.05) == [], "the model folder holds another average"
    assert doubts(now[0], "c" * 64, ema_step=3) == [], "or that of another step"


def test_no_absolute_path_is_left() -> None:
    rest = '</p> <img src="data:image/jpeg;base64,/9j/4AA/Q=="> 1/s a/b/c'
    page = f'<p>of /home/jo/runs/kl/diffusion, see "/home/jo doe/x/y".{rest}'
    assert hide_paths(page, [Path("/home/jo doe/x/y")]) == f'<p>of .../kl/diffusion, see ".../x/y".{rest}'
    picture = '<img src="data:image/png;base64,qq/ae+/ae/out=">'
    relative = f"mine/out/x, /out/x of /ae (/aerial), tag:/ae, <b></ae>{picture}"
    told = f"mine/out/x, .../out/x of .../ae (/aerial), tag:.../ae, <b></ae>{picture}"
    assert hide_paths(relative, [Path("/ae"), Path("/out")]) == told
    assert hide_paths("of diffusers:/home/jo/models/vae,") == "of diffusers:.../models/vae,"
    assert hide_paths("https://arxiv.org/abs/2405.14477 ../one/health.html") == (
        "https://arxiv.org/abs/2405.14477 ../one/health.html"
    )


def test_digests_are_shortened() -> None:
    assert shorten(f"weights ({'0123456789abcdef' * 4})") == "weights (0123456789ab...)"


def test_the_worst_reconstructions_are_those_that_evaluate_saved(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "one", two[1]
    folder = first / "evaluation-reconstruction"
    images = [{"index": 7, "name": "a/7.png", "value": 0.51234}, {"index": 2, "name": None, "value": 0.4}]
    write(folder / "metrics.json", {**RECONSTRUCTION, "worst": {"psnr": images[::-1], "lpips": images}})
    variants = read_variants([first, second])
    assert [strip.missing for strip in worst_strips(variants)] == [
        "there is no worst-reconstructions.png beside its metrics", "not measured"
    ]  # fmt: skip
    saved = np.full((SIDE, 2 * SIDE, 3), colour(5), dtype=np.uint8)
    Image.fromarray(saved).save(folder / "worst-reconstructions.png")
    strip, _ = worst_strips(variants)
    assert strip.source == "by LPIPS: a/7.png (0.512), 2 (0.4)"
    assert (pixels({"src": strip.uri}) == saved).all()


def test_large_pictures_are_reduced() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 1500, 3), dtype=np.uint8)
    uri = embed(noise, widest=1000)
    assert pixels({"src": uri}).shape == (200, 1000, 3)
    assert uri.startswith("data:image/jpeg;base64,/9j/")
    assert embed(noise[:40, :40]).startswith("data:image/png;base64,")
    assert LARGEST_PNG == 250_000


def test_tiles_come_apart_again() -> None:
    cells = [np.full((5, 5, 3), n, dtype=np.uint8) for n in range(7)]
    grid = tile(cells, 3)
    assert grid.shape == (3 * 5 + 2 * 2, 3 * 5 + 2 * 2, 3)
    assert [int(cell[2, 2, 0]) for cell in untile(grid, 3, 7)] == list(range(7))
    assert all(cell.shape == (5, 5, 3) for cell in untile(grid, 3, 7))


def test_runs_that_share_an_autoencoder_show_it_once(two: tuple[Path, Path], tmp_path: Path) -> None:
    first = tmp_path / "one"
    others = [write_second(tmp_path / f"run-{number}", first) for number in range(3)]
    variants = read_variants([two[0], *others])
    assert [strip.name for strip in reconstruction_strips(variants)] == [
        "originals", "one-diffusion, run-0 and 2 more"
    ]  # fmt: skip
    assert list(by_run(variants, 2)) == ["one-diffusion", "run-0", "run-1", "run-2"]
    found = distinct_latents(variants, {variant.name: latents_of(variant) for variant in variants})
    assert list(found) == ["one-diffusion, run-0 and 2 more"]
