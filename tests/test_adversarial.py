"""When the adversarial term acts and how much, the adaptive weight, the gradient penalties' schedule, and the pause."""

import json

import pytest
import torch

from wavelatent.common.errors import UsageError
from wavelatent.common.images import open_data, read_batch
from wavelatent.common.run_folder import RunFolder
from wavelatent.common.runtime import RuntimeOptions, make_accelerator
from wavelatent.common.training import Clock
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.train_autoencoder import train_autoencoder
from wavelatent.stage1_autoencoder import trainer as trainer_module
from wavelatent.stage1_autoencoder.adversarial import (
    AdaptiveWeightConfig,
    AdversarialConfig,
    Adversary,
    PauseConfig,
    ReconstructionMonitor,
    adaptive_weight,
    last_layer_gradients,
)
from wavelatent.stage1_autoencoder.trainer import AutoencoderTrainer, check_settings

CPU = RuntimeOptions(device="cpu")
PATCH = {"kind": "patchgan", "width": 8, "layers": 2}


def config(steps: int = 4, **adversarial) -> AutoencoderRunConfig:
    return AutoencoderRunConfig.model_validate(
        {
            "model": {
                "encoder": {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1},
                "bottleneck": {"kind": "plain"},
                "decoder": {"width": "tiny", "num_res_blocks": 1},
            },
            "objective": {"lpips": {"weight": 0}, "adversarial": {"discriminator": PATCH} | adversarial},
            "train": {"steps": steps, "batch_size": 4, "log_every": 1, "sample_every": 0},
        }
    )


@pytest.fixture(scope="module")
def data():
    return open_data("synthetic:8", size=32)


def log_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def settings(**changes) -> AdversarialConfig:
    return AdversarialConfig.model_validate({"discriminator": PATCH} | changes)


def test_start_warmup_and_ramp_in_steps_and_fractions():
    game = settings(start=0.25, warmup=2, ramp=0.2)  # of 20 steps: 5, 2 and 4
    assert game.timing(20) == (5, 2, 4)
    assert [game.timing(20).scale(step) for step in range(4, 13)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [settings(start=3).timing(20).scale(step) for step in (2, 3)] == [0, 1]
    with pytest.raises(ValueError, match="start"):
        settings(start=1.5)  # neither a number of steps nor a share


def test_the_schedule_is_what_a_run_does(tmp_path, data):
    train_autoencoder(config(start=1, warmup=1, ramp=2), data=data, out=tmp_path / "run", options=CPU)
    lines = log_of(tmp_path / "run")
    assert ["loss/discriminator" in line for line in lines] == [False, True, True, True]
    assert ["loss/adversarial" in line for line in lines] == [False, False, True, True]
    for line, share in zip(lines[2:], (0.5, 1.0), strict=True):
        assert line["loss/total"] == pytest.approx(line["loss/l1"] + 0.1 * share * line["loss/adversarial"], rel=1e-5)
    assert {"gan/logit_gap", "gan/accuracy", "gan/reconstruction", "gan/reconstruction_before"} <= lines[3].keys()
    assert lines[3]["gan/logit_gap"] == pytest.approx(lines[3]["gan/logit_real"] - lines[3]["gan/logit_fake"], abs=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    last = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    one, other = last * torch.tensor([[3.0, 0.0, 4.0]]), last * torch.tensor([[0.0, 0.1, 0.0]])
    gradients = last_layer_gradients((one.sum(), other.sum()), last)
    torch.testing.assert_close(gradients, torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.1, 0.0]]))
    weight, clamped = adaptive_weight(*gradients, AdaptiveWeightConfig(epsilon=0.1))
    assert (weight.item(), clamped.item()) == (pytest.approx(5 / 0.2), 0)
    weight, clamped = adaptive_weight(*gradients, AdaptiveWeightConfig(epsilon=0.1, max=7.0))
    assert (weight.item(), clamped.item()) == (7, 1)
    assert last.grad is None  # nothing is left behind for the optimiser


