"""The comparison page: whole in one file, every variant on it, and honest about what is missing or differs."""

import base64
import io
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from wavelatent.common.errors import UsageError
from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord, LatentCache
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter
from wavelatent.common.latents import Posterior
from wavelatent.pipelines.diffusion_run import inputs_of
from wavelatent.pipelines.report import report
from wavelatent.pipelines.report_pictures import tile, untile
from wavelatent.pipelines.report_runs import read_variants
from wavelatent.pipelines.report_tables import flatten, metric_rows
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig

SIDE = 16
RECONSTRUCTION = {
    "metrics": {"psnr": 21.5, "ssim": 0.71, "lpips": 0.123, "rfid": 33.25},
    "protocol": {
        "num_samples": 64, "num_reference": 64, "features": "inception-v3-2015-12-05", "weights_sha256": "abc",
        "resize": {"data": "none", "features": "bilinear"}, "lpips_net": "alex", "reference_fingerprint": "d" * 64,
        "autoencoder": {"path": "one", "fingerprint": "a" * 64, "mixed_precision": "no"},
    },
    "seconds": 1.0,
}  # fmt: skip


@dataclass
class Page(HTMLParser):
    """What a test asks of a page."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_run(path: Path, config: dict, inputs: dict, names: tuple[str, ...], grid: tuple[int, int]) -> Path:
    """Write a finished run; the cells of its sample grid, ``(rows, columns)``, are flat and tell their number."""
    write(path / "config.yaml", yaml.safe_dump(config))
    write(path / "inputs.json", inputs)
    write(path / "status.json", {"state": "done", "step": 20, "of": 20, "peak_memory_bytes": 300 * 2**20})
    write(path / "environment.json", {"command_line": ["/x/cli.py", "train", "a b"], "versions": {"torch": "2.9"}})
    lines = [{"step": s, "images": 8 * s, "seconds": 2.0 * s, **dict.fromkeys(names, 1 / s)} for s in (10, 20)]
    write(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "los')
    cells = [np.full((SIDE, SIDE, 3), 10 * n, dtype=np.uint8) for n in range(grid[0] * grid[1])]
    (path / "samples").mkdir()
    Image.fromarray(tile(cells, grid[1])).save(path / "samples" / "step-20.png")
    Image.fromarray(tile(cells, grid[1])[::-1]).save(path / "samples" / "step-9.png")
    return path


def write_first(path: Path, **model: Any) -> Path:
    data = {"spec": "synthetic:64", "fingerprint": "d" * 64, "transform": {"size": SIDE}}
    config = {"model": {"channels": 2, "bottleneck": {"kind": "kl"}, **model}, "seed": 0}
    return write_run(path, config, {"kind": "autoencoder", "data": data}, ("loss/l1", "psnr"), (2, 8))


def write_second(path: Path, first: Path, *, num_samples: int = 4) -> Path:
    """A stage-2 run on a cache whose first channel is at +-2.9 and whose second is at 0."""
    plan = CachePlan(
        autoencoder=AutoencoderRecord(fingerprint="a" * 64, path=str(first.resolve())),
        data=DataRecord(fingerprint="d" * 64, spec="synthetic:64", transform={"size": SIDE}),
        shape=(2, 3, 5),
        count=10,
        shard_size=4,
    )
    writer = CacheWriter(path.with_name(f"{path.name}-cache"), plan)
    for number in writer.unfinished():
        index = torch.tensor(writer.remaining(number))
        signs = torch.where(index % 2 == 0, 2.9, -2.9)[:, None, None].expand(-1, 3, 5)
        writer.add(number, index, Posterior(torch.stack([signs, torch.zeros_like(signs)], dim=1)))
    writer.finish()
    cache = LatentCache.open(path.with_name(f"{path.name}-cache"))
    config = {
        "model": {"kind": "unet", "channels": 32, "multipliers": [1], "attention_levels": [], "head_channels": 8},
        "whitening": "scalar",
        "train": {"num_samples": num_samples, "sample_steps": 3},
        "seed": 0,
    }
    return write_run(path, config, inputs_of(cache), ("loss/denoising", "gradient_norm"), (2, 2))


def result(**changes: Any) -> dict[str, Any]:
    return {**RECONSTRUCTION, "protocol": {**RECONSTRUCTION["protocol"], **changes}}  # type: ignore[dict-item]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A whole variant and a stage-1 run by itself; returns the stage-2 run of the one, and the other."""
    first = write_first(tmp_path / "one", bottleneck={"kind": "bounded", "bound": 3.0})
    write(first / "evaluation-reconstruction" / "metrics.json", RECONSTRUCTION)
    return write_second(tmp_path / "one-diffusion", first), write_first(tmp_path / "two")


def test_the_page_needs_nothing_but_itself(two: tuple[Path, Path], tmp_path: Path) -> None:
    path = report(two, tmp_path / "report", title="<b>Runs</b>", notes=["one & two"])
    assert {p.name for p in path.parent.iterdir()} == {"index.html", "report.json"}
    text, page = path.read_text(encoding="utf-8"), parse(path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
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


def test_a_metric_that_could_not_be_computed_says_why(two: tuple[Path, Path], tmp_path: Path) -> None:
    partial = {**result(), "metrics": {"psnr": 20.0}, "not_computed": {"rfid": "no weights here"}}
    write(two[1] / "evaluation-reconstruction" / "metrics.json", partial)
    page = parse(report([two[1]], tmp_path / "report"))
    assert "two - rFID: not computed: no weights here" in page.text
    assert "20.00" in page.text


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
    tiny = {"encoder": {"kind": "litevae", "size": "s", "levels": 1, "num_res_blocks": 1}, "decoder": {"width": "tiny"}}
    Autoencoder(AutoencoderConfig.model_validate(tiny)).save_pretrained(two[1] / "model")
    for number in range(3):
        write(tmp_path / "photos" / f"{number}.png", "")
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "photos" / f"{number}.png")
    write(tmp_path / "photos" / "3.png", "not an image")
    options = {"out": tmp_path / "report", "data": str(tmp_path / "photos")}
    assert "1 of 4 images" in parse(report(two[1:], **options)).text
    page = parse(report(two[1:], **options, max_bad_fraction=0.25))
    assert "1 of 4 images" not in page.text
    assert f"from {tmp_path / 'photos'}" in page.text


def test_samples_are_of_the_seeds_that_all_have(two: tuple[Path, Path], tmp_path: Path) -> None:
    third = write_second(tmp_path / "two-diffusion", two[1], num_samples=3)
    text = parse(report([two[0], third], tmp_path / "report")).text
    assert text.count("seeds 0-2; Heun, 3 steps, by the averaged weights at training step 20") == 2


def test_tiles_come_apart_again() -> None:
    cells = [np.full((5, 5, 3), n, dtype=np.uint8) for n in range(7)]
    grid = tile(cells, 3)
    assert grid.shape == (3 * 5 + 2 * 2, 3 * 5 + 2 * 2, 3)
    assert [int(cell[2, 2, 0]) for cell in untile(grid, 3, 7)] == list(range(7))
    assert all(cell.shape == (5, 5, 3) for cell in untile(grid, 3, 7))


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
