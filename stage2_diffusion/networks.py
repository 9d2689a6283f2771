"""The table of denoiser networks: the raw network F of EDM on latents ``[B, C, h, w]`` of any channels and size.

A network has ``config``, ``num_classes`` (0: none), ``check_size(h, w)``, ``forward(x, noise_label, labels=None)``,
plain attributes ``gradient_checkpointing`` (trade compute for memory in training; same result) and ``channels_last``
(memory layout; same result to rounding), and ``after_step()``, to be called after every step of the optimiser. Adding
one costs its config and class, and a line in the union and the table.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from .mp_unet import MPUNet, MPUNetConfig
from .unet import UNet, UNetConfig

DenoiserConfig = Annotated[UNetConfig | MPUNetConfig, Field(discriminator="kind")]
DENOISER_CONFIG: TypeAdapter[DenoiserConfig] = TypeAdapter(DenoiserConfig)
"""Turns a plain dict into the config of its ``kind``, with ``validate_python``; a config it returns as it is."""
DenoiserNetwork = UNet | MPUNet

DENOISERS: dict[str, type[UNet] | type[MPUNet]] = {"unet": UNet, "mp_unet": MPUNet}


def build_network(config: UNetConfig | MPUNetConfig, in_channels: int, num_classes: int = 0) -> DenoiserNetwork:
    """Return the network that ``config`` describes, for latents of ``in_channels`` channels; 0 classes is none."""
    return DENOISERS[config.kind](config, in_channels, num_classes)  # type: ignore[arg-type]  # the class of that kind
