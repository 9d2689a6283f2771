"""Averages rebuilt from snapshots against averages that were tracked, and the snapshots themselves."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from wavelatent.common.checkpoints import save_checkpoint
from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.power_ema import (
    SNAPSHOT_FOLDER,
    PowerEMA,
    PowerEMAConfig,
    Profile,
    drop_after,
    fit,
    gamma_of,
    inner_products,
    rebuild,
    save_snapshot,
    snapshots,
)
from wavelatent.common.run_folder import save_model_folder
from wavelatent.pipelines.ema_snapshots import load_diffusion_at_width
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.objectives import EDMConfig
from wavelatent.stage2_diffusion.unet import UNetConfig

STEPS, KEPT, OTHER = 320, (0.1, 0.05), (0.03, 0.07, 0.15, 0.25)
EXACT = PowerEMAConfig(widths=KEPT, snapshot_dtype="float32")
HALF = PowerEMAConfig(widths=KEPT)


class Walker(nn.Module):
    """Many weights, and a buffer that says how far it has come."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(40, 50))
        self.register_buffer("shift", torch.zeros(3))


def jitter(step: int) -> Tensor:
    """Return weights that are drawn anew at every step, around 2."""
    return 2 + torch.randn(40, 50, generator=torch.Generator().manual_seed(step))


def wander(step: int) -> Tensor:
    """Return weights that drift along a curve and jitter, as those of a training do."""
    rate = torch.linspace(0.5, 3, 2000).reshape(40, 50)
    return 2 + torch.sin(rate * math.log(step)) + 0.1 * (jitter(step) - 2)


TRAJECTORIES = {"jitter": jitter, "wander": wander}


def train(
    folder: Path, config: PowerEMAConfig, widths: Sequence[float] = KEPT, trajectory: str = "wander"
) -> PowerEMA[Walker]:
    """Walk, store snapshots of the widths of ``config``, and return averages tracked at ``widths``."""
    model = Walker()
    stored, tracked = PowerEMA(model, config), PowerEMA(model, PowerEMAConfig(widths=tuple(widths)))
    for step in walk(model, trajectory, range(1, STEPS + 1)):
        stored.update(model, step)
        tracked.update(model, step)
        if config.snapshot_due(step, STEPS):
            save_snapshot(folder, step, stored)
    return tracked


def walk(model: Walker, trajectory: str, steps: range) -> Iterator[int]:
    for step in steps:
        with torch.no_grad():
            model.weight.copy_(TRAJECTORIES[trajectory](step))
            model.shift.fill_(step)
        yield step


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def test_the_inner_products_are_the_integrals() -> None:
    profiles = [Profile(100, 0.1), Profile(70, 0.1), Profile(70, 0.2), Profile(31, 0.05)]
    tau = (np.arange(200_000) + 0.5) / 2_000  # up to step 100
    values = [
        np.where(tau <= p.step, (gamma_of(p.width) + 1) * (tau / p.step) ** gamma_of(p.width) / p.step, 0)
        for p in profiles
    ]
    expected = [[(first * second).sum() / 2_000 for second in values[1:]] for first in values]
    np.testing.assert_allclose(inner_products(profiles, profiles[1:]), expected, rtol=2e-3)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_a_rebuilt_average_is_the_tracked_one_within_what_its_residual_allows(tmp_path: Path, trajectory: str) -> None:
    """The difference is the integral of (fit - target) times the weights, from which, the two having the same sum, any
    constant can be taken; Cauchy and Schwarz bound it for each weight by the residual."""
    tracked = train(tmp_path, EXACT, OTHER, trajectory)
    history = torch.stack([TRAJECTORIES[trajectory](step) for step in range(1, STEPS + 1)]).double()
    spread = (history - history.mean(0)).square().sum(0).sqrt()
    for width, averaged in tracked.models.items():
        rebuilt = rebuild(tmp_path, width)
        norm = math.sqrt(inner_products([Profile(STEPS, width)], [Profile(STEPS, width)])[0, 0])
        error = rebuilt.state["weight"] - averaged.weight
        assert 0 < rebuilt.residual < 0.09
        assert (error.abs() <= rebuilt.residual * norm * spread + 5e-6).all()
        nearest = min(rms(rebuild(tmp_path, kept).state["weight"] - averaged.weight) for kept in KEPT)
        assert rms(error) < 0.2 * nearest


def test_of_weights_that_only_jitter_the_residual_is_the_share_of_error(tmp_path: Path) -> None:
    tracked = train(tmp_path, EXACT, OTHER, "jitter")
    for width, averaged in tracked.models.items():
        rebuilt = rebuild(tmp_path, width)
        error = rms(rebuilt.state["weight"] - averaged.weight) / rms(averaged.weight - 2)
        assert error == pytest.approx(rebuilt.residual, rel=0.1)


