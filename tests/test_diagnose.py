"""``diagnose``: what it writes, what it leaves out and says so, and the page it ends in."""

import base64
import functools
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_diffusers import diffusers_model

import cli
from wavelatent.common.config import PRESETS
from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.images import ImageData, open_data
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.pipelines import diagnose as pipeline
from wavelatent.pipelines import diagnose_page
from wavelatent.pipelines.diagnose import diagnose, gather, summary_lines
from wavelatent.pipelines.health_sections import SECTIONS, Given, choose_sections
from wavelatent.pipelines.learnability import learnability
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from wavelatent.stage1_autoencoder.health import LatentData, Plot, Section, Verdict

SIZE, COUNT = 16, 24
DATA = f"synthetic:{COUNT}"
CHEAP = ["scale", "correlation"]
VOID = {"meta", "link", "img", "br", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The tags and the text of a page whose tags must nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def save(folder: Path, bottleneck: dict[str, Any], channels: int = 3) -> str:
    torch.manual_seed(0)
    encoder = {"kind": "litevae", "size": "s", "levels": 1, "num_res_blocks": 1}
    model = {"encoder": encoder, "decoder": {"width": "tiny"}, "channels": channels, "bottleneck": bottleneck}
    Autoencoder(AutoencoderConfig.model_validate(model)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("autoencoders") / "gaussian", {"kind": "kl"})


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("autoencoders") / "bounded", {"kind": "bounded", "bound": 2.5}, channels=5)


@functools.cache
def faces(spec: str, size: int, **_: object) -> ImageData:
    """Data whose images are painted once: that takes longer than all the rest."""
    data = open_data(spec, size=size)
    data.image = functools.cache(data.image)  # type: ignore[method-assign]
    return data


@pytest.fixture(autouse=True)
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metric's network is here."""
    monkeypatch.setattr(pipeline, "open_data", faces)

    def missing(*_: object) -> None:
        raise MissingWeightsError(f"not in {Path.home()}")

    monkeypatch.setattr(pipeline, "PerceptualDistance", missing)
    monkeypatch.setattr(pipeline, "InceptionFeatures", missing)


def verdict(level: Any, name: str, text: str = "measured") -> Verdict:
    return Verdict(level, name, text, "less than 1", "ours")


def refuse(given: Given) -> Section:
    raise WavelatentError(f"{len(given.data.images)} images\nare not enough")


PLANNED: dict[str, Callable[[Given], Section]] = {
    "scale": lambda _: Section("scale", {"std": [1.0, math.inf], "none": None}, [verdict("ok", "unequal_scale")]),
    "spectrum": lambda _: Section(
        "spectrum",
        {"slope": math.nan, "many": list(range(40))},
        [verdict("note", "steep"), verdict("fault", "white_spectrum", "<i>white</i> & flat")],
        [Plot("Power", {"latents": [1.0, 0.1], "images": [1.0, 0.01]}, x=[0.1, 0.5], log="xy", labels=("f", "power"))],
    ),
    "locality": lambda _: Section("locality", {}, [verdict("ok", "global_site")]),
    "geometry": refuse,
}


@pytest.fixture
def planned() -> Iterator[None]:
    """Four sections whose findings are known; one of them cannot be computed."""
    real = dict(SECTIONS)
    SECTIONS.clear()
    SECTIONS.update({n: replace(entry, compute=PLANNED[n]) for n, entry in real.items() if n in PLANNED})
    yield
    SECTIONS.clear()
    SECTIONS.update(real)


def run(ae: str, out: Path, **options: Any) -> dict[str, Any]:
    return diagnose(ae, DATA, out, size=SIZE, device="cpu", **options)


