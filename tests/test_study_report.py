"""The report of a study, from made-up cells: it says what the analysis says, names every gap, and can be passed on."""

import dataclasses
import io
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import look, needs_chromium
from finished_runs import RECONSTRUCTION, colour, write, write_first, write_samples, write_second
from html_page import Page, parse
from PIL import Image
from tiny_diffusion_run import random_model, write_autoencoder, write_run

from wavelatent.common.config import load_config
from wavelatent.common.run_folder import save_model_folder
from wavelatent.pipelines import study_report
from wavelatent.pipelines.report_runs import Run
from wavelatent.pipelines.report_runs import Variant as RunVariant
from wavelatent.pipelines.study_analysis import analyse, power_in_words
from wavelatent.pipelines.study_checks import check_table
from wavelatent.pipelines.study_config import StudyConfig, StudyEvaluationConfig
from wavelatent.pipelines.study_design import Variant, make_variants
from wavelatent.pipelines.study_findings import Analysis, Predictor
from wavelatent.pipelines.study_markdown import markdown
from wavelatent.pipelines.study_pictures import radial_power, read_cells, shown_variants, with_samples
from wavelatent.pipelines.study_plots import Dots, scatter, styles
from wavelatent.pipelines.study_records import CellRecord
from wavelatent.pipelines.study_report import write_report
from wavelatent.pipelines.study_text import command_line, missing_lines, protocol_lines, total_seconds

CONFIG = StudyConfig.model_validate(
    {
        "title": "Bounded & wide",
        "question": "Do bounded, <wider> latents help?",
        "data": {"train": "/home/jo/photos/train", "validation": "/home/jo/photos/held-out", "size": 16},
        "factors": {
            "bottleneck": {"kl": {}, "bounded": {"autoencoder.model.bottleneck": {"kind": "bounded"}}},
            "channels": {"4": {}, "16": {"autoencoder.model.channels": 16}},
            "whitening": {"channel": {}, "none": {"diffusion.whitening": "none"}},
            "noise": {"without": {}, "with": {"autoencoder.model.perturbations": [{"kind": "uniform_gaussian"}]}},
        },
        "design": {
            "kind": "named",
            "variants": {
                "kl-4": {},
                "bounded-4": {"bottleneck": "bounded"},
                "bounded-16": {"bottleneck": "bounded", "channels": "16"},
                "kl-16": {"channels": "16"},
                "kl-4-unwhitened": {"whitening": "none"},
                "bounded-4-noise": {"bottleneck": "bounded", "noise": "with"},
            },
        },
        "claims": {
            "bounded": {
                "statement": "Bounded latents help.",
                "comparisons": [{"factor": "bottleneck", "level": "bounded", "against": "kl"}],
            },
            "wide": {
                "statement": "Width is free, and preserves more.",
                "comparisons": [
                    {"factor": "channels", "level": "16", "against": "4", "expect": "no_worse", "margin": 0.05},
                    {"factor": "channels", "level": "16", "against": "4", "metric": "rfid"},
                ],
            },
            "scale": {
                "statement": "KL latents need no scale.",
                "comparisons": [
                    {"factor": "whitening", "level": "none", "against": "channel", "at": {"bottleneck": "kl"}}
                ],
            },
        },
        "evaluation": {"num_samples": 2000, "num_reconstructions": 500},
    }
)
MEANS = {
    "kl-4": (0.050, 14.0),
    "bounded-4": (0.040, 13.5),
    "bounded-16": (0.041, 6.2),
    "kl-16": (0.054, 6.0),
    "kl-4-unwhitened": (0.080, 14.0),
    "bounded-4-noise": (0.0405, 15.1),
}
"""KID and rFID that the variants scatter about."""
FAILED = ("bounded-4-noise", 1)


def folders(variant: str, seed: int) -> dict[str, str]:
    autoencoder = variant.removesuffix("-unwhitened")
    return {
        "autoencoder": f"autoencoders/{autoencoder}-seed{seed}",
        "latents": f"latents/{autoencoder}-seed{seed}",
        "diffusion": f"diffusions/{variant}-seed{seed}",
    }


