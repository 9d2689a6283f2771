"""Power-function averages: the profile's relations, the tracked averages against direct sums, and resuming."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from wavelatent.common.checkpoints import Checkpoint, save_checkpoint
from wavelatent.common.power_ema import PowerEMA, PowerEMAConfig, decay, gamma_of, width_of

WIDTHS = (0.1, 0.03, 0.25)


class Walker(nn.Module):
    """Parameters of several shapes, and the two kinds of buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 7, dtype=dtype))
        self.gain = nn.Parameter(torch.zeros((), dtype=dtype))
        self.register_buffer("shift", torch.zeros(3, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def walk(model: Walker, steps: range) -> Iterator[int]:
    """Set ``model`` to random weights that depend on the step alone, far from zero, and yield each step."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(3 + number + torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            model.shift.fill_(step)
            model.count.fill_(step)
        yield step


def profile(gamma: float, count: int = 200_000) -> tuple[np.ndarray, np.ndarray]:
    """Return the midpoints of ``count`` cells of [0, 1] and the share of the profile in each, by the midpoint rule."""
    tau = (np.arange(count) + 0.5) / count
    return tau, (gamma + 1) * tau**gamma / count


@pytest.mark.parametrize("gamma", [0.3, 2.0, 6.94, 60.0])
def test_the_width_is_the_standard_deviation_of_the_profile(gamma: float) -> None:
    tau, share = profile(gamma)
    mean = (share * tau).sum()
    assert share.sum() == pytest.approx(1, abs=1e-6)
    assert width_of(gamma) == pytest.approx(math.sqrt((share * (tau - mean) ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("width", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.2799])
def test_gamma_inverts_the_width(width: float) -> None:
    assert gamma_of(width) > 0
    assert width_of(gamma_of(width)) == pytest.approx(width, rel=1e-9)


def test_the_exponents_are_those_the_paper_names() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("gamma", [0.3, 6.94, 60.0])
def test_the_decays_give_every_step_the_integral_of_the_profile_over_it(gamma: float) -> None:
    steps, count = 50, 4_000
    kept = np.array([decay(step, gamma) for step in range(1, steps + 1)])
    later = np.append(np.cumprod(kept[::-1])[::-1][1:], 1.0)
    _, share = profile(gamma, steps * count)
    np.testing.assert_allclose((1 - kept) * later, share.reshape(steps, count).sum(1), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_averages_are_the_weighted_sums_of_all_past_weights(dtype: torch.dtype, tolerance: float) -> None:
    """What ``decay`` says of the profile is tested above: the weights here are its integral, in closed form."""
    model, steps = Walker(dtype), 400
    ema = PowerEMA(model, PowerEMAConfig(widths=WIDTHS))
    history = []
    for step in walk(model, range(1, steps + 1)):
        ema.update(model, step)
        history.append(model.weight.detach().double().clone())
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    for width, averaged in ema.models.items():
        weights = (edges ** (gamma_of(width) + 1)).diff()
        expected = torch.einsum("t,tij->ij", weights, torch.stack(history))
        torch.testing.assert_close(averaged.weight.double(), expected, rtol=tolerance, atol=0)
    plain_mean = torch.stack(history).mean(0)
    assert not torch.allclose(ema.shown.weight.double(), plain_mean, rtol=1e-3)


def test_after_the_first_step_the_averages_are_the_model() -> None:
    model = Walker(torch.float32)
    ema = PowerEMA(model, PowerEMAConfig(widths=WIDTHS))
    for step in walk(model, range(1, 2)):
        ema.update(model, step)
    for averaged in ema.models.values():
        assert states_equal(averaged.state_dict(), model.state_dict())


def test_buffers_are_copied_and_the_copies_take_no_part_in_training() -> None:
    model = Walker(torch.float32).train()
    ema = PowerEMA(model, PowerEMAConfig(widths=WIDTHS))
    for step in walk(model, range(1, 6)):
        ema.update(model, step)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for averaged in ema.models.values():
        assert torch.equal(averaged.shift, model.shift)
        assert torch.equal(averaged.count, model.count)
        assert not averaged.training
        assert not any(parameter.requires_grad for parameter in averaged.parameters())
        assert not torch.equal(averaged.weight, model.weight)


def test_a_resumed_run_has_the_same_averages_to_the_bit(tmp_path: Path) -> None:
    config = PowerEMAConfig(widths=WIDTHS)
    model = Walker(torch.float32)
    ema = PowerEMA(model, config)
    for step in walk(model, range(1, 21)):
        ema.update(model, step)
        if step == 7:
            save_checkpoint(tmp_path, step, modules=ema.modules(), optimizers={}, counters={}, keep=1)
    resumed = PowerEMA(Walker(torch.float32), config)
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "checkpoint-7")
    checkpoint.restore(resumed.modules(), {})
    for step in walk(model, range(8, 21)):
        resumed.update(model, step)
    assert list(resumed.modules()) == ["ema-0.1", "ema-0.03", "ema-0.25"]
    for width in WIDTHS:
        assert states_equal(resumed.models[width].state_dict(), ema.models[width].state_dict())


def test_the_first_width_is_the_one_that_is_shown() -> None:
    ema = PowerEMA(Walker(torch.float32), PowerEMAConfig(widths=(0.2, 0.05)))
    assert ema.shown is ema.models[0.2]


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": ()},
        {"widths": (0.1, 0.1)},
        {"widths": (0.0,)},
        {"widths": (0.28,)},
        {"snapshot_every": -1},
        {"snapshot_dtype": "bfloat16"},
    ],
)
def test_what_cannot_be_averaged_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PowerEMAConfig.model_validate(changes)


@pytest.mark.parametrize(
    ("every", "steps", "due"),
    [
        (None, 64, list(range(4, 65, 4))),
        (None, 5, [1, 2, 3, 4, 5]),
        (3, 8, [3, 6, 8]),
        (9, 8, [8]),
        (0, 8, []),
    ],
)
def test_snapshots_are_due_every_so_often_and_at_the_end(every: int | None, steps: int, due: list[int]) -> None:
    config = PowerEMAConfig(snapshot_every=every)
    assert [step for step in range(steps + 1) if config.snapshot_due(step, steps)] == due


def states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
