"""The trained part of stage two: a denoiser of whitened latents, and the whitening it was trained behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..common.config import Config
from ..common.denoising import denoise_with, denoising_loss, expand_like
from ..common.latents import Whitening
from .networks import DENOISER_CONFIG, DenoiserConfig, build_network
from .objectives import OBJECTIVE_CONFIG, ObjectiveConfig, build_objective
from .uncertainty import Uncertainty, UncertaintyConfig, uncertain_loss

WhiteningKind = Literal["none", "scalar", "channel"]

MODEL_CARD = """---
{{ card_data }}
---

# Latent diffusion model

A denoiser of the latents of an image autoencoder, trained with wavelatent.
`config.json` says how it is built; the whitening of the latents is part of the weights. The images come from the
autoencoder that the run's `inputs.json` names.

```python
from wavelatent.stage2_diffusion.model import LatentDiffusion

model = LatentDiffusion.from_pretrained("path/to/this/folder").eval()
denoised = model.denoise(x, sigma)        # whitened latents [B, C, h, w] at noise levels sigma [B]
raw = model.whitening.inverse(denoised)   # what the autoencoder decodes
```
"""


class Losses(NamedTuple):
    """What a training step computes per sample, each ``[B]`` float32."""

    total: Tensor
    """What is minimised."""
    denoising: Tensor
    """The weighted mean squared error alone, which ``total`` is but for a learned uncertainty."""


class LatentDiffusion(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="wavelatent",
    tags=["latent-diffusion", "unconditional-image-generation"],
    model_card_template=MODEL_CARD,
    coders={Config: (lambda config: config.model_dump(mode="json"), lambda plain: plain)},
):
    """A network, the objective that turns it into a denoiser, and the whitening of its latents.

    Everything it is made from is kept in ``config.json``, so `from_pretrained` needs the folder alone.

    Args:
        denoiser: the network, or its plain dict.
        objective: the training objective, or its plain dict.
        latent_shape: ``(C, h, w)`` of one latent.
        num_classes: 0 for an unconditional model.
        whitening: which kind.
        statistics: ``{"mean": [C], "std": [C]}`` of the raw latents over the whole training set; None is mean 0, std 1.
        uncertainty: the learned weight of every noise level, or its plain dict; None is none.

    Raises ``ValueError`` where the latents' size does not suit the network.
    """

    def __init__(
        self,
        denoiser: DenoiserConfig | dict[str, Any],
        objective: ObjectiveConfig | dict[str, Any],
        latent_shape: Sequence[int],
        num_classes: int = 0,
        whitening: WhiteningKind = "channel",
        statistics: Mapping[str, Sequence[float]] | None = None,
        uncertainty: UncertaintyConfig | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        self.latent_shape = (channels, height, width)
        self.num_classes = num_classes
        self.whitening = Whitening.from_statistics(
            whitening, statistics or {"mean": [0.0] * channels, "std": [1.0] * channels}
        )
        self.objective = build_objective(OBJECTIVE_CONFIG.validate_python(objective), channels * height * width)
        self.network = build_network(DENOISER_CONFIG.validate_python(denoiser), channels, num_classes)
        self.network.check_size(height, width)
        learned = None if uncertainty is None else UncertaintyConfig.model_validate(uncertainty)
        self.uncertainty = None if learned is None else Uncertainty(learned)

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the expected whitened latents given ``x [B, C, h, w] = latents + sigma * noise``, ``sigma [B]``.

        Computed in float32 whatever the type of ``x``, which the result has.
        """
        denoised = denoise_with(self.network, self.objective.preconditioning, x.float(), sigma.float(), labels)
        return denoised.to(x.dtype)

    def forward(self, raw: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None = None) -> Losses:
        """Return the training losses of raw latents at given noise levels ``[B]`` and noise.

        This is the forward pass that a distributed wrapper must see; it draws nothing.
        """
        latents = self.whitening(raw)
        noisy = latents + expand_like(sigma, latents) * noise
        preconditioning = self.objective.preconditioning
        loss = denoising_loss(self.denoise(noisy, sigma, labels), latents, preconditioning.weight(sigma))
        if self.uncertainty is None:
            return Losses(loss, loss)
        return Losses(uncertain_loss(loss, self.uncertainty(preconditioning.scalings(sigma).noise)), loss)

    def after_step(self) -> None:
        """Do what the network asks for after every step of the optimiser."""
        self.network.after_step()

    def draw_noise(self, raw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw what a training step adds to ``raw``: noise levels ``[B]`` and noise like ``raw``, on its device."""
        sigma = self.objective.draw_sigma(len(raw), generator)
        noise = torch.randn(raw.shape, generator=generator, device=generator.device)
        return sigma.to(raw.device), noise.to(raw.device)