def record(variant: Variant, seed: int) -> CellRecord:
    kid, rfid = MEANS.get(variant.name, (0.05, 10.0))
    draw = random.Random(f"{variant.name} {seed}")
    kid *= draw.gauss(1, 0.02)
    rfid = rfid * random.Random(folders(variant.name, seed)["autoencoder"]).gauss(1, 0.015)
    known: dict[str, Any] = {"variant": variant.name, "levels": variant.levels, "seed": seed}
    if (variant.name, seed) == FAILED:
        return CellRecord(**known, failed="diffusion, train: the loss is no longer finite", folders=folders(*FAILED))
    metrics = {
        "kid_mean": kid,
        "fid": 700 * kid + draw.gauss(10, 0.3),
        "precision": 0.55 + draw.gauss(0, 0.01),
        "recall": 0.31 + draw.gauss(0, 0.01),
        "rfid": rfid,
        "psnr": 30 - rfid / 4,
        "ssim": 0.95 - rfid / 200,
        "lpips": 0.01 + rfid / 400,
    }
    return CellRecord(
        **known,
        metrics=metrics,
        intervals={"kid_mean": (kid - 0.0005, kid + 0.0005), "rfid": (rfid - 0.4, rfid + 0.4)},
        health={"scale.kurtosis": draw.gauss(rfid, 1), "spectrum.slope": -draw.gauss(20 * kid, 0.05)},
        verdicts=("scale: dead_channel",) if variant.levels["bottleneck"] == "kl" else (),
        cost={
            "autoencoder_seconds": 600.0,
            "diffusion_seconds": 1200.0,
            "reconstruction_seconds": 60.0,
            "generation_seconds": 120.0,
            "autoencoder_parameters": 1_234_567,
        },
        folders=folders(variant.name, seed),
        protocol={"reconstruction": {"num_samples": 500}, "generation": {"num_samples": 2000}},
    )


SETTING = {
    "mixed_precision": "bf16",
    "data": {
        "train": {"count": 12_000, "size": 16, "fingerprint": "d" * 64},
        "validation": {"count": 500, "size": 16},
        "validation_is_train": False,
    },
    "networks": {
        name: {"latent_shape": [4, 8, 8], "autoencoder_parameters": 1_234_567, "denoise_flops": 2_340_000_000}
        for name in MEANS
    },
    "environments": [{"versions": {"torch": "2.9"}, "hardware": {"cpu": "one"}}],
}


@lru_cache
def made_up() -> tuple[list[Variant], list[CellRecord], Analysis]:
    """Return a study of six variants at three seeds of which one cell failed and one is not there."""
    variants = make_variants(CONFIG)
    cells = [record(variant, seed) for seed in CONFIG.seeds for variant in variants]
    del cells[-1]
    return variants, cells, analyse(CONFIG, variants, cells)


def rows(page: Path) -> list[list[str]]:
    """Return the rows of all tables."""
    found = re.findall(r"<tr.*?</tr>", page.read_text(encoding="utf-8"), re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in found]


