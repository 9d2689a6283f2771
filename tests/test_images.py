import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wavelatent.common.errors import UsageError
from wavelatent.common.image_sources import SkippedFile
from wavelatent.common.images import (
    Batch,
    iterate_batches,
    open_data,
    save_grid,
    save_png,
    to_float,
    to_uint8,
    training_batches,
)


class Numbered:
    """Images 6 pixels a side whose left column says which image it is."""

    spec, size, num_classes = "numbered", 6, 3
    transform: dict[str, object] = {"size": 6}  # noqa: RUF012
    class_names = ["a", "b", "c"]  # noqa: RUF012
    skipped: list[SkippedFile] = []  # noqa: RUF012

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> np.ndarray:
        pixels = np.zeros((6, 6, 3), np.uint8)
        pixels[:, 0] = index, 100, 255
        return pixels

    def label(self, index: int) -> int:
        return index % 3

    def fingerprint(self) -> str:
        return "numbered"


def equal(first: Batch, second: Batch) -> bool:
    assert first.labels is not None
    assert second.labels is not None
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.labels, second.labels)
        and torch.equal(first.index, second.index)
    )


def test_to_float_and_to_uint8_are_exact_inverses() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert floats[0] == -1
    assert floats[-1] == 1
    assert torch.equal(to_uint8(floats), values)


def test_to_uint8_rounds_and_clamps() -> None:
    # -0.5 is 63.75 of 255; 0.004 is 128.01
    assert to_uint8(torch.tensor([-3.0, -0.5, 0.004, 1.7])).tolist() == [0, 64, 128, 255]


def test_batches_in_order_end_with_a_short_one() -> None:
    batches = list(iterate_batches(Numbered(7), 3))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    first = batches[1]
    assert first.images.shape == (3, 3, 6, 6)
    assert first.images.dtype == torch.float32
    assert first.images.is_contiguous()
    assert to_uint8(first.images)[1, :, 2, 0].tolist() == [4, 100, 255]
    assert first.labels is not None
    assert first.labels.tolist() == [0, 1, 2]
    assert first.labels.dtype == first.index.dtype == torch.int64


def test_chosen_images_come_in_the_order_asked() -> None:
    batches = list(iterate_batches(Numbered(9), 2, indices=[5, 1, 8]))
    assert [batch.index.tolist() for batch in batches] == [[5, 1], [8]]


def test_training_resumes_in_the_middle() -> None:
    data = Numbered(11)
    whole = list(islice(training_batches(data, batch_size=4, seed=2), 9))
    for step, batch in enumerate(islice(training_batches(data, batch_size=4, seed=2, start_step=5), 4), 5):
        assert equal(batch, whole[step])


def test_ranks_together_are_one_process() -> None:
    data = Numbered(11)
    whole = islice(training_batches(data, batch_size=6, seed=2), 5)
    ranks = [training_batches(data, batch_size=2, seed=2, rank=rank, world_size=3) for rank in range(3)]
    for expected, *parts in zip(whole, *ranks, strict=False):
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.index for part in parts]), expected.index)


def test_images_and_labels_stay_together_and_about_half_are_mirrored() -> None:
    mirrored = 0
    for batch in islice(training_batches(Numbered(50), batch_size=50, seed=0), 4):
        pixels = to_uint8(batch.images)
        for image, index in zip(pixels, batch.index.tolist(), strict=True):
            edge = [image[:, 0, column].tolist() == [index, 100, 255] for column in (0, 5)]
            assert sum(edge) == 1
            mirrored += edge[1]
        assert batch.labels is not None
        assert torch.equal(batch.labels, batch.index % 3)
    assert 70 <= mirrored <= 130


def test_without_flip_nothing_is_mirrored() -> None:
    batch = next(training_batches(Numbered(9), batch_size=9, seed=0, flip=False))
    assert torch.equal(to_uint8(batch.images)[:, 0, 0, 0].long(), batch.index)


def test_workers_change_nothing() -> None:
    data = Numbered(11)
    alone = islice(training_batches(data, batch_size=4, seed=2, start_step=3), 4)
    helped = islice(training_batches(data, batch_size=4, seed=2, start_step=3, num_workers=2), 4)
    assert all(equal(first, second) for first, second in zip(alone, helped, strict=True))
    assert all(map(equal, iterate_batches(data, 4), iterate_batches(data, 4, num_workers=2)))


def test_reading_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    next(training_batches(Numbered(5), batch_size=2, seed=0))
    list(iterate_batches(Numbered(5), 2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unlabelled_data_gives_no_labels(tmp_path: Path) -> None:
    save_png(tmp_path / "1.png", np.zeros((8, 8, 3), np.uint8))
    assert next(iterate_batches(open_data(str(tmp_path)), 1)).labels is None


def test_png_holds_the_exact_values(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    save_png(tmp_path / "new" / "a.png", to_float(torch.from_numpy(pixels)).permute(2, 0, 1))
    save_png(tmp_path / "new" / "b.png", pixels)
    for name in ("a.png", "b.png"):
        assert (np.asarray(Image.open(tmp_path / "new" / name)) == pixels).all()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]


def test_what_is_not_finite_stands_out_in_a_grid(tmp_path: Path) -> None:
    images = torch.full((2, 3, 4, 6), -1.0)
    images[0, 1, 2, 3], images[1, 0, 0, 0] = math.nan, math.inf
    save_grid(tmp_path / "grid.png", images, columns=1, gap=0)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels[2, 3].tolist() == pixels[4, 0].tolist() == [255, 0, 255]
    assert pixels.reshape(-1, 3).sum(axis=0).tolist() == [2 * 255, 0, 2 * 255]  # all others are black


def test_grid_lays_images_out_row_by_row(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])[:, None, None, None].expand(5, 3, 4, 6)
    save_grid(tmp_path / "grid.png", images, columns=3, gap=1)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 4 + 1, 3 * 6 + 2, 3)
    assert pixels[0, [0, 7, 14], 0].tolist() == [0, 64, 128]
    assert pixels[5, [0, 7, 14], 0].tolist() == [191, 255, 255]
    assert (pixels[4] == 255).all()
    with pytest.raises(UsageError, match="at least one"):
        save_grid(tmp_path / "none.png", images[:0], columns=3)
