"""Stage one's loop: it resumes exactly, stops whole, and its losses reach what they should and nothing else."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from wavelatent.common.config import Config
from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.images import Batch, open_data, read_batch
from wavelatent.common.run_folder import RunFolder
from wavelatent.common.runtime import RuntimeOptions, make_accelerator
from wavelatent.pipelines.loading import load_autoencoder
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.train_autoencoder import train_autoencoder
from wavelatent.stage1_autoencoder import trainer as trainer_module
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder
from wavelatent.stage1_autoencoder.gan_losses import GAN_LOSSES
from wavelatent.stage1_autoencoder.objective import on_share, weighted_total
from wavelatent.stage1_autoencoder.trainer import AutoencoderTrainer

CPU = RuntimeOptions(device="cpu")
UNET = {"kind": "unet", "width": "narrow", "levels": 2}
PATCH = {"kind": "patchgan", "width": 8, "layers": 2}


def config(**changes) -> AutoencoderRunConfig:
    plain = {
        "model": {
            "encoder": {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1},
            "decoder": {"width": "tiny", "num_res_blocks": 1},
        },
        "objective": {"lpips": {"weight": 0}, "adversarial": {"discriminator": PATCH, "start": 2, "weight": 0.1}},
        "train": {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": {"peak": 1e-3, "warmup_steps": 1, "decay": "cosine"},
            "log_every": 1,
            "checkpoint_every": 2,
            "sample_every": 2,
        },
    }
    for dotted, value in changes.items():
        section = plain
        *path, last = dotted.split("__")
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    return AutoencoderRunConfig.model_validate(plain)


@pytest.fixture(scope="module")
def data():
    return open_data("synthetic:12", size=32)


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_autoencoder(run).state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("discriminator", [UNET, PATCH], ids=lambda d: d["kind"])
@pytest.mark.parametrize("bottleneck", [{"kind": "kl"}, {"kind": "bounded"}], ids=lambda b: b["kind"])
def test_a_resumed_run_is_the_same_run(tmp_path, data, discriminator, bottleneck):
    changes = {
        "objective__adversarial__discriminator": discriminator,
        "model__bottleneck": bottleneck,
        "model__perturbations": [{"kind": "gaussian"}],
        "model__decoder__dropout": 0.1,
        "objective__adversarial__start": 1,
        "train__learning_rate": {"peak": 1e-3},
        "train__steps": 3,
    }
    train_autoencoder(config(**changes), data=data, out=tmp_path / "whole", options=CPU)
    train_autoencoder(config(**changes | {"train__steps": 2}), data=data, out=tmp_path / "parts", options=CPU)
    checkpoint = tmp_path / "parts" / "checkpoints" / "checkpoint-2"
    before = checkpoint.stat().st_ino
    assert train_autoencoder(config(**changes), data=data, out=tmp_path / "parts", options=CPU)
    assert checkpoint.stat().st_ino == before, "the copy that a run goes on from is left as it is"
    assert_equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    without_time = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert without_time[0] == without_time[1]
    assert [line["step"] for line in without_time[0]] == [1, 2, 3]


def test_gradient_accumulation_resumes_too(tmp_path, data):
    option = {"objective__adversarial__start": 0, "train__gradient_accumulation": 2}
    for out, stops in (("whole", [2]), ("parts", [1, 2])):
        for steps in stops:
            settings = config(**option, train__steps=steps, train__learning_rate={"peak": 1e-3})
            assert train_autoencoder(settings, data=data, out=tmp_path / out, options=CPU)
    assert_equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_a_discriminator_gradient_that_is_not_finite_stops_the_run_too(tmp_path, data, monkeypatch):
    hinge = GAN_LOSSES["hinge"]

    def explode(*maps):  # a finite loss whose gradient is not: d sqrt(x) / dx at 0
        loss = hinge.discriminator(*maps)
        return loss + (loss - loss).clamp_min(0).sqrt()

    monkeypatch.setitem(GAN_LOSSES, "hinge", replace(hinge, discriminator=explode))
    with pytest.raises(
        WavelatentError,
        match=r"gradient of discriminator \(gradient_norm/discriminator\) is not finite at step 2: the state before",
    ):
        train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    train_autoencoder(config(), data=data, out=tmp_path / "whole", options=CPU)
    assert_equal(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_a_gradient_of_the_autoencoder_that_is_not_finite_names_the_term(tmp_path, data, monkeypatch):
    """The loss itself is finite: d sqrt(x) / dx at 0 is not."""
    hinge = GAN_LOSSES["hinge"]

    def explode(fake, real):
        loss = hinge.generator(fake, real)
        return loss + (loss - loss).clamp_min(0).sqrt()

    monkeypatch.setitem(GAN_LOSSES, "hinge", replace(hinge, generator=explode))
    with pytest.raises(
        WavelatentError, match=r"the gradient of adversarial \(gradient_norm/autoencoder\) is not finite"
    ):
        train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    assert (tmp_path / "run/checkpoints/checkpoint-2").is_dir()  # the state before that step
    monkeypatch.undo()
    train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    train_autoencoder(config(), data=data, out=tmp_path / "whole", options=CPU)
    assert_equal(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_the_run_folder_is_what_the_contract_says(tmp_path, data):
    run = tmp_path / "run"
    assert train_autoencoder(config(), data=data, out=run, options=CPU)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["of"]) == ("done", 4, 4)
    assert status["peak_memory_bytes"] > 0
    for name in ("config.yaml", "environment.json", "model/config.json", "model/model.safetensors", "model/README.md"):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-2.png", "step-4.png"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert any((run / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [4, 8, 12, 16]
    assert "loss/discriminator" not in lines[1]
    assert {"loss/l1", "loss/kl", "loss/adversarial", "loss/discriminator", "psnr"} <= lines[2].keys()
    before = (run / "metrics.jsonl").read_bytes()
    assert not train_autoencoder(config(), data=data, out=run, options=CPU)  # finished: nothing happens
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_configuration_or_data_set_is_refused_by_name(tmp_path, data):
    train_autoencoder(config(train__steps=1), data=data, out=tmp_path / "run", options=CPU)
    with pytest.raises(UsageError, match=r"another model\.channels"):
        train_autoencoder(config(model__channels=8), data=data, out=tmp_path / "run", options=CPU)
    with pytest.raises(UsageError, match=r"another data\.fingerprint"):
        train_autoencoder(config(), data=open_data("synthetic:11", size=32), out=tmp_path / "run", options=CPU)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("precious")
    options = RuntimeOptions(device="cpu", overwrite=True)
    with pytest.raises(UsageError, match="not a run folder"):
        train_autoencoder(config(), data=data, out=tmp_path / "foreign", options=options)
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "precious"


def test_a_size_that_does_not_divide_is_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match="38 px do not divide"):
        train_autoencoder(config(), data=open_data("synthetic:4", size=38), out=tmp_path / "run", options=CPU)
    assert not (tmp_path / "run").exists()


def test_a_deadline_saves_and_the_same_command_goes_on(tmp_path, data):
    now = RuntimeOptions(device="cpu", max_minutes=0.0)
    with pytest.raises(Stopped, match="--max-minutes at step 0"):
        train_autoencoder(config(), data=data, out=tmp_path / "run", options=now)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "stopped"
    assert train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    train_autoencoder(config(), data=data, out=tmp_path / "whole", options=CPU)
    assert_equal(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_stops_the_run_names_the_term_and_saves_the_state_before(tmp_path, data, monkeypatch):
    hinge = GAN_LOSSES["hinge"]
    explosive = replace(hinge, generator=lambda fake, real: hinge.generator(fake, real) * math.inf)
    monkeypatch.setitem(GAN_LOSSES, "hinge", explosive)
    with pytest.raises(WavelatentError, match="adversarial is not finite at step 2"):
        train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert (tmp_path / "run/checkpoints/checkpoint-2").is_dir()
    monkeypatch.undo()
    train_autoencoder(config(), data=data, out=tmp_path / "run", options=CPU)
    train_autoencoder(config(), data=data, out=tmp_path / "whole", options=CPU)
    assert_equal(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def build_trainer(tmp_path, data, settings: Config) -> AutoencoderTrainer:
    accelerator = make_accelerator(CPU, settings.train.gradient_accumulation)
    run = RunFolder(tmp_path, settings, {"kind": "test"})
    return AutoencoderTrainer(
        settings.model, settings.objective, settings.train, data=data, seed=0, run=run, accelerator=accelerator
    )


def test_accumulated_micro_steps_equal_one_whole_batch(tmp_path, data, monkeypatch):
    """Gradients of two micro-batches of 2 are those of one batch of 4, for both networks (Adam hides their scale)."""
    gradients = []
    for accumulation in (1, 2):
        settings = config(
            model__bottleneck={"kind": "plain"},  # its forward has no noise, so only the batches differ
            objective__adversarial__start=0,
            train__gradient_accumulation=accumulation,
            train__flip=False,
            train__steps=1,
        )
        trainer = build_trainer(tmp_path / str(accumulation), data, settings)
        seen: dict[str, list[torch.Tensor]] = {}

        def record(accelerator, optimizer, parameters, max_norm, seen=seen):
            parameters = list(parameters)
            seen[f"network {len(seen)}"] = [p.grad.clone() for p in parameters]
            return torch.stack([g.norm() for g in seen[f"network {len(seen) - 1}"]]).norm()

        monkeypatch.setattr(trainer_module, "clip_gradients", record)
        whole = read_batch(data, [0, 1, 2, 3])
        parts = whole.images.chunk(accumulation)
        monkeypatch.setattr(trainer, "_batches", lambda parts=parts: iter([Batch(p, None, None) for p in parts]))
        before = {name: p.clone() for name, p in trainer.adversary.network.named_parameters()}
        trainer._step(trainer._batches(), trainer_module.Clock(0.0, 0))
        assert any(not torch.equal(p, before[name]) for name, p in trainer.adversary.network.named_parameters())
        gradients.append(seen)
    assert [len(g) for g in gradients] == [2, 2]  # each network was stepped exactly once
    for one, other in zip(gradients[0].values(), gradients[1].values(), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_generators_loss_leaves_no_gradient_in_the_discriminator(tmp_path, data):
    trainer = build_trainer(tmp_path, data, config(objective__adversarial__start=0))
    trainer._generator_backward(read_batch(data, [0, 1, 2, 3]).images, trainer_module.Clock(0.0, 0))
    assert all(p.grad is None for p in trainer.adversary.network.parameters())
    assert all(p.requires_grad for p in trainer.adversary.network.parameters())


def test_the_total_is_the_weighted_sum_and_needs_every_weight():
    terms = {"l1": torch.tensor(2.0), "kl": torch.tensor(3.0)}
    assert weighted_total(terms, {"l1": 0.5, "kl": 2.0, "lpips": 1.0}).item() == 7.0
    with pytest.raises(KeyError):
        weighted_total(terms, {"l1": 0.5})


def test_the_gradient_of_lpips_alone_reaches_the_whole_autoencoder(perceptual_distance):
    """Under ``no_grad`` somewhere on the way, as in many training codes, all of these would be None or zero."""
    autoencoder = Autoencoder(config().model).train()
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    distance = on_share(perceptual_distance("vgg"), 0.5)(autoencoder(images).images, images)
    assert distance.shape == (1,)
    distance.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in autoencoder.parameters())


def test_what_is_saved_when_a_step_fails_is_the_state_before_it_also_of_running_statistics(tmp_path, data, monkeypatch):
    """The forward pass of the failing step has already been into the batch norm when its loss is looked at."""
    settings = config(model__bottleneck={"kind": "batchnorm"})
    train_autoencoder(
        config(model__bottleneck={"kind": "batchnorm"}, train__steps=2), data=data, out=tmp_path / "run", options=CPU
    )
    before = load_file(tmp_path / "run/checkpoints/checkpoint-2/autoencoder.safetensors")
    hinge = GAN_LOSSES["hinge"]
    monkeypatch.setitem(
        GAN_LOSSES, "hinge", replace(hinge, generator=lambda fake, real: hinge.generator(fake, real) * math.nan)
    )
    with pytest.raises(WavelatentError, match="adversarial is not finite at step 2"):
        train_autoencoder(settings, data=data, out=tmp_path / "run", options=CPU)
    after = load_file(tmp_path / "run/checkpoints/checkpoint-2/autoencoder.safetensors")
    assert any("running" in name for name in before)
    assert_equal(before, after)