def write_cells(root: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Write run folders of cells: training logs, a cache, samples, reconstructions and health reports."""
    for place, seed, variant in [(n, s, v) for s in seeds for n, v in enumerate(names)]:
        where = folders(variant, seed)
        first = root / where["autoencoder"]
        if not first.exists():
            write_first(first, bottleneck={"kind": "bounded", "bound": 3.0} if "bounded" in variant else {"kind": "kl"})
            write(first / "evaluation-reconstruction" / "metrics.json", RECONSTRUCTION)
            Image.new("RGB", (8 * 18, 36), colour(place)).save(
                first / "evaluation-reconstruction" / "worst-reconstructions.png"
            )
            power = [4.0, 2.0, 1.0 + place / 10, 0.5]
            figures = {"frequencies": [0.1, 0.2, 0.3, 0.45], "power": power, "image_power": [8.0, 2.0, 1.0, 0.25]}
            verdict = {"level": "fault", "name": "dead_channel", "text": "Dead.", "threshold": "1", "source": "ours"}
            scale, spectrum = {"verdicts": [verdict], "figures": {}}, {"verdicts": [], "figures": figures}
            write(first / "health" / "health.json", {"sections": {"scale": scale, "spectrum": spectrum}})
        second = write_second(root / where["diffusion"], first, measured=("validation/loss",))
        write_samples(second / "samples-2000", second, range(8))


def reported(folder: Path, **options: Any) -> Page:
    variants, records, analysis = made_up()
    write_report(folder, CONFIG, variants, records, analysis, SETTING, **options)
    return parse(folder / "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with the run folders of two variants."""
    root = tmp_path_factory.mktemp("study")
    write_cells(root, ["kl-4", "bounded-16"], [0])
    reported(root)
    return root


def test_verdicts_come_first_and_say_what_they_rest_on(whole: Path) -> None:
    page = parse(whole / "report.html")
    text = " ".join(page.text.split())
    headings = ["The question", "Verdicts", "Protocol", "Results by variant", "Effects", "Cost", "How to run it again"]
    places = [page.text.index(f"{heading}\n") for heading in headings]
    assert places == sorted(places)
    assert "Do bounded, <wider> latents help?" in text  # escaped: text, not a tag
    assert "Of 3 claims 1 supported, 1 refuted, 1 inconclusive at this scale" in text
    (supported, inconclusive, refuted) = made_up()[2].claims
    for claim in (supported, inconclusive, refuted):
        assert f"{claim.statement}{claim.reason} {claim.verdict} at this scale" in text
    effect = supported.parts[0].effect
    assert effect.simultaneous is not None
    low, high = effect.simultaneous
    assert f"KID, bottleneck bounded against kl: ×{effect.estimate:.3f} [{low:.3f}, {high:.3f}] expected better" in text
    assert "expected no worse than by 5 %: inconclusive" in text
    assert "2,000 samples; 500 reconstructions" in text
    assert "The claims make 4 comparisons" in text
    assert made_up()[2].rule in text


def test_every_value_stands_with_its_seed_and_interval(whole: Path) -> None:
    text = " ".join(parse(whole / "report.html").text.split())
    _, records, analysis = made_up()
    for one in records:
        if one.failed is None:
            kid, (low, high) = one.metrics["kid_mean"], one.intervals["kid_mean"]
            assert f"seed {one.seed}: {kid:.5f} [{low:.5f}, {high:.5f}]" in text
    summary = analysis.variants["bounded-16"]["psnr"]
    assert f"{summary.mean:.2f} ± {summary.std:.2f}" in text
    tables = rows(whole / "report.html")
    assert ["scale: dead channel", "fault 3/3", "–", "–", "3/3", "fault 3/3", "–"] in tables
    assert ["kl-4", "4 × 8 × 8", "1.23 M", "2.34"] in tables
    lacking = [row[0] for row in tables if any(">1 of 3 seeds</small>" in cell for cell in row)]
    assert lacking == ["bounded-4-noise"] * 2, "of one cell that failed and one that is not there, for both stages"
    assert ["bounded-16", "bounded", "16", "·", "·"] in tables


def test_what_is_missing_is_named_and_nothing_stands_twice(whole: Path) -> None:
    text = " ".join(parse(whole / "report.html").text.split())
    assert "bounded-4-noise at seed 1 (diffusion, train: the loss is no longer finite)" in text
    assert "Not finished when this was written: bounded-4-noise, seed 2." in text
    labels = [row[0] for row in rows(whole / "report.html") if row]
    assert labels.count("none against channel") == 2  # once per stage: the claim's own restriction changes nothing
    assert [label for label in labels if "at bottleneck kl" in label] == [
        "KID, whitening none against channel (at bottleneck kl)"  # the check of the claim's own interval
    ]
    assert "– both sides share their autoencoders, which were measured once" in text  # rFID of whitening


def test_costs_count_a_shared_autoencoder_once(whole: Path) -> None:
    _, records, _ = made_up()
    done = [one for one in records if one.cost]
    autoencoders = {one.folders["autoencoder"] for one in done}
    assert len(autoencoders) == len(done) - 3
    total = total_seconds(records)
    assert total["autoencoder_seconds"] == 600 * len(autoencoders)
    assert total["reconstruction_seconds"] == 60 * len(autoencoders)
    assert total["diffusion_seconds"] == 1200 * len(done)
    assert total["generation_seconds"] == 120 * len(done)


def test_it_draws_what_the_folders_hold(whole: Path) -> None:
    page = parse(whole / "report.html")
    alts = [image["alt"] or "" for image in page.images]
    assert sum(alt.startswith("Effects on ") for alt in alts) == 4  # KID, FID, rFID and LPIPS
    of_kid = next(alt for alt in alts if alt.startswith("Effects on KID"))
    assert (
        of_kid.count("margin at ")
        == sum(
            c.expect == "no_worse" and c.metric == "kid_mean"
            for claim in CONFIG.claims.values()
            for c in claim.comparisons
        )
        > 0
    )
    assert any(alt.startswith("rFID against KID") and "bounded-16 at" in alt for alt in alts)
    assert any(alt.startswith("Training loss over step, a line per seed") and "kl-4 0.05" in alt for alt in alts)
    assert any(alt.startswith("Power by spatial frequency") for alt in alts)
    assert [alt for alt in alts if "sampled from" in alt] == [
        "8 images sampled from kl-4", "8 images sampled from bounded-16"
    ]  # fmt: skip
    assert any("encoded and decoded by bounded-16" in alt for alt in alts)
    assert "those of different latents cannot be compared" in " ".join(page.text.split())


def test_of_seeds_with_as_many_cells_one_that_still_has_its_weights_is_shown(tmp_path: Path) -> None:
    """A study may go on from cells of which only measurements and logs were kept."""
    write_cells(tmp_path, ["kl-4"], [0, 1])
    records = [one for one in made_up()[1] if one.variant == "kl-4"]
    for seed in (0, 1):
        model = tmp_path / folders("kl-4", seed)["diffusion"] / "model"
        model.mkdir(exist_ok=True)
        (model / "model.safetensors").write_bytes(b"")
    assert shown_variants(read_cells(tmp_path, records))[0] == 0
    (tmp_path / folders("kl-4", 0)["diffusion"] / "model" / "model.safetensors").unlink()
    assert shown_variants(read_cells(tmp_path, records))[0] == 1


def test_photographs_can_be_left_out(tmp_path: Path) -> None:
    write_cells(tmp_path, ["kl-4"], [0])
    page = reported(tmp_path, photographs=False)
    alts = [image["alt"] or "" for image in page.images]
    assert not [alt for alt in alts if "Original" in alt or "decoded" in alt or "reconstructs worst" in alt]
    assert [alt for alt in alts if "sampled from" in alt]
    assert "as they show photographs" in page.text


def test_without_folders_the_figures_still_stand_and_are_the_same_again(tmp_path: Path) -> None:
    def contents() -> list[bytes]:
        return [(tmp_path / name).read_bytes() for name in ("report.html", "summary.md")]

    page = reported(tmp_path)
    first = contents()
    assert page.text.count("The run folders are not here.") == 2
    assert page.text.count("Nothing was logged, or the run folders are not here.") == 2
    assert "None" not in page.text
    assert len(page.images) == 4 + 2  # effects, and rFID against KID and FID
    reported(tmp_path)
    assert contents() == first


def test_it_can_be_passed_on(whole: Path) -> None:
    for name in ("report.html", "summary.md"):
        content = (whole / name).read_text(encoding="utf-8")
        assert "/home/jo" not in content
        assert str(whole.parent) not in content
    page = parse(whole / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for image in page.images:
        assert (image["src"] or "").startswith("data:image/")
        assert image["alt"]


def test_the_summary_is_well_formed_markdown(tmp_path: Path) -> None:
    variants, records, analysis = made_up()
    found = (
        Predictor("spectrum.slope", "kid_mean", -0.9, 0.01, 0.04, 8),
        Predictor("scale.std", "fid", 0.1, 1, None, 8),
    )
    analysis = dataclasses.replace(analysis, predictors=found)
    text = markdown(CONFIG, variants, records, analysis, SETTING)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 7  # verdicts, what is beside them, values, levels, effects, interactions, predictors
    assert "1 of 1 figures of the latent health report go with KID" in text
    assert "| spectrum: slope | KID | −0.90 | 0.010 | 0.040 | 8 |" in text
    for table in tables:
        rows = table.splitlines()
        assert set(rows[1]) == {"|", "-"}
        assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert text.startswith("# Bounded & wide\n\nDo bounded, &lt;wider> latents help?\n\n")
    assert (
        "| KL latents need no scale. | **refuted** | KID, whitening none against channel (at bottleneck kl): ×" in text
    )
    spread = analysis.variants["kl-4"]["kid_mean"]
    assert f"| kl-4 | {spread.mean:.5f} ± {spread.std:.5f} |" in text
    kid = analysis.variants["bounded-4-noise"]["kid_mean"].mean
    assert f"| bounded-4-noise (1 of 3 seeds) | {kid:.5f} |" in text
    less = [dataclasses.replace(one, metrics={"kid_mean": 0.1}) if one.seed == 2 else one for one in records]
    text = markdown(CONFIG, variants, less, analyse(CONFIG, variants, less), SETTING)
    assert re.search(r"\| kl-4 \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \(2 of 3 seeds\) \|", text), "of FID alone"
    assert "wavelatent study config.yaml --data TRAIN --eval-data VALIDATION --mixed-precision bf16 --out OUT" in text


def test_the_protocol_claims_no_sameness_that_a_factor_ends() -> None:
    alike = " ".join(protocol_lines(CONFIG, make_variants(CONFIG), {}))
    assert "the same network but for its first and last convolution" in alike
    train = CONFIG.diffusion.train
    levels = {"large": {}, "small": {"diffusion.train.batch_size": train.batch_size // 2,
                                     "diffusion.train.steps": train.steps * 2}}  # fmt: skip
    content = CONFIG.model_dump(mode="json", exclude={"claims"})
    content["factors"] |= {
        "batch": levels,
        "size": {"s": {}, "m": {"diffusion.model.channels": 2 * CONFIG.diffusion.model.channels}},
    }
    content["design"] = {"kind": "named", "variants": {"a": {}, "b": {"batch": "small"}}}
    config = StudyConfig.model_validate(content)
    images = f"{train.images_at(train.steps):,} images"
    told = " ".join(protocol_lines(config, make_variants(config), {}))
    assert f"Stage two: {train.steps:,} to {2 * train.steps:,} steps, {images}" in told
    content["design"]["variants"]["b"] = {"size": "m"}
    config = StudyConfig.model_validate(content)
    told = " ".join(protocol_lines(config, make_variants(config), {}))
    assert "the networks are not the same in all variants" in told
    assert "the same network" not in told


def test_what_is_measured_on_its_training_images_is_so_when_it_is_run_again() -> None:
    alone = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"validation": None})})
    assert command_line(alone, {}) == "wavelatent study config.yaml --data TRAIN --out OUT"


