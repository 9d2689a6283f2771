"""Our KL autoencoder in diffusers' AutoencoderKL layout, both ways and exactly.

The two are one network with its weights under other names: our layers are numbered in the order they run, theirs are
nested by resolution; our attention has one 1x1 convolution for queries, keys and values, theirs three linear maps.
An autoencoder of two ``pretrained`` halves goes back into the class that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UsageError
from ..common.nn import group_norm
from .autoencoder import Autoencoder, AutoencoderConfig
from .bottlenecks import KLConfig
from .decoder import MULTIPLIERS, WIDTHS, ConvDecoderConfig
from .diffusers_source import architecture_of, default_settings, diffusers_class, load_diffusers_model
from .kl_vae import KLEncoderConfig
from .pretrained import PretrainedConfig, PretrainedDecoder, PretrainedEncoder

CLASS = "AutoencoderKL"
IN_RES_BLOCK = {"skip": ("conv_shortcut",)}
IN_ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}


def from_diffusers(model: Any) -> Autoencoder:
    """Return our autoencoder with the weights of an AutoencoderKL: equal outputs, float32, on the CPU, in eval mode.

    It can be trained on as any of ours. The scaling factor is left behind: whitening is measured from the latents.

    Args:
        model: the model, or a folder or hub id of one.

    Raises:
        UsageError: ours has no counterpart of something in the model; the message names it.
    """
    if isinstance(model, str | Path):
        model = load_diffusers_model(str(model))
    if type(model).__name__ != CLASS:
        raise UsageError(
            f"{type(model).__name__} has no counterpart of ours, only {CLASS} has; take it as `pretrained`"
        )
    settings = default_settings(CLASS) | architecture_of(CLASS, model.config)
    autoencoder = Autoencoder(_our_config(settings))
    theirs = model.state_dict()
    names = _names(autoencoder.config)
    ours = {
        key: torch.cat([theirs[name].float() for name in _their_keys(key, names)]).reshape(value.shape)
        for key, value in _weights(autoencoder).items()
    }
    autoencoder.load_state_dict(autoencoder.state_dict() | ours)
    return autoencoder.eval()


def to_diffusers(autoencoder: Autoencoder, statistics: Mapping[str, Sequence[float]] | None = None) -> Any:
    """Return a diffusers model with the weights of ``autoencoder``: equal outputs, float32, on the CPU, in eval mode.

    Args:
        autoencoder: KL encoder, ``kl`` bottleneck and convolutional decoder, or two halves of one pretrained model.
        statistics: ``{"mean": [C], "std": [C]}`` of the raw latents, recorded as ``latents_mean`` and ``latents_std``;
            without them the scaling factor is 1. A pretrained model keeps its own and takes none.

    Raises:
        UsageError: diffusers has no counterpart of something in the autoencoder; the message names it.
    """
    config = autoencoder.config
    if isinstance(config.encoder, PretrainedConfig) and isinstance(config.decoder, PretrainedConfig):
        if statistics is not None:
            raise UsageError(f"the pretrained {config.encoder.class_name} keeps its own latent statistics: give none")
        return _joined(autoencoder)
    settings = _their_settings(config)
    if statistics is not None:
        settings |= {"latents_mean": list(statistics["mean"]), "latents_std": list(statistics["std"])}
    model = diffusers_class(CLASS)(**settings)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    names = _names(config)
    state: dict[str, Tensor] = {}
    for key, value in _weights(autoencoder).items():
        their_keys = _their_keys(key, names)
        for name, part in zip(their_keys, value.detach().float().chunk(len(their_keys)), strict=True):
            state[name] = part.reshape(shapes[name])
    model.load_state_dict(state)
    return model.eval()


def _weights(autoencoder: Autoencoder) -> dict[str, Tensor]:
    return {k: v for k, v in autoencoder.state_dict().items() if k.startswith(("encoder.", "decoder."))}


def _joined(autoencoder: Autoencoder) -> Any:
    """Return the diffusers model that two pretrained halves are of."""
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    assert isinstance(encoder, PretrainedEncoder), "its config is of one"
    assert isinstance(decoder, PretrainedDecoder), "its config is of one"
    name, family = encoder.config.class_name, encoder.config.family
    if encoder.config.architecture != decoder.config.architecture:
        raise UsageError("the pretrained encoder and decoder are of two architectures: no diffusers model has both")
    if family.unused:
        raise UsageError(f"{name} has parts that are not kept here ({', '.join(family.unused)}): it cannot be written")
    model = diffusers_class(name)(**encoder.config.settings)
    model.load_state_dict(encoder.model.state_dict() | decoder.model.state_dict())
    return model.eval()


# The configuration


def _our_config(settings: Mapping[str, Any]) -> AutoencoderConfig:
    widths = list(settings["block_out_channels"])
    for key, expected in _fixed_settings(len(widths)).items():
        if settings[key] != expected:
            raise UsageError(f"an {CLASS} with {key}={settings[key]} has no counterpart of ours, which has {expected}")
    _check_groups(widths, settings["norm_num_groups"])
    downsampling = 2 ** (len(widths) - 1)
    sizes = {name: [base * m for m in MULTIPLIERS.get(downsampling, ())] for name, base in WIDTHS.items()}
    width = next((name for name, of_ours in sizes.items() if of_ours == widths), None)
    if width is None:
        raise UsageError(
            f"an {CLASS} with block_out_channels={widths} has no counterpart of ours, whose decoders of that depth "
            f"have {' or '.join(str(s) for s in sizes.values() if s) or 'none'}; take it as `pretrained`"
        )
    shared = {"num_res_blocks": settings["layers_per_block"], "attention": settings["mid_block_add_attention"]}
    return AutoencoderConfig(
        encoder=KLEncoderConfig(
            width=widths[0],
            multipliers=tuple(w // widths[0] for w in widths),
            quant_conv=settings["use_quant_conv"],
            **shared,
        ),
        channels=settings["latent_channels"],
        decoder=ConvDecoderConfig(width=width, post_quant_conv=settings["use_post_quant_conv"], **shared),
    )


def _their_settings(config: AutoencoderConfig) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    for part, value, expected in [
        ("encoder", encoder, KLEncoderConfig),
        ("bottleneck", config.bottleneck, KLConfig),
        ("decoder", decoder, ConvDecoderConfig),
    ]:
        if not isinstance(value, expected):
            raise UsageError(f"an {CLASS} has no counterpart of {part}.kind={value.kind}")
    assert isinstance(encoder, KLEncoderConfig), "just checked"
    assert isinstance(decoder, ConvDecoderConfig), "just checked"
    if decoder.norm != "group" or decoder.output != "pixels":
        raise UsageError(
            f"an {CLASS} has no counterpart of a decoder with norm={decoder.norm}, output={decoder.output}"
        )
    widths = [encoder.width * m for m in encoder.multipliers]
    for name, one, other in [
        ("widths", widths, [WIDTHS[decoder.width] * m for m in MULTIPLIERS[encoder.downsampling]]),
        ("num_res_blocks", encoder.num_res_blocks, decoder.num_res_blocks),
        ("attention", encoder.attention, decoder.attention),
    ]:
        if one != other:
            raise UsageError(
                f"an {CLASS} has one {name} for both halves; here the encoder's is {one}, the decoder's {other}"
            )
    groups = group_norm(widths[0]).num_groups
    _check_groups(widths, groups)
    return {
        **_fixed_settings(len(widths)),
        "block_out_channels": widths,
        "layers_per_block": encoder.num_res_blocks,
        "latent_channels": config.channels,
        "norm_num_groups": groups,
        "scaling_factor": 1.0,
        "use_quant_conv": encoder.quant_conv,
        "use_post_quant_conv": decoder.post_quant_conv,
        "mid_block_add_attention": encoder.attention,
    }


def _fixed_settings(num_levels: int) -> dict[str, Any]:
    """Return the settings of an AutoencoderKL that ours has no choice of."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "act_fn": "silu",
    }


