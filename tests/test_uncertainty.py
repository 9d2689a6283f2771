import math

import pytest
import torch

from wavelatent.stage2_diffusion.uncertainty import Uncertainty, UncertaintyConfig, uncertain_loss

LABELS = torch.linspace(-1.5, 1.1, 41)


def make(seed: int = 0) -> Uncertainty:
    torch.manual_seed(seed)
    return Uncertainty(UncertaintyConfig(channels=64))


def train(factor: float = 1.0) -> Uncertainty:
    """Learn u for the losses ``factor * e^(1 - label)``, a convex problem."""
    uncertainty = make()
    optimizer = torch.optim.LBFGS(uncertainty.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = uncertain_loss(factor * (1 - LABELS).exp(), uncertainty(LABELS)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return uncertainty


def test_it_starts_at_zero_where_the_loss_is_the_plain_one_and_learns_from_there():
    uncertainty, loss = make(), torch.rand(41)
    u = uncertainty(LABELS)
    assert u.shape == (41,)
    assert (u == 0).all()
    torch.testing.assert_close(uncertain_loss(loss, u), loss)
    uncertain_loss(loss, u).mean().backward()
    assert uncertainty.weight.grad.norm() > 0.01


def test_the_features_have_unit_variance_and_the_sum_is_normalised():
    """sqrt(2) cos of a uniform phase has variance 1, so weights of one give u of mean square one."""
    squares = []
    for seed in range(200):
        uncertainty = make(seed)
        torch.nn.init.ones_(uncertainty.weight)
        squares.append(uncertainty(torch.tensor([0.7])).item() ** 2)
    assert sum(squares) / 200 == pytest.approx(1, abs=4 * math.sqrt(2 / 200))  # of a normal: variance 2


def test_it_learns_the_logarithm_of_the_expected_loss():
    torch.testing.assert_close(train()(LABELS), 1 - LABELS, atol=0.05, rtol=0)


def test_at_its_optimum_every_level_pulls_alike_whatever_the_fixed_weight():
    for factor in (1.0, 7.0):
        loss = (1 - LABELS).exp().requires_grad_()
        uncertain_loss(factor * loss, train(factor)(LABELS).detach()).sum().backward()
        torch.testing.assert_close(loss.grad * loss.detach(), torch.ones(41), atol=0.06, rtol=0)


def test_its_features_are_saved_with_it():
    first, second = train(), make(seed=1)
    assert not torch.equal(first(LABELS), second(LABELS))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(LABELS), second(LABELS))


def test_u_is_in_single_precision():
    assert make()(LABELS.double()).dtype == torch.float32
