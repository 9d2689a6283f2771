"""``evaluate`` and what it rests on, with a six-number stand-in for Inception; one test uses the real network."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import HalfSize, TinyInception
from torch import Tensor

from wavelatent.common import claims, reference_cache, reference_features
from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.evaluation import Result
from wavelatent.common.feature_distances import FeatureStatistics, frechet_distance
from wavelatent.common.image_metrics import psnr, ssim
from wavelatent.common.images import open_data
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.common.runtime import StopRequest
from wavelatent.pipelines import evaluate, reconstructions
from wavelatent.pipelines.evaluate import evaluate_generation, evaluate_reconstruction
from wavelatent.pipelines.sample_images import SampleOptions
from wavelatent.stage2_diffusion.sampling import Sampling

SIZE, COUNT = 32, 12


def _save_images(folder: Path, count: int, seed: int, size: int = SIZE) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:06d}.png")
    return folder


def _pixels(folder: Path) -> Tensor:
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture
def data(tmp_path) -> Path:
    return _save_images(tmp_path / "data", COUNT, seed=0)


@pytest.fixture
def samples(tmp_path) -> Path:
    return _save_images(tmp_path / "samples", COUNT, seed=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path) -> None:
    TinyInception.images_seen = 0
    monkeypatch.setattr(evaluate, "InceptionFeatures", TinyInception)
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("wavelatent.pipelines.evaluate.load_autoencoder", lambda spec: HalfSize())


@pytest.fixture
def without_lpips(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "PerceptualDistance", _missing("LPIPS is not here"))


def _missing(reason: str) -> Callable[..., None]:
    def raise_missing(*_: object) -> None:
        raise MissingWeightsError(reason)

    return raise_missing


def test_generation_is_measured_saved_and_described(data, samples):
    result = evaluate_generation(samples=samples, data=str(data), batch_size=5)
    saved = json.loads((samples / "metrics.json").read_text())
    assert saved == result.to_dict()
    assert set(saved) == {"metrics", "protocol", "seconds"}
    figures = {"fid", "fid_extrapolated", "kid_mean", "precision", "recall", "density", "coverage"}
    assert set(saved["metrics"]) == figures | {f"{name}_interval" for name in figures} | {"kid_std"}
    assert Result.load(samples / "metrics.json") == result
    features = [TinyInception()(_pixels(folder)) for folder in (samples, data)]
    expected = frechet_distance(*(FeatureStatistics.of(x) for x in features))
    assert saved["metrics"]["fid"] == pytest.approx(expected, rel=1e-6)
    protocol = saved["protocol"]
    assert protocol["num_samples"] == protocol["num_reference"] == COUNT
    assert protocol["features"] == "inception-v3-2015-12-05"
    assert protocol["reference_fingerprint"] == open_data(str(data)).fingerprint()
    assert protocol["crop"] == "adm-center"
    assert protocol["resize"]["data"] == "lanczos"
    assert protocol["seeds"] == f"0-{COUNT - 1}"
    assert protocol["kid"]["subset_size"] == COUNT // 2
    assert "torch-fidelity" in protocol["library versions"]
    assert any(note.startswith("small-sample: fid of 12 images") for note in protocol["notes"])
    low, high = saved["metrics"]["fid_interval"]
    assert low <= saved["metrics"]["fid"] <= high
    assert protocol["fid_extrapolated"]["error"] >= 0


def test_a_set_is_at_distance_zero_of_itself(data):
    metrics = evaluate_generation(samples=data, data=str(data), out=data.parent / "out").metrics
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision"] == metrics["recall"] == pytest.approx(1)


def test_the_reference_is_paid_for_once_and_grows_from_what_is_there(data, samples, monkeypatch):
    def cost(**options: object) -> int:
        TinyInception.images_seen = 0
        evaluate_generation(samples=samples, data=str(data), overwrite=True, intervals=False, **options)
        return TinyInception.images_seen - COUNT

    assert cost(num_reference=5) == 5
    assert cost(num_reference=5) == 0
    assert cost() == COUNT - 5, "the first five of the same order are kept"
    assert cost(reference_seed=1, num_reference=5) == 5, "another order is another reference"
    Image.new("RGB", (SIZE, SIZE), "red").save(data / "000003.png")
    assert cost() == COUNT, "changed data is another reference"
    assert cost() == 0
    for part in ("weights_sha256", "name"):
        monkeypatch.setattr(TinyInception, part, "another")
        assert cost() == COUNT, f"another {part} of the network is another reference"


def test_a_stopped_reference_goes_on_where_it_was(data, monkeypatch):
    monkeypatch.setattr(reference_features, "PART", 4)

    class Stops(TinyInception):
        def __call__(self, images: Tensor) -> Tensor:
            if TinyInception.images_seen >= 8:
                raise KeyboardInterrupt
            return super().__call__(images)

    images = open_data(str(data))
    with pytest.raises(KeyboardInterrupt):
        reference_features.reference_features(images, Stops(), batch_size=2)
    TinyInception.images_seen = 0
    reference = reference_features.reference_features(images, TinyInception(), batch_size=2)
    assert TinyInception.images_seen == COUNT - 8
    order = reference_features.choose_images(COUNT, None, seed=0)
    torch.testing.assert_close(reference.features, TinyInception()(_pixels(data)[order]))
    torch.testing.assert_close(reference.statistics.mean, reference.features.double().mean(dim=0))


def test_two_that_need_one_reference_at_once_share_it(data, monkeypatch, tmp_path):
    monkeypatch.setattr(reference_features, "PART", 4)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    fork = multiprocessing.get_context("fork")
    both_extract = fork.Barrier(2)

    class Waits(TinyInception):
        def __call__(self, images: Tensor) -> Tensor:
            if not TinyInception.images_seen:
                both_extract.wait(timeout=60)
            return super().__call__(images)

    def extract(number: int) -> None:
        reference = reference_features.reference_features(open_data(str(data)), Waits(), batch_size=2)
        torch.save((TinyInception.images_seen, reference.features.clone()), tmp_path / f"{number}.pt")

    TinyInception.images_seen = 0
    processes = [fork.Process(target=extract, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    (seen, features), (seen_by_other, same) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert seen + seen_by_other == COUNT, "nobody does another's work"
    assert min(seen, seen_by_other) > 0
    torch.testing.assert_close(
        features, TinyInception()(_pixels(data)[reference_features.choose_images(COUNT, None, 0)])
    )
    assert torch.equal(features, same)


def test_what_another_leaves_undone_of_the_reference_is_done_here(data, monkeypatch, capsys):
    monkeypatch.setattr(reference_features, "PART", 4)
    images = open_data(str(data))
    cache = reference_cache.ReferenceCache(images.fingerprint(), TinyInception())
    held = cache.claim([1], lambda: None)
    assert next(held) == 1
    kept_when_it_stopped = TinyInception()(_pixels(data)[reference_features.choose_images(COUNT, 5, 0)[4:]])

    def stops(seconds: float) -> None:
        cache.store(1, kept_when_it_stopped)
        held.close()

    monkeypatch.setattr(claims.time, "sleep", stops)
    TinyInception.images_seen = 0
    reference = reference_features.reference_features(images, TinyInception(), batch_size=2)
    assert TinyInception.images_seen == COUNT - 1
    assert capsys.readouterr().err.count("waiting for another process") == 1
    order = reference_features.choose_images(COUNT, None, seed=0)
    torch.testing.assert_close(reference.features, TinyInception()(_pixels(data)[order]))


def test_waiting_for_anothers_part_of_the_reference_can_be_stopped(data, monkeypatch):
    images = open_data(str(data))
    held = reference_cache.ReferenceCache(images.fingerprint(), TinyInception()).claim([0], lambda: None)
    next(held)
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    with StopRequest() as stop, pytest.raises(Stopped, match="stopped by SIGTERM"):
        reference_features.reference_features(images, TinyInception(), stop=stop)
    held.close()


@pytest.mark.parametrize("error", [PermissionError, NotImplementedError])
def test_a_cache_that_cannot_be_written_or_locked_costs_no_image_twice(data, monkeypatch, error):
    def cannot(*_: object, **__: object) -> None:
        raise error("not here")

    monkeypatch.setattr(claims.FileLock, "acquire", cannot)
    if error is PermissionError:
        monkeypatch.setattr(reference_cache, "write_atomically", cannot)
    TinyInception.images_seen = 0
    reference_features.reference_features(open_data(str(data)), TinyInception(), batch_size=2)
    assert TinyInception.images_seen == COUNT


def test_a_full_disk_costs_one_part_of_the_reference_twice_and_no_more(data, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(reference_features, "PART", 4)
    monkeypatch.setattr(reference_cache, "write_atomically", full)
    TinyInception.images_seen = 0
    reference = reference_features.reference_features(open_data(str(data)), TinyInception(), batch_size=2)
    assert len(reference) == COUNT
    assert TinyInception.images_seen == COUNT + 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(("at", "kept"), [(4, 4), (COUNT + 4, COUNT)], ids=["reference", "samples"])
@pytest.mark.parametrize("measured", ["reconstruction", "generation"])
def test_a_signal_stops_it_and_the_reference_is_kept(
    data, samples, without_lpips, monkeypatch, measured, at, kept, number
):
    def measure() -> None:
        if measured == "generation":
            evaluate_generation(samples=samples, data=str(data), batch_size=2, intervals=False)
        else:
            evaluate_reconstruction("half", str(data), batch_size=2, intervals=False)

    class Signalled(TinyInception):
        def __call__(self, images: Tensor) -> Tensor:
            features = super().__call__(images)
            if TinyInception.images_seen == at:
                os.kill(os.getpid(), number)
            return features

    monkeypatch.setattr(evaluate, "InceptionFeatures", Signalled)
    with pytest.raises(Stopped, match=f"stopped by {number.name}"):
        measure()
    assert at == TinyInception.images_seen, "it stops after the batch in hand"
    TinyInception.images_seen = -100
    measure()
    assert TinyInception.images_seen + 100 == 2 * COUNT - kept


def test_a_finished_measurement_is_returned_and_a_changed_input_measured_again(data, samples, capsys):
    first = evaluate_generation(samples=samples, data=str(data))
    TinyInception.images_seen = 0
    assert evaluate_generation(samples=samples, data=str(data)) == first
    assert TinyInception.images_seen == 0
    assert "already measured" in capsys.readouterr().err
    Image.new("RGB", (SIZE, SIZE), "red").save(samples / "000003.png")
    assert evaluate_generation(samples=samples, data=str(data)).metrics != first.metrics


def test_samples_that_cannot_be_compared_are_refused_by_name(data, samples):
    def refused(match: str, **options: object) -> None:
        with pytest.raises(WavelatentError, match=match):
            evaluate_generation(**{"samples": samples, "data": str(data), **options})

    refused(r"holds 12 images, 13 asked for", num=13)
    refused(r"32x32 px and the reference .* is 16", size=16)
    refused(r"no such folder", samples=samples / "nowhere")
    refused(r"either --samples DIR, or --run", run=samples)
    refused(r"how to sample is for --run", options=SampleOptions(Sampling("euler", 3)))
    refused(r"how to sample is for --run", autoencoder="some/ae")
    Image.new("RGB", (SIZE, SIZE - 1)).save(samples / "000004.png")
    refused(r"000004.png is 32x31, 000000.png 32x32")
    (samples / "000004.png").write_bytes(b"not an image")
    refused(r"000004.png cannot be read")
    Image.new("RGB", (SIZE, SIZE)).save(samples / "000004.jpg")
    refused(r"000004.jpg is in a lossy format")
    assert not (samples / "metrics.json").exists()


def test_asking_for_too_much_reference_is_a_usage_error(data, samples):
    with pytest.raises(UsageError, match="asked for 13 images of 12"):
        evaluate_generation(samples=samples, data=str(data), num_reference=13)


def test_generation_without_weights_fails_with_the_line_that_helps(data, samples, monkeypatch):
    monkeypatch.setattr(evaluate, "InceptionFeatures", _missing("run `wavelatent doctor --fetch`"))
    with pytest.raises(MissingWeightsError, match="doctor --fetch"):
        evaluate_generation(samples=samples, data=str(data))


def test_a_run_is_sampled_in_memory(data, samples, monkeypatch, tmp_path):
    images = _pixels(samples)
    asked: list[tuple[Path, list[int]]] = []
    autoencoders: list[str | None] = []

    class Sampler:
        def __init__(self, run, options, *, device, autoencoder):
            self.run, self.options = run, options
            self.autoencoder = autoencoder
            self.model = SimpleNamespace(latent_shape=(4, SIZE // 2, SIZE // 2))
            self.decoder = SimpleNamespace(downsampling=2)

        def identity(self):
            return "m"

        def protocol(self):
            return {"model_sha256": "m", "ema": 1, "sampler": self.options.sampling.sampler}

        def draw(self, seeds):
            asked.append((self.run, list(seeds)))
            autoencoders.append(self.autoencoder)
            return images[list(seeds)]

    monkeypatch.setattr("wavelatent.pipelines.sample_sources.ImageSampler", Sampler)
    run = tmp_path / "run"
    options = SampleOptions(Sampling("euler", 3), pass_rows=3)
    drawn = evaluate_generation(run=run, num=COUNT, data=str(data), batch_size=5, options=options)
    assert asked == [(run, list(range(6))), (run, list(range(6, 12)))]  # whole passes
    assert drawn.metrics == pytest.approx(evaluate_generation(samples=samples, data=str(data)).metrics)
    assert (run / "evaluation-generation" / "metrics.json").exists()
    assert (drawn.protocol["sampler"], drawn.protocol["seeds"]) == ("euler", "0-11")
    drawn = evaluate_generation(run=run, num=2, seed=7, data=str(data), out=tmp_path, autoencoder="moved")
    assert autoencoders == [None, None, "moved"]
    assert asked[-1] == (run, [7, 8])
    assert drawn.protocol["sampler"] == "dpmpp_2m"
    with pytest.raises(UsageError, match="--run needs --num"):
        evaluate_generation(run=run, data=str(data))


def test_reconstruction_gives_every_figure_that_it_can(data, without_lpips, tmp_path):
    result = evaluate_reconstruction("half", str(data), out=tmp_path / "result", batch_size=5)
    originals = _pixels(data)
    halved = HalfSize().decode(HalfSize().encode(originals / 127.5 - 1).mode())
    decoded = ((halved + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    statistics = (FeatureStatistics.of(TinyInception()(images)) for images in (decoded, originals))
    assert {**result.metrics, "rfid_extrapolated": 0} == pytest.approx(
        {
            "rfid_extrapolated": 0,
            "psnr": psnr(decoded, originals).mean().item(),
            "ssim": ssim(decoded, originals).mean().item(),
            "rfid": frechet_distance(*statistics),
        },
        rel=1e-6,
    )
    assert result.not_computed == {"lpips": "LPIPS is not here"}
    assert json.loads((tmp_path / "result" / "metrics.json").read_text()) == result.to_dict()
    assert result.protocol["num_samples"] == result.protocol["num_reference"] == COUNT
    assert result.protocol["lpips_net"] == "alex"
    assert result.protocol["autoencoder"]["fingerprint"] == "half-size"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_figure_of_a_reconstruction_is_computed_on_the_given_device(data, without_lpips, monkeypatch):
    devices = []

    def spy(images: Tensor, target: Tensor) -> Tensor:
        devices.extend([images.device.type, target.device.type])
        return ssim(images, target)

    monkeypatch.setattr(reconstructions, "ssim", spy)
    on_gpu = evaluate_reconstruction("half", str(data), device="cuda")
    assert devices == ["cuda", "cuda"]
    on_cpu = evaluate_reconstruction("half", str(data), device="cpu")
    assert on_gpu.metrics == pytest.approx(on_cpu.metrics, rel=1e-3)  # a value halfway may round to either side


def test_reconstruction_without_inception_never_names_an_rfid(data, without_lpips, monkeypatch):
    monkeypatch.setattr(evaluate, "InceptionFeatures", _missing("Inception is not here"))
    result = evaluate_reconstruction("half", str(data))
    assert set(result.metrics) == {"psnr", "ssim"}
    assert result.to_dict()["not_computed"]["rfid"] == "Inception is not here"


def test_reconstruction_takes_the_images_of_its_reference(data, without_lpips):
    result = evaluate_reconstruction("half", str(data), num_images=4, seed=3)
    chosen = _pixels(data)[reference_features.choose_images(COUNT, 4, seed=3)]
    decoded = HalfSize().decode(HalfSize().encode(chosen / 127.5 - 1).mode())
    decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert result.metrics["psnr"] == pytest.approx(psnr(decoded, chosen).mean().item())
    assert result.protocol["num_samples"] == 4


def test_a_reconstruction_that_is_not_finite_is_no_black_image(data, without_lpips, monkeypatch):
    class Broken(HalfSize):
        def decode(self, latents: Tensor) -> Tensor:
            images = super().decode(latents)
            images[-1, 0, 0, 0] = torch.nan
            return images

    monkeypatch.setattr(evaluate, "load_autoencoder", lambda spec: Broken())
    last = reference_features.choose_images(COUNT, 4, seed=0)[-1]
    with pytest.raises(WavelatentError, match=f"reconstruction of image {last} is not finite"):
        evaluate_reconstruction("half", str(data), num_images=4)


def test_a_size_that_the_autoencoder_cannot_take_is_a_usage_error(data):
    with pytest.raises(UsageError, match="--size 30"):
        evaluate_reconstruction("half", str(data), size=31)


def test_bad_images_are_skipped_up_to_the_fraction_that_is_allowed(data, samples, without_lpips):
    (data / "bad.png").write_bytes(b"not an image")
    measures = [
        lambda **options: evaluate_reconstruction("half", str(data), **options),
        lambda **options: evaluate_generation(samples=samples, data=str(data), **options),
    ]
    for measure in measures:
        with pytest.raises(WavelatentError, match="1 of 13 images"):
            measure()
        assert measure(max_bad_fraction=0.1).protocol["num_reference"] == COUNT


def test_the_real_networks_through_the_whole_command(data, monkeypatch):
    from wavelatent.common.inception import InceptionFeatures

    monkeypatch.setattr(evaluate, "InceptionFeatures", InceptionFeatures)
    try:
        result = evaluate_reconstruction("half", str(data), num_images=3, batch_size=2)
        if result.not_computed:
            pytest.skip("; ".join(result.not_computed.values()))
    finally:
        monkeypatch.undo()
    assert set(result.metrics) == {"rfid", "psnr", "ssim", "lpips"}
    assert any("extrapolating FID needs" in note for note in result.protocol["notes"])
    assert result.metrics["rfid"] > 1
    assert 0 < result.metrics["lpips"] < 1
    assert len(result.protocol["weights_sha256"]) == 64
