"""What an autoencoder makes of images, and how far that is from them, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import Diverged, UsageError
from ..common.evaluation import PSNR_PROTOCOL, SSIM_PROTOCOL
from ..common.image_metrics import psnr, ssim
from ..common.images import ImageData, read_batch, to_float, to_uint8
from ..common.lpips_metric import PerceptualDistance
from ..common.runtime import MixedPrecision, autocast
from ..stage1_autoencoder.autoencoder import Autoencoder
from ..stage1_autoencoder.tiling import TiledAutoencoder

FIGURES = ("psnr", "ssim", "lpips")


class Reconstructions:
    """The images at ``indices`` of ``data`` through the posterior's mode of ``autoencoder``, as uint8.

    Attributes:
        lpips: measures the third of :data:`FIGURES`; None leaves it out.
        not_computed: why a figure could not be computed in this process.

    Raises:
        UsageError: the images do not divide by the autoencoder's downsampling factor.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | TiledAutoencoder,
        data: ImageData,
        indices: Sequence[int],
        device: torch.device,
        mixed_precision: MixedPrecision,
    ) -> None:
        _check_divides(data.size, autoencoder.downsampling)
        self.autoencoder, self.data, self.indices = autoencoder, data, indices
        self.device, self.mixed_precision = device, mixed_precision
        self.lpips: PerceptualDistance | None = None
        self.not_computed: dict[str, str] = {}

    def protocol(self) -> dict[str, Any]:
        """Return what identifies the autoencoder and how it is run."""
        tile = {"tile": self.autoencoder.tile} if isinstance(self.autoencoder, TiledAutoencoder) else {}
        return {"fingerprint": self.autoencoder.fingerprint(), "mixed_precision": self.mixed_precision, **tile}

    def __call__(self, numbers: range) -> tuple[Tensor, Tensor]:
        """Return the :data:`FIGURES` float64 ``[B,3]`` (NaN for one not computed) and reconstructions ``[B,3,H,W]``."""
        originals, reconstructions = self.pairs(self.indices[numbers.start : numbers.stop])
        return self.compare(originals, reconstructions), reconstructions

    @torch.no_grad()
    def pairs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return originals and reconstructions, uint8 ``[B,3,H,W]`` on the device: all figures are computed there.

        Raises:
            Diverged: a reconstruction is not finite, which 8 bits would show as black, and measure.
        """
        originals = to_uint8(read_batch(self.data, indices).images).to(self.device)
        with autocast(self.device, self.mixed_precision):
            decoded = self.autoencoder.decode(self.autoencoder.encode(to_float(originals)).mode())
        if broken := (~decoded.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
            raise Diverged(
                f"the reconstruction of image {indices[broken[0]]} is not finite: measure with --mixed-precision no, "
                "or train the autoencoder again"
            )
        return originals, to_uint8(decoded)

    @torch.no_grad()
    def compare(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the :data:`FIGURES` of pairs uint8 ``[B,3,H,W]``, float64 ``[B,3]`` on the CPU."""
        nothing = torch.full((len(originals),), torch.nan, dtype=torch.float64)

        def measured(name: str, measure: Callable[[], Tensor]) -> Tensor:
            try:
                return measure().double().cpu()
            except ValueError as error:  # images too small for it
                self.not_computed[name] = str(error)
                return nothing

        lpips = self.lpips
        columns = [
            measured("psnr", lambda: psnr(reconstructions, originals)),
            measured("ssim", lambda: ssim(reconstructions, originals)),
            nothing
            if lpips is None
            else measured("lpips", lambda: lpips(to_float(reconstructions), to_float(originals))),
        ]
        return torch.stack(columns, dim=1)

    def by_figure(self, values: Tensor) -> dict[str, Tensor]:
        """Return those of the :data:`FIGURES` that were computed, ``[N]`` each, of ``values`` ``[N,3]``."""
        columns = dict(zip(FIGURES, values.T, strict=True))
        return {name: column for name, column in columns.items() if not column.isnan().any()}

    def figure_protocol(self) -> dict[str, Any]:
        """Return how the figures are defined."""
        network = {} if self.lpips is None else {"lpips_sha256": self.lpips.weights_sha256}
        return {"psnr": PSNR_PROTOCOL, "ssim": SSIM_PROTOCOL, **network}


def _check_divides(size: int, factor: int) -> None:
    if size % factor:
        nearest = max(factor, size // factor * factor)
        raise UsageError(
            f"images of {size} px do not divide by the autoencoder's downsampling factor {factor}; use --size {nearest}"
        )
