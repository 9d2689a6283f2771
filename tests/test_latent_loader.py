import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from wavelatent.common.errors import UsageError
from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord, LatentCache
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter
from wavelatent.common.latent_loader import KeyedNoise, TrainingLatents, held_out_positions, mirrored, prefetched
from wavelatent.common.latents import Posterior
from wavelatent.common.ordering import step_indices

COUNT, C, H, W = 23, 3, 5, 7  # an odd number of numbers in a latent
SEED = 9


def make_cache(
    path: Path, *, std: bool = True, flips: bool = False, labels: bool = True, dtype: str = "float32"
) -> LatentCache:
    """A cache of ``COUNT`` random latents in shards of 5; the image of position ``i`` has label ``i % 4``."""
    writer = CacheWriter(
        path,
        CachePlan(
            autoencoder=AutoencoderRecord(fingerprint="a" * 64, path="runs/ae"),
            data=DataRecord(fingerprint="d" * 64, spec="s", transform={}, num_classes=4 if labels else 0),
            shape=(C, H, W),
            count=COUNT,
            flips=flips,
            dtype=dtype,  # type: ignore[arg-type]
            shard_size=5,
        ),
    )
    torch.manual_seed(0)
    for number in writer.unfinished():
        index = torch.tensor(writer.remaining(number))
        sides = [
            Posterior(torch.randn(len(index), C, H, W) + side, torch.rand(len(index), C, H, W) if std else None)
            for side in (10, -10)
        ]
        writer.add(number, index, sides[0], sides[1] if flips else None, index % 4 if labels else None)
    writer.finish()
    return LatentCache.open(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Posteriors of both sides: the image's mean is near 10, its mirror image's near -10."""
    return make_cache(tmp_path_factory.mktemp("cache"), flips=True)


def noise_of(image: int, step: int, seed: int = SEED, count: int = C * H * W) -> np.ndarray:
    return KeyedNoise(seed, count)(image, step).copy()


def test_a_batch_is_mean_plus_std_times_the_noise_of_its_images_and_step(cache: LatentCache) -> None:
    for step in range(COUNT // 6 + 2):  # beyond the first epoch
        chosen = step_indices(COUNT, 6, SEED, step)
        stored = cache.read(chosen)
        assert stored.flip_posterior is not None
        raw, labels = TrainingLatents(cache, 6, SEED).batch(step)
        assert labels is not None
        assert labels.tolist() == [i % 4 for i in chosen]
        for row, image in enumerate(chosen.tolist()):
            flip = mirrored(SEED, np.array([image]), step)[0]
            side = stored.flip_posterior if flip else stored.posterior
            assert side.std is not None
            noise = torch.from_numpy(noise_of(image, step).reshape(C, H, W))
            assert torch.equal(raw[row], side.mean[row] + side.std[row] * noise)


def test_the_same_image_in_another_step_is_another_draw(cache: LatentCache) -> None:
    latents = TrainingLatents(cache, 1, SEED)
    draws = [latents.draw(np.array([5]), step)[0].abs() for step in range(2)]
    assert not torch.equal(*draws)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("labels", [False, True])
def test_other_caches(tmp_path: Path, dtype: str, labels: bool) -> None:
    cache = make_cache(tmp_path, std=False, labels=labels, dtype=dtype)
    raw, given = TrainingLatents(cache, 4, SEED).batch(0)
    stored = cache.read(step_indices(COUNT, 4, SEED, 0))
    assert raw.dtype == torch.float32
    assert torch.equal(raw, stored.posterior.mean)  # a deterministic encoder: nothing to draw
    assert (given is None) == (not labels)


def test_a_draw_does_not_depend_on_the_batch_the_resume_or_the_processes(cache: LatentCache) -> None:
    latents = TrainingLatents(cache, 6, SEED)
    whole = [latents.batch(step)[0] for step in range(7)]
    assert torch.equal(TrainingLatents(cache, 6, SEED).batch(6)[0], whole[6])  # no state from earlier steps
    for step, raw in enumerate(whole):
        ranks = [TrainingLatents(cache, 2, SEED, rank=rank, world_size=3).batch(step)[0] for rank in range(3)]
        assert torch.equal(torch.cat(ranks), raw)
        order = step_indices(COUNT, 6, SEED, step)
        assert torch.equal(latents.draw(order[::-1].copy(), step)[0], raw.flip(0))


def images_of_an_epoch(cache: LatentCache, epoch: int, seed: int = SEED) -> list[int]:
    """The labels tell only ``i % 4``, so images are told by their latents without noise."""
    latents = TrainingLatents(cache, COUNT, seed)
    means = cache.read(range(COUNT)).posterior.mean.flatten(1)
    raw = latents.batch(epoch)[0].flatten(1)
    return torch.cdist(raw, means).argmin(1).tolist()


def test_every_image_once_in_an_epoch_in_an_order_of_seed_and_epoch(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, std=False)
    orders = {(seed, epoch): tuple(images_of_an_epoch(cache, epoch, seed)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(COUNT)) for order in orders.values())
    assert len(set(orders.values())) == 6
    assert orders == {key: tuple(images_of_an_epoch(cache, key[1], key[0])) for key in orders}


def test_held_out_images_are_never_given_and_all_others_are(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, std=False)
    held_out = held_out_positions(COUNT, 7)
    means = cache.read(range(COUNT)).posterior.mean.flatten(1)
    for seed in (1, 2):
        latents = TrainingLatents(cache, 4, seed, held_out=7)
        raw = torch.cat([latents.batch(step)[0] for step in range(4)]).flatten(1)  # 16 images: one epoch
        assert sorted(torch.cdist(raw, means).argmin(1).tolist()) == sorted({*range(COUNT)} - {*held_out.tolist()})


def test_held_out_positions_are_fixed_distinct_and_nested() -> None:
    assert held_out_positions(COUNT, 0).tolist() == []
    seven, eight = held_out_positions(COUNT, 7).tolist(), held_out_positions(COUNT, 8).tolist()
    assert set(seven) < set(eight)
    assert len(set(seven)) == 7
    assert seven == [0, 10, 12, 14, 16, 19, 21]  # the same in every version: runs must stay comparable
    assert held_out_positions(COUNT, COUNT).tolist() == list(range(COUNT))
    assert abs(held_out_positions(100_000, 1_000).mean() / 50_000 - 1) < 0.1  # not one end of the set


def test_nothing_left_to_train_on_is_a_usage_error(cache: LatentCache) -> None:
    with pytest.raises(UsageError, match="23 of the 23 latents"):
        TrainingLatents(cache, 4, SEED, held_out=COUNT)


def test_the_noise_stays_what_it_is() -> None:
    expected = [-0.40123335, 0.67690933, 0.24826224, 1.73116807, 0.77162880]
    assert noise_of(3, 11, seed=1, count=5) == pytest.approx(expected, rel=1e-5)


def test_noise_is_standard_normal_by_kolmogorov_and_smirnov() -> None:
    noise = np.sort(np.concatenate([noise_of(image, 4, count=2049) for image in range(200)]).astype(np.float64))
    size = len(noise)
    normal = 0.5 * (1 + torch.erf(torch.from_numpy(noise) / math.sqrt(2))).numpy()
    distance = max((np.arange(1, size + 1) / size - normal).max(), (normal - np.arange(size) / size).max())
    assert distance * math.sqrt(size) < 1.95  # p = 0.001
    moments = [float((noise**power).mean()) for power in (1, 2, 3, 4)]
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < 4 * math.sqrt(variance / size)
    assert 4 < np.abs(noise).max() < 6.8  # tails of 409,800 numbers


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation in standard errors: about standard normal where there is none."""
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1]) * math.sqrt(x.size)