def test_one_seed_gives_no_intervals_and_no_error(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"seeds": (0,)})
    variants = made_up()[0]
    records = [record(variant, 0) for variant in variants]
    write_report(tmp_path, config, variants, records, analyse(config, variants, records), {})
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "Of 3 claims 3 inconclusive at this scale: 6 variants, 1 seed, 6 of 6 cells" in text
    assert "one seed has no spread" in text
    assert "±" not in text.split("## Effects")[0].split("Mean ±")[1].split("deviation over seeds.")[1]


def test_samples_are_drawn_once_where_there_are_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_autoencoder(tmp_path / "autoencoder"))
    evaluation = StudyEvaluationConfig(num_samples=3, steps=1, pass_rows=3)

    def drawn() -> dict[Path, tuple[int, bytes]]:
        variant = RunVariant(None, Run.read(run), "one")
        (found,) = with_samples([variant], seed=2, evaluation=evaluation, device="cpu")
        assert found.second is not None
        (folder,) = found.second.sample_folders
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(folder.glob("*.png"))}

    first = drawn()
    assert [file.stem for file in first] == ["000006", "000007", "000008"]  # the first that were evaluated at seed 2
    assert drawn() == first
    save_model_folder(random_model(1), run / "model")
    again = drawn()
    assert again.keys() == first.keys()
    assert all(again[file][1] != first[file][1] for file in first)  # of other weights, so drawn anew
    given = write_samples(run / "samples-2000", run, range(3))
    variant = RunVariant(None, Run.read(run), "one")
    (left,) = with_samples([variant], seed=2, evaluation=evaluation, device="cpu")
    assert left.second is variant.second  # what is there is shown
    assert given in left.second.sample_folders


