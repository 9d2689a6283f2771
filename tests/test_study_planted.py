"""A study of autoencoders that are really trained, on procedural faces: one crippled on purpose, one the base again.

By PSNR, which takes no networks to measure; effects planted in KID are in ``test_study_analysis.py``, on drawn figures.
"""

import json
from pathlib import Path
from typing import Any

from tiny_study import Steps, stand_in_for_networks

from wavelatent.common.config import load_config
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines import study_cells
from wavelatent.pipelines.study import study
from wavelatent.pipelines.study_config import StudyConfig

LEVELS = """{
    whole: {},
    again: {autoencoder.model.encoder.dropout: 1.0e-9},
    crippled: {autoencoder.train.learning_rate.peak: 1.0e-9}}"""
"""The dropout drops nothing, and all noise that is drawn after it is another: the same variant under other seeds."""


def claim(level: str, expect: str) -> dict[str, Any]:
    comparison = {"factor": "training", "level": level, "against": "whole", "metric": "psnr", "expect": expect}
    return {"statement": f"{level} is {expect}", "comparisons": [comparison]}


CLAIMS = {
    "crippling hurts": claim("crippled", "worse"),
    "crippling helps": claim("crippled", "better"),
    "the same is better": claim("again", "better"),
    "the same is worse": claim("again", "worse"),
}


def test_what_is_crippled_is_called_and_what_is_the_same_is_not(tmp_path: Path, monkeypatch):
    trained = study_cells.train_autoencoder, study_cells.evaluate_reconstruction
    stand_in_for_networks(monkeypatch, tmp_path / "cache")
    Steps(monkeypatch)
    for real in trained:
        monkeypatch.setattr(study_cells, real.__name__, real)
    monkeypatch.setattr(study_cells.Workbench, "_fingerprint", lambda *_: None)  # the stand-ins know of no weights
    overrides = [
        "data={train: 'synthetic:12', validation: 'synthetic:8', size: 16}",
        f"factors={{training: {LEVELS}}}",
        "design={kind: one_at_a_time}",
        "autoencoder.train={steps: 8, batch_size: 4, learning_rate: {peak: 1.0e-3}, sample_every: 0}",
        "seeds=[0, 1, 2]",
        "evaluation={num_samples: 4, steps: 1, health: []}",
        f"claims={json.dumps(CLAIMS)}",
    ]
    config = load_config(StudyConfig, "study-tiny", overrides)
    result = study(config, out=tmp_path / "out", options=RuntimeOptions(device="cpu"))
    assert result["claims"] == {
        "crippling hurts": "supported",
        "crippling helps": "refuted",
        "the same is better": "inconclusive",
        "the same is worse": "inconclusive",
    }
    found = json.loads(Path(result["results"]).read_text())["analysis"]["variants"]
    values = [found[name]["psnr"]["values"] for name in ("base", "training: again")]
    assert values[0] != values[1], "it is the same variant, and not the same training"
