"""The autoencoder: an encoder, a bottleneck and a decoder, each chosen from a table by its config's ``kind``."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, NamedTuple

from huggingface_hub import PyTorchModelHubMixin
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..common.config import Config
from ..common.latents import Posterior
from .bottlenecks import BOTTLENECKS, BottleneckConfig, KLConfig
from .decoder import ConvDecoder, ConvDecoderConfig
from .kl_vae import KLEncoder, KLEncoderConfig
from .litevae import LiteVAEConfig, LiteVAEEncoder
from .perturbations import PerturbationConfig, Perturbations
from .pretrained import PretrainedDecoder, PretrainedDecoderConfig, PretrainedEncoder, PretrainedEncoderConfig

EncoderConfig = Annotated[LiteVAEConfig | KLEncoderConfig | PretrainedEncoderConfig, Field(discriminator="kind")]
DecoderConfig = Annotated[ConvDecoderConfig | PretrainedDecoderConfig, Field(discriminator="kind")]

ENCODERS: dict[str, type[nn.Module]] = {"litevae": LiteVAEEncoder, "kl": KLEncoder, "pretrained": PretrainedEncoder}
DECODERS: dict[str, type[nn.Module]] = {"conv": ConvDecoder, "pretrained": PretrainedDecoder}


class AutoencoderConfig(Config):
    """Everything that decides an autoencoder's parameters and its arithmetic."""

    encoder: EncoderConfig = LiteVAEConfig()
    channels: int = Field(4, ge=1)
    """Latent channels."""
    bottleneck: BottleneckConfig = KLConfig()
    perturbations: tuple[PerturbationConfig, ...] = ()
    decoder: DecoderConfig = ConvDecoderConfig()

    @model_validator(mode="after")
    def _normalised_both_or_neither(self) -> AutoencoderConfig:
        encoder, decoder = self.encoder, self.decoder
        if encoder.kind == decoder.kind == "pretrained" and encoder.normalise != decoder.normalise:
            raise ValueError("set normalise of both the pretrained encoder and the pretrained decoder, or of neither")
        return self

    @model_validator(mode="after")
    def _prefixes_fit(self) -> AutoencoderConfig:
        for perturbation in self.perturbations:
            if perturbation.kind == "prefix_mask" and perturbation.min_channels > self.channels:
                raise ValueError(
                    f"prefix_mask keeps at least {perturbation.min_channels} channels, but model.channels is "
                    f"{self.channels}: lower min_channels"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _decoder_is_convolutional(cls, data: Any) -> Any:
        """Take a decoder that does not say its kind for the convolutional one."""
        if isinstance(data, dict) and isinstance(decoder := data.get("decoder"), dict) and "kind" not in decoder:
            return {**data, "decoder": {"kind": "conv", **decoder}}
        return data


class AutoencoderOutput(NamedTuple):
    """What a training step sees.

    Attributes:
        images: the reconstruction ``[B, 3, H, W]``.
        target: what it must match: the input, or what an equivariance made of it, of the same shape as ``images``.
        raw: the unperturbed raw latents ``[B, C, h, w]``.
        penalties: the bottleneck's terms, unweighted scalars.
        metrics: the bottleneck's figures for the log.
    """

    images: Tensor
    target: Tensor
    raw: Tensor
    penalties: dict[str, Tensor]
    metrics: dict[str, Tensor]


MODEL_CARD = """---
{{ card_data }}
---

# A wavelatent autoencoder

An image autoencoder for latent diffusion. Images are `[B, 3, H, W]` in [-1, 1]; its configuration is in `config.json`,
its weights (an exponential moving average) in `model.safetensors`.

```python
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder

autoencoder = Autoencoder.from_pretrained("this folder").eval()
latents = autoencoder.encode(images).mode()
images = autoencoder.decode(latents)
```

Raw latents are not whitened: their statistics belong to the latent cache made from them.
"""


class Autoencoder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="wavelatent",
    tags=["latent-diffusion", "autoencoder"],
    model_card_template=MODEL_CARD,
    coders={AutoencoderConfig: (lambda c: c.model_dump(mode="json"), lambda d: AutoencoderConfig.model_validate(d))},
):
    """Images ``[B, 3, H, W]`` in [-1, 1] <-> raw latents ``[B, channels, H / f, W / f]`` with ``f = downsampling``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        config = AutoencoderConfig.model_validate(config)  # from_pretrained hands over what config.json holds
        self.config = config
        self.downsampling: int = config.encoder.downsampling
        self.latent_channels: int = config.channels
        bottleneck = BOTTLENECKS[config.bottleneck.kind](config.bottleneck, config.channels, self.downsampling)
        self.encoder = ENCODERS[config.encoder.kind](config.encoder, bottleneck.feature_channels)
        self.bottleneck = bottleneck
        self.perturbations = Perturbations(config.perturbations)
        self.decoder = DECODERS[config.decoder.kind](config.decoder, config.channels, self.downsampling)

    def load_source_weights(self) -> None:
        """Fill the halves that are ``pretrained`` with their source's weights; building them drew random ones."""
        for half in (self.encoder, self.decoder):
            if isinstance(half, PretrainedEncoder | PretrainedDecoder):
                half.load_source_weights()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution. Raises :class:`UsageError` where it is frozen."""
        weight = self.decoder.last_layer
        assert isinstance(weight, nn.Parameter)
        return weight

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior over raw latents (deterministic where the bottleneck is)."""
        return self.bottleneck(self.encoder(images)).posterior

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]`` from raw latents; their range is [-1, 1] up to overshoot."""
        return self.decoder(latents)

    def forward(self, images: Tensor) -> AutoencoderOutput:
        """Encode, draw from the posterior, perturb (in ``train()``) and decode."""
        bottlenecked = self.bottleneck(self.encoder(images))
        raw = bottlenecked.posterior.sample() if self.training else bottlenecked.posterior.mode()
        perturbed, target = self.perturbations(raw, images)
        return AutoencoderOutput(self.decode(perturbed), target, raw, bottlenecked.penalties, bottlenecked.metrics)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return ``(C, h, w)`` for square images of ``size``. Raises ``ValueError`` where the size does not divide."""
        if size % self.downsampling:
            raise ValueError(f"images of {size} px do not divide by the autoencoder's downsampling {self.downsampling}")
        return self.latent_channels, size // self.downsampling, size // self.downsampling

    def fingerprint(self) -> str:
        """Return a SHA-256 of the configuration and of every weight: what latents are tied to."""
        return module_fingerprint(self, self.config.model_dump(mode="json"))


def module_fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """Return a SHA-256 over ``config`` and the names, types, shapes and bytes of a module's state."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