@pytest.mark.parametrize("neighbour", ["image", "step", "seed", "half", "number", "exchanged"])
def test_noise_of_neighbours_does_not_correlate(neighbour: str) -> None:
    count, images = 1024, range(100, 200)
    here = np.stack([noise_of(image, 7, count=count) for image in images])
    there = {
        "image": lambda: np.stack([noise_of(image + 1, 7, count=count) for image in images]),
        "step": lambda: np.stack([noise_of(image, 8, count=count) for image in images]),
        "seed": lambda: np.stack([noise_of(image, 7, SEED + 1, count) for image in images]),
        "exchanged": lambda: np.stack([noise_of(7, image, count=count) for image in images]),
        "number": lambda: np.roll(here, 1, axis=1),
        "half": lambda: here[:, count // 2 :],  # the sines of the angles whose cosines are the first half
    }[neighbour]()
    here = here[:, : there.shape[1]]
    assert abs(correlation(here, there)) < 4
    assert abs(correlation(np.abs(here), np.abs(there))) < 4


def test_mirror_images_are_half_of_all_and_do_not_follow_each_other() -> None:
    count = 100_000
    coins = mirrored(SEED, np.arange(count), 3).astype(np.float64)
    assert abs(coins.mean() - 0.5) * 2 * math.sqrt(count) < 4
    others = [np.roll(coins, 1), mirrored(SEED, np.arange(count), 4), mirrored(SEED + 1, np.arange(count), 3)]
    assert all(abs(correlation(coins, other.astype(np.float64))) < 4 for other in others)
    one_image = np.array([mirrored(SEED, np.array([17]), step)[0] for step in range(2_000)])
    assert abs(one_image.mean() - 0.5) * 2 * math.sqrt(2_000) < 4
    assert mirrored(SEED, np.array([99, 5]), 3).tolist() == coins[[99, 5]].astype(bool).tolist()


def test_the_mirror_image_is_the_one_that_was_encoded_again(cache: LatentCache) -> None:
    latents = TrainingLatents(cache, COUNT, SEED)
    flipped = torch.cat([latents.batch(step)[0].mean(dim=(1, 2, 3)) < 0 for step in range(40)])
    expected = np.concatenate([mirrored(SEED, step_indices(COUNT, COUNT, SEED, step), step) for step in range(40)])
    assert flipped.tolist() == expected.tolist()
    assert 0.4 < expected.mean() < 0.6


def test_prefetched_items_come_in_order_from_other_threads() -> None:
    threads: set[int] = set()

    def make(step: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.01 if step % 2 else 0)  # odd ones are finished after the even ones that follow them
        return step

    with prefetched(make, 5, depth=4, threads=3) as items:
        assert [next(items) for _ in range(20)] == list(range(5, 25))
    assert threading.get_ident() not in threads
    assert len(threads) > 1


def test_prefetched_makes_no_more_than_depth_ahead_and_ends_its_threads() -> None:
    made: list[int] = []
    before = threading.active_count()
    with prefetched(made.append, 0, depth=3, threads=2) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(made) == [0, 1, 2, 3]
    assert threading.active_count() == before


def test_prefetched_counts_the_waiting_and_only_that() -> None:
    with prefetched(lambda step: time.sleep(0.1), 0, depth=1) as items:
        next(items)
        assert items.waited > 0.09
    ready = threading.Event()
    with prefetched(lambda step: ready.set(), 0, depth=1) as items:
        ready.wait()
        time.sleep(0.2)
        next(items)
        assert items.waited < 0.1


def test_prefetched_raises_what_making_an_item_raised_at_its_place() -> None:
    def make(step: int) -> int:
        return 6 // (3 - step)

    with prefetched(make, 0, depth=4, threads=2) as items:
        assert [next(items) for _ in range(3)] == [2, 3, 6]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(items)


def test_prefetched_ends_when_the_block_raises() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), prefetched(lambda step: step, 0):
        raise KeyError
    assert threading.active_count() == before


def test_batches_made_by_several_threads_are_those_of_one(cache: LatentCache) -> None:
    latents = TrainingLatents(cache, 6, SEED)
    with prefetched(latents.batch, 3, depth=6, threads=4) as batches:
        for step in range(3, 40):
            assert torch.equal(next(batches)[0], latents.batch(step)[0])
