"""``export``: an autoencoder as a diffusers model folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..common.checkpoints import replace_folder
from ..common.errors import UsageError
from ..common.latent_cache import LatentCache
from ..stage1_autoencoder.diffusers_layout import to_diffusers
from ..stage1_autoencoder.diffusers_source import WEIGHTS
from .loading import load_autoencoder

_FILES = re.compile(rf"config\.json|README\.md|{WEIGHTS}.*")


def export(ae: str, out: Path, *, latents: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write ``ae`` to the folder ``out`` as a diffusers model, whole or not at all.

    A folder that holds this very model already is left as it is.

    Args:
        ae: autoencoder, as on the command line.
        out: the folder.
        latents: a latent cache of ``ae``, whose statistics the model is given as its per-channel normalisation.
        overwrite: replace another model that is there.

    Returns:
        ``model`` (the folder), ``class``, ``parameters`` and ``already_complete``.

    Raises:
        UsageError: diffusers has no counterpart of the autoencoder, or ``out`` holds something else.
        WavelatentError: the cache is damaged, or of another autoencoder.
    """
    _check_folder(out)
    autoencoder = load_autoencoder(ae)
    statistics = None
    if latents is not None:
        cache = LatentCache.open(latents, verify=False, autoencoder_fingerprint=autoencoder.fingerprint())
        statistics = cache.manifest.model_dump(mode="json")["stats"]
    model = to_diffusers(autoencoder, statistics)
    if not (same := _holds(out, model)):
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise UsageError(f"{out} holds another model; give another --out, or --overwrite to replace it")
        _write(model, out)
    return {
        "model": str(out),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "already_complete": same,
    }


def _check_folder(out: Path) -> None:
    """Refuse a folder with anything in it that is not of a diffusers model."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out takes a folder")
    foreign = [path.name for path in out.glob("*") if not _FILES.fullmatch(path.name)]
    if foreign:
        raise UsageError(f"{out} holds other files ({sorted(foreign)[0]}); give another --out")


def _holds(out: Path, model: Any) -> bool:
    """Return whether ``out`` holds ``model``, by its configuration and every weight."""
    try:
        recorded = json.loads((out / "config.json").read_text(encoding="utf-8"))
        weights = load_file(out / f"{WEIGHTS}.safetensors")
    except (OSError, ValueError, SafetensorError):
        return False
    state = model.state_dict()
    return (
        recorded == json.loads(model.to_json_string())
        and weights.keys() == state.keys()
        and all(torch.equal(weights[key], state[key]) for key in state)
    )


def _write(model: Any, out: Path) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(temporary)
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
