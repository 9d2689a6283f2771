"""The sections of the latent health report that need nothing but latents: each a function of :class:`LatentData`.

Adding one costs a function and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from .health import LatentData, Section
from .health_distribution import gaussianity
from .health_scale import posterior, scale
from .health_spectrum import spectrum
from .health_structure import correlation, geometry

LATENT_SECTIONS: dict[str, Callable[[LatentData], Section]] = {
    "scale": scale,
    "posterior": posterior,
    "gaussianity": gaussianity,
    "correlation": correlation,
    "spectrum": spectrum,
    "geometry": geometry,
}
"""By name, in the report's order.

Latents that are not finite are left out, and ``scale`` says so; fewer than two images are refused
(:class:`~wavelatent.common.errors.WavelatentError`). Nothing is random from call to call, and data are not changed.
"""
