"""The report of a study, from made-up cells: it says what the analysis says, names every gap, and can be passed on."""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from finished_runs import RECONSTRUCTION, colour, write, write_first, write_samples, write_second
from html_page import Page, parse
from PIL import Image

from wavelatent.pipelines.study_analysis import analyse
from wavelatent.pipelines.study_config import StudyConfig
from wavelatent.pipelines.study_design import Variant, make_variants
from wavelatent.pipelines.study_findings import Analysis
from wavelatent.pipelines.study_records import CellRecord
from wavelatent.pipelines.study_report import write_report

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
FAILED = ("kl-16", 2)


def folders(variant: str, seed: int) -> dict[str, str]:
    autoencoder = variant.removesuffix("-unwhitened")
    return {
        "autoencoder": f"autoencoders/{autoencoder}-seed{seed}",
        "latents": f"latents/{autoencoder}-seed{seed}",
        "diffusion": f"diffusions/{variant}-seed{seed}",
    }


def record(variant: Variant, seed: int) -> CellRecord:
    kid, rfid = MEANS[variant.name]
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
        intervals={"kid_mean": (kid - 0.002, kid + 0.002), "rfid": (rfid - 0.4, rfid + 0.4)},
        health={"scale.kurtosis": draw.gauss(rfid, 1), "spectrum.slope": -draw.gauss(20 * kid, 0.05)},
        verdicts=("scale: dead_channel",) if variant.levels["bottleneck"] == "kl" else (),
        cost={
            "autoencoder_seconds": 600.0,
            "diffusion_seconds": 1200.0,
            "evaluation_seconds": 180.0,
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with the run folders of two variants."""
    root = tmp_path_factory.mktemp("study")
    write_cells(root, ["kl-4", "bounded-16"], [0])
    return root


def reported(folder: Path, **options: Any) -> Page:
    variants, records, analysis = made_up()
    write_report(folder, CONFIG, variants, records, analysis, SETTING, **options)
    return parse(folder / "report.html")
