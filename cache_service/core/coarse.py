"""The index of what other sites publish with a stride: anchors and ends (core/publish.py), asked per block.

Decides what of a query such claims cover. An anchor stands for the `stride` blocks up to it; an end at block
b says that b's holder has what lies between the anchor above and b, and that its model can go on from there.
So a holder of the first k anchors of a query has k * stride blocks for certain, and an end up to a stride
deeper counts too. Nothing is claimed that both do not say.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache_service.core.delta import Declared
from cache_service.core.errors import LocalProtocolError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Event, Group, GroupRemoved
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.index_protocol import BlockIndex
from cache_service.core.index_search import bits, discard
from cache_service.core.index_types import Applied, Match


class CoarseIndex:
    """Published entries of one stride, the anchors in an empty index. Not thread-safe; all is synchronous."""

    def __init__(self, stride: int, anchors: BlockIndex) -> None:
        self.stride = stride
        self.anchors = anchors
        self._ends: dict[BlockHash, int] = {}
        self._ends_of: dict[SourceId, set[BlockHash]] = {}
        self._slot: dict[SourceId, int] = {}
        self._sources: list[SourceId | None] = []
        #: Slots whose model can go on from ends only, and slots that are offered.
        self._bounded = 0
        self._offered = 0

    def sources(self) -> tuple[SourceId, ...]:
        """Return the registered holders."""
        return self.anchors.sources()

    def add(self, source: SourceId) -> None:
        """Register a holder that holds nothing yet; no effect when it is registered."""
        if source in self._slot:
            return
        self.anchors.add(source)
        if None in self._sources:
            slot = self._sources.index(None)
            self._sources[slot] = source
        else:
            slot = len(self._sources)
            self._sources.append(source)
        self._slot[source] = slot
        self._offered |= 1 << slot
        self._ends_of[source] = set()

    def drop(self, source: SourceId) -> None:
        """Forget a holder and what it holds. O(its entries)."""
        slot = self._slot_of(source)
        self._clear_ends(source)
        self.anchors.drop(source)
        self._bounded &= ~(1 << slot)
        self._offered &= ~(1 << slot)
        del self._slot[source], self._ends_of[source]
        self._sources[slot] = None

    def quarantine(self, source: SourceId) -> None:
        """Leave a holder out of every answer, and keep what it holds."""
        self.anchors.quarantine(source)
        self._offered &= ~(1 << self._slot_of(source))

    def restore(self, source: SourceId) -> None:
        """Undo `quarantine`."""
        self.anchors.restore(source)
        self._offered |= 1 << self._slot_of(source)

    def declare(self, source: SourceId, declared: Declared) -> None:
        """Say whether a holder's model can go on from ends only; until then, from any block it has."""
        bit = 1 << self._slot_of(source)
        self._bounded = self._bounded | bit if declared.needs_state else self._bounded & ~bit

    def apply(self, source: SourceId, event: Event) -> Applied:
        """Change the index by one event of a registered holder. Raises LocalProtocolError for another."""
        slot = self._slot_of(source)
        match event:
            case BlocksStored() | BlocksRemoved():
                return self.anchors.apply(source, event)
            case AllCleared():
                ends = self._clear_ends(source)
                return Applied(removed=self.anchors.clear(source) + ends)
        if event.group is not Group.STATE:
            return Applied(unchanged=len(event.hashes))
        if isinstance(event, GroupRemoved):
            gone = [block for block in event.hashes if discard(self._ends, block, 1 << slot)]
            self._ends_of[source].difference_update(gone)
            return Applied(removed=len(gone), unchanged=len(event.hashes) - len(gone))
        mine = self._ends_of[source]
        stored = 0
        for block in event.hashes:
            if block not in mine:
                mine.add(block)
                self._ends[block] = self._ends.get(block, 0) | 1 << slot
                stored += 1
        return Applied(stored=stored, unchanged=len(event.hashes) - stored)

    def held_blocks(self, source: SourceId) -> int:
        """Return how many entries a holder has."""
        return self.anchors.held_blocks(source) + len(self._ends_of[source])

    def match(self, hashes: Sequence[BlockHash], limit_blocks: int | None = None) -> list[Match]:
        """Return every holder of a prefix of `hashes` that is known, deepest first, then by name; in blocks.

        As PrefixIndex.match; O(blocks) where a holder of a hybrid model is among them.
        """
        limit = len(hashes) if limit_blocks is None else max(0, limit_blocks)
        stride = self.stride
        matched: dict[int, int] = {}
        bounded: dict[int, int] = {}
        found: list[Match] = []
        for source, anchors, _ in self.anchors.match(hashes[stride - 1 :: stride]):
            slot = self._slot[source]
            if self._bounded >> slot & 1:
                bounded[slot] = anchors * stride
            else:
                matched[slot] = anchors * stride
                found.append(Match(source, anchors * stride, min(anchors * stride, limit)))
        if self._bounded & self._offered:
            for slot, depth, usable in self._from_ends(hashes, limit, bounded):
                source_at = self._sources[slot]
                assert source_at is not None
                found.append(Match(source_at, depth, usable))
        found.sort(key=lambda m: (-m.matched, m.source))
        return found

    def _from_ends(
        self, hashes: Sequence[BlockHash], limit: int, anchored: dict[int, int]
    ) -> list[tuple[int, int, int]]:
        """Return (slot, matched, usable) of the holders of hybrid models; `anchored`: depth by anchors."""
        last = self.stride - 1
        reach = {slot: anchored.get(slot, 0) + last for slot in bits(self._bounded & self._offered)}
        seeking = self._bounded & self._offered
        depths = dict(anchored)
        usable: dict[int, int] = {}
        for boundary in range(min(len(hashes), max(reach.values())), 0, -1):
            at = self._ends.get(hashes[boundary - 1], 0) & seeking
            for slot in bits(at) if at else ():
                if boundary > reach[slot]:
                    continue
                depths[slot] = max(depths.get(slot, 0), boundary)
                if boundary <= limit:
                    usable[slot] = boundary
                    seeking ^= 1 << slot
            if not seeking:
                break
        return [(slot, depth, usable.get(slot, 0)) for slot, depth in depths.items()]

    def _clear_ends(self, source: SourceId) -> int:
        bit = 1 << self._slot_of(source)
        mine = self._ends_of[source]
        for block in mine:
            discard(self._ends, block, bit)
        gone = len(mine)
        mine.clear()
        return gone

    def _slot_of(self, source: SourceId) -> int:
        slot = self._slot.get(source)
        if slot is None:
            raise LocalProtocolError(f"{source} is not registered with the index")
        return slot
