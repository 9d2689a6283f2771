"""The benchmark's arithmetic, the shape of its result and its exact figures. No timing is judged."""

import json
import math

import pytest
import torch
from torch import nn

from wavelatent.common.errors import UsageError
from wavelatent.pipelines import bench
from wavelatent.pipelines.bench import bench_autoencoder, compare, describe
from wavelatent.pipelines.bench_memory import cpu_activation_bytes
from wavelatent.pipelines.bench_models import PEER, Half, arithmetic, build_half
from wavelatent.pipelines.info import info


def row(model, speed, rounds, flops, memory):
    return {
        "model": model,
        "direction": "encode",
        "precision": "fp32",
        "images_per_second": speed,
        "seconds_per_image": rounds,
        "flops_per_image": flops,
        "peak_memory_bytes": memory,
    }


def test_comparisons_are_quotients_of_the_rows():
    found = compare([row(PEER, 2.0, [0.5, 0.8], 600, 100), row("mine", 10.0, [0.2, 0.1], 100, 25)])
    assert found == {
        "ratios": {"encode_fp32": {"mine": 5.0}},
        "ratio_ranges": {"encode_fp32": {"mine": [2.5, 8.0]}},
        "flop_ratios": {"encode_fp32": {"mine": 6.0}},
        "ratio_to_flop_ratio": {"encode_fp32": {"mine": pytest.approx(5 / 6)}},
        "memory_ratios": {"encode_fp32": {"mine": 0.25}},
    }


def test_a_run_has_every_row_and_ratios_that_follow_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0.01)
    models = ["litevae-s", "tiny/encoder-kl"]
    result = bench_autoencoder(
        32, batch_size=1, device="cpu", models=models, repeats=2, memory=False, out=tmp_path / "x" / "bench.json"
    )
    groups = [f"{direction}_{precision}" for direction in ("encode", "decode") for precision in ("fp32", "bf16")]
    assert [(f"{r['direction']}_{r['precision']}", r["model"]) for r in result["rows"]] == [
        (group, model) for group in groups for model in (PEER, *models)
    ]
    by_key = {(f"{r['direction']}_{r['precision']}", r["model"]): r for r in result["rows"]}
    for group in groups:
        assert set(result["ratios"][group]) == set(models)
        for model in models:
            mine, peer = by_key[group, model], by_key[group, PEER]
            assert result["ratios"][group][model] == mine["images_per_second"] / peer["images_per_second"]
            assert mine["images_per_second"] == 1 / min(mine["seconds_per_image"])
            assert len(mine["seconds_per_image"]) == 2
    # Against what info counts, and the published size of the peer's halves.
    small = info("litevae-s", size=32)
    assert by_key["encode_fp32", "litevae-s"]["parameters"] == small["parameters"]["encoder"]
    assert by_key["encode_bf16", "litevae-s"]["flops_per_image"] == small["flops"]["encode"]
    quant, post_quant = 8 * 8 + 8, 4 * 4 + 4
    assert by_key["encode_fp32", PEER]["parameters"] == 34_163_592 + quant
    assert by_key["decode_fp32", PEER]["parameters"] == 49_490_179 + post_quant
    assert json.loads((tmp_path / "x" / "bench.json").read_text()) == result
    assert {"method", "versions", "threads", "hardware", "clock", "load_average"} <= set(result["protocol"])
    assert len(describe(result).splitlines()) == 2 + len(result["rows"])


def test_presets_with_the_same_decoder_share_its_measurement():
    decoders = {arithmetic(model, "decode") for model in ("litevae-s", "litevae-b", "litevae-m", "litevae-l")}
    assert len(decoders) == 1
    assert arithmetic("ae-tiny", "decode") not in decoders
    assert arithmetic(PEER, "decode") not in decoders
    assert arithmetic("litevae-s", "encode") != arithmetic("litevae-b", "encode")


def test_rounds_time_every_model_and_count_by_the_image(monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0.01)
    slow = Half(nn.ModuleList(), lambda x: torch.linalg.inv(torch.eye(300)), (2,))
    quick = Half(nn.ModuleList(), lambda x: x, (2,))
    seconds = bench.time_rounds({"slow": slow, "quick": quick}, 4, torch.device("cpu"), "no", 3)
    assert {name: len(values) for name, values in seconds.items()} == {"slow": 3, "quick": 3}
    assert all(math.isfinite(s) and s >= 0 for values in seconds.values() for s in values)


def test_memory_of_a_pass_holds_its_largest_maps_and_grows_with_the_batch():
    def measure(batch_size):
        return cpu_activation_bytes(
            "ae-tiny", "encode", size=128, batch_size=batch_size, precision="no", threads=torch.get_num_threads()
        )

    one_map = 32 * 64 * 64 * 4  # the widest extraction net at half of 128 px, one image, float32
    few = measure(4)
    assert 3 * 4 * one_map < few < 60 * 4 * one_map
    assert measure(16) > 2 * few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["litevae-x"]}, "litevae-s"),
        ({"size": 100}, "do not divide"),
        ({"precisions": ["fp16"]}, "fp32 and bf16"),
        ({"repeats": 0}, "at least one round"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        bench_autoencoder(**{"size": 32, "device": "cpu", "memory": False} | arguments)


def test_our_kl_f8_and_the_peer_have_the_same_shapes():
    for direction in ("encode", "decode"):
        ours, theirs = build_half("kl-f8", direction, 32), build_half(PEER, direction, 32)
        assert ours.input_shape == theirs.input_shape
        inputs = torch.zeros(2, *ours.input_shape)
        with torch.inference_mode():
            assert ours.compute(inputs).shape == theirs.compute(inputs).shape
