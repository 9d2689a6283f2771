"""The plots of the latent health report: anything a section may hand over can be drawn, and said in words."""

import io
import math
import re
from typing import Any

import pytest
from PIL import Image

from wavelatent.pipelines.health_plots import MOST_NAMED, alternative, draw
from wavelatent.stage1_autoencoder.health import Plot


@pytest.mark.parametrize("kind", ["line", "bar", "image"])
@pytest.mark.parametrize(("count", "length"), [(1, 7), (2, 1), (MOST_NAMED + 3, 7)])
def test_any_plot_can_be_drawn(kind: Any, count: int, length: int) -> None:
    rows: Any = [0.0, math.nan, *range(length)][:length]
    series = {f"s{number}": [rows, rows] if kind == "image" else rows for number in range(count)}
    plot = Plot("Title", series, kind=kind, labels=("x", "y"), log="y")
    with Image.open(io.BytesIO(draw(plot))) as image:
        assert image.format == "PNG"
        assert image.convert("L").getextrema()[0] < 128  # something is on it
    assert re.match(r"Title \(s0(, s1| to s10)?\): y over x; values from 0 to \d", alternative(plot))


def test_a_plot_of_nothing_says_so() -> None:
    plot = Plot("Title", {"s": [math.nan, math.inf]}, x=[1.0, 2.0], log="xy")
    assert alternative(plot) == "Title (s); values none of them finite."
    assert draw(plot).startswith(b"\x89PNG")
