"""Pretrained autoencoders of the diffusers library, as an encoder and a decoder of ours.

Each half holds the diffusers model itself, without the other half's layers, and calls its public ``encode`` or
``decode``: the numbers are diffusers' own. An AutoencoderKL's half feeds a ``kl`` bottleneck (its features are the
moments after ``quant_conv``), one without a distribution a ``plain`` bottleneck.

A configuration names a ``source`` (a folder or a hub id) or spells out an ``architecture`` (the content of diffusers'
``config.json``). :func:`resolve_pretrained` reads the second from the first, once; from then on a model is built
without the source, with random weights that :meth:`PretrainedEncoder.load_source_weights` fills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from ..common.config import Config
from ..common.errors import UsageError, WavelatentError
from .bottlenecks import LOGVAR_RANGE
from .diffusers_source import (
    FAMILIES,
    Family,
    default_settings,
    diffusers_class,
    load_diffusers_model,
    one_line,
    read_architecture,
)
from .kl_vae import require_divisible

if TYPE_CHECKING:
    from .autoencoder import AutoencoderConfig

ENCODER_PARTS = ("encoder", "quant_conv")
"""The children of a diffusers autoencoder that encode; every other one decodes."""


class PretrainedConfig(Config):
    """One half of a diffusers autoencoder, frozen unless ``trainable``."""

    kind: Literal["pretrained"] = "pretrained"
    source: str | None = None
    """A diffusers folder or hub id (``name/repository`` or ``name/repository/subfolder``): where the weights are.
    None trains ``architecture`` from random weights."""
    architecture: dict[str, Any] | None = None
    """diffusers' configuration, with ``_class_name``. None is read from ``source`` by :func:`resolve_pretrained`."""
    trainable: bool = False
    normalise: bool = False
    """Apply the model's own normalisation of its latents: ``(z - shift) * scaling``, or per channel
    ``(z - mean) / std * scaling``. The encoder applies it and the decoder takes it back, so set both or neither."""

    @model_validator(mode="after")
    def _check(self) -> PretrainedConfig:
        if self.source is None and self.architecture is None:
            raise ValueError("needs a source (a diffusers folder or hub id) or an architecture")
        if self.architecture is not None and self.architecture.get("_class_name") not in FAMILIES:
            name = self.architecture.get("_class_name")
            raise ValueError(f"architecture._class_name must be one of {', '.join(FAMILIES)}, not {name!r}")
        return self

    @property
    def class_name(self) -> str:
        """The diffusers class."""
        return str(self._known_architecture["_class_name"])

    @property
    def family(self) -> Family:
        """What there is to know of the class."""
        return FAMILIES[self.class_name]

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the diffusers class, with its defaults. Raises :class:`UsageError` for an unknown one."""
        given = {key: value for key, value in self._known_architecture.items() if not key.startswith("_")}
        defaults = default_settings(self.class_name)
        if unknown := sorted(set(given) - set(defaults)):
            raise UsageError(f"{self.class_name} of the installed diffusers has no setting {', '.join(unknown)}")
        return defaults | given

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        settings = self.settings
        return next(int(settings[key]) for key in self.family.latent_channels if settings[key] is not None)

    @property
    def _known_architecture(self) -> dict[str, Any]:
        if self.architecture is None:
            raise UsageError(f"the architecture of {self.source} has not been read: call resolve_pretrained first")
        return self.architecture


class PretrainedEncoderConfig(PretrainedConfig):
    """The encoder of a diffusers autoencoder."""

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return self.family.downsampling(self.settings)


class PretrainedDecoderConfig(PretrainedConfig):
    """The decoder of a diffusers autoencoder."""

    @property
    def upsampling(self) -> int:
        """Image side over latent side."""
        return self.family.upsampling(self.settings)


def resolve_pretrained(config: AutoencoderConfig) -> AutoencoderConfig:
    """Return ``config`` with the architecture of every pretrained half read from its source.

    What has an architecture already stays as it is, and needs no source. Raises as :func:`read_architecture`.
    """
    halves = {"encoder": config.encoder, "decoder": config.decoder}
    resolved = {
        name: half.model_copy(update={"architecture": read_architecture(half.source)})
        for name, half in halves.items()
        if isinstance(half, PretrainedConfig) and half.architecture is None and half.source is not None
    }
    return config.model_copy(update=resolved) if resolved else config


class _PretrainedHalf(nn.Module):
    """The diffusers model without the other half's layers, and the normalisation where it is asked for."""

    def __init__(self, config: PretrainedConfig, *, encodes: bool) -> None:
        super().__init__()
        self.config = config
        self.model = _build_half(config, encodes=encodes)
        self.normalisation = LatentNormalisation(config) if config.normalise else None
        self.requires_grad_(config.trainable)
        for name in config.family.fixed:
            if hasattr(self.model, name):
                getattr(self.model, name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> _PretrainedHalf:
        """Set the mode; a frozen half stays in ``eval()``."""
        super().train(mode and self.config.trainable)
        return self

    def load_source_weights(self) -> None:
        """Take the weights from ``source``; without one, the random weights stay. Errors as `load_diffusers_model`."""
        if self.config.source is not None:
            self.take_weights(load_diffusers_model(self.config.source), self.config.source)

    def take_weights(self, model: nn.Module, name: str) -> None:
        """Copy this half's weights from a diffusers model; ``name`` is what the error says of it.

        Raises :class:`WavelatentError` where the model is of another architecture.
        """
        weights = model.state_dict()
        try:
            self.model.load_state_dict({key: weights[key] for key in self.model.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise WavelatentError(f"{name} is not of the recorded architecture: {one_line(error)[:200]}") from error


def _build_half(config: PretrainedConfig, *, encodes: bool) -> Any:
    settings, family = config.settings, config.family
    for key in ("in_channels", "out_channels"):
        if settings.get(key, 3) != 3:
            raise UsageError(f"{config.class_name}: {key} is {settings[key]}, images have 3 channels")
    try:
        model = diffusers_class(config.class_name)(**settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{config.class_name} cannot be built from its architecture: {one_line(error)}") from error
    for name in family.unused:
        parent, _, child = name.rpartition(".")
        delattr(model.get_submodule(parent), child)
    for name, _ in list(model.named_children()):
        if (name in ENCODER_PARTS) != encodes:
            delattr(model, name)
    return model


class LatentNormalisation(nn.Module):
    """The model's own normalisation of its latents, ``(raw - shift) / scale``, the inverse of its decoding.

    Per channel where the model states ``latents_mean`` and ``latents_std``, as diffusers' pipelines prefer them, and
    else of all channels alike by ``shift_factor``. The constants follow from the architecture and are not saved.

    Raises :class:`UsageError` where the model states no scaling factor.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        settings, channels = config.settings, config.latent_channels
        scaling = settings.get("scaling_factor")
        if scaling is None:
            raise UsageError(f"{config.class_name} states no scaling factor: set normalise=false")
        mean, std = settings.get("latents_mean"), settings.get("latents_std")
        if mean is None or std is None:
            mean, std = [settings.get("shift_factor") or 0.0] * channels, [1.0] * channels
        shift, scale = torch.tensor(mean), torch.tensor(std) / scaling
        self.register_buffer("shift", shift.float().reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """Return the normalised latents ``[B, C, h, w]``."""
        return (raw - self.shift) / self.scale

    def inverse(self, latents: Tensor) -> Tensor:
        """Return the latents as the model's decoder takes them."""
        return latents * self.scale + self.shift


class PretrainedEncoder(_PretrainedHalf):
    """Images ``[B, 3, H, W]`` in [-1, 1] -> ``[B, 2C, h, w]`` (mean, log-variance), or the latents ``[B, C, h, w]``.

    The normalisation of a distribution is applied to its parameters: the mean as a latent, the log-variance (after
    diffusers' clamp) less ``2 log(std / scaling)``. Through the ``kl`` bottleneck that is exact, except that a standard
    deviation that normalising brings below exp(-15) is raised to it.

    Raises :class:`UsageError` where ``out_channels`` is not what the model gives.
    """

    config: PretrainedEncoderConfig

    def __init__(self, config: PretrainedEncoderConfig, out_channels: int) -> None:
        channels, gaussian = config.latent_channels, config.family.gaussian
        features = 2 * channels if gaussian else channels
        if features != out_channels:
            raise UsageError(
                f"the pretrained {config.class_name} gives {features} feature channels, the bottleneck takes "
                f"{out_channels}: set channels={channels} and bottleneck.kind={'kl' if gaussian else 'plain'}"
            )
        super().__init__(config, encodes=True)
        self._downsampling = config.downsampling

    def forward(self, images: Tensor) -> Tensor:
        """Return the bottleneck's input. Raises ``ValueError`` where the sides do not divide."""
        require_divisible(images, self._downsampling)
        with torch.set_grad_enabled(self.config.trainable and torch.is_grad_enabled()):
            features = self._features(images)
            if self.normalisation is None:
                return features
            if not self.config.family.gaussian:
                return self.normalisation(features.float())
            mean, logvar = features.float().chunk(2, dim=1)
            logvar = logvar.clamp(*LOGVAR_RANGE) - 2 * self.normalisation.scale.log()
            return torch.cat([self.normalisation(mean), logvar], dim=1)

    def _features(self, images: Tensor) -> Tensor:
        encoded = self.model.encode(images, return_dict=False)[0]
        return encoded.parameters if self.config.family.gaussian else encoded


class PretrainedDecoder(_PretrainedHalf):
    """Latents ``[B, latent_channels, h, w]`` -> images ``[B, 3, h * f, w * f]``, as diffusers' ``decode`` gives them.

    Raises :class:`UsageError` where the latents' channels or the downsampling are not the model's.
    """

    config: PretrainedDecoderConfig

    def __init__(self, config: PretrainedDecoderConfig, latent_channels: int, downsampling: int) -> None:
        if config.latent_channels != latent_channels:
            raise UsageError(
                f"the pretrained {config.class_name} decodes {config.latent_channels} channels, the latents have "
                f"{latent_channels}: set channels={config.latent_channels}"
            )
        if config.upsampling != downsampling:
            raise UsageError(
                f"the pretrained {config.class_name} upsamples by {config.upsampling}, the encoder downsamples by "
                f"{downsampling}: give an encoder and a decoder of one factor"
            )
        super().__init__(config, encodes=False)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution. Raises :class:`UsageError` in a frozen half, which has no gradient."""
        if not self.config.trainable:
            raise UsageError(
                "the adaptive weight compares gradients at the decoder's last layer, which is frozen here: "
                "set model.decoder.trainable=true, or give the adversarial term a constant weight"
            )
        convolutions = [module for module in self.model.decoder.modules() if isinstance(module, nn.Conv2d)]
        return convolutions[-1].get_parameter("weight")

    def forward(self, latents: Tensor) -> Tensor:
        """Return the images."""
        raw = latents if self.normalisation is None else self.normalisation.inverse(latents)
        return self.model.decode(raw, return_dict=False)[0]
