import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wavelatent.common import verification
from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.files import sha256_file
from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord, LatentCache
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter, default_shard_size
from wavelatent.common.latent_loader import TrainingLatents
from wavelatent.common.latents import Posterior
from wavelatent.common.randomness import generator

COUNT, C, H, W = 23, 3, 2, 4
SHARD = 5


def plan(**changes: object) -> CachePlan:
    values: dict[str, object] = {
        "autoencoder": AutoencoderRecord(fingerprint="a" * 64, path="runs/ae"),
        "data": DataRecord(fingerprint="d" * 64, spec="synthetic:23", transform={"size": 16}, num_classes=4),
        "shape": (C, H, W),
        "count": COUNT,
        "shard_size": SHARD,
    }
    return CachePlan(**{**values, **changes})  # type: ignore[arg-type]


def posterior_of(indices: range | list[int], side: str = "") -> Posterior:
    """What a pretended encoder says of images ``indices``."""
    shape = (C, H, W)
    mean = [3 + 2 * torch.randn(shape, generator=generator("mean", side, i)) for i in indices]
    std = [0.1 + torch.rand(shape, generator=generator("std", side, i)) for i in indices]
    return Posterior(torch.stack(mean), torch.stack(std))


def fill(writer: CacheWriter, numbers: list[int], deterministic: bool = False) -> None:
    for number in numbers:
        images = writer.remaining(number)
        for start in range(0, len(images), 2):
            add(writer, number, images[start : start + 2], deterministic)


def add(writer: CacheWriter, number: int, chosen: range, deterministic: bool = False) -> None:
    index = torch.tensor(chosen)
    posterior = posterior_of(chosen)
    flipped = posterior_of(chosen, "flip") if writer.plan.flips else None
    labels = index % 4 if writer.plan.data.num_classes else None
    writer.add(number, index, Posterior(posterior.mean) if deterministic else posterior, flipped, labels)


def write(path: Path, deterministic: bool = False, **changes: object) -> CacheWriter:
    writer = CacheWriter(path, plan(**changes))
    fill(writer, writer.unfinished(), deterministic)
    writer.finish()
    return writer


def test_round_trip_in_any_order(tmp_path: Path) -> None:
    write(tmp_path)
    cache = LatentCache.open(tmp_path)
    indices = [22, 0, 7, 7, 21, 4, 5]
    batch = cache.read(indices)
    expected = posterior_of(indices)
    assert torch.equal(batch.posterior.mean, expected.mean)
    assert batch.posterior.std is not None
    assert expected.std is not None
    assert torch.equal(batch.posterior.std, expected.std)
    assert batch.index.tolist() == indices
    assert batch.labels is not None
    assert batch.labels.tolist() == [i % 4 for i in indices]
    assert batch.flip_posterior is None
    assert (len(cache), cache.shape, cache.num_classes) == (COUNT, (C, H, W), 4)


def test_the_files_are_those_of_the_contract(tmp_path: Path) -> None:
    write(tmp_path, flips=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"manifest.json", *(f"shard-{k:05d}.safetensors" for k in range(5))}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["shape"] == [C, H, W]
    assert (manifest["dtype"], manifest["count"], manifest["flips"]) == ("float32", COUNT, True)
    assert manifest["posterior"] == "mean_std"
    assert {"fingerprint", "path"} <= manifest["autoencoder"].keys()
    assert {"fingerprint", "spec", "transform"} <= manifest["data"].keys()
    assert [shard["count"] for shard in manifest["shards"]] == [5, 5, 5, 5, 3]
    tensors = load_file(tmp_path / "shard-00004.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        **dict.fromkeys(["mean", "std", "flip_mean", "flip_std"], (3, C, H, W)),
        **dict.fromkeys(["index", "label"], (3,)),
    }


@pytest.mark.parametrize("flips", [False, True])
def test_statistics_equal_brute_force_over_the_whole_set(tmp_path: Path, flips: bool) -> None:
    write(tmp_path, flips=flips)
    stats = LatentCache.open(tmp_path).manifest.stats
    sides = [posterior_of(range(COUNT), side) for side in (("", "flip") if flips else ("",))]
    mean = torch.cat([side.mean for side in sides]).double().transpose(0, 1).flatten(1)
    std = torch.cat([side.std for side in sides if side.std is not None]).double().transpose(0, 1).flatten(1)
    assert stats.mean == pytest.approx(mean.mean(1).tolist(), rel=1e-12)
    assert stats.std == pytest.approx((mean.var(1, unbiased=False) + std.square().mean(1)).sqrt().tolist(), rel=1e-12)
    assert stats.min == mean.amin(1).tolist()
    assert stats.max == mean.amax(1).tolist()


