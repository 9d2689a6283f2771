"""Stage two on a cache: the training loop and its command."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cache import CLASSES, write_cache
from torch import Tensor, nn

from wavelatent.common.checkpoints import latest_checkpoint
from wavelatent.common.config import parse_yaml
from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.latent_cache import LatentCache
from wavelatent.common.run_folder import RunFolder
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.diffusion_run import load_diffusion
from wavelatent.pipelines.loading import load_model_folder
from wavelatent.pipelines.train_diffusion import build_model, resolved, train_diffusion
from wavelatent.stage2_diffusion import trainer as trainer_module
from wavelatent.stage2_diffusion.model import LatentDiffusion, Losses
from wavelatent.stage2_diffusion.validation import SIGMA_BINS

CPU = RuntimeOptions(device="cpu")
CONFIG = {
    "model": {
        "kind": "unet", "channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "attention_levels": [1],
        "head_channels": 8, "dropout": 0.1,
    },
    "objective": {"kind": "edm", "reference_size": 24},
    "train": {
        "steps": 6, "batch_size": 4, "gradient_accumulation": 2, "log_every": 2, "checkpoint_every": 3,
        "sample_every": 0, "num_samples": 3, "sample_steps": 2, "learning_rate": {"peak": 1e-2, "warmup_steps": 2},
    },
}  # fmt: skip
SAMPLED = {"sample_every": 4, "validation": {"every": 4}}


class TinyAutoencoder(nn.Module):
    """Decodes by enlarging each latent site to 2 x 2 pixels."""

    def __init__(self, fingerprint: str = "a" * 64) -> None:
        super().__init__()
        self._fingerprint = fingerprint

    def decode(self, raw: Tensor) -> Tensor:
        return (raw / 10).clamp(-1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def fingerprint(self) -> str:
        return self._fingerprint


def config(train: dict | None = None, **changes: object) -> DiffusionRunConfig:
    return DiffusionRunConfig.model_validate({**CONFIG, "train": {**CONFIG["train"], **(train or {})}, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def autoencoder(monkeypatch: pytest.MonkeyPatch) -> TinyAutoencoder:
    model = TinyAutoencoder()
    monkeypatch.setattr("wavelatent.pipelines.diffusion_run.load_autoencoder", lambda spec: model)
    return model


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional run of a few steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wavelatent.pipelines.diffusion_run.load_autoencoder", lambda spec: TinyAutoencoder())
        assert train_diffusion(config(class_conditional=True, train=SAMPLED), latents=cache, out=out, options=CPU)
    return out


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def best(run: Path) -> dict:
    return json.loads((run / "best" / "best.json").read_text())


def state(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    tensors = {f"{p.stem}/{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return tensors | {f"adam/{i}/{k}": v for i, entry in moments.items() for k, v in entry.items()}


def test_a_run_leaves_what_the_contract_names(trained: Path, cache: Path) -> None:
    assert {p.name for p in trained.iterdir()} >= {
        "config.yaml", "environment.json", "inputs.json", "metrics.jsonl", "tensorboard", "checkpoints", "samples",
        "model", "status.json",
    }  # fmt: skip
    assert json.loads((trained / "status.json").read_text())["state"] == "done"
    assert {p.name for p in (trained / "samples").iterdir()} == {"step-4.png", "step-6.png"}
    assert [line["step"] for line in metrics(trained)] == [2, 4, 6]
    assert metrics(trained)[-1]["images"] == 6 * 4
    assert metrics(trained)[-1]["learning_rate"] == pytest.approx(1e-2)
    inputs = json.loads((trained / "inputs.json").read_text())
    assert inputs["autoencoder"] == {"fingerprint": "a" * 64, "path": "somewhere/ae", "mixed_precision": "no"}
    assert inputs["data"]["fingerprint"] == "d" * 64
    manifest = json.loads((cache / "manifest.json").read_text())
    assert inputs["latents"]["stats"] == manifest["stats"]
    model = load_diffusion(trained)
    assert model.whitening.scale.flatten().tolist() == pytest.approx(manifest["stats"]["std"])


def test_the_loss_by_noise_level_adds_up(trained: Path) -> None:
    line = metrics(trained)[0]
    bins = [value for name, value in line.items() if name.startswith("loss/denoising/sigma_")]
    assert min(bins) <= line["loss/denoising"] <= max(bins)
    assert 0 <= line["data_wait_share"] <= 1
    assert line["images_per_second"] > 0


def test_the_averages_are_kept_the_best_is_saved_and_held_out_latents_measured(trained: Path) -> None:
    assert {p.name for p in (trained / "ema").iterdir()} == {
        f"step-{step}-width-{width}.safetensors" for step in range(1, 7) for width in (0.1, 0.05)
    }
    measured = {line["step"]: line["validation/loss"] for line in metrics(trained) if "validation/loss" in line}
    assert list(measured) == [4, 6]  # every 4 steps, and at the end
    assert best(trained) == {"step": min(measured, key=measured.__getitem__), "validation/loss": min(measured.values())}
    assert load_model_folder(LatentDiffusion, trained / "best").latent_shape == load_diffusion(trained).latent_shape
    line = metrics(trained)[-1]
    ranges = [line[f"validation/sigma_{name}"] for name in SIGMA_BINS]
    assert line["validation/loss"] == pytest.approx(sum(ranges) / len(ranges), rel=1e-5)


def test_a_worse_model_does_not_replace_the_best(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = iter([7.0, 3.0, 5.0])
    monkeypatch.setattr(
        "wavelatent.pipelines.train_diffusion.QuickEvaluation",
        lambda *a, **k: lambda model, step: {"quick_fid": next(quick)},
    )
    train = {"quick_evaluation": {"every": 2, "num_samples": 4, "num_reference": 4}}
    train_diffusion(config(train=train), latents=cache, out=tmp_path, options=CPU)
    assert [line["quick_fid"] for line in metrics(tmp_path)] == [7, 3, 5]
    assert best(tmp_path) == {"step": 4, "quick_fid": 3.0}


def test_a_less_telling_figure_never_replaces_the_best(cache: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, config(), {"kind": "diffusion"})
    model, by = build_model(config(), LatentCache.open(cache)), ("quick_fid", "validation/loss")
    for step, figures, expected in [
        (1, {"validation/loss": 0.5}, {"step": 1, "validation/loss": 0.5}),
        (2, {"validation/loss": 0.6}, {"step": 1, "validation/loss": 0.5}),
        (3, {"quick_fid": 20.0, "validation/loss": 0.7}, {"step": 3, "quick_fid": 20.0}),
        (4, {"validation/loss": 0.1}, {"step": 3, "quick_fid": 20.0}),
        (5, {"quick_fid": 35.0}, {"step": 3, "quick_fid": 20.0}),
        (6, {"quick_fid": 19.0}, {"step": 6, "quick_fid": 19.0}),
        (7, {}, {"step": 6, "quick_fid": 19.0}),
        (8, {"quick_fid": -math.inf}, {"step": 6, "quick_fid": 19.0}),
        (9, {"quick_fid": math.nan, "validation/loss": 0.1}, {"step": 6, "quick_fid": 19.0}),
        (10, {"quick_fid": 18.0}, {"step": 10, "quick_fid": 18.0}),
    ]:
        run.save_best(model, step, figures, by)
        assert best(tmp_path) == expected, step


def test_a_figure_that_is_not_finite_neither_is_the_best_nor_hides_a_finite_one(cache: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, config(), {"kind": "diffusion"})
    model, by = build_model(config(), LatentCache.open(cache)), ("quick_fid", "validation/loss")
    run.save_best(model, 1, {"quick_fid": math.nan, "validation/loss": math.inf}, by)
    assert not (tmp_path / "best").exists()
    run.save_best(model, 2, {"quick_fid": math.nan, "validation/loss": 0.5}, by)
    assert best(tmp_path) == {"step": 2, "validation/loss": 0.5}
    (tmp_path / "best" / "best.json").write_text('{"step": 3, "quick_fid": NaN}')  # of an older version
    run.save_best(model, 4, {"validation/loss": 0.6}, by)
    assert best(tmp_path) == {"step": 4, "validation/loss": 0.6}


def test_a_best_model_from_after_the_checkpoint_is_forgotten_and_found_again(cache: Path, tmp_path: Path) -> None:
    train = {"validation": {"every": 6}, "checkpoint_every": 3, "keep": 5}
    train_diffusion(config(train=train), latents=cache, out=tmp_path, options=CPU)
    whole = best(tmp_path)
    assert whole["step"] > 3
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "state": "running", "step": 3}))
    with RunFolder(tmp_path, resolved(config(train=train), LatentCache.open(cache)), {"kind": "diffusion"}) as run:
        run.begin()
    assert not (tmp_path / "best").exists()
    train_diffusion(config(train=train), latents=cache, out=tmp_path, options=CPU)
    assert best(tmp_path) == whole


def test_what_was_due_when_a_run_was_killed_is_measured_when_it_goes_on(cache: Path, tmp_path: Path) -> None:
    train = {"validation": {"every": 3}}
    train_diffusion(config(train={**train, "steps": 3}), latents=cache, out=tmp_path, options=CPU)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("".join(line + "\n" for line in lines[:-1]))  # killed between the checkpoint and the log of step 3
    train_diffusion(config(train=train), latents=cache, out=tmp_path, options=CPU)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4, 6]
    assert metrics(tmp_path)[1]["validation/loss"] == json.loads(lines[-1])["validation/loss"]


def test_quick_evaluation_without_the_images_leaves_training_alone(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"quick_evaluation": {"every": 3, "num_samples": 4, "num_reference": 4}}
    train_diffusion(config(train=train), latents=cache, out=tmp_path, options=CPU)
    assert capsys.readouterr().err.count("no quick FID") == 1
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_the_noise_shift_is_recorded_as_a_number(trained: Path) -> None:
    shift = math.sqrt(3 * 4 * 8 / 24)
    assert parse_yaml((trained / "config.yaml").read_text(), "")["objective"]["noise_shift"] == pytest.approx(shift)
    model = load_diffusion(trained)
    assert model.objective.noise_shift == pytest.approx(shift)
    assert model.objective.sigma_max == pytest.approx(80 * shift)


def test_training_learns(cache: Path, tmp_path: Path) -> None:
    short = {"steps": 60, "log_every": 20, "checkpoint_every": 100, "gradient_accumulation": 1, "batch_size": 16}
    train_diffusion(config(train=short), latents=cache, out=tmp_path / "run", options=CPU)
    losses = [line["loss/denoising"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]


def test_a_stopped_and_resumed_run_equals_one_that_was_not(cache: Path, tmp_path: Path) -> None:
    """With dropout and accumulation; test_stage2_contracts.py has every option."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_diffusion(config(), latents=cache, out=whole, options=CPU)
    train_diffusion(config(train={"steps": 3}), latents=cache, out=parts, options=CPU)
    train_diffusion(config(), latents=cache, out=parts, options=CPU)
    first, second = state(whole), state(parts)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    steps = [line["step"] for line in metrics(parts)]
    assert steps == sorted(set(steps))
    mixed = RuntimeOptions(device="cpu", mixed_precision="bf16")
    train_diffusion(config(train={"steps": 7}), latents=cache, out=parts, options=mixed)
    record = json.loads((parts / "environment.json").read_text())
    assert [session["mixed_precision"] for session in (record, *record["resumed"])] == ["no", "no", "bf16"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_asked_share_of_labels_is_hidden(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    seen: list[Tensor] = []

    def forward(self: LatentDiffusion, raw: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor) -> Losses:
        seen.append(labels)
        loss = sum((p.sum() * 0 for p in self.parameters()), torch.zeros(len(raw)))
        return Losses(loss, loss)

    monkeypatch.setattr(LatentDiffusion, "forward", forward)
    train = {"steps": 20, "batch_size": 256, "log_every": 20, "checkpoint_every": 20, "label_dropout": dropout}
    train_diffusion(config(class_conditional=True, train=train), latents=cache, out=tmp_path / "run", options=CPU)
    labels = torch.cat(seen)
    assert len(labels) == 20 * 256
    hidden = (labels == CLASSES).float()
    error = math.sqrt(dropout * (1 - dropout) / len(labels))
    assert hidden.mean().item() == pytest.approx(dropout, abs=4 * error)
    assert set(labels[hidden == 0].tolist()) == {0, 1}, "the others keep theirs"


def test_a_batch_that_does_not_divide_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size=5"):
        train_diffusion(config(train={"batch_size": 5}), latents=cache, out=tmp_path / "run", options=CPU)


def test_a_finished_run_is_left_alone(trained: Path, cache: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    same = config(class_conditional=True, train=SAMPLED)
    assert not train_diffusion(same, latents=cache, out=trained, options=CPU)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_signal_stops_with_everything_saved(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = trainer_module.DiffusionTrainer._step

    def step_then_signal(self: trainer_module.DiffusionTrainer, *arguments: object) -> None:
        advance(self, *arguments)  # type: ignore[arg-type]
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer_module.DiffusionTrainer, "_step", step_then_signal)
    with pytest.raises(Stopped, match="SIGTERM at step 4"):
        train_diffusion(config(), latents=cache, out=tmp_path, options=CPU)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = trainer_module.DiffusionTrainer._losses

    def nan_at_step_2(self: trainer_module.DiffusionTrainer, *arguments: object) -> Losses:
        total, denoising = losses(self, *arguments)  # type: ignore[arg-type]
        return Losses(total * (float("nan") if self.step == 2 else 1), denoising)

    monkeypatch.setattr(trainer_module.DiffusionTrainer, "_losses", nan_at_step_2)
    with pytest.raises(WavelatentError, match="loss/denoising is not finite at step 2"):
        train_diffusion(config(), latents=cache, out=tmp_path, options=CPU)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert all(tensor.isfinite().all() for tensor in state(tmp_path).values())


def test_options_that_do_not_fit_the_cache_are_refused(cache: Path, tmp_path: Path) -> None:
    unlabelled = write_cache(tmp_path / "unlabelled", num_classes=0)
    with pytest.raises(UsageError, match="has no labels"):
        train_diffusion(config(class_conditional=True), latents=unlabelled, out=tmp_path / "run", options=CPU)
    deep = {**CONFIG["model"], "multipliers": [1, 1, 1, 1]}
    with pytest.raises(UsageError, match="divide by 8"):
        train_diffusion(config(model=deep), latents=cache, out=tmp_path / "run", options=CPU)


def test_a_model_whose_files_do_not_belong_together_is_refused(trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    file = broken / "model" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "whitening" not in name}, file)
    with pytest.raises(WavelatentError, match=r"whitening\.s"):
        load_diffusion(broken)
    shutil.rmtree(broken / "model")
    with pytest.raises(WavelatentError, match="has no model yet"):
        load_diffusion(broken)