def test_the_spectrum_of_white_noise_is_flat() -> None:
    points = radial_power(torch.randn(300, 2, 6, 9, generator=torch.Generator().manual_seed(0)))
    shares = [share for _, share in points]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([1 / len(shares)] * len(shares), rel=0.1)


@pytest.mark.parametrize("name", ["a", "a long name of a variant"])
def test_names_of_points_stay_inside_the_plot(name: str) -> None:
    dots = {f"{name} {n}": Dots([(x, y)], (x, y), (x, x), (y, y)) for n, (x, y) in enumerate([(0, 0), (0, 1), (1, 0)])}
    figure = scatter("Title", dots, ("x", "y"), styles(list(dots)))
    with Image.open(io.BytesIO(figure.png)) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels[:, -3:].min() > 200  # nothing is cut at the right edge
    assert f"{name} 1 at 0 and 1" in figure.alt


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots, which take longest."""
    for name in ("_forests", "_scatters"):
        monkeypatch.setattr(study_report, name, lambda *_: [])


def both(folder: Path) -> list[str]:
    """Return what page and summary say."""
    return [
        " ".join(text.split())
        for text in (parse(folder / "report.html").text, (folder / "summary.md").read_text(encoding="utf-8"))
    ]


@pytest.mark.usefixtures("no_plots")
def test_what_was_changed_after_the_first_start_is_not_called_fixed_before_the_run(tmp_path: Path) -> None:
    variants, records, analysis = made_up()
    fixed = "The claims make 4 comparisons, fixed with the rule before the run."
    told = "were changed after the first start; see config.1.yaml."
    for names, said in (([], None), (["factors", "design", "claims"], f"Factors, design, claims {told}")):
        write_report(tmp_path, CONFIG, variants, records, analysis, {**SETTING, "changed_since_the_first_start": names})
        for text in both(tmp_path):
            assert (fixed in text) == (said is None)
            assert told in text or said is None
            if said:
                assert text.count(said) == 3  # by the verdicts, in the protocol, first of what is to be read with care
                assert text.index("at this scale: 6 variants") < text.index(said) < text.index("Bounded latents help.")
                assert text.index(said) < text.index("The claims make 4 comparisons.") < text.rindex(said)
    begun = {"begun_before_the_first_start": ["diffusions/a-seed0", "diffusions/b-seed0"]}
    write_report(tmp_path, CONFIG, variants, records, analysis, {**SETTING, **begun})
    for text in both(tmp_path):
        assert fixed not in text
        assert text.count("2 runs were begun before the study's folder held a configuration") == 3
    one = {"changed_since_the_first_start": ["design"]}
    assert missing_lines(CONFIG, variants, analysis, records, one)[0] == "Design " + told.replace("were", "was")
    config = CONFIG.model_copy(update={"claims": {}})
    write_report(tmp_path, config, variants, records, analyse(config, variants, records), SETTING)
    for text in both(tmp_path):
        assert "before the run" not in text
        assert "The claims make" not in text


def test_checks_stand_beside_the_intervals_that_decide(whole: Path) -> None:
    variants, records, analysis = made_up()
    found = {row[0]: row[1:] for row in rows(whole / "report.html") if len(row) == 5}
    summary = (whole / "summary.md").read_text(encoding="utf-8")
    effects = {part.effect.metric: part.effect for claim in analysis.claims[:2] for part in claim.parts}
    names = {"kid_mean": "KID, channels 16 against 4", "rfid": "rFID, channels 16 against 4"}
    for metric, name in names.items():
        effect = effects[metric]
        assert effect.simultaneous and effect.paired and effect.error and effect.image_error  # noqa: PT018
        bounds = [f"[{low:.3f}, {high:.3f}]" for low, high in (effect.simultaneous, effect.paired)]
        share = f"more samples would remove up to {100 * (effect.image_error / effect.error) ** 2:.0f} % of the square"
        holds = "the interval holds for these 500 reconstructions; other images would move it by up to"
        said = f"{share} of its error" if metric == "kid_mean" else f"{holds} {100 * effect.image_error:.2g} %"
        seeds = ", ".join(f"×{value:.3f}" for value in effect.by_seed)
        assert len(effect.by_seed) == 3
        assert found[name][:3] == [bounds[0], seeds, bounds[1]]
        assert found[name][3].startswith(said)
        assert f"| {name} | {bounds[0]} | {seeds} | {bounds[1]} | {said}" in summary
    assert len([row for row in summary.splitlines() if "of its error |" in row or "for these 500" in row]) == 4
    for text in both(whole):
        assert power_in_words(CONFIG, variants) in text
    wide = [dataclasses.replace(one, intervals={"kid_mean": (0.0, 0.1)} if one.metrics else {}) for one in records]
    of_images = [row[-1] for row in check_table(CONFIG, analyse(CONFIG, variants, wide), wide).rows]
    assert set(of_images) == {
        "more samples would remove up to all of the square of its error",
        "the interval holds for these 500 reconstructions",
    }


def test_under_a_paired_rule_its_own_interval_is_not_shown_again() -> None:
    config = CONFIG.model_copy(update={"rule": CONFIG.rule.model_copy(update={"spread": "paired"})})
    variants, records, _ = made_up()
    table = check_table(config, analyse(config, variants, records), records)
    assert table.head == ("comparison", "interval of the rule", "by seed", "images")
    assert len(table.rows) == 4


@pytest.mark.usefixtures("no_plots")
def test_extrapolated_rfid_stands_beside_rfid_and_says_where_it_orders_variants_otherwise(tmp_path: Path) -> None:
    variants, records, _ = made_up()
    by_rfid = sorted(("kl-16", "bounded-16"), key=lambda name: made_up()[2].variants[name]["rfid"].mean)
    lower = dict(zip(by_rfid, (2.0, 3.0), strict=True))  # the larger rFID of both is the one with more bias
    extrapolated = [
        dataclasses.replace(
            one,
            metrics={**one.metrics, "rfid_extrapolated": one.metrics["rfid"] - lower.get(one.variant, 2.5)},
        )
        if one.metrics
        else one
        for one in records
    ]
    analysis = analyse(CONFIG, variants, extrapolated)
    (note,) = [note for note in analysis.notes if "rFID∞" in note]
    assert note.endswith("stand the other way round: bounded-16 and kl-16")
    write_report(tmp_path, CONFIG, variants, extrapolated, analysis, SETTING)
    for text in both(tmp_path):
        assert f"{note}." in text
        assert "rFID∞ is rFID extrapolated to infinitely many images" in text
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "| rFID ↓ | rFID∞ ↓ |" in summary
    mean = analysis.variants["kl-16"]["rfid_extrapolated"].mean
    assert f" | {mean:.2f} ± " in summary
    assert [row[-5:-2] for row in rows(tmp_path / "report.html") if "rFID∞" in "".join(row)] == [
        [f"{name}<br><small>{side} is better</small>" for name, side in
         (("rFID", "lower"), ("rFID∞", "lower"), ("PSNR (dB)", "higher"))]
    ], "in the table of variants, and in none of effects"  # fmt: skip
    assert not [effect for effect in analysis.effects if effect.metric == "rfid_extrapolated"]
    assert not [note for note in made_up()[2].notes if "rFID∞" in note], "older results have none"


@needs_chromium
@pytest.mark.usefixtures("no_plots")
def test_the_presets_ten_variants_fit_a_printed_page(tmp_path: Path) -> None:
    config = load_config(StudyConfig, "study-faces64")
    variants = make_variants(config)
    records = [
        dataclasses.replace(record(variant, seed), verdicts=("gaussianity: heavier_tails_than_normal",))
        for variant in variants
        for seed in config.seeds
        if (variant.name, seed) != FAILED
    ]
    write_report(tmp_path, config, variants, records, analyse(config, variants, records), SETTING)
    page = tmp_path / "report.html"
    text = page.read_text(encoding="utf-8")
    assert len(variants) >= 10
    assert text.count("@media print") == 2  # of all pages, and of this one
    page.write_text(text.replace("@media print", "@media all"), encoding="utf-8")
    seen = look(page, 718, tmp_path)  # A4 between the margins
    assert seen.found["bleeding"] == []
    assert seen.found["width"] <= 718


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_desk_and_a_telephone(whole: Path, width: int, tmp_path: Path) -> None:
    seen = look(whole / "report.html", width, tmp_path)
    assert seen.found["width"] <= width
    assert seen.found["bleeding"] == []
    assert seen.found["broken"] == 0
    assert seen.console == []
    assert len(seen.found["rows"]) == 2 + 3 + 2  # samples, originals and reconstructions, the worst
    for left, _, side, _ in seen.found["plots"][:4]:
        assert left >= 0
        assert left + side <= width  # forest plots shrink to the page
