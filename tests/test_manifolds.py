import pytest
import torch
from torch import Tensor

from wavelatent.common import manifolds
from wavelatent.common.errors import WavelatentError
from wavelatent.common.manifolds import figures_of_parts, manifold_figures


def normal(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def by_definition(samples: Tensor, reference: Tensor) -> list[float]:
    """Precision, recall, density and coverage, one image at a time."""
    samples, reference = samples.double(), reference.double()

    def reach(points: Tensor, neighbours: int) -> list[float]:
        return [sorted((points - point).norm(dim=1).tolist())[neighbours] for point in points]

    wide, narrow, own = reach(reference, 5), reach(reference, 3), reach(samples, 3)
    apart = [[float((sample - point).norm()) for point in reference] for sample in samples]
    n, m = range(len(samples)), range(len(reference))
    return [
        sum(any(apart[i][j] <= narrow[j] for j in m) for i in n) / len(n),
        sum(any(apart[i][j] <= own[i] for i in n) for j in m) / len(m),
        sum(apart[i][j] < wide[j] for i in n for j in m) / (5 * len(n)),
        sum(any(apart[i][j] < wide[j] for i in n) for j in m) / len(m),
    ]


def test_the_four_figures_follow_their_definitions_whatever_the_blocks(monkeypatch):
    samples, reference = normal(23, 4, seed=0, shift=0.6), normal(31, 4, seed=1)
    expected = pytest.approx(by_definition(samples, reference), abs=1e-9)
    figures = manifold_figures(samples, reference)
    assert [figures.precision, figures.recall, figures.density, figures.coverage] == expected
    assert all(0 < value < 1 for value in by_definition(samples, reference))
    assert (figures.num_samples, figures.num_reference) == (23, 31)
    monkeypatch.setattr(manifolds, "_BLOCK", 7)
    assert manifold_figures(samples, reference) == figures


def test_figures_of_parts_are_those_of_each_part_alone():
    samples, reference = normal(40, 3, seed=2, shift=0.5), normal(25, 3, seed=3)
    present = torch.stack([torch.arange(40) % 2 == 0, torch.arange(40) < 30, torch.ones(40, dtype=torch.bool)])
    rows = figures_of_parts(samples, reference, present).tolist()
    for part, row in zip(present, rows, strict=True):
        assert row == pytest.approx(by_definition(samples[part], reference), abs=1e-9)


def test_a_set_against_itself_is_perfect():
    """Also where points are equal, which cannot be told from a point and itself."""
    points = normal(30, 3, seed=4)
    figures = manifold_figures(points, points)
    assert [figures.precision, figures.recall, figures.coverage] == [1, 1, 1]
    assert figures.density == pytest.approx(1)  # oneself and the four nearer than the fifth, over five
    twice = manifold_figures(torch.cat([points, points[:10]]), points)
    assert [twice.precision, twice.recall, twice.coverage] == [1, 1, 1]


def test_two_modes_of_which_one_is_missed():
    reference = torch.cat([normal(20, 3, seed=0), normal(20, 3, seed=1, shift=100.0)])
    samples = torch.cat([reference[:20], normal(20, 3, seed=2, shift=-500.0)])
    figures = manifold_figures(samples, reference)
    assert [figures.precision, figures.recall, figures.coverage] == [0.5, 0.5, 0.5]
    assert figures.density == pytest.approx(0.5)


def test_of_larger_sets_images_are_taken_from_all_over_them(monkeypatch):
    samples, reference = normal(30, 3, seed=5, shift=0.3), normal(40, 3, seed=6)
    thirds = [row for row in range(30) if row % 3 != 2]
    expected = manifold_figures(samples[thirds], reference[::2])
    monkeypatch.setattr(manifolds, "MAX_MANIFOLD_IMAGES", 20)
    assert manifold_figures(samples, reference) == expected
    assert expected.num_samples == 20


def test_too_few_images_are_refused():
    with pytest.raises(WavelatentError, match=r"need 6 .* got 5 and 40"):
        manifold_figures(normal(5, 3, seed=0), normal(40, 3, seed=1))
