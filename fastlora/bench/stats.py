"""Medians, percentiles, and a test of whether two lists of samples come from one distribution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_EXACT = 60


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
    """Two-sided p-value of the Mann-Whitney U test, with midranks for ties; exact for up to 60 samples.

    A normal approximation, which larger lists get, has no small p-values for short ones: with 8 samples
    each, 9e-4 where exactly 2 of 12870 orders are as far apart.

    Args:
        a (Sequence[float]): samples.
        b (Sequence[float]): samples.

    Returns:
        float: near 0 when one list lies above the other, 1.0 where either is empty.
    """
    if not a or not b:
        return 1.0
    _, inverse, counts = np.unique(np.asarray([*a, *b]), return_inverse=True, return_counts=True)
    twice = (2 * np.cumsum(counts) - counts + 1)[inverse.reshape(-1)]  # twice the midranks
    n, m = len(a), len(b)
    middle = n * (n + m + 1)
    far = abs(int(twice[:n].sum()) - middle)
    if n + m > _EXACT:
        # Of n ranks drawn without putting back; a sum moves in steps of 1, twice it of 2.
        deviation = math.sqrt(n * m / (n + m - 1) * float(np.var(twice)))
        return math.erfc(max(0, far - 1) / deviation / math.sqrt(2)) if deviation else 1.0
    sums = _rank_sums(tuple(sorted(twice.tolist())), n)
    extreme = np.abs(np.arange(len(sums)) - middle) >= far
    return float(sums[extreme].sum() / sums.sum())


@functools.lru_cache(maxsize=64)
def _rank_sums(ranks: tuple[int, ...], n: int) -> npt.NDArray[np.float64]:
    """How many choices of ``n`` of the ranks have each sum."""
    ways = np.zeros((n + 1, sum(ranks) + 1))
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, :-rank].copy()
    last: npt.NDArray[np.float64] = ways[n]
    return last


def least_p(n: int, m: int) -> float:
    """The smallest p-value that so many samples can give."""
    return min(1.0, 2 / math.comb(n + m, n))