def test_the_adaptive_weight_balances_the_terms_of_a_run(tmp_path, data):
    train_autoencoder(config(weight=0.5, adaptive={"max": 1e-3}), data=data, out=tmp_path / "clamped", options=CPU)
    train_autoencoder(config(weight=0.5, adaptive={}), data=data, out=tmp_path / "free", options=CPU)
    for line in log_of(tmp_path / "clamped"):
        assert (line["gan/adaptive_weight"], line["gan/adaptive_clamped"]) == (pytest.approx(1e-3), 1)
    for line in log_of(tmp_path / "free"):
        assert line["gan/adaptive_clamped"] == 0
        expected = line["loss/l1"] + 0.5 * line["gan/adaptive_weight"] * line["loss/adversarial"]
        assert line["loss/total"] == pytest.approx(expected, rel=1e-4)


def test_lazy_gradient_penalties_count_as_many_times(data):
    """Over a whole period, they weigh what they would at every step."""
    images = read_batch(data, range(4)).images
    real, fake = images[:2], images[2:]
    weights = {}
    for every in (1, 4):
        adversary = Adversary(settings(r1_weight=3.0, r2_weight=0.5, penalty_every=every))
        outputs = [adversary.discriminator_terms(adversary.network, real, fake, step) for step in range(4)]
        assert [("r1" in o.terms, "r2" in o.terms) for o in outputs] == [(s % every == 0,) * 2 for s in range(4)]
        weights[every] = [sum(o.weights.get(name, 0.0) for o in outputs) for name in ("r1", "r2")]
    assert weights[1] == weights[4] == [12.0, 2.0]
    only_real = Adversary(settings(r1_weight=3.0)).discriminator_terms
    assert set(only_real(Adversary(settings()).network, real, fake, 0).terms) == {"discriminator", "r1"}


def test_the_generators_term_leaves_nothing_in_the_discriminator(data):
    real, fake = read_batch(data, range(4)).images.chunk(2)
    for loss in ("hinge", "logistic", "relativistic"):
        adversary = Adversary(settings(loss=loss, augment=["color", "translation", "cutout"]))
        fake = fake.detach().requires_grad_()
        adversary.generator_term(fake, real).backward()
        assert fake.grad.abs().sum() > 0
        assert all(p.grad is None and p.requires_grad for p in adversary.network.parameters())


def test_lecam_is_told_the_logits_and_saved(tmp_path, data):
    train_autoencoder(config(lecam={"weight": 0.1}), data=data, out=tmp_path / "run", options=CPU)
    lines = log_of(tmp_path / "run")
    assert lines[0]["loss/lecam"] == 0  # there is nothing yet to be tied to
    assert all(line["loss/lecam"] > 0 for line in lines[1:])
    assert (tmp_path / "run/checkpoints/checkpoint-4/lecam.safetensors").is_file()


def test_the_monitor_pauses_where_the_loss_is_too_far_above_its_best():
    monitor, rule = ReconstructionMonitor(), PauseConfig(factor=1.5, steps=7)
    monitor.begin_phase()
    for step in range(100):
        monitor.update(torch.tensor(2.0), step, adversarial=False)
        assert monitor.maybe_pause(step, rule) is None
    assert monitor.smoothed.item() == pytest.approx(2.0)
    assert monitor.best.item() == pytest.approx(2.0)
    events = []
    for step in range(100, 160):
        monitor.update(torch.tensor(4.0), step, adversarial=True)
        event = monitor.maybe_pause(step + 1, rule)
        events += [] if event is None else [(step, event)]
    # With w = 0.98^n of weight left on the 2s, (2 (1 - 0.98^100) w + 4 (1 - w)) / (1 - 0.98^100 w) > 3 from n = 31 on;
    # it is still above after every 7 steps of pause.
    assert [step for step, _ in events] == [130, 137, 144, 151, 158]
    assert "step 131: the reconstruction loss is 1.50 times its best" in events[0][1]
    assert (monitor.paused(165), monitor.paused(166)) == (True, False)
    assert monitor.before.item() == pytest.approx(2.0)
    monitor.begin_phase()  # another resolution: what was the best says nothing any more
    monitor.update(torch.tensor(9.0), 0, adversarial=True)
    assert monitor.maybe_pause(170, rule) is None


