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
from torch import Tensor, nn

from wavelatent.common.checkpoints import latest_checkpoint
from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.latent_cache import AutoencoderRecord, DataRecord
from wavelatent.common.latent_cache_writer import CachePlan, CacheWriter
from wavelatent.common.latents import Posterior
from wavelatent.common.randomness import generator
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.diffusion_run import load_diffusion
from wavelatent.pipelines.train_diffusion import train_diffusion
from wavelatent.stage2_diffusion import trainer as trainer_module
from wavelatent.stage2_diffusion.model import LatentDiffusion

C, H, W, COUNT, CLASSES = 3, 4, 8, 13, 2
CPU = RuntimeOptions(device="cpu")
CONFIG = {
    "model": {
        "kind": "unet", "channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "attention_levels": [1], "head_channels": 8,
        "dropout": 0.1,
    },
    "train": {
        "steps": 6, "batch_size": 4, "gradient_accumulation": 2, "log_every": 2, "checkpoint_every": 3,
        "sample_every": 0, "num_samples": 3, "sample_steps": 2, "learning_rate": {"peak": 1e-2, "warmup_steps": 2},
    },
}  # fmt: skip


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


def write_cache(path: Path, num_classes: int = CLASSES) -> Path:
    plan = CachePlan(
        autoencoder=AutoencoderRecord(fingerprint="a" * 64, path="somewhere/ae"),
        data=DataRecord(fingerprint="d" * 64, spec="synthetic:13", transform={"size": 8}, num_classes=num_classes),
        shape=(C, H, W),
        count=COUNT,
        shard_size=5,
    )
    writer = CacheWriter(path, plan)
    for number in writer.unfinished():
        index = torch.tensor(writer.remaining(number))
        scale = torch.tensor([1.0, 2.0, 5.0])[:, None, None]
        # Flat latents: white ones would leave nothing to learn, as c_skip x is then the best estimate already.
        mean = [3 + scale * torch.randn(C, 1, 1, generator=generator("mean", i)) for i in index.tolist()]
        posterior = Posterior(
            torch.stack(mean).expand(-1, C, H, W).contiguous(), torch.full((len(index), C, H, W), 0.1)
        )
        writer.add(number, index, posterior, None, index % num_classes if num_classes else None)
    writer.finish()
    return path


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
        assert train_diffusion(
            config(class_conditional=True, train={"sample_every": 4}), latents=cache, out=out, options=CPU
        )
    return out


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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


def test_training_learns(cache: Path, tmp_path: Path) -> None:
    short = {"steps": 60, "log_every": 20, "checkpoint_every": 100, "gradient_accumulation": 1, "batch_size": 16}
    train_diffusion(config(train=short), latents=cache, out=tmp_path / "run", options=CPU)
    losses = [line["loss/denoising"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize(
    "option", [{}, {"whitening": "none"}, {"whitening": "scalar"}, {"class_conditional": True}], ids=str
)
def test_a_stopped_and_resumed_run_equals_one_that_was_not(cache: Path, tmp_path: Path, option: dict) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_diffusion(config(**option), latents=cache, out=whole, options=CPU)
    train_diffusion(config(train={"steps": 3}, **option), latents=cache, out=parts, options=CPU)
    train_diffusion(config(**option), latents=cache, out=parts, options=CPU)
    first, second = state(whole), state(parts)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    steps = [line["step"] for line in metrics(parts)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_asked_share_of_labels_is_hidden(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    seen: list[Tensor] = []

    def forward(self: LatentDiffusion, raw: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return sum((p.sum() * 0 for p in self.parameters()), torch.zeros(len(raw)))

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
    same = config(class_conditional=True, train={"sample_every": 4})
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
    loss = trainer_module.DiffusionTrainer._loss

    def nan_at_step_2(self: trainer_module.DiffusionTrainer, *arguments: object) -> Tensor:
        return loss(self, *arguments) * (float("nan") if self.step == 2 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module.DiffusionTrainer, "_loss", nan_at_step_2)
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
