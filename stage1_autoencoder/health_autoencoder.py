"""The sections of the latent health report that run the autoencoder, by name.

Each takes the autoencoder in evaluation mode (what it needs of it is :class:`~.health_passes.Coder`), runs it where it
is, on a subset of the images that its figures state, and draws from generators of its own: the same data give the same
figures.
"""

from __future__ import annotations

from typing import Protocol

from .health import LatentData, Section
from .health_equivariance import equivariance
from .health_locality import locality
from .health_passes import Coder, Lpips
from .health_reconstruction import reconstruction
from .health_robustness import robustness


class AutoencoderSection(Protocol):
    """One section: what it measures of an autoencoder."""

    def __call__(self, autoencoder: Coder, data: LatentData, *, batch_size: int, lpips: Lpips | None) -> Section:
        """Measure ``autoencoder`` on ``data``.

        Args:
            autoencoder: in evaluation mode.
            data: images and the latents that the autoencoder made of them.
            batch_size: images or latents in a pass; the figures do not depend on it.
            lpips: the perceptual distance, or None where its weights are missing: its figures are None then.
        """
        ...


AUTOENCODER_SECTIONS: dict[str, AutoencoderSection] = {
    "equivariance": equivariance,
    "robustness": robustness,
    "locality": locality,
    "reconstruction": reconstruction,
}
