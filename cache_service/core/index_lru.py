"""Which leaf of the index was used longest ago.

Decides the order of eviction only. A tick is counted per use; a leaf inherits the tick of the child that
went, when that is younger. The heap is lazy: an entry whose block was used again goes back with its new
tick, one whose block is gone or has children again is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from cache_service.core.ids import BlockHash


class LeafQueue:
    """Leaves by last use. A block may be touched at any time; `leaf` is called when it has become one."""

    def __init__(self) -> None:
        self._clock = 0
        self._used: dict[BlockHash, int] = {}
        self._heap: list[tuple[int, BlockHash]] = []
        self._queued: set[BlockHash] = set()

    def __contains__(self, block: BlockHash) -> bool:
        return block in self._queued and block in self._used

    def touch(self, block: BlockHash) -> None:
        """Note that a known block was used now."""
        self._clock += 1
        self._used[block] = self._clock

    def leaf(self, block: BlockHash, tick: int) -> None:
        """Queue a block that has no child any more; it is at least as young as `tick`."""
        tick = max(tick, self._used.get(block, 0))
        self._used[block] = tick
        if block not in self._queued:
            self._queued.add(block)
            heappush(self._heap, (tick, block))
            if len(self._heap) > 2 * len(self._used) + 64:
                self._compact()

    def forget(self, block: BlockHash) -> int:
        """Drop a block that nobody holds any more; return its tick."""
        return self._used.pop(block, 0)

    def pop(self, is_leaf: Callable[[BlockHash], bool]) -> BlockHash | None:
        """Take the leaf used longest ago off the queue, None without one."""
        while self._heap:
            tick, block = heappop(self._heap)
            used = self._used.get(block)
            if used is not None and used != tick and is_leaf(block):
                heappush(self._heap, (used, block))
                continue
            self._queued.discard(block)
            if used is not None and is_leaf(block):
                return block
        return None

    def copy(self) -> LeafQueue:
        """Return a queue of its own with the same content."""
        other = LeafQueue()
        other._clock = self._clock
        other._used = self._used.copy()
        other._heap = self._heap.copy()
        other._queued = self._queued.copy()
        return other

    def _compact(self) -> None:
        self._queued &= self._used.keys()
        self._heap = [(self._used[block], block) for block in self._queued]
        heapify(self._heap)
