"""Turns what a user names on the command line (AE, RUN) into models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.errors import UsageError, WavelatentError
from ..stage1_autoencoder.autoencoder import Autoencoder


def model_folder(spec: str | Path) -> Path:
    """Return the ``from_pretrained`` folder that ``spec``, a run folder or a model folder, means.

    Raises :class:`UsageError` where there is none, and :class:`WavelatentError` for a run that has not saved one yet.
    """
    path = Path(spec)
    if not path.is_dir():
        raise UsageError(f"{spec}: no such folder; give a run folder or a saved model folder")
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return path
    if (path / "config.yaml").is_file():
        raise WavelatentError(f"{spec}: this run has not saved a model yet; let it reach its first checkpoint")
    raise UsageError(f"{spec}: neither a run folder (config.yaml, model/) nor a model folder (config.json)")


def load_autoencoder(spec: str | Path) -> Autoencoder:
    """Return the autoencoder that AE means, in eval mode and float32 on the CPU. Errors as :func:`model_folder`."""
    folder = model_folder(spec)
    if "encoder" not in _read_config(folder):
        raise UsageError(f"{spec}: holds no autoencoder; give the run of train-ae")
    return _load(Autoencoder, folder).eval().requires_grad_(False)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WavelatentError(f"{folder}/config.json cannot be read: {error}") from error


def _load(model: Any, folder: Path) -> Any:
    """Load strictly from the folder alone, never from a hub."""
    try:
        return model.from_pretrained(folder, local_files_only=True, strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise WavelatentError(f"{folder}: the model cannot be loaded: {' '.join(str(error).split())}") from error
