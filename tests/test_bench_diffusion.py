"""The comparison with diffusers' UNet2DModel: of equals, its arithmetic, its result. No timing is judged."""

import json

import pytest
import torch

from wavelatent.common.config import load_config
from wavelatent.common.errors import UsageError
from wavelatent.pipelines import bench
from wavelatent.pipelines.bench_diffusion import Job, bench_diffusion, compare, describe
from wavelatent.pipelines.bench_diffusion_models import (
    COMPILED,
    OURS,
    PEER,
    PeerNetwork,
    build_model,
    network_calls,
    preset_of,
    sampling_pass,
    training_step,
)
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.info import info
from wavelatent.stage2_diffusion.unet import UNet, UNetConfig

CPU = torch.device("cpu")
SMALL = DiffusionRunConfig(
    model=UNetConfig(channels=32, multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_channels=32)
)


def row(network, speed, seconds, memory, precision="bf16"):
    return {
        "model": "unet-s",
        "network": network,
        "task": "train",
        "precision": precision,
        "per_second": speed,
        "seconds": seconds,
        "peak_memory_bytes": memory,
    }


def test_comparisons_are_quotients_within_task_and_precision():
    rows = [
        row(PEER, 2.0, [0.5, 0.8], 100),
        row(OURS, 5.0, [0.25, 0.2], 50),
        row(COMPILED, 8.0, [0.125, 0.2], 40),
        row(PEER, 1.0, [1.0], None, "fp32"),
        row(OURS, 3.0, [0.5], None, "fp32"),
    ]
    assert compare(rows) == {
        "ratios": {
            "train_bf16": {"unet-s": 2.5},
            "train_bf16_compiled": {"unet-s": 4.0},
            "train_fp32": {"unet-s": 3.0},
        },
        "ratio_ranges": {
            "train_bf16": {"unet-s": [2.0, 4.0]},
            "train_bf16_compiled": {"unet-s": [4.0, 4.0]},
            "train_fp32": {"unet-s": [2.0, 2.0]},
        },
        "memory_ratios": {"train_bf16": {"unet-s": 0.5}, "train_bf16_compiled": {"unet-s": 0.4}},
    }


@pytest.mark.parametrize("preset", ["unet-tiny", "unet-s", "unet-b", "ldm8"])
def test_the_peer_has_as_many_parameters_as_every_preset(preset):
    config = load_config(DiffusionRunConfig, preset).model
    with torch.device("meta"):
        ours, peer = UNet(config, 4), PeerNetwork(config, 4)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())


@pytest.mark.parametrize("network", [OURS, PEER])
def test_a_training_pass_trains_and_a_sampling_pass_calls_the_network_as_often_as_stated(network):
    model = build_model(SMALL, network, 4)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    take = training_step(model, SMALL.train, 2, CPU, "no")
    take()
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    sampling_pass(model, 3, 2, CPU, "no")()
    assert len(calls) == network_calls(2) == 3
    assert not any(p.requires_grad for p in model.parameters())


def test_a_run_has_every_row_and_ratios_that_follow_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0.01)
    result = bench_diffusion(
        ["unet-tiny"], size=4, batch_size=2, num_steps=1, device="cpu", repeats=2, memory=False, out=tmp_path / "b.json"
    )
    assert json.loads((tmp_path / "b.json").read_text()) == result
    groups = ["train_fp32", "train_bf16", "sample_fp32", "sample_bf16"]
    assert [(f"{r['task']}_{r['precision']}", r["network"]) for r in result["rows"]] == [
        (group, network) for group in groups for network in (PEER, OURS)
    ]
    counted = info("unet-tiny", latent_shape=(4, 4, 4))
    flops, parameters = counted["flops"]["denoise"], counted["parameters"]["denoiser"]
    for peer, ours in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        task, per_pass = ours["task"], 2 if ours["task"] == "sample" else 1
        assert ours["parameters"] == peer["parameters"] == parameters
        assert ours["flops"] == peer["flops"] == 2 * flops * (3 if task == "train" else 1)
        assert ours["per_second"] == per_pass / min(ours["seconds"])
        rates, against = (result["protocol"][name][ours["precision"]] for name in ("flops_per_second", "mfu_against"))
        assert set(rates) == {"matrix product", "convolution"}
        rate = max(rates.values())
        assert rates[against] == rate
        assert ours["mfu"] == pytest.approx(ours["flops"] / min(ours["seconds"]) / rate)
        group = f"{task}_{ours['precision']}"
        assert result["ratios"][group] == {"unet-tiny": ours["per_second"] / peer["per_second"]}
    assert {"method", "versions", "threads", "hardware", "clock", "load_average"} <= set(result["protocol"])
    training = [r for r in result["rows"] if r["task"] == "train"]
    loader = {r["loader_share"] * min(r["seconds"]) for r in training}  # the seconds of one batch
    assert min(loader) > 0
    assert max(loader) == pytest.approx(min(loader))
    assert {r["loader_share"] for r in result["rows"] if r["task"] == "sample"} == {None}
    assert len(describe(result).splitlines()) == 2 + len(result["rows"])


def test_memory_of_training_holds_weights_gradients_moments_and_averages():
    parameters = 4 * 4_950_276
    averages = len(preset_of("unet-tiny").train.ema.widths)
    held = (1 + 1 + 2 + averages) * parameters
    assert 0.95 * held < Job("unet-tiny", 4, 1, 1, "train", "fp32", "cpu").memory(OURS) < 2 * held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["unet-x"]}, "unet-"),
        ({"models": ["unet-mp-s"]}, "mp_unet"),
        ({"size": 6}, "divide by 4"),
        ({"precisions": ["fp16"]}, "fp32 and bf16"),
        ({"num_steps": 0}, "at least one"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0.01)
    with pytest.raises(UsageError, match=message):
        bench_diffusion(**{"models": ["unet-tiny"], "device": "cpu", "memory": False, "repeats": 1} | arguments)
