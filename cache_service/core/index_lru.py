"""Which leaf of the index was used longest ago: the order of eviction, and nothing else.

A block may have a place in a line. A use puts it at the end: being the last block of a store, or of a match.

* A block gives its place up when another is stored below it: that is newer.
* A block that becomes a leaf takes the place of the child that went, or keeps its own when that is later.
  Where one event takes a run back from its first block on, as SGLang does, that is the place of its last.
  When nothing that went had a place, this counts as a use.
* A leaf that `clear` left without a place is put at the end when eviction next looks, by hash among others.
* The first in line goes; when it is no leaf, only its place does.

So every leaf has a place, but after a `clear`, and few other blocks have. uses.hpp keeps the same line.
"""

from __future__ import annotations

from collections.abc import KeysView
from heapq import heapify, heappop, heappush

from cache_service.core.ids import BlockHash
from cache_service.core.index_chains import Chains


class Uses:
    """The line. A place is a number that grows with every use; the heap may hold some that were given up."""

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._clock = 0
        self._place: dict[BlockHash, int] = {}
        self._heap: list[tuple[int, BlockHash]] = []
        #: A leaf that waits for a place, and the block that went above where one may be.
        self._heir: BlockHash | None = None
        self._went: BlockHash | None = None
        #: Whether a `clear` may have made leaves without a place.
        self.unplaced = False

    def blocks(self) -> KeysView[BlockHash]:
        """Return the blocks that have a place."""
        return self._place.keys()

    def touch(self, block: BlockHash) -> None:
        """Put a block at the end: it was used now."""
        self._clock += 1
        self._put(block, self._clock)

    def drop(self, block: BlockHash) -> None:
        """Take a block's place away."""
        self._place.pop(block, None)

    def gone(self, block: BlockHash, parent: BlockHash | None) -> None:
        """Take the place of a block that nobody holds any more, and give it to its heir, if it has one."""
        if parent is None or parent != self._went:
            self.settle()
            self._heir = parent if parent is not None and self._chains.is_leaf(parent) else None
        self._went = block
        place = self._place.pop(block, None)
        if self._heir is None or place is None:
            return
        if self._place.get(self._heir, 0) < place:
            self._put(self._heir, place)
        self._heir = self._went = None

    def settle(self) -> None:
        """End an event that took blocks back."""
        heir, self._heir, self._went = self._heir, None, None
        if heir is not None and heir not in self._place and self._chains.is_leaf(heir):
            self.touch(heir)

    def first(self) -> BlockHash | None:
        """Return the leaf that is first in line, None without one."""
        if self.unplaced:
            for leaf in sorted(filter(self._chains.is_leaf, self._chains.parent)):
                if leaf not in self._place:
                    self.touch(leaf)
            self.unplaced = False
        while self._heap:
            place, block = self._heap[0]
            if self._place.get(block) == place:
                if self._chains.is_leaf(block):
                    return block
                del self._place[block]
            heappop(self._heap)
        return None

    def copy(self, chains: Chains) -> Uses:
        """Return a line of its own with the same content, of a copy of the chains."""
        other = Uses(chains)
        other._clock = self._clock
        other._place = self._place.copy()
        other._heap = self._heap.copy()
        other.unplaced = self.unplaced
        return other

    def _put(self, block: BlockHash, place: int) -> None:
        self._place[block] = place
        heappush(self._heap, (place, block))
        if len(self._heap) > 2 * len(self._place) + 64:
            self._heap = [(place, block) for block, place in self._place.items()]
            heapify(self._heap)
