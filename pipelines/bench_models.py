"""What ``bench autoencoder`` measures: encoding or decoding by our presets and by diffusers' autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.config import load_config
from ..common.errors import UsageError
from ..common.latents import Posterior
from ..stage1_autoencoder.autoencoder import Autoencoder
from ..stage1_autoencoder.diffusers_source import diffusers_class
from .run_config import AutoencoderRunConfig

Direction = Literal["encode", "decode"]

PEER = "diffusers-kl-f8"
"""The model that every ratio is against."""
PEER_CHANNELS_LAST = "diffusers-kl-f8-channels-last"
"""The peer with its weights in the layout that our models choose for themselves on a CPU; measured where asked for."""
MODELS = ("litevae-s", "litevae-b", "litevae-m", "litevae-l", "kl-f8")


@dataclass(frozen=True)
class Half:
    """One direction of an autoencoder with random weights, in eval mode.

    Attributes:
        modules: what it consists of, and nothing else of the model.
        compute: images ``[B, 3, H, W]`` -> latents (the posterior's mode), or latents -> images.
        input_shape: of one image, or of one image's latents.
    """

    modules: nn.ModuleList
    compute: Callable[[Tensor], Tensor]
    input_shape: tuple[int, ...]


def build_half(model: str, direction: Direction, size: int) -> Half:
    """Return one direction of a preset or of the peer for images of ``size``.

    Raises :class:`UsageError` for an unknown preset, a size that does not divide, or where diffusers is missing.
    """
    half = _peer(model, direction, size) if model in (PEER, PEER_CHANNELS_LAST) else _ours(model, direction, size)
    half.modules.eval()
    return half


def arithmetic(model: str, direction: Direction) -> str:
    """Return a key that is equal for models whose halves compute the same: LiteVAE's presets share one decoder."""
    if model in (PEER, PEER_CHANNELS_LAST) or direction == "encode":
        return model
    config = load_config(AutoencoderRunConfig, model).model
    return f"{config.decoder} {config.channels} {config.encoder.downsampling}"


def _ours(model: str, direction: Direction, size: int) -> Half:
    try:
        whole = Autoencoder(load_config(AutoencoderRunConfig, model).model)
        latent_shape = whole.latent_shape(size)
    except ValueError as error:
        raise UsageError(f"{model}: {error}") from error
    if direction == "decode":
        return Half(nn.ModuleList([whole.decoder]), whole.decoder, latent_shape)
    encoder, bottleneck = whole.encoder, whole.bottleneck

    def encode(images: Tensor) -> Tensor:
        posterior: Posterior = bottleneck(encoder(images)).posterior
        return posterior.mode()

    return Half(nn.ModuleList([encoder, bottleneck]), encode, (3, size, size))


def _peer(model: str, direction: Direction, size: int) -> Half:
    if size % 8:
        raise UsageError(f"images of {size} px do not divide by the downsampling 8 of {model}")
    widths = (128, 256, 512, 512)
    whole = diffusers_class("AutoencoderKL")(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
    )
    if model == PEER_CHANNELS_LAST:
        whole.to(memory_format=torch.channels_last)
    if direction == "decode":
        modules = nn.ModuleList([whole.post_quant_conv, whole.decoder])
        return Half(modules, lambda latents: whole.decode(latents).sample, (4, size // 8, size // 8))
    modules = nn.ModuleList([whole.encoder, whole.quant_conv])
    return Half(modules, lambda images: whole.encode(images).latent_dist.mode(), (3, size, size))
