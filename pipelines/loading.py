"""Turns what a user names on the command line (AE, RUN) into models."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from ..common.errors import UsageError, WavelatentError
from ..stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from ..stage1_autoencoder.bottlenecks import KLConfig, PlainConfig
from ..stage1_autoencoder.diffusers_source import load_diffusers_model, read_architecture
from ..stage1_autoencoder.pretrained import (
    PretrainedDecoder,
    PretrainedDecoderConfig,
    PretrainedEncoder,
    PretrainedEncoderConfig,
)
from ..stage2_diffusion.model import LatentDiffusion

DIFFUSERS = "diffusers:"
"""What an AE begins with that is a folder or hub id of a diffusers autoencoder."""

M = TypeVar("M", Autoencoder, LatentDiffusion)


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
    """Return the autoencoder that AE means, in eval mode and float32 on the CPU.

    Errors as :func:`model_folder`; for ``diffusers:...`` as :func:`load_diffusers_model`, and :class:`UsageError` where
    the optional extra is not installed.
    """
    if str(spec).startswith(DIFFUSERS):
        return _load_diffusers(str(spec).removeprefix(DIFFUSERS))
    folder = model_folder(spec)
    if "encoder" not in _read_config(folder):
        raise UsageError(f"{spec}: holds no autoencoder; give the run of train-ae")
    return load_model_folder(Autoencoder, folder)


def _load_diffusers(source: str) -> Autoencoder:
    """Return a diffusers autoencoder, frozen, as an encoder and a decoder of ours; the latents are not normalised.

    Its configuration does not name ``source``, so that its fingerprint is that of the model wherever it lies.
    """
    model = load_diffusers_model(source)
    encoder = PretrainedEncoderConfig(architecture=read_architecture(source))
    decoder = PretrainedDecoderConfig(architecture=encoder.architecture)
    autoencoder = Autoencoder(
        AutoencoderConfig(
            encoder=encoder,
            channels=encoder.latent_channels,
            bottleneck=KLConfig() if encoder.family.gaussian else PlainConfig(),
            decoder=decoder,
        )
    )
    for half in (autoencoder.encoder, autoencoder.decoder):
        assert isinstance(half, PretrainedEncoder | PretrainedDecoder)
        half.take_weights(model, source)
    return autoencoder.eval().requires_grad_(False)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WavelatentError(f"{folder}/config.json cannot be read: {error}") from error


def load_model_folder(model: type[M], folder: Path) -> M:
    """Return a saved model in eval mode, float32, on the CPU, from its folder alone and strictly.

    Raises :class:`WavelatentError` where its files are missing or do not belong together.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin says what is known
            loaded = model.from_pretrained(folder, local_files_only=True, strict=True)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise WavelatentError(f"{folder}: the model cannot be loaded: {' '.join(str(error).split())}") from error
    return loaded.eval().requires_grad_(False)
