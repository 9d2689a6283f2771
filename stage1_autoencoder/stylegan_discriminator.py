"""A discriminator after StyleGAN2's (Karras et al. 2020, arXiv 1912.04958): residual, with minibatch statistics."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..common.config import Config
from .edge_padding import pad_edges

GRID = 4
"""Sites per side of the map that the dense layers judge."""
GROUP = 4
"""Most images that share one minibatch standard deviation."""
EPSILON = 1e-8
LOW_PASS = (1, 3, 3, 1)
RELU_GAIN = math.sqrt(2)


class StyleGANDiscriminatorConfig(Config):
    """StyleGAN2's residual discriminator (Karras et al. 2020, arXiv 1912.04958) for images of any size.

    Its weights have unit variance and are scaled as they are used (equalised learning rate), so they want a far higher
    learning rate than the other discriminators': the paper's is 2e-3 (``train.discriminator_learning_rate``).
    """

    kind: Literal["stylegan"] = "stylegan"
    width: int = Field(64, ge=1)
    """Channels at image resolution; they double with each halving of the sides."""
    max_width: int = Field(512, ge=1)
    """Most channels at any resolution, the last ones included."""
    levels: int = Field(6, ge=1, le=8)
    """Times the sides are halved. 256 px at 6 levels, as 64 px at 4, end at the paper's 4x4 sites; more sites than that
    are averaged (ours), fewer repeated (ours)."""


class EqualizedConv2d(nn.Module):
    """A convolution with equalised learning rate (Karras et al. 2018, arXiv 1710.10196, section 4.1).

    The weights are stored with unit variance and multiplied by ``gain / sqrt(fan_in)`` as they are used, so that an
    adaptive optimiser moves every layer at the same relative speed.
    Shape: ``[B, in_channels, H, W]`` -> ``[B, out_channels, H', W']``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        gain: float = RELU_GAIN,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolved map."""
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class EqualizedLinear(nn.Module):
    """A dense layer with equalised learning rate, ``[B, in_features]`` -> ``[B, out_features]``."""

    def __init__(self, in_features: int, out_features: int, *, gain: float = RELU_GAIN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product plus the bias."""
        return F.linear(x, self.weight * self.scale, self.bias)


class Blur(nn.Module):
    """Low-pass filter ``[1, 3, 3, 1] / 8`` along both sides, of unit gain, with zeros beyond the border.

    It goes before every halving, which would fold the finest detail into coarse patterns otherwise (Zhang 2019, arXiv
    1904.11486). Shape: ``[B, C, H, W]`` -> ``[B, C, (H + 2 * padding - 3) / stride, ...]``, rounded up.
    """

    kernel: Tensor

    def __init__(self, *, padding: int, stride: int = 1) -> None:
        super().__init__()
        taps = torch.tensor(LOW_PASS) / sum(LOW_PASS)
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered map."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class DownBlock(nn.Module):
    """3x3, blur, 3x3 of stride 2, beside a blurred and halved 1x1; their sum over sqrt(2) keeps the variance."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, padding=1)
        self.blur = Blur(padding=2)  # one more than the filter needs: the margin of the unpadded 3x3
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, stride=2)
        self.halve = Blur(padding=1, stride=2)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, gain=1.0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` -> ``[B, out, H/2, W/2]``, rounded down."""
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(self.blur(h)), 0.2)
        return (h + self.skip(self.halve(x))) / math.sqrt(2)


def minibatch_std(x: Tensor, parts: int = 1) -> Tensor:
    """Return how much the images of a group differ, as one more map: ``[B, C, h, w]`` -> ``[B, 1, h, w]``.

    The standard deviation over the group at each channel and site, averaged over both (Karras et al. 2018, arXiv
    1710.10196, section 3); 1e-8 is added to the variance. A group is up to 4 images that follow each other inside one
    of ``parts`` equal parts of the batch: the largest number that divides a part. So no real image's statistic holds
    a reconstruction. Computed in float32.
    """
    count, remainder = divmod(len(x), parts)
    assert remainder == 0, f"{len(x)} images do not make {parts} equal parts"
    group = max(size for size in range(1, GROUP + 1) if count % size == 0)
    variance = x.float().unflatten(0, (-1, group)).var(dim=1, correction=0)  # [B / group, C, h, w]
    std = (variance + EPSILON).sqrt().mean(dim=(1, 2, 3))
    return std.repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])


class StyleGANDiscriminator(nn.Module):
    """Judges the image as a whole: one logit per image, which also depends on the others of its group.

    Images below ``2^levels`` pixels are padded by repeating their border.
    """

    def __init__(self, config: StyleGANDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [min(config.width * 2**level, config.max_width) for level in range(config.levels + 1)]
        last = widths[-1]
        self.from_rgb = EqualizedConv2d(3, widths[0], 1)
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in itertools.pairwise(widths))
        self.conv = EqualizedConv2d(last + 1, last, 3, padding=1)
        self.dense = EqualizedLinear(last * GRID**2, last)
        self.logit = EqualizedLinear(last, 1, gain=1.0)

    def forward(self, images: Tensor, parts: int = 1) -> list[Tensor]:
        """Return ``[logits [B, 1, 1, 1]]``; images affect each other inside each of ``parts`` equal parts only."""
        smallest = 2**self.config.levels
        h = F.leaky_relu(self.from_rgb(pad_edges(images, smallest, smallest)), 0.2)
        for block in self.down:
            h = block(h)
        h = F.adaptive_avg_pool2d(h, GRID)  # [B, C, 4, 4]
        h = torch.cat([h, minibatch_std(h, parts).to(h.dtype)], dim=1)
        h = F.leaky_relu(self.conv(h), 0.2)
        h = F.leaky_relu(self.dense(h.flatten(1)), 0.2)
        return [self.logit(h)[:, :, None, None]]
