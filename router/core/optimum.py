"""The best threshold t and the best split of the home site into prefill and decode (paper, section 3).

Two ways that must agree: an exhaustive search over (t, N_p), as the paper does it, and the crossing
conditions (7) Theta_prfaas / p = Theta_pd-p / (1 - p) and (8) Theta_prfaas + Theta_pd-p = Theta_pd-d. Among
equally fast points the one with the most prefill to spare is taken, so a decode-bound system still gets the t
of (7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from router.core.throughput import Split, System, Throughput, split, throughput
from router.core.workload import Lengths

#: Quantiles of the workload at which thresholds are tried, and the finer steps between the best's neighbours.
COARSE, FINE = 256, 64


def thresholds(lengths: Lengths, steps: int = COARSE) -> list[float]:
    """Return `steps` + 1 thresholds at even quantiles: 0 offloads all, the longest prompt none."""
    return sorted({0.0, *(lengths.quantile(i / steps) for i in range(1, steps + 1))})


#: What is to be as large as can be.
Worth = Callable[[Throughput], float]


def sustained(found: Throughput) -> float:
    """Return Lambda_max, what the paper optimises."""
    return found.requests_per_s


def better(a: Throughput, b: Throughput, worth: Worth = sustained) -> bool:
    """Say whether `a` is worth more than `b`, or as much with more prefill to spare."""
    if not math.isclose(worth(a), worth(b), rel_tol=1e-9):
        return worth(a) > worth(b)
    return a.prefill_capacity > b.prefill_capacity


def best(candidates: Iterable[Throughput], worth: Worth = sustained) -> Throughput:
    """Return the first best of `candidates` (at least one)."""
    found: Throughput | None = None
    for candidate in candidates:
        if found is None or better(candidate, found, worth):
            found = candidate
    if found is None:
        raise ValueError("no candidates")
    return found


def ratios(system: System) -> list[System]:
    """Return every way to split the home instances into whole prefill and decode ones (decode > 0)."""
    total = system.prefill + system.decode
    return [replace(system, prefill=n, decode=total - n) for n in range(math.ceil(total))]


def by_grid(systems: Sequence[System], lengths: Lengths, worth: Worth = sustained) -> Throughput:
    """Search all thresholds with all of `systems` (one, or `ratios`). O(systems x (COARSE + FINE))."""
    tried = thresholds(lengths)
    splits = [split(lengths, t) for t in tried]
    coarse = best((throughput(system, at) for system in systems for at in splits), worth)
    at = tried.index(coarse.at.threshold)
    low, high = tried[max(0, at - 1)], tried[min(len(tried) - 1, at + 1)]
    finer = [split(lengths, low + (high - low) * i / FINE) for i in range(FINE + 1)]
    return best([coarse, *(throughput(coarse.system, s) for s in finer)], worth)


def by_crossing(system: System, lengths: Lengths) -> Throughput:
    """Solve (7) for the system's own N_p and N_d.

    Where (7) has no solution one of the ends is best: nothing offloaded, or everything.
    """
    tried = thresholds(lengths, COARSE // 4)
    at = [split(lengths, t) for t in tried]
    found = [throughput(system, s) for s in (at[0], at[-1])]
    for low, high in pairwise(at):
        if _prefers_local(system, low) != _prefers_local(system, high):
            found.append(throughput(system, _cross(system, lengths, low, high)))
    return best(found)


def _prefers_local(system: System, at: Split) -> bool:
    """Say whether the remote side binds at this threshold: (7) with < for =."""
    now = throughput(system, at)
    return now.remote * (1.0 - at.p) < now.local * at.p


def _cross(system: System, lengths: Lengths, low: Split, high: Split) -> Split:
    """Halve [low, high] until the two sides of (7) meet; of the last pair return the better."""
    below = _prefers_local(system, low)
    for _ in range(60):
        if high.threshold - low.threshold <= 1e-6 * high.threshold:
            break
        middle = split(lengths, (low.threshold + high.threshold) / 2)
        if _prefers_local(system, middle) == below:
            low = middle
        else:
            high = middle
    return best(throughput(system, s) for s in (low, high)).at


def by_crossings(system: System, lengths: Lengths) -> Throughput:
    """Solve (7) and (8) together: the N_p at which prefill and decode are equally fast, rounded either way.

    Prefill capacity grows and decode capacity shrinks with N_p, so the two cross once; of the whole numbers
    around the crossing the better one is returned.
    """
    total = system.prefill + system.decode
    low, high = 0, max(0, math.ceil(total) - 1)  # prefill binds at low, decode at high
    while high - low > 1:
        middle = (low + high) // 2
        found = by_crossing(replace(system, prefill=middle, decode=total - middle), lengths)
        if found.remote + found.local < found.decode:
            low = middle
        else:
            high = middle
    around = {max(0, low - 1), low, high}
    return best(by_crossing(replace(system, prefill=n, decode=total - n), lengths) for n in sorted(around))
