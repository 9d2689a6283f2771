"""The protocol lock."""

import re

import pytest

from wavelatent.common.config import PRESETS
from wavelatent.common.evaluation import Result
from wavelatent.pipelines.comparison import DEFINED_BY, differences, flatten, protocol_differences

METRICS = {"psnr": 30.0, "lpips": 0.1, "rfid": 2.0}
PROTOCOL = {
    "num_samples": 100,
    "num_reference": 100,
    "size": 64,
    "features": "inception",
    "lpips_net": "alex",
    "autoencoder": {"path": "a", "fingerprint": "f", "mixed_precision": "no"},
    "resize": {"data": "lanczos", "features": "bilinear"},
    "library versions": {"torch": "2"},
    "notes": [],
}


def result(metrics: dict = METRICS, **changes: object) -> Result:
    return Result(metrics=metrics, protocol={**PROTOCOL, **changes}, seconds=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"autoencoder": {"path": "b", "fingerprint": "g", "mixed_precision": "no"}},
        {"library versions": {"torch": "3"}, "notes": ["biased"], "intervals": {"resamples": 10}},
    ],
    ids=["equal", "another autoencoder", "how it was measured"],
)
def test_what_does_not_define_a_figure_may_differ(changes):
    assert differences(result(), result(**changes)) == []


def test_a_field_that_every_figure_rests_on_is_named_with_both_values():
    assert differences(result(), result(num_samples=50)) == ["num_samples (50 against 100)"]
    resize = {"data": "bicubic", "features": "bilinear"}
    assert differences(result(), result(resize=resize)) == ["resize.data (bicubic against lanczos)"]
    half = {"path": "a", "fingerprint": "f", "mixed_precision": "bf16"}
    assert differences(result(), result(autoencoder=half)) == ["autoencoder.mixed_precision (bf16 against no)"]
    assert differences(result(), result(num_samples=50), "psnr")


def test_a_field_of_one_figure_leaves_the_others_comparable():
    other = result(lpips_net="vgg")
    assert differences(result(), other) == ["lpips_net (vgg against alex)"]
    assert differences(result(), other, "psnr") == []
    assert differences(result(), other, "lpips")
    assert differences(result(), result({"psnr": 1.0}, lpips_net="vgg")) == [], "only one of them has that figure"


def test_a_field_that_one_protocol_lacks_and_one_that_nobody_knows_count():
    assert differences(result(), result(novel=1)) == ["novel (1 against none)"]
    assert differences(result(novel=1), result()) == ["novel (none against 1)"]
    assert protocol_differences({"a": 1}, {"a": 2}, "no such metric") == ["a (2 against 1)"]


def test_the_page_on_evaluation_has_every_figure():
    page = (PRESETS.parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall("`(.+?)`", cell)} == set(DEFINED_BY)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert flatten({}) == {}
