"""Phases of a run: which one a step is in, what it has, and a resume inside any of them."""

import json

import pytest
import torch

from wavelatent.common.errors import Stopped, UsageError
from wavelatent.common.images import open_data
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.common.training import LearningRateConfig
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.train_autoencoder import train_autoencoder
from wavelatent.stage1_autoencoder.phases import PhaseConfig, phase_at, resize, resolve_phases
from wavelatent.stage1_autoencoder.trainer import AutoencoderTrainConfig, AutoencoderTrainer

CPU = RuntimeOptions(device="cpu")
PHASES = [
    {"steps": 2, "size": 16, "batch_size": 4, "losses": ["l1"]},
    {"steps": 2, "size": 24, "learning_rate": {"peak": 3e-3}},
    {},
]


def config(steps: int = 6, phases: list[dict] = PHASES) -> AutoencoderRunConfig:
    return AutoencoderRunConfig.model_validate(
        {
            "model": {
                "encoder": {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1},
                "decoder": {"width": "tiny", "num_res_blocks": 1},
                "perturbations": [{"kind": "gaussian"}],
            },
            "objective": {
                "lpips": {"weight": 0},
                "l2_weight": 1,
                "adversarial": {"discriminator": {"kind": "patchgan", "width": 8, "layers": 2}},
            },
            "train": {"steps": steps, "batch_size": 2, "phases": phases, "log_every": 1, "sample_every": 0},
        }
    )


@pytest.fixture(scope="module")
def data():
    return open_data("synthetic:10", size=32)


def test_phases_follow_each_other_and_the_last_goes_on():
    train = config().train
    first, second, third = phases = train.resolved_phases()
    assert [(p.start, p.steps, p.size, p.batch_size, p.images_before) for p in phases] == [
        (0, 2, 16, 4, 0),
        (2, 2, 24, 2, 8),
        (4, 2, None, 2, 12),
    ]
    assert [phase_at(phases, step).index for step in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [train.images_at(step) for step in range(7)] == [0, 4, 8, 10, 12, 14, 16]
    assert (first.has("l1"), first.has("l2"), first.has("adversarial"), second.has("l2")) == (True, False, False, True)
    assert (second.learning_rate.rate.peak, third.learning_rate.rate) == (3e-3, train.learning_rate)
    assert first.data_seed(7) == 7 != second.data_seed(7) != third.data_seed(7)


def test_learning_rates_over_a_phase_or_over_the_run():
    decay = {"peak": 1.0, "decay": "cosine"}
    train = AutoencoderTrainConfig.model_validate(
        {
            "steps": 8,
            "learning_rate": decay,
            "phases": [{"steps": 2}, {"steps": 2, "learning_rate": decay}, {"steps": 1}],
        }
    )
    first, own, last = train.resolved_phases()
    whole = AutoencoderTrainConfig.model_validate({"steps": 8, "learning_rate": decay}).resolved_phases()[0]
    rates = [whole.learning_rate.at(step) for step in range(8)]
    assert [first.learning_rate.at(step) for step in (0, 1)] == rates[:2]  # as if there were no phases
    assert [last.learning_rate.at(step) for step in (4, 7)] == [rates[4], rates[7]]
    assert [own.learning_rate.at(step) for step in (2, 3)] == [1.0, pytest.approx(0.5)]  # its own, from its own start
    assert (last.start, last.steps) == (4, 4)  # the last is as long as the run is
    longer = {"steps": 8, "phases": [{"steps": 4}, {"steps": 1, "learning_rate": decay}]}
    last = AutoencoderTrainConfig.model_validate(longer).resolved_phases()[-1]
    assert [last.learning_rate.at(step) for step in (4, 6)] == [1.0, pytest.approx(0.5)]


def test_a_phase_that_is_not_reached_is_said(tmp_path, data, capsys):
    train_autoencoder(config(2), data=data, out=tmp_path / "run", options=CPU)
    said = capsys.readouterr().err
    assert "train.phases.1 begins with step 2: 2 steps end before it" in said
    assert "train.phases.0" not in said


def test_a_run_without_phases_is_one_of_all_its_steps():
    train = AutoencoderTrainConfig(steps=9, batch_size=3)
    (only,) = train.resolved_phases()
    assert (only.start, only.steps, only.size, only.batch_size, only.losses) == (0, 9, None, 3, None)
    assert train.images_at(9) == 27


def test_only_the_last_phase_may_leave_its_steps_out():
    rate = LearningRateConfig()
    with pytest.raises(ValueError, match=r"train\.phases\.0 needs steps"):
        resolve_phases(
            [PhaseConfig(), PhaseConfig()], steps=4, batch_size=1, learning_rate=rate, discriminator_learning_rate=rate
        )


def test_resizing_keeps_a_constant_and_the_range():
    images = torch.rand(2, 3, 32, 32).round() * 2 - 1  # the steepest edges there are
    smaller = resize(images, 20)
    assert smaller.shape == (2, 3, 20, 20)
    assert smaller.abs().max() <= 1
    assert resize(images, None) is images
    assert resize(images, 32) is images
    torch.testing.assert_close(resize(torch.full((1, 3, 32, 32), 0.3), 8), torch.full((1, 3, 8, 8), 0.3))


def test_each_phase_trains_at_its_size_with_its_batch_rate_and_losses(tmp_path, data, monkeypatch):
    seen = []
    real = AutoencoderTrainer._micro_step

    def record(self, images, clock):
        rate = self.autoencoder_optimizer.param_groups[0]["lr"]
        seen.append((self.step, tuple(images.shape), rate, self._adversarial_on))
        return real(self, images, clock)

    monkeypatch.setattr(AutoencoderTrainer, "_micro_step", record)
    train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    assert seen == [
        (0, (4, 3, 16, 16), 1e-4, False),
        (1, (4, 3, 16, 16), 1e-4, False),
        (2, (2, 3, 24, 24), 3e-3, True),
        (3, (2, 3, 24, 24), 3e-3, True),
        (4, (2, 3, 32, 32), 1e-4, True),
        (5, (2, 3, 32, 32), 1e-4, True),
    ]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [4, 8, 10, 12, 14, 16]
    assert ["loss/l2" in line for line in lines] == [False, False, True, True, True, True]
    assert [line["learning_rate"] for line in lines] == [rate for _, _, rate, _ in seen]


@pytest.mark.parametrize("stops", [(1, 6), (2, 6), (3, 5, 6)], ids=str)
def test_a_run_resumes_inside_and_between_phases(tmp_path, data, stops):
    train_autoencoder(config(), data=data, out=tmp_path / "whole", options=CPU)
    for steps in stops:
        train_autoencoder(config(steps), data=data, out=tmp_path / "parts", options=CPU)
    whole, parts = (load_autoencoder(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert [name for name, value in whole.items() if not torch.equal(value, parts[name])] == []


def test_a_stop_in_a_later_phase_is_resumed_there(tmp_path, data):
    train_autoencoder(config(3), data=data, out=tmp_path / "run", options=CPU)
    with pytest.raises(Stopped, match="at step 3 of 6"):
        train_autoencoder(
            config(), data=data, out=tmp_path / "run", options=RuntimeOptions(device="cpu", max_minutes=0.0)
        )
    assert train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, data):
    for phases, message in (
        ([{"size": 64}], r"phases\.0\.size=64 is larger than the data's 32 px"),
        ([{"size": 18}], "18 px do not divide"),
    ):
        with pytest.raises(UsageError, match=message):
            train_autoencoder(config(phases=phases), data=data, out=tmp_path / "run", options=CPU)
    assert not (tmp_path / "run").exists()
