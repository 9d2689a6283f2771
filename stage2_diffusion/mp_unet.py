"""The magnitude-preserving UNet denoiser: configuration G of EDM2 (Karras et al. 2024, arXiv 2312.02696).

Written from the paper's equations. Activations, weights and updates keep their magnitude throughout training by
construction, so there are no group normalisations and no biases, and a learning rate of 1e-2 relative to weights of
magnitude one is stable.

Differs from the paper:

- the unconditional output of a network with classes has an embedding of its own, as in `UNet`; the paper passes a
  vector of zeros;
- activations are not clipped, which the paper does for float16;
- weights are normalised when they are built and after every step, instead of before every step;
- levels with attention, the width of the embedding and the balances are options, with the paper's values as defaults.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .mp_layers import MPAttention, MPConv, MPFourier, MPLayer, MPLinear, mp_cat, mp_silu, mp_sum, pixel_norm
from .unet_layout import UNetLayout


class MPUNetConfig(UNetLayout):
    """The magnitude-preserving UNet; widths, depth and attention mean what they mean in `UNetConfig`."""

    kind: Literal["mp_unet"] = "mp_unet"
    head_channels: int = Field(64, gt=0)
    """Channels per attention head."""
    embedding_channels: int | None = Field(None, gt=0)
    """Width of the noise and class embedding; None is the width of the widest level, as in EDM2."""
    residual_balance: float = Field(0.3, ge=0, le=1)
    """Share of a block's branch, and of its attention, in the sum with its input."""
    concat_balance: float = Field(0.5, ge=0, le=1)
    """Share of a skip connection in the concatenation on the way up."""
    class_balance: float = Field(0.5, ge=0, le=1)
    """Share of the class in the sum with the embedding of the noise."""


