"""``info``: the size and the cost of a configuration or a run, without training or loading anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import randn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.config import load_config, read_config
from ..common.errors import UsageError, WavelatentError
from ..stage1_autoencoder.autoencoder import Autoencoder, AutoencoderConfig
from ..stage1_autoencoder.discriminators import DISCRIMINATORS
from ..stage1_autoencoder.pretrained import resolve_pretrained
from ..stage2_diffusion.networks import build_network
from ..stage2_diffusion.unet import UNetConfig
from .costs import count_flops, count_parameters
from .diffusion_config import DiffusionRunConfig
from .run_config import AutoencoderRunConfig

IMAGE_SIZE = 256
"""For a stage-1 configuration: the size that papers report costs at."""
LATENT_SHAPES = {"unet-tiny": (4, 16, 16)}
DEFAULT_LATENT_SHAPE = (4, 32, 32)
"""For a stage-2 configuration, whose latents are the cache's: 256 px through the usual f = 8 and 4 channels."""


def info(
    source: str,
    *,
    overrides: Sequence[str] = (),
    size: int | None = None,
    latent_shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return parameters per part, the latents' shape and FLOPs per image of a configuration or a run.

    Parameters are counted and operations traced on tensors without data, so the largest preset takes seconds.

    Args:
        source: a preset's name, a YAML file of either stage, or a run folder.
        overrides: ``key=value``, over a configuration.
        size: image size in pixels, for stage 1; by default the run's, or 256 for a configuration.
        latent_shape: ``[C, h, w]``, for a stage-2 configuration; by default ``[4, 16, 16]`` for ``unet-tiny`` and
            ``[4, 32, 32]`` for the others. A run has its own.

    Returns:
        ``{"kind", "parameters", "latent_shape", "flops"}``, for stage 1 also ``size``. ``parameters`` has ``encoder``,
        ``decoder``, ``discriminator`` (where the objective has one; it is not part of the model, nor of ``total``)
        and ``total``; or ``denoiser``. ``flops`` per image, a multiply-add counted as 2, of convolutions, matrix
        products and attention: ``encode`` and ``decode``; or ``denoise``, one call of the denoiser.

    Raises:
        UsageError: there is no such configuration or run, or an option does not fit it.
    """
    path = Path(source)
    inputs: dict[str, Any] = {}
    if path.is_dir():
        if overrides:
            raise UsageError(f"{source} is a run: key=value overrides are for configurations")
        source, inputs = str(path / "config.yaml"), _read_inputs(path)
    if is_diffusion_config(source):
        if size is not None:
            raise UsageError(f"{source} configures a denoiser: give the latent shape, not an image size")
        shape = latent_shape or (inputs["latents"]["shape"] if inputs else LATENT_SHAPES.get(source))
        classes = int(inputs["data"].get("num_classes", 0)) if inputs else 0
        config = load_config(DiffusionRunConfig, source, overrides)
        return denoiser_info(config, shape or DEFAULT_LATENT_SHAPE, classes)
    if latent_shape is not None:
        raise UsageError(f"{source} configures an autoencoder: its latent shape follows from the image size")
    size = size or (int(inputs["data"]["transform"]["size"]) if inputs else IMAGE_SIZE)
    return autoencoder_info(load_config(AutoencoderRunConfig, source, overrides), size)


def is_diffusion_config(source: str) -> bool:
    """Return whether the preset or YAML file ``source`` is of stage 2, by the keys of its ``model``."""
    model = read_config(source).get("model")
    keys = set(model) if isinstance(model, dict) else set()
    return len(keys & set(UNetConfig.model_fields)) > len(keys & set(AutoencoderConfig.model_fields))


def _read_inputs(run: Path) -> dict[str, Any]:
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} is not a run folder: it has no config.yaml")
    try:
        return json.loads((run / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WavelatentError(f"{run} is not a whole run folder: its inputs.json cannot be read ({error})") from error


def autoencoder_info(config: AutoencoderRunConfig, size: int) -> dict[str, Any]:
    """Return what :func:`info` does of an autoencoder for images of ``size`` pixels."""
    with FakeTensorMode():
        try:
            model = Autoencoder(resolve_pretrained(config.model)).eval()
            shape = model.latent_shape(size)
        except ValueError as error:
            raise UsageError(str(error)) from error
        parameters = {
            "encoder": count_parameters(model.encoder) + count_parameters(model.bottleneck),
            "decoder": count_parameters(model.decoder),
        }
        total = sum(parameters.values())
        if (adversarial := config.objective.adversarial) is not None:
            parameters["discriminator"] = count_parameters(
                DISCRIMINATORS[adversarial.discriminator.kind](adversarial.discriminator)
            )
        flops = {
            "encode": count_flops(lambda: model.encode(randn(1, 3, size, size)).mode()),
            "decode": count_flops(lambda: model.decode(randn(1, *shape))),
        }
    return {
        "kind": "autoencoder",
        "parameters": {**parameters, "total": total},
        "size": size,
        "latent_shape": list(shape),
        "flops": flops,
    }


def denoiser_info(config: DiffusionRunConfig, latent_shape: Sequence[int], num_classes: int) -> dict[str, Any]:
    """Return what :func:`info` does of a denoiser of latents ``[C, h, w]``."""
    with FakeTensorMode():
        try:
            classes = num_classes if config.class_conditional else 0
            network = build_network(config.model, latent_shape[0], classes).eval()
            network.check_size(*latent_shape[1:])
        except ValueError as error:
            raise UsageError(str(error)) from error
        flops = count_flops(lambda: network(randn(1, *latent_shape), randn(1)))
    return {
        "kind": "diffusion",
        "parameters": {"denoiser": count_parameters(network)},
        "latent_shape": list(latent_shape),
        "flops": {"denoise": flops},
    }
