"""What the latent health report is made of: sections of figures, plots and verdicts, and the data behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Level = Literal["ok", "note", "fault"]
Figure = float | int | str | None | Sequence[float | int | None]
PlotKind = Literal["line", "bar", "image"]


@dataclass(frozen=True)
class LatentData:
    """Images and what an autoencoder made of them, on the CPU.

    Attributes:
        images: float ``[N, 3, H, W]`` in [-1, 1].
        mean: raw latents, the posterior's mean, float32 ``[N, C, h, w]``.
        std: the posterior's standard deviation, likewise; None where the encoder is deterministic.
        drawn: one draw from the posterior, or ``mean`` where there is none.
        bound: of a bounded bottleneck, the largest value that a latent can have; None without.
    """

    images: Tensor
    mean: Tensor
    std: Tensor | None
    drawn: Tensor
    bound: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One finding in plain words, with the threshold that decided it.

    Attributes:
        level: ``ok``, ``note`` (worth knowing) or ``fault`` (expect trouble in stage two).
        name: of the finding, one word for programs, such as ``dead_channel``; the same whatever the level.
        text: one plain sentence with the measured value in it.
        threshold: what would have been called otherwise, in words and numbers.
        source: of the threshold: a paper, or "ours".
    """

    level: Level
    name: str
    text: str
    threshold: str
    source: str


@dataclass(frozen=True)
class Plot:
    """What a plot shows; drawing it is the report's.

    Attributes:
        title: above it.
        series: ``{name: values}`` of equal length; of an ``image``, ``{name: rows of values}``.
        x: positions of the values; None counts them.
        kind: of the plot.
        labels: of the two axes.
        log: which axes are logarithmic: "", "x", "y" or "xy".
    """

    title: str
    series: Mapping[str, Sequence[float] | Sequence[Sequence[float]]]
    x: Sequence[float] | None = None
    kind: PlotKind = "line"
    labels: tuple[str, str] = ("", "")
    log: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Attributes:
        name: as in the JSON and for switching it off, such as ``scale``.
        figures: by name, as JSON values.
        verdicts: at least one.
        plots: in order.
    """

    name: str
    figures: Mapping[str, Figure]
    verdicts: Sequence[Verdict]
    plots: Sequence[Plot] = field(default=())
