"""``evaluate`` gives the same figures with any number of processes and any batch size."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from tiny_evaluation import COUNT, HalfSize, TinyInception, pixels, write_folder
from torch import Tensor

from wavelatent.common import claims, distributed_features, reference_cache
from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.evaluation import Result
from wavelatent.common.images import open_data, read_batch, to_uint8
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.common.reference_features import choose_images
from wavelatent.pipelines import evaluate
from wavelatent.pipelines.evaluate import evaluate_generation, evaluate_reconstruction
from wavelatent.pipelines.evaluation_inputs import open_reference
from wavelatent.pipelines.sample_sources import open_samples

PATIENCE = 120
"""Seconds that a process may take; one that waits for another for ever is killed, and the test fails."""


def missing(*_: object) -> None:
    raise MissingWeightsError("not here")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    TinyInception.images_seen = 0
    monkeypatch.setattr(evaluate, "InceptionFeatures", TinyInception)
    monkeypatch.setattr(evaluate, "PerceptualDistance", missing)
    monkeypatch.setattr(evaluate, "load_autoencoder", lambda spec: HalfSize())
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(distributed_features, "PART", 6)  # so that there are several


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", pixels(0))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "samples", pixels(1))


def together(processes: int, work: Callable[[], Result], out: Path) -> list[dict]:
    """Return what ``work`` gave, or how it failed, and how many images were looked at, in each process."""

    def run() -> None:
        signal.alarm(PATIENCE)
        try:
            found = work().to_dict()
        except WavelatentError as error:
            found = {"error": type(error).__name__, "text": str(error)}
        found["images_seen"] = TinyInception.images_seen
        (out / f"{PartialState().process_index}.json").write_text(json.dumps(found))

    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(run, num_processes=processes)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


def assert_same(first: dict, other: dict) -> None:
    assert first["metrics"].keys() == other["metrics"].keys()
    for name, value in first["metrics"].items():
        assert other["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-9), name
    several = {name: value for name, value in first["protocol"].items() if not name.endswith("_extrapolated")}
    assert {name: other["protocol"][name] for name in several} == several


@pytest.mark.parametrize("processes", [2, 3])
def test_generation_is_shared_and_every_process_returns_the_result(processes, data, samples, tmp_path, monkeypatch):
    one = evaluate_generation(samples=samples, data=str(data), batch_size=5, device="cpu").to_dict()
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "another")
    TinyInception.images_seen = 0
    several = together(
        processes,
        lambda: evaluate_generation(samples=samples, data=str(data), batch_size=2, device="cpu", overwrite=True),
        tmp_path,
    )
    seen = [found.pop("images_seen") for found in several]
    assert sum(seen) == 2 * COUNT, "nobody does another's work"
    assert min(seen) > 0
    assert all(found == several[0] for found in several)
    assert_same(one, several[0])
    assert json.loads((samples / "metrics.json").read_text()) == several[0]


def test_a_part_of_the_reference_that_another_command_is_at_is_waited_for(data, tmp_path, monkeypatch):
    images = open_data(str(data))
    cache = reference_cache.ReferenceCache(images.fingerprint(), TinyInception())
    order = choose_images(COUNT, None, seed=0)

    def measure() -> Result:
        held = cache.claim([0], lambda: None)
        if PartialState(cpu=True).is_main_process:
            next(held)

        def ends(seconds: float) -> None:
            cache.store(0, TinyInception()(to_uint8(read_batch(images, order[:6]).images)))
            TinyInception.images_seen -= 6
            held.close()

        monkeypatch.setattr(claims, "time", SimpleNamespace(sleep=ends))
        return evaluate_reconstruction("half", str(data), device="cpu")

    several = together(2, measure, tmp_path)
    assert sum(found["images_seen"] for found in several) == 2 * COUNT - 6
    one = evaluate_reconstruction("half", str(data), device="cpu").to_dict()
    assert_same(one, several[0])


def test_reconstruction_is_shared_and_no_image_counts_twice(data, tmp_path):
    one = evaluate_reconstruction("half", str(data), batch_size=13, device="cpu", out=tmp_path / "one").to_dict()
    several = together(
        2,
        lambda: evaluate_reconstruction("half", str(data), batch_size=3, device="cpu", out=tmp_path / "two"),
        tmp_path,
    )
    assert_same(one, several[0])
    assert several[1]["metrics"] == several[0]["metrics"]
    assert several[0]["worst"] == one["worst"]
    tables = [(tmp_path / name / "per-image.csv").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1]
    assert (tmp_path / "two" / "worst-reconstructions.png").exists()


def test_more_processes_than_images(data, tmp_path):
    several = together(
        3, lambda: evaluate_reconstruction("half", str(data), num_images=2, device="cpu", intervals=False), tmp_path
    )
    one = evaluate_reconstruction("half", str(data), num_images=2, device="cpu", intervals=False).to_dict()
    assert_same(one, several[0])


def test_what_one_process_misses_all_do_without(data, tmp_path, monkeypatch):
    class AbsentInTheSecond(torch.nn.Module):
        def __init__(self, net: str) -> None:
            super().__init__()
            if PartialState().process_index == 1:
                raise MissingWeightsError("not on the second machine")

    class AbsentInTheFirst(TinyInception):
        def __init__(self, device: object = "cpu") -> None:
            if PartialState().process_index == 0:
                raise MissingWeightsError("not on the first machine")

    monkeypatch.setattr(evaluate, "PerceptualDistance", AbsentInTheSecond)
    monkeypatch.setattr(evaluate, "InceptionFeatures", AbsentInTheFirst)
    for found in together(2, lambda: evaluate_reconstruction("half", str(data), device="cpu"), tmp_path):
        assert set(found["metrics"]) == {"psnr", "psnr_interval", "ssim", "ssim_interval"}
        assert found["not_computed"] == {"rfid": "not on the first machine", "lpips": "not on the second machine"}
        assert found["protocol"]["weights_sha256"] is None


def test_processes_that_see_other_files_are_refused_by_name(data, samples, tmp_path, monkeypatch):
    def of_one_machine(spec: str, **options: object) -> object:
        return open_reference(str(samples) if PartialState().process_index == 1 else spec, **options)

    monkeypatch.setattr(evaluate, "open_reference", of_one_machine)
    for found in together(2, lambda: evaluate_generation(samples=samples, data=str(data), device="cpu"), tmp_path):
        assert found["error"] == "WavelatentError"
        assert f"--data {data} is not the same in process 0 and in process 1" in found["text"]


@pytest.mark.parametrize("how", ["out of memory", "signal", "usage", "by main"])
def test_what_happens_in_one_process_ends_all_of_them(how, data, samples, tmp_path, monkeypatch):
    class Troubled(TinyInception):
        def __call__(self, images: Tensor) -> Tensor:
            if PartialState().process_index == 1 and how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if PartialState().process_index == 1 and how == "out of memory":
                raise torch.OutOfMemoryError("no more")
            return super().__call__(images)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(evaluate, "InceptionFeatures", Troubled)
    if how == "by main":
        monkeypatch.setattr(Result, "save", fail)
    num = COUNT + 1 if how == "usage" else None
    found = together(
        2, lambda: evaluate_generation(samples=samples, data=str(data), num_reference=num, device="cpu"), tmp_path
    )
    kinds = {"signal": Stopped, "usage": UsageError}
    texts = {"signal": "stopped by SIGTERM", "usage": "asked for 14 images of 13", "by main": "the disk is full"}
    for each in found:
        assert each["error"] == kinds.get(how, WavelatentError).__name__
        assert texts.get(how, "lower the batch size") in each["text"]


def test_processes_that_see_other_samples_are_refused_by_name(data, samples, tmp_path, monkeypatch):
    """As many images of one size in both."""
    other = tmp_path / "other"
    shutil.copytree(samples, other)
    first = min(other.glob("*.png"))
    Image.fromarray(np.asarray(Image.open(first)) // 2).save(first)

    def of_one_machine(folder: Path, num: int | None) -> object:
        return open_samples(other if PartialState().process_index == 1 else folder, num)

    monkeypatch.setattr(evaluate, "open_samples", of_one_machine)
    for found in together(2, lambda: evaluate_generation(samples=samples, data=str(data), device="cpu"), tmp_path):
        assert found["error"] == "WavelatentError"
        assert f"--samples {samples} is not the same in process 0 and in process 1" in found["text"]
