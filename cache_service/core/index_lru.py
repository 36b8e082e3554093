"""Which leaf of the index was used longest ago: the order of eviction, and nothing else.

A block may have a place in a line. A use puts it at the end: being the last block of a store, or of a match.

* A block gives its place up when another is stored below it: that is newer.
* A block that becomes a leaf takes the place of the child that went, or keeps its own when that is later.
  A child without a place (it went before what hangs below it) counts as a use.
* A leaf that `clear` left without a place is put at the end when eviction next looks, by hash among others.
* The first in line goes; when it is no leaf, only its place does.

So every leaf has a place, but after a `clear`, and few other blocks have. uses.hpp keeps the same line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView
from heapq import heapify, heappop, heappush

from cache_service.core.ids import BlockHash


class Uses:
    """The line. A place is a number that grows with every use; the heap may hold some that were given up."""

    def __init__(self) -> None:
        self._clock = 0
        self._place: dict[BlockHash, int] = {}
        self._heap: list[tuple[int, BlockHash]] = []
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

    def give(self, block: BlockHash, heir: BlockHash) -> None:
        """Take the place of a block that goes, and give it to one that becomes a leaf by that."""
        place = self._place.pop(block, None)
        own = self._place.get(heir)
        if place is None and own is None:
            self.touch(heir)
        elif place is not None and (own is None or own < place):
            self._put(heir, place)

    def place(self, leaves: Iterable[BlockHash]) -> None:
        """Put those of all leaves that have no place at the end."""
        for leaf in sorted(leaves):
            if leaf not in self._place:
                self.touch(leaf)
        self.unplaced = False

    def first(self, is_leaf: Callable[[BlockHash], bool]) -> BlockHash | None:
        """Return the leaf that is first in line, None without one."""
        while self._heap:
            place, block = self._heap[0]
            if self._place.get(block) == place:
                if is_leaf(block):
                    return block
                del self._place[block]
            heappop(self._heap)
        return None

    def copy(self) -> Uses:
        """Return a line of its own with the same content."""
        other = Uses()
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
