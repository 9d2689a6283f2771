"""The protocol lock."""

import re

import pytest

from wavelatent.common.config import PRESETS
from wavelatent.pipelines.comparison import DEFINED_BY, flatten, protocol_differences

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


def differences(metric: str = "lpips", **changes: object) -> list[str]:
    return protocol_differences(PROTOCOL, {**PROTOCOL, **changes}, metric)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"autoencoder": {"path": "b", "fingerprint": "g", "mixed_precision": "no"}},
        {"library versions": {"torch": "3"}, "notes": ["biased"], "intervals": {"resamples": 10}},
    ],
    ids=["equal", "another autoencoder", "how it was measured"],
)
@pytest.mark.parametrize("metric", ["psnr", "lpips", "rfid"])
def test_what_does_not_define_a_figure_may_differ(changes, metric):
    assert differences(metric, **changes) == []


def test_a_field_that_every_figure_rests_on_is_named_with_both_values():
    for metric in ("psnr", "lpips", "rfid"):
        assert differences(metric, num_samples=50) == ["num_samples (50 against 100)"]
        half = {"path": "a", "fingerprint": "f", "mixed_precision": "bf16"}
        assert differences(metric, autoencoder=half) == ["autoencoder.mixed_precision (bf16 against no)"]
    resize = {"data": "bicubic", "features": "bilinear"}
    assert differences("rfid", resize=resize) == ["resize.data (bicubic against lanczos)"]


def test_a_field_of_one_figure_leaves_the_others_comparable():
    assert differences("psnr", lpips_net="vgg") == []
    assert differences("rfid", lpips_net="vgg") == []
    assert differences("lpips", lpips_net="vgg") == ["lpips_net (vgg against alex)"]


def test_a_field_that_one_protocol_lacks_and_one_that_nobody_knows_count():
    assert differences(novel=1) == ["novel (1 against none)"]
    assert protocol_differences({**PROTOCOL, "novel": 1}, PROTOCOL, "lpips") == ["novel (none against 1)"]
    assert protocol_differences({"a": 1}, {"a": 2}, "no such metric") == ["a (2 against 1)"]


def test_the_page_on_evaluation_has_every_figure():
    page = (PRESETS.parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall("`(.+?)`", cell)} == set(DEFINED_BY)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert flatten({}) == {}
