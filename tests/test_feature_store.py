import re
import sys
from pathlib import Path

import pytest
import torch

from wavelatent.common.feature_distances import FeatureStatistics
from wavelatent.common.feature_store import FeatureStore

ROWS = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))


def test_rows_come_back_in_the_order_of_their_index_and_once():
    with FeatureStore(3) as store:
        store.append(ROWS[[4, 0]], [4, 0])
        store.append(ROWS[[2, 2, 4]], torch.tensor([2, 2, 4]))
        assert store.indices == [0, 2, 4]
        assert torch.equal(store.features, ROWS[[0, 2, 4]])
        store.append(ROWS[[1]], [1])
        assert len(store) == 4
        assert torch.equal(store.features, ROWS[[0, 1, 2, 4]])


def test_of_a_known_index_the_first_row_stays():
    with FeatureStore(3) as store:
        store.append(ROWS[:2], [7, 7])
        store.append(ROWS[2:3], [7])
        assert torch.equal(store.features, ROWS[:1])


def test_statistics_are_those_of_the_distinct_rows():
    with FeatureStore(3) as store:
        for index in (5, 1, 1, 0, 5, 9):
            store.append(ROWS[[index]], [index])
        expected = FeatureStatistics.of(ROWS[[0, 1, 5, 9]])
        assert store.statistics.count == 4
        torch.testing.assert_close(store.statistics.covariance, expected.covariance)


def test_rows_outlive_the_store_and_later_ones():
    store = FeatureStore(3)
    store.append(ROWS, range(11))
    features = store.features
    store.append(ROWS[:1], [11])
    store.close()
    del store
    assert torch.equal(features, ROWS)


def test_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = FeatureStore(3)
    store.append(ROWS, range(10, -1, -1))
    assert torch.equal(store.features, ROWS.flip(0))
    store.close()
    assert not list(tmp_path.iterdir())


def test_an_empty_store_has_no_rows():
    with FeatureStore(3) as store:
        store.append(torch.empty(0, 3), [])
        assert store.features.shape == (0, 3)
        assert store.indices == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows():
    """64 MiB of rows, out of order: in the file, not in the process's own memory."""

    def own_memory() -> int:
        return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) >> 10

    dim, block, count = 256, 1024, 64
    rows = torch.ones(block, dim)
    with FeatureStore(dim) as store:
        store.append(rows, range(count * block, (count + 1) * block))
        before = own_memory()
        for number in range(count):
            store.append(rows * number, range(number * block, (number + 1) * block))
        features = store.features
        assert own_memory() - before < 30
    assert features.shape == ((count + 1) * block, dim)
    assert features[::block, 0].tolist() == [*range(count), 1]