def test_the_loss_before_is_that_without_the_term_in_every_phase():
    monitor = ReconstructionMonitor()
    monitor.begin_phase()
    monitor.update(torch.tensor(5.0), 0, adversarial=True)
    assert "gan/reconstruction_before" not in monitor.metrics(0)  # there was nothing before
    monitor.begin_phase()
    for step, (loss, adversarial) in enumerate([(3.0, False), (3.0, False), (9.0, True), (9.0, False)]):
        monitor.update(torch.tensor(loss), step, adversarial=adversarial)
    assert monitor.metrics(3)["gan/reconstruction_before"].item() == pytest.approx(3.0)


def test_a_start_that_is_a_share_does_not_move_once_it_is_passed(tmp_path, data):
    """Of 4 steps the discriminator starts with step 1 and is heard from step 2 on; of 12 it would be 3 and 6."""
    for steps in (4, 12):
        train_autoencoder(config(steps, start=0.25, warmup=0.25), data=data, out=tmp_path / "run", options=CPU)
    lines = log_of(tmp_path / "run")
    assert ["loss/discriminator" in line for line in lines] == [False] + [True] * 11
    assert ["loss/adversarial" in line for line in lines] == [False] * 2 + [True] * 10


def test_a_run_pauses_says_so_and_resumes_inside_the_pause(tmp_path, data, monkeypatch, capsys):
    """The loss is made to jump by a changed decoder; the term is off for the steps that follow, also over a resume."""
    monkeypatch.setattr(ReconstructionMonitor, "SETTLING", 1)
    monkeypatch.setattr(ReconstructionMonitor, "DECAY", 0.0)
    real = AutoencoderTrainer._micro_step

    def worsen(self, images, clock):
        loss = real(self, images, clock)
        return loss * 3 if self.step == 2 else loss

    monkeypatch.setattr(AutoencoderTrainer, "_micro_step", worsen)
    game = {"pause": {"factor": 1.5, "steps": 2}}
    train_autoencoder(config(7, **game), data=data, out=tmp_path / "whole", options=CPU)
    assert "step 3: the reconstruction loss is 3." in capsys.readouterr().err
    for steps in (4, 7):
        train_autoencoder(config(steps, **game), data=data, out=tmp_path / "parts", options=CPU)
    for run in ("whole", "parts"):
        lines = log_of(tmp_path / run)
        assert ["loss/adversarial" in line for line in lines] == [True, True, True, False, False, True, True]
        assert [line["gan/paused"] for line in lines] == [0, 0, 0, 1, 1, 0, 0]
        (event,) = [json.loads(line) for line in (tmp_path / run / "events.jsonl").read_text().splitlines()]
        assert (event["step"], event["event"]) == (3, "adversarial_paused")
        assert all("loss/discriminator" in line for line in lines)  # it goes on learning
    whole, parts = (load_autoencoder(tmp_path / run).state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_an_adaptive_weight_of_two_halves_is_that_of_the_whole(tmp_path, data, monkeypatch):
    """What the trainer reduces over processes are gradients, not norms: a mean of norms is another number."""
    settings = config(adaptive={})
    accelerator = make_accelerator(CPU)
    trainer = AutoencoderTrainer(
        settings.model, settings.objective, settings.train, data=data, seed=0,
        run=RunFolder(tmp_path, settings, {"kind": "test"}), accelerator=accelerator,
    )  # fmt: skip
    given = []
    monkeypatch.setattr(
        trainer_module, "adaptive_weight", lambda *a: given.append(a[:2]) or (torch.tensor(1.0), torch.tensor(0.0))
    )
    images = read_batch(data, range(8)).images
    for part in (images[:4], images[4:], images):
        trainer._generator_backward(part, Clock(0.0, 0))
        trainer.autoencoder_optimizer.zero_grad()
    for one, other, whole in zip(*given, strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-3, atol=1e-6)


def test_what_does_not_go_together_is_refused(data):
    class Half:
        mixed_precision, num_processes = "fp16", 1

    for penalised in (config(r1_weight=1.0), config(adaptive={})):
        with pytest.raises(UsageError, match="r1_weight, r2_weight and adaptive need --mixed-precision bf16"):
            check_settings(penalised.objective, penalised.train, Half(), 32)
