"""What a study knows of a finished cell: what the runner collects, the analysis reads and the report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .study_config import Levels


@dataclass(frozen=True)
class CellRecord:
    """One variant at one seed, measured, or failed.

    Attributes:
        variant: its name.
        levels: its level of every factor.
        seed: the seed.
        failed: why there are no metrics: a loss that was no longer finite, in which stage; None where there are.
        metrics: figures of the samples (``fid``, ``kid_mean``, ``precision``, ``recall``) and of the reconstructions
            (``rfid``, ``psnr``, ``ssim``, ``lpips``), by name.
        intervals: 95 % intervals over images of some of them.
        health: figures of the latent health report, ``section.figure`` -> value; verdicts that are faults or notes
            stand under ``verdicts``.
        verdicts: ``section: verdict name`` of the health report's faults and notes.
        cost: wall time of training (``autoencoder_seconds``, ``diffusion_seconds``) and of measuring
            (``reconstruction_seconds``, ``generation_seconds``, ``health_seconds``), and parameters of both stages.
        folders: where it is, relative to the study's folder: ``autoencoder``, ``latents``, ``diffusion``. Cells with
            the same autoencoder name the same folder.
        protocol: what both evaluations record of how they measured.
    """

    variant: str
    levels: Levels
    seed: int
    failed: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    health: Mapping[str, float] = field(default_factory=dict)
    verdicts: tuple[str, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)