def _check_groups(widths: Sequence[int], num_groups: int) -> None:
    for width in widths:
        if (ours := group_norm(width).num_groups) != num_groups:
            raise UsageError(
                f"group normalisation of {width} channels has {ours} groups in ours and {num_groups} in the {CLASS}, "
                "which has one number for all widths"
            )


# The names of the weights


def _names(config: AutoencoderConfig) -> dict[str, list[str]]:
    """Return, for the layers of our encoder and decoder in order, diffusers' names; a layer without weights has ''."""
    encoder = config.encoder
    assert isinstance(encoder, KLEncoderConfig), "checked before"
    levels, blocks = range(len(encoder.multipliers)), encoder.num_res_blocks
    middle = ["mid_block.resnets.0", *(["mid_block.attentions.0"] * encoder.attention), "mid_block.resnets.1"]
    end = ["conv_norm_out", "", "conv_out"]
    down: list[str] = []
    up: list[str] = []
    for level in levels:
        down += [f"down_blocks.{level}.resnets.{block}" for block in range(blocks)]
        up += [f"up_blocks.{level}.resnets.{block}" for block in range(blocks + 1)]
        if level != levels[-1]:
            down.append(f"down_blocks.{level}.downsamplers.0")
            up.append(f"up_blocks.{level}.upsamplers.0")
    return {"encoder": ["conv_in", *down, *middle, *end], "decoder": ["conv_in", *middle, *up, *end]}


def _their_keys(key: str, names: Mapping[str, list[str]]) -> list[str]:
    """Return the keys of diffusers that our ``key`` is the concatenation of: one, or three for attention's qkv."""
    half, part, *rest = key.split(".")
    if part != "layers":  # quant_conv, post_quant_conv
        return [".".join([part, *rest])]
    number, *inside, kind = rest
    layer = names[half][int(number)]
    if not inside:
        return [f"{half}.{layer}.{kind}"]
    renamed = IN_ATTENTION if "attentions" in layer else IN_RES_BLOCK
    return [f"{half}.{layer}.{name}.{kind}" for name in renamed.get(inside[0], (inside[0],))]
