"""Which prefixes are used most, in bounded memory.

Decides what a use is: of a prompt that matched m blocks, its prefixes of 1, 2, 4, ... and m blocks are used.
So a system prompt that many prompts share is found although each of them matches deeper. Counting is by
space-saving with batched eviction: `uses - error <= true uses <= uses`, until the counts are halved, which
they are now and then so that the list follows the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

from cache_service.core.ids import BlockHash

#: A longer prefix with at least so much of the uses stands for the shorter one.
_SAME_USE = 0.9


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A prefix by its last block; `blocks` is its length, `uses` may be too high by `error`."""

    last: BlockHash
    blocks: int
    uses: int
    error: int


class HotPrefixes:
    """The most used prefixes among those seen; holds at most 2 * `capacity` of them."""

    def __init__(self, *, capacity: int = 4096, halve_every: int = 1 << 20) -> None:
        self._capacity = capacity
        self._halve_every = halve_every
        #: Last block -> [uses, error, blocks, last block of the next shorter prefix].
        self._counts: dict[BlockHash, list[int]] = {}
        self._floor = 0
        #: Matches counted.
        self.observed = 0

    def __len__(self) -> int:
        return len(self._counts)

    def saw(self, hashes: Sequence[BlockHash], matched: int) -> None:
        """Count one use of the first `matched` blocks of `hashes`. O(log matched), amortised."""
        if not 0 < matched <= len(hashes):
            return
        self.observed += 1
        depth, above = 1, -1
        while True:
            last = hashes[depth - 1]
            counted = self._counts.get(last)
            if counted is None:
                self._counts[last] = [self._floor + 1, self._floor, depth, above]
            else:
                counted[0] += 1
            if depth == matched:
                break
            above = last
            depth = min(2 * depth, matched)
        if len(self._counts) > 2 * self._capacity:
            self._evict()
        if self.observed % self._halve_every == 0:
            self._halve()

    def top(self, number: int) -> list[HotPrefix]:
        """Return the most used prefixes, most used first; O(capacity)."""
        longer: dict[int, int] = {}
        for uses, _, _, above in self._counts.values():
            longer[above] = max(longer.get(above, 0), uses)
        own = (
            HotPrefix(last, blocks, uses, error)
            for last, (uses, error, blocks, _) in self._counts.items()
            if longer.get(last, 0) < _SAME_USE * uses
        )
        return nlargest(number, own, key=lambda hot: (hot.uses, hot.blocks, hot.last))

    def _evict(self) -> None:
        kept = nlargest(self._capacity, self._counts.items(), key=lambda item: item[1][0])
        gone = self._counts.keys() - {last for last, _ in kept}
        self._floor = max(self._floor, max(self._counts[last][0] for last in gone))
        self._counts = dict(kept)

    def _halve(self) -> None:
        for counted in self._counts.values():
            counted[0], counted[1] = (counted[0] + 1) // 2, (counted[1] + 1) // 2
        self._floor = (self._floor + 1) // 2
