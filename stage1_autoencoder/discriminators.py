"""The table of discriminators: images ``[B, 3, H, W]`` of any size -> a list of logit maps, each ``[B, 1, h, w]``.

Positive means real. ``forward(images, parts=1)``: of how many equal parts, one after the other, the batch consists
(real images and reconstructions, say). What is computed over a batch stays inside a part, so that the logits of one
are the same whatever the others hold.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from .patchgan import PatchGAN, PatchGANConfig
from .stylegan_discriminator import StyleGANDiscriminator, StyleGANDiscriminatorConfig
from .unet_discriminator import UNetDiscriminator, UNetDiscriminatorConfig

DiscriminatorConfig = Annotated[
    UNetDiscriminatorConfig | PatchGANConfig | StyleGANDiscriminatorConfig, Field(discriminator="kind")
]

DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "unet": UNetDiscriminator,
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
}
