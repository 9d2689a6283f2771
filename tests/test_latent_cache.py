import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord, LatentCache, draw_latents, training_latents
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter, default_shard_size
from wavelatent.common.latents import Posterior
from wavelatent.common.ordering import step_indices
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


def test_positions_outside_the_cache(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(IndexError, match="cache of 23"):
        LatentCache.open(tmp_path).read([0, COUNT])


def take(cache: LatentCache, steps: int, **options: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    stream = training_latents(cache, **{"batch_size": 6, "seed": 9, **options})  # type: ignore[arg-type]
    return [next(stream) for _ in range(steps)]


def test_training_latents_follow_the_order_and_redraw_the_posterior(tmp_path: Path) -> None:
    write(tmp_path)
    cache = LatentCache.open(tmp_path)
    first_epoch_over = COUNT // 6 + 1
    for step, (raw, labels) in enumerate(take(cache, first_epoch_over)):
        chosen = step_indices(COUNT, 6, 9, step).tolist()
        posterior = posterior_of(chosen)
        assert labels is not None
        assert labels.tolist() == [i % 4 for i in chosen]
        noise = torch.stack([torch.randn(C, H, W, generator=generator("posterior", 9, i, step)) for i in chosen])
        assert posterior.std is not None
        assert torch.equal(raw, posterior.mean + posterior.std * noise)
    batch = cache.read([5])
    assert not torch.equal(draw_latents(batch, 9, 0)[0], draw_latents(batch, 9, 1)[0])


def test_training_latents_resume_and_split_over_ranks(tmp_path: Path) -> None:
    write(tmp_path, flips=True)
    cache = LatentCache.open(tmp_path)
    whole = [raw for raw, _ in take(cache, 7)]
    assert torch.equal(take(cache, 1, start_step=6)[0][0], whole[6])
    ranks = [[raw for raw, _ in take(cache, 7, batch_size=2, rank=rank, world_size=3)] for rank in range(3)]
    for step, raw in enumerate(whole):
        assert torch.equal(torch.cat([ranks[rank][step] for rank in range(3)]), raw)


def test_both_sides_of_a_flipped_cache_are_drawn(tmp_path: Path) -> None:
    write(tmp_path, flips=True)
    batch = LatentCache.open(tmp_path).read([8])
    exact = [Posterior(batch.posterior.mean), batch.flip_posterior]
    assert exact[1] is not None
    without_noise = type(batch)(exact[0], Posterior(exact[1].mean), None, batch.index)
    draws = [draw_latents(without_noise, 0, step)[0] for step in range(200)]
    flipped = sum(torch.equal(raw, exact[1].mean) for raw in draws)
    assert flipped + sum(torch.equal(raw, exact[0].mean) for raw in draws) == 200
    assert 70 < flipped < 130


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
