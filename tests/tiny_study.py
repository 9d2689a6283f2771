"""A study of two variants that share their autoencoders, and what stands in for its networks, steps and report."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import PartialState
from tiny_evaluation import TinyInception

from wavelatent.common import reference_cache
from wavelatent.common.config import load_config
from wavelatent.common.evaluation import Result
from wavelatent.common.images import open_data
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.common.power_ema import PowerEMAConfig
from wavelatent.pipelines import evaluate, study, study_cells
from wavelatent.pipelines.sample_sources import describe_seeds
from wavelatent.pipelines.study_config import StudyConfig

CLAIM = """{whitening: {statement: Whitening helps.,
    comparisons: [{factor: whitening, level: channel, against: none}]}}"""
OVERRIDES = [
    "data={train: 'synthetic:12', validation: 'synthetic:6', size: 16}",
    "design={kind: named, variants: {plain: {}, unwhitened: {whitening: none}}}",
    f"claims={CLAIM}",
    "autoencoder.train={steps: 2, batch_size: 2, log_every: 1, sample_every: 0, checkpoint_every: 1}",
    "diffusion.train.steps=2",
    "evaluation={num_samples: 5, steps: 2, health: [scale], health_images: 4}",
]


def tiny_config(*overrides: str) -> StudyConfig:
    return load_config(StudyConfig, "study-tiny", [*OVERRIDES, *overrides])


def stand_in_for_networks(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Six numbers in place of Inception's features, no LPIPS, and a report of two words."""

    def no_lpips(*_: object) -> None:
        raise MissingWeightsError("LPIPS is not here")

    def write_report(folder: Path, *_: object, photographs: bool, device: str) -> None:
        (folder / "summary.md").write_text("summary")
        (folder / "report.html").write_text("report" if photographs else "report without photographs")

    report = ModuleType("wavelatent.pipelines.study_report")
    report.write_report = write_report  # type: ignore[attr-defined]
    patch.setitem(sys.modules, report.__name__, report)
    patch.setattr(evaluate, "InceptionFeatures", TinyInception)
    patch.setattr(evaluate, "PerceptualDistance", no_lpips)
    patch.setattr(reference_cache, "cache_folder", lambda: cache)
    patch.setattr(study, "load_weights", lambda name: None)


def _is_main() -> bool:
    return PartialState().is_main_process


class Steps:
    """Steps that compute nothing and leave the files by which a study knows that they are done.

    ``fails`` raises where a step is to fail; ``done`` lists what was done in this process, of which the first writes.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.fails: Any = lambda step, folder: None
        for name in ("train_autoencoder", "train_diffusion", "evaluate_reconstruction", "evaluate_generation"):
            patch.setattr(study_cells, name, getattr(self, name))
        patch.setattr(study_cells, "diagnose", self.diagnose)
        patch.setattr(study_cells, "encode", self.encode)

    def train_autoencoder(self, config: Any, *, out: Path, **_: object) -> None:
        self._train("autoencoder", config, out)

    def train_diffusion(self, config: Any, *, out: Path, **_: object) -> None:
        self._train("diffusion", config, out)

    def _train(self, stage: str, config: Any, out: Path) -> None:
        if not _is_main():
            return self._do(stage, out)
        steps = config.train.steps
        (out / "model").mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 3.0}) + "\n")
        (out / "status.json").write_text(json.dumps({"state": "running", "step": 1, "of": steps}))
        self._do(stage, out)
        (out / "metrics.jsonl").write_text(json.dumps({"step": steps, "seconds": 7.0}) + '\n{"step": 9')
        (out / "status.json").write_text(json.dumps({"state": "done", "step": steps, "of": steps}))
        return None

    def evaluate_reconstruction(self, ae: str, data: str, *, num_images: int, lpips_net: str, **_: object) -> None:
        self._do("measure autoencoder", Path(ae))
        protocol = {
            "num_samples": num_images,
            "lpips_net": lpips_net,
            "reference": data,
            "reference_order_seed": 0,
            "autoencoder": {"mixed_precision": "no"},
        }
        self._save(Path(ae) / "evaluation-reconstruction", data, {"rfid": 2.0}, protocol)

    def evaluate_generation(self, *, run: Path, seeds: range, data: str, options: Any, **_: object) -> None:
        self._do("measure diffusion", run)
        protocol = {
            "num_samples": len(seeds),
            "num_reference": len(open_data(data)),
            "seeds": describe_seeds(seeds),
            "ema": PowerEMAConfig().widths[0],
            **options.protocol(),
        }
        self._save(run / "evaluation-generation", data, {"fid": 4.0, "kid_mean": 0.5}, protocol)

    def _save(self, folder: Path, data: str, metrics: dict[str, float], protocol: dict[str, Any]) -> None:
        fingerprint = open_data(data).fingerprint()
        protocol = {**protocol, "reference_fingerprint": fingerprint, "run": str(folder)}
        if _is_main():
            Result(metrics=metrics, protocol=protocol, seconds=11.0).save(folder / "metrics.json")

    def diagnose(self, ae: str, data: str, out: Path, *, num_images: int, only: list[str], **_: object) -> None:
        self._do("diagnose", Path(ae))
        figures = {"std": [1.0, 3.0, None], "bound": None, "quantile_images": 4, "rank": 2}
        verdicts = [{"level": level, "name": level} for level in ("ok", "note", "fault")]
        protocol = {
            "sections": only,
            "num_images": num_images,
            "data": {"fingerprint": open_data(data).fingerprint()},
            "autoencoder": {"fingerprint": None},
        }
        record = {
            "sections": {"scale": {"figures": figures, "verdicts": verdicts}},
            "protocol": protocol,
            "seconds": 1.0,
        }
        out.mkdir(exist_ok=True)
        (out / "health.json").write_text(json.dumps(record))

    def encode(self, ae: str, data: str, out: Path, **_: object) -> dict[str, float]:
        self._do("encode", Path(ae))
        if _is_main():
            out.mkdir(parents=True)
            (out / "manifest.json").write_text("{}")
        return {"seconds": 5.0}

    def _do(self, step: str, folder: Path) -> None:
        self.fails(step, folder)
        self.done.append(f"{step} {folder.name.rpartition('-')[2]}")
