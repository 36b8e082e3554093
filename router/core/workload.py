"""How long prompts are: the distribution that thresholds and ratios are chosen on (paper, section 5.1).

Lengths here are *uncached* tokens, what is left of a prompt after prefix matching (the paper's L), unless
the caller says otherwise. Three kinds: the paper's truncated log-normal, a sample (a trace), and a histogram
(what a router exports); all answer the same questions.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Protocol

#: Points that stand for a whole distribution in means of functions; 2,000 keep the paper's means to 0.1 %.
POINTS = 2000


class Lengths(Protocol):
    """A distribution of prompt lengths in tokens."""

    def above(self, tokens: float) -> float:
        """Return p = P(L > tokens)."""
        ...

    def mass_above(self, tokens: float) -> float:
        """Return E[L; L > tokens]: the tokens of the prompts above, per prompt of any length."""
        ...

    def quantile(self, share: float) -> float:
        """Return the length that `share` (0..1) of the prompts do not exceed."""
        ...

    def scaled(self, factor: float) -> Lengths:
        """Return the distribution of `factor` (> 0) times the length."""
        ...


def mean(lengths: Lengths) -> float:
    """Return E[L]."""
    return lengths.mass_above(0.0)


def mean_above(lengths: Lengths, tokens: float) -> float:
    """Return l_long = E[L | L > tokens] (Table 4); 0 when no prompt is that long."""
    share = lengths.above(tokens)
    return lengths.mass_above(tokens) / share if share > 0 else 0.0


def mean_below(lengths: Lengths, tokens: float) -> float:
    """Return l_short = E[L | L <= tokens] (Table 4); 0 when no prompt is that short."""
    share = 1.0 - lengths.above(tokens)
    return (mean(lengths) - lengths.mass_above(tokens)) / share if share > 0 else 0.0


def expected(lengths: Lengths, value: Callable[[float], float], low: float = 0.0, high: float = 1.0) -> float:
    """Return the mean of `value` over the prompts between quantiles `low` and `high`. O(POINTS)."""
    step = (high - low) / POINTS
    return math.fsum(value(lengths.quantile(low + (i + 0.5) * step)) for i in range(POINTS)) / POINTS


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(mu, sigma)) truncated to [low, high] tokens: prompts outside do not occur."""

    mu: float
    sigma: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 < self.low < self.high and math.isfinite(self.mu + self.high)):
            raise ValueError(f"{self}: accepted are sigma > 0 and 0 < low < high")
        if self._cdf(self.high) - self._cdf(self.low) < 1e-9:
            raise ValueError(f"{self}: nothing of the distribution lies between low and high")

    def _cdf(self, tokens: float, shift: float = 0.0) -> float:
        return NormalDist().cdf((math.log(tokens) - self.mu) / self.sigma - shift)

    def _clip(self, tokens: float) -> float:
        return min(max(tokens, self.low), self.high)

    def above(self, tokens: float) -> float:
        """Return P(L > tokens)."""
        bottom, top = self._cdf(self.low), self._cdf(self.high)
        return (top - self._cdf(self._clip(tokens))) / (top - bottom)

    def mass_above(self, tokens: float) -> float:
        """Return E[L; L > tokens]: the log-normal's partial expectation."""
        bottom, top = self._cdf(self.low), self._cdf(self.high)
        part = self._cdf(self.high, self.sigma) - self._cdf(self._clip(tokens), self.sigma)
        return math.exp(self.mu + self.sigma**2 / 2) * part / (top - bottom)

    def quantile(self, share: float) -> float:
        """Return the length that `share` of the prompts do not exceed."""
        bottom, top = self._cdf(self.low), self._cdf(self.high)
        at = bottom + min(max(share, 0.0), 1.0) * (top - bottom)
        if not 0 < at < 1:
            return self.low if at <= 0 else self.high
        return self._clip(math.exp(self.mu + self.sigma * NormalDist().inv_cdf(at)))

    def scaled(self, factor: float) -> LogNormal:
        """Return the distribution of `factor` times the length."""
        return LogNormal(self.mu + math.log(factor), self.sigma, self.low * factor, self.high * factor)


#: The case study's workload: mean 26.8K, [128, 128K] (paper, section 5.1).
PAPER = LogNormal(mu=9.90, sigma=1.00, low=128, high=128 * 1024)


@dataclass(frozen=True, slots=True)
class Sample:
    """A trace: the lengths that occurred, each as likely as any other."""

    lengths: tuple[float, ...]
    _sums: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.lengths))
        if not ordered or not (ordered[0] > 0 and math.isfinite(ordered[-1])):
            raise ValueError("a sample needs lengths, each > 0")
        sums = [0.0]
        for length in ordered:
            sums.append(sums[-1] + length)
        object.__setattr__(self, "lengths", ordered)
        object.__setattr__(self, "_sums", tuple(sums))

    def above(self, tokens: float) -> float:
        """Return P(L > tokens)."""
        return 1.0 - bisect.bisect_right(self.lengths, tokens) / len(self.lengths)

    def mass_above(self, tokens: float) -> float:
        """Return E[L; L > tokens]."""
        at = bisect.bisect_right(self.lengths, tokens)
        return (self._sums[-1] - self._sums[at]) / len(self.lengths)

    def quantile(self, share: float) -> float:
        """Return the length that `share` of the prompts do not exceed."""
        at = math.ceil(min(max(share, 0.0), 1.0) * len(self.lengths)) - 1
        return self.lengths[max(0, at)]

    def scaled(self, factor: float) -> Sample:
        """Return the distribution of `factor` times the length."""
        return Sample(tuple(length * factor for length in self.lengths))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between bounds, spread evenly inside each bucket.

    Attributes:
        bounds: [n + 1] tokens, growing, the first >= 0.
        counts: [n] prompts in (bounds[i], bounds[i + 1]], not all 0.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        growing = all(a < b for a, b in pairwise(self.bounds))
        if len(self.bounds) != len(self.counts) + 1 or not growing or not self.bounds[0] >= 0:
            raise ValueError("bounds must grow from >= 0 and be one more than counts")
        if not all(c >= 0 and math.isfinite(c) for c in self.counts) or not sum(self.counts) > 0:
            raise ValueError("counts must be >= 0 and not all 0")

    def _buckets(self) -> Sequence[tuple[float, float, float]]:
        total = sum(self.counts)
        return [(a, b, c / total) for a, b, c in zip(self.bounds, self.bounds[1:], self.counts, strict=False)]

    def above(self, tokens: float) -> float:
        """Return P(L > tokens)."""
        return math.fsum(c * (b - min(max(tokens, a), b)) / (b - a) for a, b, c in self._buckets())

    def mass_above(self, tokens: float) -> float:
        """Return E[L; L > tokens]."""
        parts = []
        for a, b, c in self._buckets():
            start = min(max(tokens, a), b)
            parts.append(c * (b - start) / (b - a) * (b + start) / 2)
        return math.fsum(parts)

    def quantile(self, share: float) -> float:
        """Return the length that `share` of the prompts do not exceed."""
        left = min(max(share, 0.0), 1.0)
        buckets = [bucket for bucket in self._buckets() if bucket[2] > 0]
        for a, b, c in buckets:
            if left <= c:
                return a + (b - a) * left / c
            left -= c
        return buckets[-1][1]

    def scaled(self, factor: float) -> Histogram:
        """Return the distribution of `factor` times the length."""
        return Histogram(tuple(bound * factor for bound in self.bounds), self.counts)
