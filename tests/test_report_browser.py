"""The comparison page as a browser shows it: whole at the width of a desk and of a telephone, light and dark.

Skipped where there is no Chromium.
"""

from pathlib import Path

import numpy as np
import pytest
from browser import DARK, HEIGHT, look, needs_chromium
from finished_runs import (
    MEASURED,
    RECONSTRUCTION,
    colour,
    result,
    write,
    write_first,
    write_health,
    write_samples,
    write_second,
)
from PIL import Image

from wavelatent.pipelines.report import report

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it: two variants, intervals, samples, health, what is worst and what is missing."""
    root = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("kl-with-a-rather-long-name-4", "bounded-16")):
        first = write_first(root / name / "autoencoder", bottleneck={"kind": "bounded", "bound": 3.0 + number})
        evaluation = result(weights_sha256=f"{number}" * 64)
        metrics = {**RECONSTRUCTION["metrics"], "rfid_interval": [30.0, 36.0], "psnr_interval": [21.0, 22.0]}
        worst = first / "evaluation-reconstruction" / "worst-reconstructions.png"
        write(worst.with_name("metrics.json"), {**evaluation, "metrics": metrics})
        Image.new("RGB", (8 * 18, 36), colour(number)).save(worst)
        write_health(first / "latent-health", dead_channel="fault" if number else "ok", heavy_tail="note")
        second = write_second(root / name / "diffusion", first, measured=MEASURED)
        write_samples(second / "samples-heun", second, range(16))
    runs = [
        root / name / stage
        for name in ("kl-with-a-rather-long-name-4", "bounded-16")
        for stage in ("autoencoder", "diffusion")
    ]
    return report(runs, root / "report")


@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_whole_and_fits(page: Path, width: int, tmp_path: Path) -> None:
    seen = look(page, width, tmp_path)
    assert seen.found["width"] <= width
    assert seen.found["bleeding"] == []
    assert seen.found["height"] < HEIGHT
    assert seen.found["broken"] == 0
    assert (len(seen.found["strips"]), len(seen.found["sheets"])) == (3 + 2, 2)
    _, _, lead_width, lead_height = seen.found["lead"][0]
    assert lead_width > 0.6 * width
    assert lead_height > 100
    assert seen.at(3, 3) == (255, 255, 255)
    left, top, *_ = seen.found["lead"][0]
    assert seen.at(left + 2, top + 20) == (0x2F, 0x6F, 0x9F)  # the accent at its side
    assert seen.at(left + 10, top + 5) == (0xF5, 0xF7, 0xF9)  # the panel
    for left, top, side, height in seen.found["sheets"]:
        assert side >= 300
        middles = [((n % 4 + 0.5) / 4, (n // 4 + 0.5) / 4) for n in range(16)]
        shown = np.array([seen.at(left + x * side, top + y * height) for x, y in middles])
        assert np.abs(shown - [colour(seed) for seed in range(16)]).max() <= 3
    for box in seen.found["plots"]:
        assert (np.ptp(seen.part(box), axis=2) > 60).sum() > 20, box  # coloured lines


def test_it_is_dark_where_the_reader_wants_that(page: Path, tmp_path: Path) -> None:
    seen = look(page, 390, tmp_path, DARK)
    assert seen.at(3, 3) == (0x15, 0x19, 0x1D)
    assert (seen.pixels.mean(axis=2) > 200).mean() < 0.1  # no glaring plots
    left, top, side, height = seen.found["sheets"][0]
    assert np.abs(np.subtract(seen.at(left + side / 8, top + height / 8), colour(0))).max() <= 3  # pictures as they are
