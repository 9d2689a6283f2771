import numpy as np
import pytest

from wavelatent.common.ordering import epoch_order, step_flips, step_indices


def sequence(count: int, batch_size: int, steps: int, **kwargs: int) -> np.ndarray:
    return np.concatenate([step_indices(count, batch_size, 7, step, **kwargs) for step in range(steps)])


def test_every_image_comes_once_per_epoch_where_batches_straddle_epochs() -> None:
    count, batch_size = 13, 5
    seen = sequence(count, batch_size, steps=13)  # 65 places: five epochs to the image
    epochs = seen.reshape(5, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert any((epochs[0] != epoch).any() for epoch in epochs[1:])


def test_ranks_joined_are_one_process_with_the_global_batch() -> None:
    for step in (0, 1, 9):
        pieces = [step_indices(29, 3, 7, step, rank, 4) for rank in range(4)]
        assert (np.concatenate(pieces) == step_indices(29, 12, 7, step)).all()


def test_ranks_are_disjoint_within_an_epoch() -> None:
    pieces = [step_indices(100, 6, 1, 2, rank, 3) for rank in range(3)]
    assert len(np.unique(np.concatenate(pieces))) == 18


def test_a_batch_larger_than_the_data_repeats_it_evenly() -> None:
    assert (np.bincount(step_indices(3, 12, 0, 5)) == 4).all()


def test_the_order_is_a_function_of_seed_and_step() -> None:
    before = step_indices(50, 8, 3, 20).copy()
    epoch_order.cache_clear()
    assert (step_indices(50, 8, 3, 20) == before).all()
    assert (step_indices(50, 8, 4, 20) != before).any()
    assert (step_indices(50, 8, 3, 21) != before).any()


def test_the_order_is_pinned() -> None:
    # A resumed run must meet the order that the run before it had, whatever was upgraded in between.
    assert step_indices(10, 6, 0, 0).tolist() == [2, 9, 4, 0, 5, 7]


def test_cached_order_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(5, 0, 0)[0] = 1


def test_flips_are_fair_and_do_not_depend_on_the_number_of_ranks() -> None:
    whole = step_flips(4000, 5, 11)
    assert 0.46 < whole.mean() < 0.54
    assert (np.concatenate([step_flips(1000, 5, 11, rank, 4) for rank in range(4)]) == whole).all()
    assert (step_flips(4000, 5, 12) != whole).any()