@pytest.mark.parametrize("config", [EXACT, HALF], ids=["float32", "float16"])
def test_half_precision_costs_no_more_than_its_rounding(tmp_path: Path, config: PowerEMAConfig) -> None:
    tracked = train(tmp_path, config, (0.07,))
    rebuilt = rebuild(tmp_path, 0.07)
    assert rms(rebuilt.state["weight"] - tracked.shown.weight) < (2e-4 if config is EXACT else 6e-4)
    assert {tensor.dtype for tensor in rebuilt.state.values()} == {torch.float32}
    assert rebuilt.state["shift"].tolist() == [STEPS] * 3  # the newest one's, not a combination


def test_a_stored_average_comes_back_as_it_is(tmp_path: Path) -> None:
    train(tmp_path / "float32", EXACT)
    tracked = train(tmp_path / "float16", HALF)
    for width in KEPT:
        whole, half = rebuild(tmp_path / "float32", width), rebuild(tmp_path / "float16", width)
        weight = tracked.models[width].weight
        assert torch.equal(whole.state["weight"], weight)
        assert torch.equal(half.state["weight"], weight.half().float())
        assert (whole.residual, whole.snapshots, whole.profile) == (0, 1, Profile(STEPS, width))
        for rebuilt in (whole, half):
            assert rebuilt.state["shift"].tolist() == [STEPS] * 3


def test_an_average_of_an_earlier_step_can_be_rebuilt(tmp_path: Path) -> None:
    train(tmp_path, EXACT)
    model, at_step = Walker(), 160
    tracked = PowerEMA(model, PowerEMAConfig(widths=(0.15,)))
    for step in walk(model, "wander", range(1, at_step + 1)):
        tracked.update(model, step)
    rebuilt = rebuild(tmp_path, 0.15, at_step=at_step)
    assert rebuilt.profile == Profile(at_step, 0.15)
    assert rms(rebuilt.state["weight"] - tracked.shown.weight) < 5e-3  # of 0.1 of jitter
    assert rms(rebuilt.state["weight"] - rebuild(tmp_path, 0.15).state["weight"]) > 0.1
    between = rebuild(tmp_path, 0.15, at_step=at_step - 10).residual  # its profile ends between two snapshots
    assert rebuilt.residual < 0.05 < between


@pytest.mark.parametrize("width", [0.02, 0.07, 0.2])
def test_more_snapshots_leave_a_smaller_residual(width: float) -> None:
    residuals = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        stored = [Profile(640 // count * (k + 1), kept) for k in range(count) for kept in KEPT]
        coefficients, residual = fit(stored, Profile(640, width))
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        residuals.append(residual)
    assert all(more < fewer for fewer, more in pairwise(residuals)), residuals
    assert residuals[-1] < 0.02


def test_the_residual_is_the_distance_of_the_profiles() -> None:
    stored = [Profile(25 * (k + 1), kept) for k in range(4) for kept in KEPT]
    coefficients, residual = fit(stored, Profile(100, 0.2))
    tau = (np.arange(100_000) + 0.5) / 1_000

    def values(p: Profile) -> np.ndarray:
        gamma = gamma_of(p.width)
        return np.where(tau <= p.step, (gamma + 1) * (tau / p.step) ** gamma / p.step, 0)

    target = values(Profile(100, 0.2))
    fitted = sum(c * values(p) for c, p in zip(coefficients, stored, strict=True))
    assert residual == pytest.approx(np.linalg.norm(fitted - target) / np.linalg.norm(target), rel=2e-3)


def test_the_defaults_rebuild_the_widths_that_they_say() -> None:
    config = PowerEMAConfig()
    steps = [step for step in range(1, 100_001) if config.snapshot_due(step, 100_000)]
    stored = [Profile(step, width) for step in steps for width in config.widths]
    assert max(fit(stored, Profile(100_000, width))[1] for width in np.linspace(0.025, 0.25, 50)) < 0.08


def test_a_snapshot_says_what_it_is(tmp_path: Path) -> None:
    model = Walker()
    ema = PowerEMA(model, HALF)
    for step in walk(model, "wander", range(1, 13)):
        ema.update(model, step)
    with torch.no_grad():
        ema.models[0.05].weight[3, 4] = 1e5  # beyond float16
    save_snapshot(tmp_path, 12, ema)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-12-width-0.05.safetensors",
        "step-12-width-0.1.safetensors",
    ]
    for width, dtype in {0.1: torch.float16, 0.05: torch.float32}.items():
        with safe_open(tmp_path / f"step-12-width-{width}.safetensors", "pt") as file:
            record = json.loads(file.metadata()["snapshot"])
            assert record == {"step": 12, "width": width, "buffers": ["shift"]}
            assert file.get_tensor("weight").dtype == dtype
            assert file.get_tensor("shift").dtype == torch.float32
    assert rebuild(tmp_path, 0.05).state["weight"][3, 4] == 1e5


def test_a_snapshot_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        save_snapshot(tmp_path, 3, PowerEMA(Walker(), HALF))
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_the_snapshots_of_one_that_was_not(tmp_path: Path) -> None:
    train(tmp_path / "whole", HALF)
    train(tmp_path / "resumed", HALF)
    wrong = Walker()
    save_snapshot(tmp_path / "resumed", 201, PowerEMA(wrong, HALF))  # of a history that is to be forgotten
    drop_after(tmp_path / "resumed", 200)
    assert max(profile.step for profile in snapshots(tmp_path / "resumed")) == 200
    assert {p for p in snapshots(tmp_path / "whole") if p.step <= 200} == set(snapshots(tmp_path / "resumed"))
    model, ema = Walker(), PowerEMA(Walker(), HALF)
    for step in walk(model, "wander", range(1, STEPS + 1)):
        ema.update(model, step)
        if step > 200 and HALF.snapshot_due(step, STEPS):
            save_snapshot(tmp_path / "resumed", step, ema)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ("whole", "resumed")]
    assert contents[0] == contents[1]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WavelatentError, match="no EMA snapshots; train with a snapshot_every other than 0"):
        rebuild(tmp_path / "none", 0.1)
    few = PowerEMAConfig(widths=(0.05,), snapshot_every=STEPS)
    train(tmp_path, few)
    for width in (0.0, 0.28, -1.0, math.nan):
        with pytest.raises(UsageError, match=r"not between 0 and 0\.28"):
            rebuild(tmp_path, width)
    for step in (0, STEPS + 1):
        with pytest.raises(UsageError, match=f"give a step from 1 to {STEPS}"):
            rebuild(tmp_path, 0.1, at_step=step)
    with pytest.raises(WavelatentError, match=r"1 EMA snapshots of width 0.05 .* cannot express width 0.2 .*smaller"):
        rebuild(tmp_path, 0.2)
    file = tmp_path / f"step-{STEPS}-width-0.05.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WavelatentError, match=r"cannot be read .* delete it"):
        rebuild(tmp_path, 0.05)