def test_a_deterministic_cache_without_labels(tmp_path: Path) -> None:
    data = DataRecord(fingerprint="d" * 64, spec="folder", transform={})
    write(tmp_path, deterministic=True, data=data)
    cache = LatentCache.open(tmp_path)
    batch = cache.read([3, 1])
    assert cache.manifest.posterior == "deterministic"
    assert batch.posterior.deterministic
    assert batch.labels is None
    assert torch.equal(batch.posterior.mean, posterior_of([3, 1]).mean)
    mean = posterior_of(range(COUNT)).mean.double().transpose(0, 1).flatten(1)
    assert cache.manifest.stats.std == pytest.approx(mean.std(1, unbiased=False).tolist(), rel=1e-12)


def test_float16_is_read_as_float32_and_rounds_once(tmp_path: Path) -> None:
    write(tmp_path, dtype="float16")
    batch = LatentCache.open(tmp_path).read(range(COUNT))
    assert batch.posterior.mean.dtype == torch.float32
    assert torch.equal(batch.posterior.mean, posterior_of(range(COUNT)).mean.half().float())


@pytest.mark.parametrize(
    ("value", "message"), [(7e4, r"image 3 .*--dtype float32"), (float("nan"), r"image 3 .*finite")]
)
def test_a_latent_that_cannot_be_stored_is_named(tmp_path: Path, value: float, message: str) -> None:
    writer = CacheWriter(tmp_path, plan(dtype="float16"))
    posterior = posterior_of(range(2, 4))
    posterior.mean[1, 0, 0, 0] = value
    with pytest.raises(WavelatentError, match=message):
        writer.add(0, torch.tensor([2, 3]), posterior, None, torch.tensor([2, 3]))


def test_a_killed_writer_goes_on_where_it_was(tmp_path: Path) -> None:
    first = CacheWriter(tmp_path, plan())
    fill(first, [0, 1])
    add(first, 2, range(10, 12))  # killed here: these two rows are lost, shards 0 and 1 are not
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    with pytest.raises(WavelatentError, match="unfinished"):
        LatentCache.open(tmp_path)
    second = CacheWriter(tmp_path, plan())
    assert second.unfinished() == [2, 3, 4]
    assert second.remaining(2) == range(10, 15)
    fill(second, second.unfinished())
    second.finish()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written} == written
    assert torch.equal(LatentCache.open(tmp_path).read(range(COUNT)).posterior.mean, posterior_of(range(COUNT)).mean)


def test_a_stopped_writer_keeps_the_rows_of_its_unfinished_shard(tmp_path: Path) -> None:
    first = CacheWriter(tmp_path, plan())
    add(first, 0, range(0, 3))
    first.save_rows(0)
    second = CacheWriter(tmp_path, plan())
    assert second.remaining(0) == range(3, 5)
    fill(second, second.unfinished())
    second.finish()
    write(tmp_path / "straight")
    for shard in tmp_path.glob("shard-*"):
        assert shard.read_bytes() == (tmp_path / "straight" / shard.name).read_bytes()


def test_a_finished_shard_that_was_damaged_is_encoded_again(tmp_path: Path) -> None:
    first = CacheWriter(tmp_path, plan())
    fill(first, [0, 1])
    flip_a_byte(tmp_path / "shard-00001.safetensors")
    assert CacheWriter(tmp_path, plan()).unfinished() == [1, 2, 3, 4]


def test_processes_share_the_shards_without_overlap(tmp_path: Path) -> None:
    writers = [CacheWriter(tmp_path, plan()) for _ in range(3)]
    for rank, writer in enumerate(writers):
        fill(writer, writer.unfinished(rank, 3))
    assert writers[0].num_missing == 0
    writers[0].finish()
    cache = LatentCache.open(tmp_path)
    assert cache.read(range(COUNT)).index.tolist() == list(range(COUNT))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"autoencoder": AutoencoderRecord(fingerprint="b" * 64, path="runs/ae")}, "autoencoder"),
        ({"data": DataRecord(fingerprint="e" * 64, spec="s", transform={}, num_classes=4)}, "data"),
        ({"flips": True}, "flips"),
        ({"dtype": "float16"}, "dtype"),
        ({"shard_size": 4}, "shard_size"),
    ],
)
def test_another_plan_does_not_go_on_with_an_unfinished_cache(
    tmp_path: Path, changes: dict[str, object], name: str
) -> None:
    fill(CacheWriter(tmp_path, plan()), [0])
    with pytest.raises(WavelatentError, match=f"another {name};"):
        CacheWriter(tmp_path, plan(**changes))


