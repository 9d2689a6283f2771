"""How far a few seeds bear out a difference: means, spreads, and a paired t interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t with 1, 2, ... 30 degrees of freedom (NIST/SEMATECH e-Handbook of Statistical
Methods, section 1.3.6.7.2)."""


def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t; above 30 degrees that of 30, which is at most 4 % too wide."""
    return T_975[min(degrees, len(T_975)) - 1]


@dataclass(frozen=True)
class Spread:
    """Values by seed, their mean, and their sample standard deviation (None for a single value)."""

    values: tuple[float, ...]
    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(tuple(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Difference:
    """A variant minus the baseline, seed by seed, with the 95 % interval of its mean (None for a single seed)."""

    spread: Spread
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, variant: Sequence[float], baseline: Sequence[float]) -> Difference:
        """Pair the two by position: ``mean +- t s / sqrt(n)`` of the differences, with ``n - 1`` degrees."""
        spread = Spread.of([a - b for a, b in zip(variant, baseline, strict=True)])
        if spread.std is None:
            return cls(spread, None)
        count = len(spread.values)
        half = t_quantile(count - 1) * spread.std / math.sqrt(count)
        return cls(spread, (spread.mean - half, spread.mean + half))

    def verdict(self, *, higher_is_better: bool) -> str:
        """Return ``better`` or ``worse`` where the interval leaves out 0, else ``inside the spread``."""
        if self.interval is None:
            return "one seed: no spread"
        low, high = self.interval
        if low <= 0 <= high:
            return "inside the spread"
        return "better" if (low > 0) == higher_is_better else "worse"
