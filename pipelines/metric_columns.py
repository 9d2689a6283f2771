"""The metrics that tables of several runs hold: their names, which way is better, and the scale that they vary on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["ratio", "difference"]


@dataclass(frozen=True)
class Column:
    """How a metric stands in a table, and how two of its values are compared.

    Attributes:
        label: what a paper calls it.
        digits: decimals that it is printed with.
        higher_is_better: whether a larger value is the better one.
        stage: 1 where it measures an autoencoder's reconstructions, 2 where it measures samples.
        scale: whether two values are compared by their ``ratio``, as distances are, whose spread grows with them, or
            by their ``difference``.
    """

    label: str
    digits: int
    higher_is_better: bool
    stage: Literal[1, 2]
    scale: Scale

    @property
    def heading(self) -> str:
        """The label and the direction that is better."""
        return f"{self.label} {'↑' if self.higher_is_better else '↓'}"


OF_VARIANTS = {
    "kid_mean": Column("KID", 5, False, 2, "ratio"),
    "fid": Column("FID", 2, False, 2, "ratio"),
    "precision": Column("precision", 3, True, 2, "difference"),
    "recall": Column("recall", 3, True, 2, "difference"),
    "rfid": Column("rFID", 2, False, 1, "ratio"),
    "rfid_extrapolated": Column("rFID∞", 2, False, 1, "ratio"),
    "psnr": Column("PSNR (dB)", 2, True, 1, "difference"),
    "ssim": Column("SSIM", 4, True, 1, "difference"),
    "lpips": Column("LPIPS", 4, False, 1, "ratio"),
}
"""The columns of a study's table of variants, by their name in ``metrics.json``."""

BESIDE = ("rfid_extrapolated",)
"""Of these, what is shown where it was computed and decides nothing.

A line through rFID at several numbers of images leaves rFID∞ at infinitely many (as FID∞ of Chong and Forsyth 2020).
The bias at few images depends on how far reconstructions keep to their originals, so it differs between autoencoders.
"""

METRICS = {name: column for name, column in OF_VARIANTS.items() if name not in BESIDE}
"""All others: what every table has."""

ON_REQUEST = {
    "density": Column("density", 3, True, 2, "difference"),
    "coverage": Column("coverage", 3, True, 2, "difference"),
    "fd_dinov2": Column("FD-DINOv2", 1, False, 2, "ratio"),
}
"""What a report shows beside these where it was measured."""
