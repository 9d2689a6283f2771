"""The autoencoders of the diffusers library: which classes can be taken, and reading them from a folder or the hub.

diffusers is an optional extra: nothing here imports it before it is needed.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.errors import UsageError, WavelatentError
from ..common.torchvision_import import ensure_torchvision

WEIGHTS = "diffusion_pytorch_model"
"""The stem of the weight files in a diffusers folder."""


def _halvings(key: str) -> Callable[[Mapping[str, Any]], int]:
    """Return the downsampling factor of an architecture that lists one entry per resolution under ``key``."""
    return lambda settings: int(2 ** (len(settings[key]) - 1))


def _tiny_upsampling(settings: Mapping[str, Any]) -> int:
    return int(settings["upsampling_scaling_factor"] ** (len(settings["decoder_block_out_channels"]) - 1))


@dataclass(frozen=True)
class Family:
    """What one class of diffusers autoencoders has that its signature does not tell.

    Attributes:
        gaussian: whether ``encode`` gives a distribution, or the latents themselves.
        downsampling: image side over latent side, by the encoder's settings.
        upsampling: the same of the decoder.
        latent_channels: the settings that say how many channels the latents have, the first that is set.
        unused: children that plain encoding and decoding never call.
        fixed: children that receive no gradient even in a trainable half.
    """

    gaussian: bool
    downsampling: Callable[[Mapping[str, Any]], int]
    upsampling: Callable[[Mapping[str, Any]], int]
    latent_channels: tuple[str, ...] = ("latent_channels",)
    unused: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "AutoencoderKL": Family(True, _halvings("block_out_channels"), _halvings("block_out_channels")),
    "AutoencoderKLFlux2": Family(
        True, _halvings("block_out_channels"), _halvings("block_out_channels"), unused=("bn",)
    ),
    "AsymmetricAutoencoderKL": Family(
        True,
        _halvings("down_block_out_channels"),
        _halvings("up_block_out_channels"),
        unused=("decoder.condition_encoder",),
    ),
    "AutoencoderDC": Family(False, _halvings("encoder_block_out_channels"), _halvings("decoder_block_out_channels")),
    "AutoencoderTiny": Family(False, _halvings("encoder_block_out_channels"), _tiny_upsampling),
    "VQModel": Family(
        False,
        _halvings("block_out_channels"),
        _halvings("block_out_channels"),
        latent_channels=("vq_embed_dim", "latent_channels"),
        fixed=("quantize",),  # the codebook learns from a loss of its own, which there is none of here
    ),
}
"""The diffusers classes that can be taken: those whose ``encode`` and ``decode`` map ``[B, 3, H, W]`` and back."""


def import_diffusers() -> Any:
    """Return the diffusers module. Raises :class:`UsageError` where the optional extra is not installed."""
    try:
        ensure_torchvision()
        import diffusers
    except ImportError as error:
        raise UsageError(f"diffusers cannot be imported ({error}): pip install 'wavelatent[diffusers]'") from error
    return diffusers


def check_class(name: object, where: str) -> str:
    """Return ``name`` where it is a diffusers class that can be taken. Raises :class:`UsageError`."""
    if name in FAMILIES:
        return str(name)
    what = f"{name!r} cannot be taken as an image autoencoder" if name else "it names no class"
    raise UsageError(f"{where}: {what}; supported: {', '.join(FAMILIES)} (no video or audio models)")


def diffusers_class(name: str) -> Any:
    """Return the class. Raises :class:`UsageError` where the installed diffusers is missing or too old to have it."""
    diffusers = import_diffusers()
    if not hasattr(diffusers, name):
        raise UsageError(f"diffusers {diffusers.__version__} has no {name}: pip install --upgrade diffusers")
    return getattr(diffusers, name)


def default_settings(class_name: str) -> dict[str, Any]:
    """Return every argument of a diffusers class, with its default."""
    parameters = inspect.signature(diffusers_class(class_name).__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def source_folder(source: str, *, weights: bool = True) -> Path:
    """Return the local folder that ``source`` means, fetched from the hub (into its cache) where it is a hub id.

    With ``weights=False`` only ``config.json`` is fetched. Raises :class:`UsageError` where there is no such folder or
    repository, and :class:`WavelatentError` where the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    parts = source.split("/")
    if not 2 <= len(parts) <= 4 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        raise UsageError(f"{source}: no such folder, and no hub id either (name/repository or .../subfolder)")
    return _from_hub("/".join(parts[:2]), "/".join(parts[2:]), source, weights)


def _from_hub(repository: str, subfolder: str, source: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    names = ["config.json"]
    if weights:
        names += [f"{WEIGHTS}.safetensors", f"{WEIGHTS}-*.safetensors", f"{WEIGHTS}.safetensors.index.json"]
    try:
        snapshot = snapshot_download(repository, allow_patterns=[f"{subfolder}/{n}".lstrip("/") for n in names])
    except GatedRepoError as error:
        raise UsageError(f"{source}: the hub grants access to those who ask on its page and log in") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"{source}: no such folder, and no such repository on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise WavelatentError(
            f"{source}: no such folder, and the hub cannot be reached ({first_line}); "
            "give a folder that holds the model, or run it once where there is a network"
        ) from error
    return Path(snapshot) / subfolder


def read_architecture(source: str) -> dict[str, Any]:
    """Return the configuration of the diffusers autoencoder in ``source``, fit for JSON.

    Settings that the installed diffusers does not know are left out, as diffusers does. Raises :class:`UsageError`
    where ``source`` holds no supported autoencoder; see also :func:`source_folder`.
    """
    folder = source_folder(source, weights=False)
    file = folder / "config.json"
    if not file.is_file():
        pipeline = (folder / "model_index.json").is_file() and (folder / "vae" / "config.json").is_file()
        hint = f"this is a pipeline: give {source.rstrip('/')}/vae" if pipeline else "it has no config.json"
        raise UsageError(f"{source}: not the folder of a diffusers autoencoder: {hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{source}: config.json is not that of a diffusers autoencoder")
    return architecture_of(check_class(config.get("_class_name"), source), config)


def architecture_of(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an ``architecture``: what ``config`` says of the arguments of the class, fit for JSON.

    Defaults are not filled in, so that a later diffusers with more of them changes nothing that is recorded.
    """
    known = default_settings(class_name)
    return {"_class_name": class_name, **json.loads(json.dumps({k: v for k, v in config.items() if k in known}))}


def load_diffusers_model(source: str) -> Any:
    """Return the diffusers autoencoder in ``source``: float32, in eval mode, every weight from its files.

    Raises :class:`UsageError` where it holds no supported one, :class:`WavelatentError` where its weights are missing,
    broken or incomplete (only safetensors are read).
    """
    model_class = diffusers_class(read_architecture(source)["_class_name"])
    folder = source_folder(source)
    try:
        model, info = model_class.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers, safetensors and torch each have their own
        raise WavelatentError(
            f"{source}: the weights ({WEIGHTS}.safetensors) cannot be loaded: {one_line(error)}"
        ) from error
    if wrong := sorted(
        {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]}
    ):
        raise WavelatentError(
            f"{source}: {len(wrong)} weights do not belong to its config.json, the first is {wrong[0]}"
        )
    return model.eval()


def one_line(error: Exception) -> str:
    """Return a library's message with its line breaks and runs of spaces closed up."""
    return " ".join(str(error).split())