TINY = UNetConfig(channels=8, multipliers=(1,), num_res_blocks=1, attention_levels=(), head_channels=8)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[float, LatentDiffusion]]:
    """Return a run folder as training leaves it, and the averages that it tracked, 0.15 not among those it kept."""
    statistics = {"mean": [0.3, -2.0, 5.0], "std": [0.5, 1.0, 4.0]}
    model = LatentDiffusion(TINY, EDMConfig(), (3, 4, 8), statistics=statistics)
    kept, tracked = PowerEMA(model, HALF), PowerEMA(model, PowerEMAConfig(widths=(*KEPT, 0.15, 0.27)))
    for step in range(1, 33):
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) + step / 16)
        kept.update(model, step)
        tracked.update(model, step)
        if HALF.snapshot_due(step, 32):
            save_snapshot(tmp_path / SNAPSHOT_FOLDER, step, kept)
    save_checkpoint(tmp_path, 32, modules=kept.modules(), optimizers={}, counters={}, keep=1)
    save_model_folder(kept.shown, tmp_path / "model")
    return tmp_path, tracked.models


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_a_run_is_loaded_at_any_width(
    run: tuple[Path, dict[float, LatentDiffusion]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tracked = run
    for width in KEPT:  # exactly, though the snapshots are in half precision
        assert torch.equal(weights(load_diffusion_at_width(folder, width)), weights(tracked[width]))
        stored = load_diffusion_at_width(folder, width, at_step=30)  # not the checkpoint's step
        assert torch.equal(weights(stored), rebuilt_weights(folder, width, 30, stored))
    other = load_diffusion_at_width(folder, 0.15)
    torch.testing.assert_close(weights(other), weights(tracked[0.15]), rtol=0, atol=0.03)
    assert not torch.allclose(weights(other), weights(tracked[0.1]), rtol=0, atol=0.1)
    assert torch.equal(other.whitening.scale, tracked[0.15].whitening.scale)
    assert not other.training
    assert capsys.readouterr().err == ""
    load_diffusion_at_width(folder, 0.27)
    assert "width 0.27 at step 32 comes from 32 snapshots with a residual of 0." in capsys.readouterr().err


def rebuilt_weights(folder: Path, width: float, step: int, like: LatentDiffusion) -> Tensor:
    model = copy.deepcopy(like)
    model.load_state_dict(rebuild(folder / SNAPSHOT_FOLDER, width, at_step=step).state)
    return weights(model)


def test_a_run_without_what_it_takes_is_refused(run: tuple[Path, dict[float, LatentDiffusion]]) -> None:
    folder, _ = run
    with pytest.raises(WavelatentError, match="has no model yet"):
        load_diffusion_at_width(folder / "nothing", 0.1)
    for path in (folder / SNAPSHOT_FOLDER).iterdir():
        path.unlink()
    with pytest.raises(WavelatentError, match="no EMA snapshots"):
        load_diffusion_at_width(folder, 0.15)
    save_snapshot(folder / SNAPSHOT_FOLDER, 32, PowerEMA(Walker(), PowerEMAConfig(widths=(0.15,))))
    with pytest.raises(WavelatentError, match="do not fit its model"):
        load_diffusion_at_width(folder, 0.15)
