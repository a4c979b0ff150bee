"""Intervals and tests over seeds: the arithmetic behind every verdict, and nothing else.

A sample holds one number per seed, in the unit of its column. Intervals are Student's t intervals.
The tests are the one-sided t tests that the intervals invert, so that an interval and its p-value
can never disagree.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Sample:
    """`n` seeds with their mean and standard deviation (n - 1 in the denominator).

    `mean` is nan for n = 0, `sd` is nan for n < 2. `exact`: a count or a closed form, in which the
    seeds have no part. Of anything else, numbers without any spread do not tell how far off they
    are: there is no interval, and no test proves anything.
    """

    n: int
    mean: float
    sd: float
    exact: bool = False

    @classmethod
    def of(cls, values: Iterable[float]) -> "Sample":
        # Sorted, so that the last bits of the sums do not depend on the order of the rows.
        data = np.sort(np.fromiter(values, dtype=np.float64))
        n = len(data)
        mean = float(data.mean()) if n else math.nan
        return cls(n, mean, float(data.std(ddof=1)) if n > 1 else math.nan)

    def half(self, level: float = 0.95) -> float:
        """Half the width of the two-sided t interval at `level`; nan for n < 2."""
        if self.n < 2:
            return math.nan
        quantile = float(student.ppf(0.5 + level / 2, self.n - 1))
        return quantile * self.sd / math.sqrt(self.n)

    @property
    def still(self) -> bool:
        """Measured without any spread over its seeds, of which there are two at least."""
        return self.n > 1 and self.sd == 0 and not self.exact

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided; nan for n < 2 and where there is no spread to tell it by."""
        if self.still:
            return math.nan, math.nan
        half = self.half(level)
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> float:
        """p-value of the one-sided t test that the mean lies above `bound`; 1 for n < 2, and
        where a measured number has no spread."""
        if self.n < 2 or self.still:
            return 1.0
        distance = self.mean - bound
        if self.exact:
            return 0.0 if distance > 0 else 1.0
        return float(student.sf(distance / (self.sd / math.sqrt(self.n)), self.n - 1))

    def p_below(self, bound: float) -> float:
        """p-value of the one-sided t test that the mean lies below `bound`; 1 for n < 2."""
        return replace(self, mean=-self.mean).p_above(-bound)


def paired(terms: Sequence[tuple[float, Mapping[int, float]]]) -> dict[int, float]:
    """The sum of factor times value, taken within a seed: only seeds that every term has count.

    terms: (factor, {seed: value}). Returns {seed: sum}.
    """
    shared = set.intersection(*(set(values) for _, values in terms)) if terms else set()
    return {
        seed: math.fsum(factor * values[seed] for factor, values in terms)
        for seed in sorted(shared)
    }


def contrast(terms: Sequence[tuple[float, Mapping[int, float]]]) -> Sample:
    """The sample of the sums that ``paired`` takes."""
    return Sample.of(paired(terms).values())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, made monotone, and cut at 1.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted
