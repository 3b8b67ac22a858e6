"""Medians, percentiles, and a test of whether two lists of samples come from one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @property
    def noise(self) -> float:
        """Half of what lies between the percentiles, as a share of the median."""
        return (self.p80 - self.p20) / 2 / self.median if self.median else 0.0


def spread(samples: Sequence[float]) -> Spread:
    """Median, p20 and p80, each by linear interpolation; NaN without samples."""
    if not samples:
        return Spread(math.nan, math.nan, math.nan)
    return Spread(*(float(q) for q in np.quantile(np.asarray(samples), (0.5, 0.2, 0.8))))


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney U test, normal approximation with ties and continuity.

    Args:
        a (Sequence[float]): samples.
        b (Sequence[float]): samples.

    Returns:
        float: near 0 when one list lies above the other, 1.0 where either is empty.
    """
    n, m = len(a), len(b)
    if n == 0 or m == 0:
        return 1.0
    _, inverse, counts = np.unique(np.asarray([*a, *b]), return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    ranks = (upper - (counts - 1) / 2)[inverse.reshape(-1)]
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    total = n + m
    ties = float((counts.astype(float) ** 3 - counts).sum())
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))
