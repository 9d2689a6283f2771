import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.images import iterate_batches, open_data
from wavelatent.common.latent_cache import LatentCache
from wavelatent.common.latent_cache_writer import CacheWriter
from wavelatent.common.latents import Posterior
from wavelatent.pipelines.encode import encode

DATA = "synthetic:11"
SIZE = 16


class TinyAutoencoder(nn.Module):
    """Averages blocks of 4 x 4 pixels and gives them a spread; counts the images it has seen."""

    downsampling = 4
    latent_channels = 3

    def __init__(self, name: str = "tiny") -> None:
        super().__init__()
        self.name = name
        self.seen = 0
        self.explode_after = 10**9

    def encode(self, images: Tensor) -> Posterior:
        self.seen += len(images)
        if self.seen > self.explode_after:
            raise KeyboardInterrupt
        mean = nn.functional.avg_pool2d(images, 4)
        return Posterior(mean, 0.1 + mean.abs())

    def fingerprint(self) -> str:
        return self.name * 16


@pytest.fixture
def autoencoder(monkeypatch: pytest.MonkeyPatch) -> TinyAutoencoder:
    model = TinyAutoencoder()
    monkeypatch.setattr("wavelatent.pipelines.encode.load_autoencoder", lambda spec: model)
    return model


def run(out: Path, **options: object) -> dict[str, object]:
    return encode("ae", DATA, out, **{"batch_size": 3, "device": "cpu", "size": SIZE, "shard_size": 4, **options})  # type: ignore[arg-type]


def test_every_image_is_encoded_once_and_the_cache_verifies(tmp_path: Path, autoencoder: TinyAutoencoder) -> None:
    result = run(tmp_path, flips=True)
    assert autoencoder.seen == 2 * 11
    images = open_data(DATA, size=SIZE)
    cache = LatentCache.open(
        tmp_path, autoencoder_fingerprint=autoencoder.fingerprint(), data_fingerprint=images.fingerprint()
    )
    rows = cache.read(range(11))
    (batch,) = iterate_batches(images, 11)
    assert torch.allclose(rows.posterior.mean, autoencoder.encode(batch.images).mean)
    assert rows.flip_posterior is not None
    assert torch.allclose(rows.flip_posterior.mean, autoencoder.encode(batch.images.flip(-1)).mean)
    assert rows.labels is not None
    assert batch.labels is not None
    assert torch.equal(rows.labels, batch.labels)
    assert (result["count"], result["shape"], result["shards"]) == (11, [3, 4, 4], 3)
    assert result["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    json.dumps(result)


def test_a_finished_cache_is_left_alone(tmp_path: Path, autoencoder: TinyAutoencoder) -> None:
    assert run(tmp_path)["already_complete"] is False
    seen = autoencoder.seen
    assert run(tmp_path)["already_complete"] is True
    assert autoencoder.seen == seen
    assert run(tmp_path, overwrite=True)["already_complete"] is False
    assert autoencoder.seen == 2 * seen


def test_a_killed_command_encodes_only_what_is_missing(tmp_path: Path, autoencoder: TinyAutoencoder) -> None:
    autoencoder.explode_after = 9  # in the third shard
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    autoencoder.explode_after, autoencoder.seen = 10**9, 0
    run(tmp_path)
    assert autoencoder.seen == 3
    assert LatentCache.open(tmp_path).read(range(11)).index.tolist() == list(range(11))


def test_max_minutes_stops_with_everything_saved_and_always_gets_on(
    tmp_path: Path, autoencoder: TinyAutoencoder
) -> None:
    stops = 0
    while True:
        try:
            run(tmp_path / "stopped", max_minutes=0)
            break
        except Stopped:
            stops += 1
    assert stops == 4  # batches of 3, 1 | 3, 1 | 3: after every one but the last
    assert autoencoder.seen == 11
    run(tmp_path / "straight")
    for name in ["manifest.json", "shard-00001.safetensors"]:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_finished_cache_of_other_inputs_or_options_is_refused_by_name(
    tmp_path: Path, autoencoder: TinyAutoencoder
) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match="flips False, not True"):
        run(tmp_path, flips=True)
    with pytest.raises(WavelatentError, match="another data"):
        run(tmp_path, size=32)
    autoencoder.name = "other"
    with pytest.raises(WavelatentError, match="another autoencoder"):
        run(tmp_path)


