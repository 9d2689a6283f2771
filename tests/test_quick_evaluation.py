"""The quick FID during training, with a six-number stand-in for Inception; one test uses the real network."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_evaluation import TinyInception
from torch import Tensor

from wavelatent.common import reference_cache
from wavelatent.common.distributed_features import Shares
from wavelatent.common.errors import UsageError
from wavelatent.common.feature_distances import FeatureStatistics, frechet_distance, kernel_distance
from wavelatent.common.images import ImageData, open_data, to_float, to_uint8
from wavelatent.common.inception import InceptionFeatures
from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord, Manifest, Statistics
from wavelatent.common.metric_weights import MissingWeightsError, inception_weights
from wavelatent.common.reference_features import choose_images, reference_features, uint8_batches
from wavelatent.common.runtime import RuntimeOptions, accelerated
from wavelatent.pipelines import quick_evaluation
from wavelatent.pipelines.quick_evaluation import QuickEvaluation
from wavelatent.stage2_diffusion.generation import draw_labels, generate_latents
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.sampling import Sampling

SIZE, COUNT = 16, 14
SETTINGS = {"num_samples": 10, "num_reference": 9, "batch_size": 3, "sampling": Sampling("euler", 2)}
Values = dict[str, float] | None
PATIENCE = 120
"""Seconds that a process of several may take."""


class NoWeights(TinyInception):
    def __init__(self, device: object = "cpu") -> None:
        raise MissingWeightsError("Inception is not here:\nfetch it")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(quick_evaluation, "InceptionFeatures", TinyInception)
    TinyInception.images_seen = 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC).save(path / f"{number}.png")
    return path


@pytest.fixture
def data(folder: Path) -> ImageData:
    return open_data(str(folder), size=SIZE, resize_filter="bicubic")


def manifest_of(data: ImageData) -> Manifest:
    statistics = Statistics(mean=[0.0] * 3, std=[1.0] * 3, min=[0.0] * 3, max=[1.0] * 3)
    return Manifest(
        autoencoder=AutoencoderRecord(fingerprint="a", path="nowhere"),
        data=DataRecord(fingerprint=data.fingerprint(), spec=data.spec, transform=dict(data.transform)),
        shape=(3, 4, 8), dtype="float32", count=len(data), flips=False, posterior="deterministic", stats=statistics,
        shards=[],
    )  # fmt: skip


def make_model(num_classes: int = 0) -> LatentDiffusion:
    torch.manual_seed(0)
    network = {
        "kind": "unet",
        "channels": 8,
        "multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_levels": [1],
        "head_channels": 8,
    }
    model = LatentDiffusion(network, {"kind": "edm"}, (3, 4, 8), num_classes)
    for parameter in model.parameters():  # an output that is not zero, for all that it starts so
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def decode(raw: Tensor) -> Tensor:
    assert raw.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    return F.interpolate(raw, size=(SIZE, SIZE)).tanh()


def evaluate(
    processes: int, evaluation: Callable[..., QuickEvaluation], out: Path, *, num_classes: int = 0, calls: int = 1
) -> list[list[Values]]:
    """Return what each of ``calls`` calls gave in each process."""

    def work() -> None:
        if processes > 1:
            signal.alarm(PATIENCE)  # a process that waits for another is killed, and the test fails
        with accelerated(RuntimeOptions(device="cpu")) as accelerator:
            assert accelerator.num_processes == processes
            quick, model = evaluation(accelerator), make_model(num_classes)
            values = [quick(model, step) for step in range(1, calls + 1)]
            (out / f"{accelerator.process_index}.json").write_text(json.dumps([values, TinyInception.images_seen]))

    AcceleratorState._reset_state(reset_partial_state=True)
    work() if processes == 1 else debug_launcher(work, num_processes=processes)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]
    evaluate.images_seen = [seen for _, seen in found]
    return [values for values, _ in found]


def figures(values: Values) -> list[float]:
    assert values is not None
    assert values.keys() == {"quick_fid", "quick_kid", "quick_seconds"}
    assert values["quick_seconds"] > 0
    return [values["quick_fid"], values["quick_kid"]]


def test_figures_are_those_of_all_samples_and_reference_in_evaluates_order(data: ImageData, tmp_path: Path) -> None:
    def quick(accelerator):
        return QuickEvaluation(manifest_of(data), decode, accelerator, **SETTINGS)

    ((values,),) = evaluate(1, quick, tmp_path, num_classes=5)
    extractor = TinyInception()
    model = make_model(5).eval()
    raw = generate_latents(model, range(10), labels=draw_labels(range(10), 5), sampling=SETTINGS["sampling"])
    samples = extractor(to_uint8(decode(raw)))
    reference = torch.cat([extractor(x) for x in uint8_batches(data, 4, choose_images(COUNT, 9, 0))])
    fid = frechet_distance(FeatureStatistics.of(samples), FeatureStatistics.of(reference))
    assert figures(values) == pytest.approx([fid, kernel_distance(samples, reference).mean], rel=1e-4)
    assert fid > 0.01  # not the distance of nothing from nothing


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_every_one_of_them_the_same(
    processes: int, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(accelerator):
        return QuickEvaluation(manifest_of(data), decode, accelerator, **SETTINGS)

    ((one,),) = evaluate(1, quick, tmp_path)
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "another")
    TinyInception.images_seen = 0
    many = evaluate(processes, quick, tmp_path)
    assert sum(evaluate.images_seen) == 10 + 9  # nobody does another's work
    assert max(evaluate.images_seen) - min(evaluate.images_seen) <= 2 * SETTINGS["batch_size"]
    assert all(values == many[0] for values in many)
    assert figures(many[0][0]) == pytest.approx(figures(one), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("count", "batch_size", "processes"), [(10, 3, 2), (5, 4, 2), (3, 2, 4), (7, 7, 1), (8, 2, 3)])
def test_shares_cover_every_row_once_and_differ_by_a_batch_at_most(count, batch_size, processes) -> None:
    shares = Shares.equal(count, batch_size, processes)
    parts = [[number for batch in shares.of(process) for number in batch] for process in range(processes)]
    assert sorted(number for part in parts for number in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= shares.batch_size

    class Gathering:
        """An accelerator whose other processes are simulated."""

        device = torch.device("cpu")

        def gather(self, mine: Tensor) -> Tensor:
            padded = [torch.zeros_like(mine) for _ in parts]
            for rows, part in zip(padded, parts, strict=True):
                rows[: len(part)] = rows_of(part)
            return torch.cat(padded)

    def rows_of(part: list[int]) -> Tensor:
        return torch.tensor(part, dtype=torch.float32)[:, None] + torch.tensor([0.0, 100.0])

    assert torch.equal(shares.gather(Gathering(), rows_of(parts[-1])), rows_of(list(range(count))))


def test_the_reference_is_evaluates_own_and_is_not_extracted_again(
    data: ImageData, folder: Path, tmp_path: Path
) -> None:
    reference_features(data, TinyInception(), num=5)  # what `evaluate` has left is used
    TinyInception.images_seen = 0
    quick = []

    def make(accelerator):
        quick.append(QuickEvaluation(manifest_of(data), decode, accelerator, **SETTINGS))
        return quick[0]

    first, second = evaluate(1, make, tmp_path, calls=2)[0]
    assert figures(first) == figures(second)
    assert TinyInception.images_seen == (9 - 5) + 2 * 10
    left = reference_features(data, TinyInception(), num=9)  # and what this leaves, by `evaluate`
    assert TinyInception.images_seen == (9 - 5) + 2 * 10
    assert torch.equal(left.features, quick[0]._reference.features)
    for path in folder.iterdir():
        path.unlink()
    ((third,),) = evaluate(1, lambda a: QuickEvaluation(manifest_of(data), decode, a, **SETTINGS), tmp_path)
    assert figures(third) == figures(first)  # the images themselves are no longer needed


def test_training_is_not_disturbed(data: ImageData) -> None:
    with accelerated(RuntimeOptions(device="cpu")) as accelerator:
        quick = QuickEvaluation(manifest_of(data), decode, accelerator, **SETTINGS)
        model = make_model().train()
        frozen = next(module for module in model.network.modules() if not list(module.children()))
        frozen.eval()
        modes = [module.training for module in model.modules()]
        torch.manual_seed(1)
        np.random.seed(1)
        before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        first = figures(quick(model, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = figures(quick(model, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpys)
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert first == second


def failing_on(rank: int, how: str, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> Callable[..., QuickEvaluation]:
    """Return what makes an evaluation that lacks something, or breaks, in process ``rank`` alone."""

    def fail(*_: object) -> Tensor:
        raise RuntimeError("out of\nmemory")

    def make(accelerator):
        here, manifest = accelerator.process_index == rank, manifest_of(data)
        if here and how == "weights":
            monkeypatch.setattr(quick_evaluation, "InceptionFeatures", NoWeights)
        if here and how == "images":
            manifest = manifest.model_copy(
                update={"data": manifest.data.model_copy(update={"spec": str(Path(data.spec) / "gone")})}
            )
        decoder = {"autoencoder": None, "memory": fail}.get(how, decode) if here else decode
        return QuickEvaluation(manifest, decoder, accelerator, **SETTINGS)

    return make


REASONS = {
    "weights": "Inception is not here: fetch it",
    "autoencoder": "the autoencoder that made the latents is not to be had",
    "images": "gone",
    "memory": "RuntimeError: out of memory",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_is_missing_is_said_in_one_line_and_not_tried_again(how, data, tmp_path, monkeypatch, capfd) -> None:
    assert evaluate(1, failing_on(0, how, data, monkeypatch), tmp_path, calls=2) == [[None, None]]
    lines = [line for line in capfd.readouterr().err.splitlines() if "quick FID at" in line]
    assert len(lines) == 1
    assert lines[0].startswith("no quick FID at step 1 and after: ")
    assert REASONS[how] in lines[0]


@pytest.mark.parametrize(("how", "rank"), [("weights", 1), ("images", 0), ("memory", 1)])
def test_what_one_process_lacks_stalls_no_other(how, rank, data, tmp_path, monkeypatch, capfd) -> None:
    make = failing_on(rank, how, data, monkeypatch)
    assert evaluate(2, make, tmp_path, calls=2) == [[None, None], [None, None]]
    said = capfd.readouterr().err
    assert said.count("no quick FID at step 1 and after: ") == 1
    assert REASONS[how] in said
    assert f"(process {rank} of 2)" in said


@pytest.mark.parametrize("processes", [1, 2])
def test_samples_that_are_not_finite_cost_one_measurement_and_are_logged(processes, data, tmp_path, capfd) -> None:
    events = tmp_path / "events"

    def make(accelerator):
        first = accelerator.process_index == processes - 1  # in one process, at the first step alone

        def decode_once_not(raw: Tensor) -> Tensor:
            nonlocal first
            images, first = decode(raw).masked_fill(torch.tensor(first), torch.nan), False
            return images

        def log(step: int, event: str, message: str) -> None:
            with events.open("a") as file:
                file.write(f"{step} {event}: {message}\n")

        return QuickEvaluation(manifest_of(data), decode_once_not, accelerator, **SETTINGS, log_event=log)

    for first, second in evaluate(processes, make, tmp_path, calls=2):
        assert first is None
        figures(second)
    said = "no quick FID at step 1: a sample is not finite"
    assert events.read_text() == f"1 quick_evaluation_skipped: {said}\n"
    assert capfd.readouterr().err.count(said) == 1


def test_images_that_have_changed_are_no_reference(data, folder, tmp_path, capfd) -> None:
    manifest = manifest_of(data)
    (folder / "0.png").unlink()
    assert evaluate(1, lambda a: QuickEvaluation(manifest, decode, a, **SETTINGS), tmp_path) == [[None]]
    assert f"{folder} has changed since the latents were made from it" in capfd.readouterr().err


def test_fewer_images_than_asked_for_are_all_of_them_and_too_few_are_refused(data) -> None:
    with accelerated(RuntimeOptions(device="cpu")) as accelerator:
        assert QuickEvaluation(manifest_of(data), decode, accelerator).num_reference == COUNT
        assert QuickEvaluation(manifest_of(data), decode, accelerator, num_reference=None).num_reference == COUNT
        with pytest.raises(UsageError, match="at least 4"):
            QuickEvaluation(manifest_of(data), decode, accelerator, num_samples=3)


def test_with_the_real_inception(data, tmp_path, monkeypatch) -> None:
    try:
        inception_weights(fetch=False)
    except MissingWeightsError as error:
        pytest.skip(str(error))
    # Its first features: the root of a covariance of all 2048 takes most of a minute on one core.
    monkeypatch.setattr(quick_evaluation, "InceptionFeatures", partial(InceptionFeatures, layer="64"))
    images = torch.cat(list(uint8_batches(data, 8, choose_images(COUNT, 8, 0))))
    rest = iter(to_float(images).split(4))  # the "samples" are the reference: at distance 0 from itself

    def quick(accelerator):
        settings = {"num_samples": 8, "num_reference": 8, "batch_size": 4, "sampling": Sampling("euler", 1)}
        return QuickEvaluation(manifest_of(data), lambda _: next(rest), accelerator, **settings)

    ((values,),) = evaluate(1, quick, tmp_path)
    fid, kid = figures(values)
    assert fid == pytest.approx(0, abs=1e-6)
    assert kid != 0