class MPUNet(nn.Module):
    """UNet whose activations have magnitude one, conditioned on a noise label and optionally a class.

    Shapes: ``x [B, in_channels, h, w]`` of unit variance, ``noise_label [B]`` of order one, ``labels [B] int64`` or
    None -> like ``x``: the raw network F of EDM. ``h`` and ``w`` must divide by 2 to the number of levels less one
    (`check_size`). With ``num_classes > 0``, ``labels=None``, and the label ``num_classes``, ask for the unconditional
    output. A new network returns zero. Call `after_step` after every step of the optimiser and before averaging.
    """

    channels_last: bool = True
    """Keep feature maps channels last, as in `UNet`."""
    gradient_checkpointing: bool = False
    """In training, keep only each block's input and compute the rest of it again in the backward pass."""

    def __init__(self, config: MPUNetConfig, in_channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        widths = config.widths
        embedding = config.embedding_channels or max(widths)

        self.fourier = MPFourier(config.channels)
        self.noise_embedding = MPLinear(config.channels, embedding)
        self.class_embedding = MPLinear(num_classes + 1, embedding) if num_classes else None

        self.stem = MPConv(in_channels + 1, widths[0], 3)
        self.down = nn.ModuleList()
        width, skips = widths[0], [widths[0]]
        for level, level_width in enumerate(widths):
            attention = level in config.attention_levels
            if level > 0:
                self.down.append(EncoderBlock(config, width, width, embedding, resample="down"))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.down.append(EncoderBlock(config, width, level_width, embedding, attention=attention))
                width = level_width
                skips.append(width)
        self.middle = nn.ModuleList(
            [DecoderBlock(config, width, width, embedding, attention=attention) for attention in (True, False)]
        )
        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            attention = level in config.attention_levels
            for _ in range(config.num_res_blocks + 1):
                self.up.append(DecoderBlock(config, width + skips.pop(), level_width, embedding, attention=attention))
                width = level_width
            if level > 0:
                self.up.append(DecoderBlock(config, width, width, embedding, resample="up"))
        assert not skips, "every skip is used once"
        self.out = MPConv(width, in_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError``, with the fix, where feature maps of this size cannot be halved often enough."""
        self.config.check_size(height, width)

    @torch.no_grad()
    def after_step(self) -> None:
        """Normalise every stored weight, as each step of the optimiser must be followed by."""
        for module in self.modules():
            if isinstance(module, MPLayer):
                module.after_step()

    def forward(self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the raw network output F, shaped like ``x``."""
        self.check_size(*x.shape[-2:])
        embedding = self._embed(noise_label, labels)  # [B, embedding]
        ones = torch.ones_like(x[:, :1])  # in place of biases
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        h = self.stem(torch.cat([x, ones], dim=1).contiguous(memory_format=layout))  # [B, channels, h, w]
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, embedding)
        for layer in self.up:
            if layer.resample is None:
                h = mp_cat(h, skips.pop(), self.config.concat_balance)
            h = self._run(layer, h, embedding)
        return self.out_gain * self.out(h)  # [B, in_channels, h, w]

    def _run(self, layer: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            result: Tensor = checkpoint(layer, x, embedding, use_reentrant=False)
            return result
        return layer(x, embedding)

    def _embed(self, noise_label: Tensor, labels: Tensor | None) -> Tensor:
        embedding = self.noise_embedding(self.fourier(noise_label))
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError(
                    "this network was built without classes: pass labels=None, or build it with num_classes"
                )
            return mp_silu(embedding)
        if labels is None:
            labels = torch.full(noise_label.shape, self.num_classes, device=noise_label.device)
        # One-hot vectors of magnitude one, so that the embedding of a class has magnitude one as well.
        one_hot = F.one_hot(labels, self.num_classes + 1) * math.sqrt(self.num_classes + 1)
        return mp_silu(mp_sum(embedding, self.class_embedding(one_hot), self.config.class_balance))


class MPBlock(nn.Module):
    """What encoder and decoder blocks share: the branch modulated by the embedding, and attention.

    The branch is SiLU, 3x3, scaled per channel by ``1 + gain * linear(embedding)``, SiLU, dropout, 3x3. The learned
    gain is 0 at first. Shapes: ``x [B, in_channels, h, w]``, ``embedding [B, embedding]`` ->
    ``[B, out_channels, h', w']`` with sides halved or doubled by ``resample``.
    """

    branch_from_input: bool
    """Whether the branch sees all channels of the input, or those of the main path."""

    def __init__(
        self,
        config: MPUNetConfig,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        attention: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        branch_channels = in_channels if self.branch_from_input else out_channels
        self.resample = resample
        self.balance = config.residual_balance
        self.skip = nn.Identity() if in_channels == out_channels else MPConv(in_channels, out_channels, 1)
        self.conv1 = MPConv(branch_channels, out_channels, 3)
        self.modulation = MPLinear(embedding, out_channels)
        self.modulation_gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = MPConv(out_channels, out_channels, 3)
        self.attention = (
            MPAttention(out_channels, head_channels=config.head_channels, balance=config.residual_balance)
            if attention
            else None
        )

    def _combine(self, x: Tensor, branch_input: Tensor, embedding: Tensor) -> Tensor:
        """Mix ``x`` with the branch, then attend."""
        h = self.conv1(mp_silu(branch_input))
        scale = 1 + self.modulation_gain * self.modulation(embedding)  # [B, out_channels]
        h = mp_silu(h * scale[:, :, None, None])
        h = mp_sum(x, self.conv2(self.dropout(h)), self.balance)
        return h if self.attention is None else self.attention(h)


class EncoderBlock(MPBlock):
    """A block of the way down: halve, change the width, normalise each pixel, then the branch beside the main path.

    The 2x2 average that halves the sides loses magnitude, up to one half; pixel normalisation restores it.
    """

    branch_from_input = False

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the block's output."""
        if self.resample is not None:
            x = F.avg_pool2d(x, 2)
        x = pixel_norm(self.skip(x))
        return self._combine(x, x, embedding)


class DecoderBlock(MPBlock):
    """A block of the middle and the way up: double, then the branch, of all channels, beside the main path."""

    branch_from_input = True

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return the block's output."""
        if self.resample is not None:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self._combine(self.skip(x), x, embedding)