def test_the_record_holds_findings_thresholds_and_protocol(planned: None, gaussian: str, tmp_path: Path) -> None:
    result = run(gaussian, tmp_path / "report", seed=3)
    record = json.loads((tmp_path / "report" / "health.json").read_text())
    assert record == {name: value for name, value in result.items() if name not in ("page", "already_finished")}
    assert record["format"] == 1
    assert record["summary"] == {"fault": 1, "note": 1, "ok": 2, "not_computed": 2}
    assert list(record["sections"]) == ["scale", "spectrum", "locality"]
    spectrum = record["sections"]["spectrum"]
    assert spectrum["asks"] == SECTIONS["spectrum"].asks
    assert spectrum["figures"] == {"slope": None, "many": list(range(40))}  # JSON knows no NaN
    assert spectrum["verdicts"][1] == {
        "level": "fault", "name": "white_spectrum", "text": "<i>white</i> & flat", "threshold": "less than 1",
        "source": "ours",
    }  # fmt: skip
    assert record["sections"]["scale"]["figures"] == {"std": [1.0, None], "none": None}
    assert record["not_computed"]["geometry"] == f"{COUNT} images are not enough"
    assert "wavelatent doctor --fetch" in record["not_computed"]["LPIPS"]
    protocol = record["protocol"]
    autoencoder = load_autoencoder(gaussian)
    assert protocol["autoencoder"] == {
        "path": gaussian, "fingerprint": autoencoder.fingerprint(), "mixed_precision": "no"
    }  # fmt: skip
    assert protocol["data"]["spec"] == DATA
    assert protocol["data"]["fingerprint"] == open_data(DATA, size=SIZE).fingerprint()
    assert (protocol["num_images"], protocol["size"], protocol["seed"]) == (COUNT, SIZE, 3)
    assert protocol["lpips"] == {"net": "alex", "weights_sha256": None}
    assert protocol["library versions"]["torch"] == torch.__version__
    others = {key: value for key, value in record.items() if key != "protocol"}
    assert str(Path.cwd()) not in json.dumps(others)
    assert str(Path.home()) not in json.dumps(others)


def test_what_is_printed_are_the_verdicts_that_are_not_ok_and_the_page(
    planned: None, gaussian: str, tmp_path: Path
) -> None:
    lines = summary_lines(run(gaussian, tmp_path))
    assert lines[:3] == [
        "fault: white_spectrum (spectrum): <i>white</i> & flat",
        "note: steep (spectrum): measured",
        f"not computed: geometry: {COUNT} images are not enough",
    ]
    assert lines[-1] == f"faults: 1, notes: 1, in order: 2; the report is {tmp_path / 'health.html'}"
    assert not any("unequal_scale" in line for line in lines)


def test_the_page_needs_nothing_but_itself(planned: None, gaussian: str, tmp_path: Path) -> None:
    autoencoder = str(shutil.copytree(gaussian, tmp_path / "jo doe" / "ae"))
    html = Path(run(autoencoder, tmp_path)["page"]).read_text(encoding="utf-8")
    page = Page(html)
    assert "Latent health of .../jo doe/ae" in page.text
    assert str(tmp_path) not in html
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"}
    assert "url(" not in html
    assert "@import" not in html
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "a":
            assert attributes["href"] in {f"#{name}" for name in ids}
        elif tag == "img":
            scheme, _, encoded = (attributes["src"] or "").partition(",")
            assert scheme == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
                image.verify()
            assert attributes["alt"] == "Power (latents, images): power over f; values from 0.01 to 1."
        else:
            assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in html


def test_the_page_says_it_all_faults_first(planned: None, gaussian: str, tmp_path: Path) -> None:
    text = Page(Path(run(gaussian, tmp_path, skip=["locality"])["page"]).read_text(encoding="utf-8")).text
    findings = text[text.index("Findings") :]
    order = [findings.index(name) for name in ("white_spectrum", "steep", "unequal_scale", "geometry")]
    assert order == sorted(order)
    assert "<i>white</i> & flat" in text  # text, not a tag
    assert "1 fault: expect trouble in stage two, and 1 part could not be computed." in text
    assert text.count("Threshold: less than 1 (source: ours)") == 3
    assert f"{COUNT} images are not enough" in text
    assert "Left out, as asked: locality." in text
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, ... (40 values)" in text
    assert SECTIONS["spectrum"].asks in text


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_can_be_looked_at(planned: None, gaussian: str, tmp_path: Path, width: int) -> None:
    """Chromium draws it, and the accent of its style and the plot are on the picture."""
    page = run(gaussian, tmp_path)["page"]
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'user'}", f"--window-size={width},2400", f"--screenshot={tmp_path / 'page.png'}", f"file://{page}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (width, 2400)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x2F, 0x6F, 0x9F), (0xB3, 0x26, 0x1E), (0x1F, 0x77, 0xB4)} <= colours  # accent, a fault, a line


