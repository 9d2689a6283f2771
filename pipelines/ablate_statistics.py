"""How far a few seeds bear out a difference: means, spreads, and a paired t interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


def t_quantile(degrees: int, probability: float = 0.975) -> float:
    """Return the quantile of Student's t at ``probability``, by default the two-sided 95 % one."""
    return float(stdtrit(degrees, probability))


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
