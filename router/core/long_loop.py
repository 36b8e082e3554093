"""The slow control loop: from what was seen over minutes, propose a better threshold and worker ratio.

Rests on the paper's section 4.5 and on router/core/throughput.py: the distribution of uncached lengths seen
and the stage profiles give, by eqs. 3 to 8, the threshold t and the split N_p/N_d of the home instances that
sustain the most requests. A proposal says what it would gain. Prefill sites are never converted.

    nothing is proposed until `min_requests` were seen since the last change
    threshold    moves by `damping` of the way (in log space), when the whole way would gain `min_gain`
    ratio        one worker at a time, to the busier stage, when that gains `min_gain_ratio`, the same was
                 wanted `agree` times in a row, and `cooldown_s` is over

What was seen fades by half with each evaluation, so that a changed workload is followed. Pure: no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from router.core.optimum import by_grid
from router.core.throughput import Stage, System, Throughput, split, throughput
from router.core.workload import Histogram

#: Bounds of the histogram: four to each doubling, 16 tokens to 4 Mi; others count at the ends.
BOUNDS = (0.0, *(16.0 * 2 ** (i / 4) for i in range(73)))


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """How eagerly the loop acts; see the table above."""

    min_requests: int = 200
    min_gain: float = 0.02
    damping: float = 0.5
    min_gain_ratio: float = 0.05
    agree: int = 3
    cooldown_s: float = 900.0


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Busy share of the home site's stages since the last evaluation, 0 to 1, queues counting as busy."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to change.

    Attributes:
        threshold_tokens: t from now on.
        prefill, decode: home instances of each role.
        gain_ratio: requests/s sustained after over before, less 1.
        bottleneck: the stage that limits after the change.
        convert: the ratio differs from the present one.
    """

    threshold_tokens: int
    prefill: int
    decode: int
    gain_ratio: float
    requests_per_s: float
    bottleneck: Stage
    convert: bool


class LongLoop:
    """Counts prompts as they come, and proposes when asked; its owner applies the proposal."""

    def __init__(self, limits: LoopLimits | None = None) -> None:
        self.limits = limits or LoopLimits()
        self._counts = [0.0] * (len(BOUNDS) - 1)
        self._seen = 0
        self._cached = self._uncached = 0.0
        self._wanted = 0
        self._agreed = 0
        self._converted_s = float("-inf")

    def observe(self, uncached_tokens: int, cached_tokens: int = 0) -> None:
        """Count one prompt: what the home site would have to compute of it, and what it holds."""
        doublings = math.log2(max(uncached_tokens, 1) / BOUNDS[1])
        place = 0 if doublings <= 0 else 1 + math.floor(4 * doublings)
        self._counts[min(place, len(self._counts) - 1)] += 1.0
        self._seen += 1
        self._cached += cached_tokens
        self._uncached += uncached_tokens

    def lengths(self) -> Histogram | None:
        """Return the distribution seen, None before the first prompt."""
        return Histogram(BOUNDS, tuple(self._counts)) if any(self._counts) else None

    def cumulative(self) -> list[tuple[float, float]]:
        """Return (tokens, prompts not longer), for people and for `prfaas plan`."""
        return list(zip(BOUNDS[1:], accumulate(self._counts), strict=True))

    def propose(
        self, system: System, threshold_tokens: int, busy: Utilisation, now_s: float
    ) -> Proposal | None:
        """Return a change worth making to `system` at its present threshold, None when there is none.

        The system's cached ratio is replaced by the one that was seen. O(thresholds): some milliseconds.
        """
        lengths = self.lengths()
        if lengths is None or self._seen < self.limits.min_requests:
            return None
        system = replace(system, cached_ratio=self._cached / max(1.0, self._uncached))
        before = throughput(system, split(lengths, threshold_tokens))
        self._fade()
        stay = by_grid([system], lengths)
        move = self._ratio(system, stay, lengths, busy, now_s)
        found, base = (move, stay) if move is not None else (stay, before)
        if move is None and _gain(found, before) < self.limits.min_gain:
            return None
        target = found.at.threshold
        if move is None:
            step = self.limits.damping * math.log(max(1.0, target) / max(1.0, float(threshold_tokens)))
            target = max(1.0, float(threshold_tokens)) * math.exp(step)
        after = throughput(found.system, split(lengths, target))
        if after.requests_per_s <= before.requests_per_s:  # half of the way is no better: a narrow peak
            target, after = found.at.threshold, found
        self._seen = 0
        return Proposal(
            round(target),
            round(found.system.prefill),
            round(found.system.decode),
            _gain(after, before if base is before else base),
            after.requests_per_s,
            after.bottleneck,
            move is not None,
        )

    def _ratio(
        self, system: System, stay: Throughput, lengths: Histogram, busy: Utilisation, now_s: float
    ) -> Throughput | None:
        """Return the best one with one home instance converted, when it is time for it."""
        step = 1 if busy.prefill > busy.decode else -1
        prefill, decode = system.prefill + step, system.decode - step
        found = None
        if prefill >= 0 and decode >= 1:
            found = by_grid([replace(system, prefill=prefill, decode=decode)], lengths)
        if found is None or _gain(found, stay) < self.limits.min_gain_ratio:
            self._wanted = self._agreed = 0
            return None
        self._agreed = self._agreed + 1 if self._wanted == step else 1
        self._wanted = step
        if self._agreed < self.limits.agree or now_s - self._converted_s < self.limits.cooldown_s:
            return None
        self._converted_s, self._agreed = now_s, 0
        return found

    def _fade(self) -> None:
        self._counts = [count / 2 for count in self._counts]
        self._cached /= 2
        self._uncached /= 2


def _gain(after: Throughput, before: Throughput) -> float:
    if not before.requests_per_s:
        return math.inf if after.requests_per_s else 0.0
    return after.requests_per_s / before.requests_per_s - 1.0
