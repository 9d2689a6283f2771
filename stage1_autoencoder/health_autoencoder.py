"""The sections of the latent health report that run the autoencoder, by name.

Each takes the autoencoder in evaluation mode (what it needs of it is :class:`~.health_passes.Coder`), runs it where it
is, on a subset of the images that its figures state, and draws from generators of its own: the same data give the same
figures.
"""

from __future__ import annotations

import functools
from typing import Protocol

from .health import LatentData, Section, Verdict
from .health_equivariance import equivariance
from .health_locality import locality
from .health_passes import Coder, Lpips, NotFinite
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


def _or_not_finite(name: str, measure: AutoencoderSection) -> AutoencoderSection:
    """Return ``measure``, with one fault in the place of its findings where a pass of the autoencoder is not finite."""

    @functools.wraps(measure)
    def section(autoencoder: Coder, data: LatentData, *, batch_size: int, lpips: Lpips | None) -> Section:
        try:
            return measure(autoencoder, data, batch_size=batch_size, lpips=lpips)
        except NotFinite as error:
            verdict = Verdict(
                "fault",
                "not_finite_pass",
                f"The autoencoder cannot be measured here: {error}.",
                "fault: any NaN or infinity in what it encodes or decodes",
                "ours: such an image is lost, and every figure would be NaN",
            )
            return Section(name, {}, [verdict])

    return section


AUTOENCODER_SECTIONS: dict[str, AutoencoderSection] = {
    section.__name__: _or_not_finite(section.__name__, section)
    for section in (equivariance, robustness, locality, reconstruction)
}
