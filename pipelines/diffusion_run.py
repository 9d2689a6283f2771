"""What a stage-two run records of its inputs, and how its model and its autoencoder are found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..common.errors import WavelatentError
from ..common.latent_cache import LatentCache
from ..stage1_autoencoder.autoencoder import Autoencoder
from ..stage2_diffusion.model import LatentDiffusion
from .loading import load_autoencoder, load_model_folder


def inputs_of(cache: LatentCache) -> dict[str, Any]:
    """Return what a run on ``cache`` records in ``inputs.json``: the cache, its autoencoder and its images."""
    manifest = cache.manifest.model_dump(mode="json")
    hashes = " ".join(shard["sha256"] for shard in manifest["shards"])
    latents = {
        "path": str(cache.path.resolve()),
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest(),
        **{key: manifest[key] for key in ("shape", "count", "flips", "posterior", "stats")},
    }
    return {"kind": "diffusion", "latents": latents, "autoencoder": manifest["autoencoder"], "data": manifest["data"]}


def read_inputs(run: Path) -> dict[str, Any]:
    """Return a stage-two run's ``inputs.json``. Raises :class:`WavelatentError` where ``run`` is not such a run."""
    try:
        inputs = json.loads((run / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WavelatentError(f"{run} is not a run folder: its inputs.json cannot be read ({error})") from error
    if inputs.get("kind") != "diffusion":
        raise WavelatentError(f"{run} is not a run of train-diffusion: its inputs.json says {inputs.get('kind')!r}")
    return inputs


def load_diffusion(run: Path) -> LatentDiffusion:
    """Return the run's model: averaged weights, eval mode, float32, on the CPU.

    Raises :class:`WavelatentError` where there is none yet, or its files do not belong together.
    """
    return _load(run, "model")


def load_best(run: Path) -> LatentDiffusion:
    """Return the model of the run's best measurement so far, as :func:`load_diffusion` does the last."""
    return _load(run, "best")


def _load(run: Path, name: str) -> LatentDiffusion:
    if not (run / name / "model.safetensors").is_file():
        what, when = ("model", "saved one") if name == "model" else ("best model", "measured one (train.validation)")
        raise WavelatentError(f"{run} has no {what} yet: run its train-diffusion command until it has {when}")
    return load_model_folder(LatentDiffusion, run / name)


def recorded_autoencoder(record: dict[str, Any], given: str | Autoencoder | None = None) -> Autoencoder:
    """Return the autoencoder that a run or cache records as ``{"fingerprint", "path"}``, in eval mode.

    ``given`` is used in place of the recorded path, for an autoencoder that has moved. Raises
    :class:`WavelatentError` where it cannot be loaded, or is another one than the latents were made with.
    """
    source = record["path"] if given is None else given
    autoencoder = load_autoencoder(source) if isinstance(source, str) else source.eval()
    fingerprint = autoencoder.fingerprint()
    if fingerprint != record["fingerprint"]:
        name = source if isinstance(source, str) else "the given autoencoder"
        raise WavelatentError(
            f"{name} is not the autoencoder that made the latents: its fingerprint is {fingerprint[:12]}, recorded is "
            f"{record['fingerprint'][:12]}; restore that autoencoder, or encode and train again with this one"
        )
    return autoencoder