def test_an_image_size_that_does_not_divide_is_a_usage_error(tmp_path: Path, autoencoder: TinyAutoencoder) -> None:
    with pytest.raises(UsageError, match=r"18 px .* --size 16"):
        run(tmp_path, size=18)


def test_a_relative_autoencoder_folder_is_recorded_as_absolute(
    tmp_path: Path, autoencoder: TinyAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-ae").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec, recorded in [
        ("my-ae", str(tmp_path / "my-ae")),
        ("diffusers:my-ae", f"diffusers:{tmp_path / 'my-ae'}"),
        ("diffusers:org/name", "diffusers:org/name"),
    ]:
        encode(spec, DATA, Path("cache"), size=SIZE, device="cpu", overwrite=True)
        assert LatentCache.open("cache").manifest.autoencoder.path == recorded


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "contents",
    [
        {"thesis.tex": "precious"},
        {"config.yaml": "a: run", "metrics.jsonl": "", "checkpoints/checkpoint-1/state.json": "{}"},
        {"manifest.json": '{"format": 1, "spec": "photos", "shards": []}', "images-00000.npy": "a prepared folder"},
        {"partial/chapter.tex": "precious"},
    ],
    ids=["file", "run", "prepared", "partial"],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, autoencoder: TinyAutoencoder, contents: dict[str, str], overwrite: bool
) -> None:
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="not empty and not a latent cache; give another --out"):
        run(tmp_path, overwrite=overwrite)
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == contents


def test_a_file_as_target_is_refused(tmp_path: Path, autoencoder: TinyAutoencoder) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        run(tmp_path / "file")


def test_what_a_killed_overwrite_left_of_a_cache_is_written_over(tmp_path: Path, autoencoder: TinyAutoencoder) -> None:
    run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / ".plan.json.7.tmp").touch()
    assert run(tmp_path)["count"] == 11


@dataclass(frozen=True)
class Process:
    """One thread that passes for one of several processes."""

    process_index: int
    num_processes: int
    barrier: threading.Barrier
    device = torch.device("cpu")
    mixed_precision = "no"

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=30)


@pytest.mark.parametrize("slow", [0, 1])
def test_all_processes_decide_alike_whether_the_cache_is_complete(
    tmp_path: Path, autoencoder: TinyAutoencoder, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    """Whichever of two counts the finished shards late, none finds that the other has already cleared them away."""
    barrier = threading.Barrier(2)
    rank = threading.local()

    @contextmanager
    def accelerated(options: object) -> Iterator[Process]:
        yield Process(rank.index, 2, barrier)
        barrier.wait(timeout=30)

    def by_main(process: Process, work: Callable[[], object]) -> None:
        if process.is_main_process:
            work()
        barrier.wait(timeout=30)

    counted = CacheWriter.num_missing.fget
    assert counted is not None

    def num_missing(writer: CacheWriter) -> int:
        if rank.index == slow:
            time.sleep(0.5)
        return counted(writer)

    def process(index: int) -> dict[str, object]:
        rank.index = index
        return run(tmp_path)

    monkeypatch.setattr("wavelatent.pipelines.encode.accelerated", accelerated)
    monkeypatch.setattr("wavelatent.pipelines.encode.by_main", by_main)
    monkeypatch.setattr(CacheWriter, "num_missing", property(num_missing))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(process, [0, 1]))
    assert [result["count"] for result in results] == [11, 11]
    assert autoencoder.seen == 11


def test_bad_images_are_skipped_up_to_the_fraction_that_is_allowed(
    tmp_path: Path, autoencoder: TinyAutoencoder
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "3.png").write_bytes(b"not an image")
    with pytest.raises(WavelatentError, match=r"1 of 4 images .* raise --max-bad-fraction"):
        encode("ae", str(tmp_path / "photos"), tmp_path / "cache", device="cpu")
    result = encode("ae", str(tmp_path / "photos"), tmp_path / "cache", device="cpu", max_bad_fraction=0.25)
    assert result["count"] == 3
