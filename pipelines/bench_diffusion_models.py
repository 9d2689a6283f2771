"""What ``bench diffusion`` measures: training and sampling with our UNet, and with diffusers' UNet2DModel in its place.

Everything around the network is ours for both: objective, loss, clipping, Adam, averages, sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..common.config import load_config
from ..common.errors import UsageError
from ..common.power_ema import PowerEMA
from ..common.runtime import MixedPrecision, autocast
from ..stage1_autoencoder.diffusers_source import diffusers_class
from ..stage2_diffusion.generation import generate_latents
from ..stage2_diffusion.model import LatentDiffusion
from ..stage2_diffusion.sampling import Sampling
from ..stage2_diffusion.train_config import DiffusionTrainConfig
from ..stage2_diffusion.unet import UNet, UNetConfig
from .diffusion_config import DiffusionRunConfig

Task = Literal["train", "sample"]

OURS, COMPILED, PEER = "wavelatent", "wavelatent-compiled", "diffusers-unet2d"
"""Our network eagerly, compiled, and the peer that every ratio is against (always eager)."""
CHANNELS = 4
SIZES = {"unet-tiny": 16, "unet-s": 32}
"""The presets measured by default, and the side of the latents that each is made for; others get 32."""


class PeerNetwork(nn.Module):
    """diffusers' UNet2DModel with the widths, depth, attention and heads of ``config``, called as our networks are.

    The noise label is its time step: the same sines and cosines, of other frequencies. What it cannot share is the
    number of groups, which is one for all its normalisations and has to divide all widths; ours has fewer on widths
    below 128 (16 against 32 on 64 channels). Parameters and operations are equal in number.
    """

    def __init__(self, config: UNetConfig, in_channels: int) -> None:
        super().__init__()
        attention = [level in config.attention_levels for level in range(len(config.multipliers))]
        self.unet = diffusers_class("UNet2DModel")(
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=[config.channels * multiplier for multiplier in config.multipliers],
            layers_per_block=config.num_res_blocks,
            down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attention],
            up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attention)],
            attention_head_dim=config.head_channels,
            time_embedding_dim=config.embedding_channels,
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32,  # without it, the middle's attention has no normalisation
            norm_eps=1e-6,
            dropout=config.dropout,
        )

    def forward(self, x: Tensor, noise_label: Tensor, labels: Tensor | None = None) -> Tensor:
        """``x [B, C, h, w]``, ``noise_label [B]`` -> like ``x``."""
        assert labels is None, "the comparison is of models without classes"
        result: Tensor = self.unet(x, noise_label).sample
        return result

    def after_step(self) -> None:
        """Do nothing, as our UNet."""


def preset_of(model: str) -> DiffusionRunConfig:
    """Return a preset whose denoiser has a counterpart in diffusers. Raises :class:`UsageError` for any other."""
    config = load_config(DiffusionRunConfig, model)
    if not isinstance(config.model, UNetConfig):
        raise UsageError(f"{model}: diffusers has no {config.model.kind}; bench measures presets of kind unet")
    return config


def build_network(config: DiffusionRunConfig, network: str) -> UNet | PeerNetwork:
    """Return a network as ``config`` describes it, ours or the peer's, with random weights.

    Raises :class:`UsageError` where diffusers is missing.
    """
    assert isinstance(config.model, UNetConfig)
    return PeerNetwork(config.model, CHANNELS) if network == PEER else UNet(config.model, CHANNELS)


def build_model(config: DiffusionRunConfig, network: str, size: int) -> LatentDiffusion:
    """Return an unconditional model for latents ``[4, size, size]``, with our network or the peer's.

    Raises :class:`UsageError` where diffusers is missing.
    """
    placeholder = UNetConfig(channels=4, multipliers=(1,), num_res_blocks=1, attention_levels=(), head_channels=4)
    built = LatentDiffusion(placeholder, config.objective, (CHANNELS, size, size), whitening=config.whitening)
    built.network = build_network(config, network)  # type: ignore[assignment]  # the peer's has the same forward
    if network == COMPILED:
        built.network.compile()
    return built


def training_step(
    model: LatentDiffusion,
    train: DiffusionTrainConfig,
    batch_size: int,
    device: torch.device,
    precision: MixedPrecision,
) -> Callable[[], None]:
    """Return a function that takes one optimiser step as the trainer does, on latents that are there already.

    Draw noise, loss, backward pass, clipping, Adam, and all averages of ``train``, for which ``model`` is copied.
    """
    model.to(device).train()
    ema = PowerEMA(model, train.ema)
    parameters = list(model.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-6, betas=train.betas, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    raw = torch.randn(batch_size, *model.latent_shape, generator=generator, device=device)
    step = 0

    def take() -> None:
        nonlocal step
        sigma, noise = model.draw_noise(raw, generator)
        with autocast(device, precision):
            loss = model(raw, sigma, noise).total.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        adam.step()
        adam.zero_grad()
        model.after_step()
        step += 1
        ema.update(model, step)

    return take


def sampling_pass(
    model: LatentDiffusion, batch_size: int, num_steps: int, device: torch.device, precision: MixedPrecision
) -> Callable[[], None]:
    """Return a function that draws a batch of latents in so many Heun steps (2 ``num_steps`` - 1 calls of the network).

    The weights require no gradient, as those of the averaged model that samples are drawn from.
    """
    model.to(device).eval().requires_grad_(False)
    seeds, sampling = range(batch_size), Sampling(sampler="heun", steps=num_steps)

    def draw() -> None:
        with autocast(device, precision):
            generate_latents(model, seeds, sampling=sampling)

    return draw


def network_calls(num_steps: int) -> int:
    """Return how often ``num_steps`` steps of Heun's method call the network."""
    return 2 * num_steps - 1