def test_sections_can_be_left_out_and_singled_out(gaussian: str, tmp_path: Path) -> None:
    assert choose_sections(skip=["learnability", "scale"]) == [
        name for name in SECTIONS if name not in ("learnability", "scale")
    ]
    assert choose_sections(only=CHEAP[::-1]) == CHEAP  # in the order of the report
    with pytest.raises(UsageError, match="spectral: no such section; did you mean 'spectrum'"):
        choose_sections(skip=["spectral"])
    with pytest.raises(UsageError, match="leave no section"):
        choose_sections(skip=["scale"], only=["scale"])
    record = run(gaussian, tmp_path, only=CHEAP, skip=["scale"])
    assert list(record["sections"]) == ["correlation"]
    assert record["skipped"] == [name for name in SECTIONS if name != "correlation"]
    assert record["not_computed"] == {}  # nobody wanted what LPIPS is for


def test_a_finished_report_is_left_alone_until_something_changes(
    planned: None, gaussian: str, bounded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run(gaussian, tmp_path, only=["scale", "locality"])["already_finished"]
    before = (tmp_path / "health.json").stat().st_mtime_ns
    capsys.readouterr()
    again = run(gaussian, tmp_path, only=["scale", "locality"])
    assert again["already_finished"]
    assert "already diagnosed" in capsys.readouterr().err
    assert (tmp_path / "health.json").stat().st_mtime_ns == before
    changes: list[dict[str, Any]] = [
        {"overwrite": True}, {"seed": 1}, {"num_images": COUNT - 1}, {"only": ["scale"]}, {"mixed_precision": "bf16"}
    ]  # fmt: skip
    for change in changes:
        assert not run(gaussian, tmp_path, **{"only": ["scale", "locality"], **change})["already_finished"], change
    assert not run(bounded, tmp_path, only=["scale"])["already_finished"]
    (tmp_path / "health.html").unlink()
    assert not run(bounded, tmp_path, only=["scale"])["already_finished"]


def test_a_page_that_could_not_be_drawn_leaves_no_record(
    planned: None, gaussian: str, bounded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(gaussian, tmp_path, only=["scale"])
    before = (tmp_path / "health.json").read_bytes()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "health_page", cut)
        with pytest.raises(KeyboardInterrupt):
            run(bounded, tmp_path, only=["scale"])
    assert (tmp_path / "health.json").read_bytes() == before
    assert not run(bounded, tmp_path, only=["scale"])["already_finished"]


def test_what_could_not_be_computed_is_tried_again(planned: None, gaussian: str, tmp_path: Path) -> None:
    assert "geometry" in run(gaussian, tmp_path)["not_computed"]
    assert not run(gaussian, tmp_path)["already_finished"]
    assert not run(gaussian, tmp_path, skip=["geometry"])["already_finished"]
    assert run(gaussian, tmp_path, skip=["geometry"])["already_finished"]


def test_the_command_prints_findings_or_json_and_ends_well_with_faults(
    planned: None, gaussian: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ae", gaussian, "--data", DATA, "--size", SIZE, "--out", tmp_path, "--device", "cpu", "--seed", 4]
    outputs = []
    for extra in (["--skip", "scale", "--skip", "geometry"], ["--only", "spectrum", "--num-images", 9, "--json"]):
        monkeypatch.setattr("sys.argv", ["wavelatent", *map(str, ["diagnose", *options, *extra])])
        cli.main()  # exits where there is anything wrong
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("fault: white_spectrum (spectrum)")
    record = json.loads(outputs[1])
    assert list(record["sections"]) == ["spectrum"]
    assert (record["protocol"]["num_images"], record["protocol"]["seed"]) == (9, 4)
    assert record["page"] == str(tmp_path / "health.html")


def test_a_mistake_of_ours_is_not_hidden(planned: None, gaussian: str, tmp_path: Path, monkeypatch: Any) -> None:
    broken = replace(SECTIONS["scale"], compute=lambda given: given.no_such_thing)
    monkeypatch.setitem(SECTIONS, "scale", broken)
    with pytest.raises(AttributeError):
        run(gaussian, tmp_path)


def test_bad_input_is_refused_in_one_line(gaussian: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"27 px do not divide .* use --size 26"):
        diagnose(gaussian, DATA, tmp_path, size=27, device="cpu")
    with pytest.raises(UsageError, match="asked for 25 images of 24"):
        run(gaussian, tmp_path, num_images=COUNT + 1)
    assert list(tmp_path.iterdir()) == []


def test_gathered_latents_depend_on_the_image_and_the_seed_alone(gaussian: str, bounded: str) -> None:
    images, autoencoder = faces(DATA, SIZE), load_autoencoder(gaussian)
    one = gather(autoencoder, images, [4, 2, 9, 11, 0], batch_size=5)
    other = gather(autoencoder, images, [9, 0, 4], batch_size=2)
    assert one.std is not None
    assert one.mean.shape == one.drawn.shape == one.std.shape == (5, 3, SIZE // 2, SIZE // 2)
    assert one.images.shape == (5, 3, SIZE, SIZE)
    assert one.bound is None
    for ours, theirs in ((one.mean, other.mean), (one.drawn, other.drawn)):
        assert torch.allclose(ours[[2, 4, 0]], theirs, atol=1e-5)
    noise = (one.drawn - one.mean) / one.std
    assert noise.abs().max() < 6
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(gather(autoencoder, images, [4], seed=1).drawn[0], one.drawn[0])
    deterministic = gather(load_autoencoder(bounded), images, [1, 3])
    assert deterministic.std is None
    assert torch.equal(deterministic.drawn, deterministic.mean)
    assert deterministic.bound == 2.5


def test_an_autoencoder_whose_latents_are_all_broken_is_refused(
    gaussian: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*_: object, **__: object) -> LatentData:
        latents = torch.full((COUNT, 3, 8, 8), math.nan)
        return LatentData(torch.zeros(COUNT, 3, SIZE, SIZE), latents, None, latents)

    monkeypatch.setattr(pipeline, "gather", broken)
    with pytest.raises(WavelatentError, match="finite"):
        run(gaussian, tmp_path)


@pytest.mark.parametrize("kind", ["gaussian", "deterministic", "diffusers"])
def test_every_section_but_the_one_that_trains(
    kind: str, gaussian: str, bounded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ae = {"gaussian": gaussian, "deterministic": bounded}.get(kind)
    if ae is None:
        pytest.importorskip("diffusers")
        diffusers_model("kl").save_pretrained(tmp_path / "kl")
        ae = f"diffusers:{tmp_path / 'kl'}"
    if kind != "gaussian":
        monkeypatch.setattr(diagnose_page, "draw", lambda plot: b"drawn once is enough")
    record = run(ae, tmp_path / "report", skip=["learnability"])
    assert list(record["sections"]) == [name for name in SECTIONS if name != "learnability"]
    assert set(record["not_computed"]) == {"LPIPS"}
    assert record["protocol"]["autoencoder"]["path"] == ae
    for name, section in record["sections"].items():
        assert section["verdicts"], name
        assert section["figures"], name
    assert record["sections"]["reconstruction"]["figures"]["lpips"] is None
    text = Page(Path(record["page"]).read_text(encoding="utf-8")).text
    assert "LPIPS" in text


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """The sections of the page on latent health, by their headings."""
    text = (PRESETS.parent.parent / "docs" / "latent-health.md").read_text(encoding="utf-8")
    return {part.partition("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text))


def test_every_section_verdict_and_threshold_is_documented(gaussian: str, documented: dict[str, str]) -> None:
    autoencoder = load_autoencoder(gaussian)
    given = Given(autoencoder, gather(autoencoder, faces(DATA, SIZE), range(COUNT)))
    assert [name for name in documented if name in SECTIONS] == list(SECTIONS)
    advice = documented["Reading a verdict"]
    for name, entry in SECTIONS.items():
        untrained = name == "learnability"
        section = learnability(given.data, steps=0) if untrained else entry.compute(given)
        for found in section.verdicts:
            assert f"| `{found.name}` |" in documented[name]
            assert numbers(found.threshold) <= numbers(documented[name]), found.name
            assert f"`{found.name}`" in advice or found.name in ("gaussianity", "intrinsic_dimension")
