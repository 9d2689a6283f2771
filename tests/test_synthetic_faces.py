import numpy as np
import pytest

from wavelatent.common.errors import UsageError
from wavelatent.common.face_looks import CLASS_NAMES
from wavelatent.common.images import open_data


def test_the_spec_names_the_number() -> None:
    assert len(open_data("synthetic")) == 10_000
    data = open_data("synthetic:17", size=32)
    assert (len(data), data.size, data.image(0).shape) == (17, 32, (32, 32, 3))
    assert open_data("synthetic:3").size == 64
    for wrong in ("synthetic:", "synthetic:0", "synthetic:-3", "synthetic:many"):
        with pytest.raises(UsageError, match="synthetic:N"):
            open_data(wrong)
    with pytest.raises(IndexError):
        data.image(17)


def test_a_face_is_a_function_of_its_index() -> None:
    first, second = open_data("synthetic:50", size=24), open_data("synthetic:90", size=24)
    second.image(3)  # whatever was drawn before
    assert (first.image(11) == second.image(11)).all()
    assert (first.image(11) != first.image(12)).any()


def test_the_same_index_is_the_same_face_at_another_size() -> None:
    small, large = open_data("synthetic", size=32), open_data("synthetic", size=128)
    for index in range(6):
        reduced = large.image(index).astype(float).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
        assert np.abs(reduced - small.image(index)).mean() < 3
        other = np.abs(reduced - small.image(index + 1)).mean()
        assert other > 15, "another index is another face"


@pytest.mark.parametrize("size", [1, 7, 48, 100, 256, 300])
def test_any_size_can_be_drawn(size: int) -> None:
    image = open_data("synthetic", size=size).image(5)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_every_class_occurs_and_labels_stay_in_range() -> None:
    data = open_data("synthetic:400")
    counts = np.bincount([data.label(i) or 0 for i in range(len(data))], minlength=data.num_classes)
    assert len(counts) == data.num_classes == len(CLASS_NAMES)
    assert counts.min() >= 0.03 * len(data)


def test_faces_differ_and_use_the_range_of_values() -> None:
    data = open_data("synthetic:40", size=32)
    images = np.stack([data.image(i) for i in range(40)]).astype(float)
    assert images.std(axis=0).mean() > 30, "variety over the data set"
    assert images.min() < 30
    assert images.max() > 225
    assert ((images == 255).all(axis=-1)).mean() < 0.02, "over-exposed"


def test_there_is_fine_detail() -> None:
    # What 2x2 averages lose, in grey levels: smooth pictures lose less than 1.
    data = open_data("synthetic:30", size=64)
    images = np.stack([data.image(i) for i in range(30)]).astype(float)
    means = images.reshape(30, 32, 2, 32, 2, 3).mean(axis=(2, 4), keepdims=True)
    assert np.abs(images.reshape(30, 32, 2, 32, 2, 3) - means).mean() > 2.5


def test_the_fingerprint_follows_size_and_number() -> None:
    first = open_data("synthetic:10", size=32).fingerprint()
    assert open_data("synthetic:10", size=32).fingerprint() == first
    assert open_data("synthetic:11", size=32).fingerprint() != first
    assert open_data("synthetic:10", size=33).fingerprint() != first