def test_a_cache_that_only_moved_may_go_on(tmp_path: Path) -> None:
    fill(CacheWriter(tmp_path, plan()), [0])
    moved = plan(autoencoder=AutoencoderRecord(fingerprint="a" * 64, path="elsewhere/ae"))
    assert CacheWriter(tmp_path, moved).unfinished() == [1, 2, 3, 4]


def test_clear_removes_the_cache_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    CacheWriter.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_images_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image"):
        CacheWriter(tmp_path, plan(count=0))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    write(tmp_path)
    flip_a_byte(tmp_path / "shard-00003.safetensors")
    with pytest.raises(WavelatentError, match=r"shard-00003\.safetensors .*SHA-256"):
        LatentCache.open(tmp_path)


def test_a_cut_shard_is_found_even_without_hashing(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "shard-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(WavelatentError, match=r"shard-00003\.safetensors cannot be read"):
        LatentCache.open(tmp_path, verify=False)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "shard-00002.safetensors").unlink()
    with pytest.raises(WavelatentError, match=r"shard-00002\.safetensors is missing"):
        LatentCache.open(tmp_path, verify=False)


def test_swapped_shards_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    one, two = (tmp_path / f"shard-0000{k}.safetensors" for k in (1, 2))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(WavelatentError, match=r"shard-00001"):
        LatentCache.open(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["stats"]["std"].__setitem__(0, 1.0), "SHA-256"),
        (lambda m: m.update(count=22), "add up"),
        (lambda m: m.pop("shards"), "shards"),
        (lambda m: m.update(format=2), "format"),
    ],
)
def test_an_edited_manifest_is_found(tmp_path: Path, edit, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(WavelatentError, match=rf"manifest\.json .*{message}"):
        LatentCache.open(tmp_path)


def test_a_manifest_that_is_not_json_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(WavelatentError, match=r"no manifest\.json"):
        LatentCache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(WavelatentError, match=r"manifest\.json cannot be read"):
        LatentCache.open(tmp_path)


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    LatentCache.open(tmp_path, autoencoder_fingerprint="a" * 64, data_fingerprint="d" * 64)
    with pytest.raises(WavelatentError, match="another autoencoder"):
        LatentCache.open(tmp_path, autoencoder_fingerprint="x" * 64)
    with pytest.raises(WavelatentError, match="another data"):
        LatentCache.open(tmp_path, data_fingerprint="x" * 64)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder for the user's notes, and files that count as settled at once; returns where the cache goes."""
    monkeypatch.setenv("WAVELATENT_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(verification, "SETTLED_SECONDS", -60.0)
    return tmp_path / "cache"


def test_what_was_verified_is_hashed_again_only_after_a_change(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(settled)
    hashed: list[str] = []
    monkeypatch.setattr(verification, "sha256_file", lambda file: hashed.append(file.name) or sha256_file(file))
    LatentCache.open(settled)
    assert sorted(hashed) == [f"shard-0000{k}.safetensors" for k in range(5)]
    LatentCache.open(settled)
    assert len(hashed) == 5
    file = settled / "shard-00003.safetensors"
    times = file.stat()
    flip_a_byte(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been written
    for _ in range(2):
        with pytest.raises(WavelatentError, match=r"shard-00003\.safetensors .*SHA-256"):
            LatentCache.open(settled)
    assert hashed[5:] == [file.name] * 2
    flip_a_byte(file)
    LatentCache.open(settled)
    assert hashed[7:] == [file.name]


def test_a_shard_that_was_just_written_is_not_taken_on_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAVELATENT_CACHE", str(tmp_path / "user"))
    write(tmp_path / "cache")
    LatentCache.open(tmp_path / "cache")
    assert not (tmp_path / "user").exists()


def test_a_broken_note_of_what_was_verified_is_no_note(settled: Path) -> None:
    write(settled)
    LatentCache.open(settled)
    (note,) = (settled.parent / "user" / "verified").iterdir()
    note.write_text("{")
    flip_a_byte(settled / "shard-00001.safetensors")
    with pytest.raises(WavelatentError, match=r"shard-00001"):
        LatentCache.open(settled)


def sparse_cache(path: Path, megabytes: int) -> LatentCache:
    """A cache of one shard of ``megabytes`` that is a hole, but for its header and the ends of its index."""
    shape = (8, 32, 32)
    count = megabytes * 2**20 // (4 * 8 * 32 * 32)
    header: dict[str, object] = {}
    end = 0
    for name, dtype, dims, size in [("index", "I64", [count], 8), ("mean", "F32", [count, *shape], 4 * 8 * 32 * 32)]:
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end + size * count]}
        end += size * count
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    path.mkdir()
    with (path / "shard-00000.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
        file.seek(8 + len(content) + 8 * (count - 1))
        file.write((count - 1).to_bytes(8, "little"))  # the last number of the index
        file.seek(0, 2)
        file.seek(-4, 1)
        file.write(np.float32(1.5).tobytes())  # and of the last latent
    manifest = {
        "autoencoder": {"fingerprint": "a" * 64, "path": "runs/ae"},
        "data": {"fingerprint": "d" * 64, "spec": "folder", "transform": {}},
        "shape": shape,
        "dtype": "float32",
        "count": count,
        "flips": False,
        "posterior": "deterministic",
        "stats": {name: [0.0] * 8 for name in ("mean", "std", "min", "max")},
        "shards": [{"file": "shard-00000.safetensors", "count": count, "sha256": "0" * 64}],
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return LatentCache.open(path, verify=False)


def resident_anonymous_mib() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="memory is read from /proc")
def test_a_cache_larger_than_memory(tmp_path: Path) -> None:
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    megabytes = int(memory.split()[1]) // 1024 + 32 * 1024
    try:
        cache = sparse_cache(tmp_path / "cache", megabytes)
    except OSError as error:
        pytest.skip(f"no sparse files of {megabytes} MiB here: {error}")
    if (tmp_path / "cache" / "shard-00000.safetensors").stat().st_blocks * 512 > 2**20:
        pytest.skip("no sparse files here")
    batch = cache.read([0, len(cache) - 1])
    assert batch.index.tolist() == [0, len(cache) - 1]
    assert batch.posterior.mean[1, -1, -1, -1] == 1.5
    random = np.random.default_rng(0)
    for read in range(80):  # 2 MiB each
        if read == 10:
            before = resident_anonymous_mib()
        assert cache.read(random.integers(1, len(cache) - 1, size=64)).posterior.mean.abs().max() == 0
    assert resident_anonymous_mib() - before < 32
    latents = TrainingLatents(cache, 64, seed=0)
    assert latents.draw(np.array([0, len(cache) - 1]), 0)[0][:, -1, -1, -1].tolist() == [0, 1.5]
    for step in range(80):
        if step == 10:  # the epoch's order is made: it is kept in memory, 8 bytes per image
            before = resident_anonymous_mib()
        raw, _ = latents.batch(step)
        assert raw[:, 0].abs().max() == 0
    assert resident_anonymous_mib() - before < 32


def test_positions_outside_the_cache(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(IndexError, match="cache of 23"):
        LatentCache.open(tmp_path).read([0, COUNT])


def test_default_shards_are_64_mib() -> None:
    assert default_shard_size((4, 32, 32), "float32", False) == 2048
    assert default_shard_size((16, 64, 64), "float16", True) == 128
    assert default_shard_size((4, 4, 4), "float32", False) == 4096


def test_random_reading_is_fast(tmp_path: Path) -> None:
    count, shape = 2000, (4, 16, 16)
    writer = CacheWriter(tmp_path, plan(count=count, shape=shape, shard_size=500))
    for number in writer.unfinished():
        index = torch.tensor(writer.remaining(number))
        mean = torch.zeros(len(index), *shape)
        writer.add(number, index, Posterior(mean, mean + 1), None, index % 4)
    writer.finish()
    cache = LatentCache.open(tmp_path)
    random = np.random.default_rng(0)
    seconds = []
    for _ in range(50):
        chosen = random.integers(count, size=64)
        begin = time.perf_counter()
        cache.read(chosen)
        seconds.append(time.perf_counter() - begin)
    assert sorted(seconds)[5] < 5e-3  # about 0.3 ms; slicing a file per latent would take tens of milliseconds
