"""The prefix index: which worker holds which block, and how long a prefix of a query each holds.

Decides what `match` answers; it must not guess: a block counts for a holder only while an event said so and
none took it back, and a prefix ends at the first block that its holder lacks, whatever lies behind.

Shape. Per tier one dict from block hash to a bitset of holders (bit = slot of the holder). Beside it the
parent of every held block and its known children, which serve one purpose: to count, per holder, the
**orphans**, its blocks whose parent it does not hold. A holder without orphans is downward closed, so along
a chain of hashes "holds block i" is monotone and its depth is found by bisection; only holders with orphans
(a lost event, an inner block evicted) are walked block by block. Both give the longest contiguous prefix;
the walk costs O(n), the bisection O(k log n) for k different depths.

The outside fact: a block's hash covers its whole prefix (core/blocks.py), so a hash has one parent. An
event that names another is refused for that block and counted (`Applied.conflicts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache_service.core.errors import LocalProtocolError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Event, Tier
from cache_service.core.ids import BlockHash, SourceId


@dataclass(frozen=True, slots=True)
class Match:
    """One holder's longest contiguous prefix of a query."""

    source: SourceId
    blocks: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What an event changed, in (block, tier) entries of one holder.

    Attributes:
        stored: entries that are new.
        removed: entries that are gone.
        unchanged: stored again or removed though absent: a duplicate, or an event was lost.
        conflicts: blocks refused because the index knows them under another parent.
    """

    stored: int = 0
    removed: int = 0
    unchanged: int = 0
    conflicts: int = 0


@dataclass(frozen=True, slots=True)
class IndexCounts:
    """Distinct blocks, (block, holder, tier) entries, holders, and blocks held without their parent."""

    blocks: int
    entries: int
    holders: int
    orphans: int


class PrefixIndex:
    """Blocks of one namespace and who holds them. Not thread-safe; every method is synchronous."""

    def __init__(self) -> None:
        self._tiers: dict[Tier, dict[BlockHash, int]] = {tier: {} for tier in Tier}
        #: The tiers that hold anything: what a probe of `match` has to look at.
        self._active: tuple[dict[BlockHash, int], ...] = ()
        self._parent: dict[BlockHash, BlockHash | None] = {}
        #: The one known child, or a set of two or more (most blocks have one; a set costs 216 bytes).
        self._children: dict[BlockHash, BlockHash | set[BlockHash]] = {}
        self._slot: dict[SourceId, int] = {}
        self._sources: list[SourceId | None] = []
        self._orphans: list[int] = []
        self._entries: list[int] = []
        self._with_orphans = 0
        self._quarantined = 0
        self._revision = 0

    @property
    def revision(self) -> int:
        """Grows with every change that a `match` could see."""
        return self._revision

    def sources(self) -> tuple[SourceId, ...]:
        """Return the registered holders, by slot."""
        return tuple(source for source in self._sources if source is not None)

    def add(self, source: SourceId) -> None:
        """Register a holder that holds nothing yet; no effect when it is registered."""
        if source in self._slot:
            return
        if None in self._sources:
            slot = self._sources.index(None)
            self._sources[slot] = source
        else:
            slot = len(self._sources)
            self._sources.append(source)
            self._orphans.append(0)
            self._entries.append(0)
        self._slot[source] = slot

    def drop(self, source: SourceId) -> int:
        """Forget a holder and what it holds; return how many entries went. O(blocks of all holders)."""
        gone = self.clear(source)
        slot = self._slot.pop(source)
        self._sources[slot] = None
        self._quarantined &= ~(1 << slot)
        return gone

    def quarantine(self, source: SourceId) -> None:
        """Leave a holder out of every answer, and keep what it holds."""
        self._quarantined |= 1 << self._slot_of(source)
        self._revision += 1

    def restore(self, source: SourceId) -> None:
        """Undo `quarantine`."""
        self._quarantined &= ~(1 << self._slot_of(source))
        self._revision += 1

    def apply(self, source: SourceId, event: Event) -> Applied:
        """Change the index by one event of a registered holder.

        Cost: O(blocks in the event), or O(blocks of all holders) for AllCleared.
        Raises LocalProtocolError when `source` was not added.
        """
        match event:
            case BlocksStored():
                applied = self._store(self._slot_of(source), event)
            case BlocksRemoved():
                applied = self._remove(self._slot_of(source), event)
            case AllCleared():
                applied = Applied(removed=self.clear(source))
        if applied.stored or applied.removed:
            self._revision += 1
        return applied

    def match(self, hashes: Sequence[BlockHash]) -> list[Match]:
        """Return every holder of a non-empty prefix of `hashes`, deepest first, then by name.

        `hashes` is one chain: each is the block hash below the one before it.
        """
        if not hashes:
            return []
        first = self._holders(hashes[0]) & ~self._quarantined
        found: list[Match] = []
        walked = first & self._with_orphans
        if walked:
            self._walk(hashes, walked, found)
        bisected = first & ~walked
        if bisected:
            self._bisect(hashes, bisected, found)
        found.sort(key=lambda match: (-match.blocks, match.source))
        return found

    def held_blocks(self, source: SourceId) -> int:
        """Return how many (block, tier) entries a holder has."""
        return self._entries[self._slot_of(source)]

    def counts(self) -> IndexCounts:
        """Return the sizes; O(holders)."""
        return IndexCounts(
            blocks=len(self._parent),
            entries=sum(self._entries),
            holders=len(self._slot),
            orphans=sum(self._orphans),
        )

    def clear(self, source: SourceId) -> int:
        """Remove all that a holder holds; return how many entries went. O(blocks of all holders)."""
        slot = self._slot_of(source)
        gone = self._entries[slot]
        if not gone:
            return 0
        bit = 1 << slot
        for held in self._tiers.values():
            mine = [block for block, mask in held.items() if mask & bit]
            for block in mine:
                self._discard(held, block, bit)
                if not self._holders(block):
                    self._forget(block)
        self._entries[slot] = 0
        self._orphans[slot] = 0
        self._with_orphans &= ~bit
        self._settle()
        self._revision += 1
        return gone

    def copy(self) -> PrefixIndex:
        """Return an index of its own with the same content: some 0.1 us a block, far less than a dump."""
        other = PrefixIndex()
        other._tiers = {tier: held.copy() for tier, held in self._tiers.items()}
        other._settle()
        other._parent = self._parent.copy()
        other._children = self._children.copy()
        other._children.update({p: c.copy() for p, c in self._children.items() if isinstance(c, set)})
        other._slot = self._slot.copy()
        other._sources = self._sources.copy()
        other._orphans = self._orphans.copy()
        other._entries = self._entries.copy()
        other._with_orphans = self._with_orphans
        other._quarantined = self._quarantined
        other._revision = self._revision
        return other

    def dump(self) -> Iterator[tuple[SourceId, BlocksStored]]:
        """Yield events that rebuild the index in an empty one: path-compressed runs of equal holders.

        The index must not change before the iterator ends. O(entries).
        """
        for tier, held in self._tiers.items():
            runs = list(self._runs(held))
            if sum(map(len, runs)) != len(held):
                # Only lies make a cycle of parents, which no run reaches: dump its blocks one by one.
                reached = {block for run in runs for block in run}
                runs.extend([block] for block in held if block not in reached)
            for run in runs:
                event = BlocksStored(tuple(run), self._parent[run[0]], tier)
                for slot in _bits(held[run[0]]):
                    yield self._source_at(slot), event

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; O(entries)."""
        held_anywhere: set[BlockHash] = set().union(*self._tiers.values())
        assert held_anywhere == set(self._parent), "a parent entry for a block that nobody holds, or none"
        assert self._active == tuple(held for held in self._tiers.values() if held)
        inverse: dict[BlockHash, set[BlockHash]] = {}
        for block, parent in self._parent.items():
            assert parent != block
            if parent is not None:
                inverse.setdefault(parent, set()).add(block)
        children = {p: c if isinstance(c, set) else {c} for p, c in self._children.items()}
        assert children == inverse, "children are not the inverse of parents"
        assert all(len(c) > 1 for c in self._children.values() if isinstance(c, set))
        assert all(mask > 0 for held in self._tiers.values() for mask in held.values()), "an empty bitset"
        assert all(self._sources[slot] == source for source, slot in self._slot.items())
        for slot, source in enumerate(self._sources):
            bit = 1 << slot
            entries = sum(1 for held in self._tiers.values() for mask in held.values() if mask & bit)
            orphans = sum(
                1
                for block, parent in self._parent.items()
                if parent is not None and self._holders(block) & bit and not self._holders(parent) & bit
            )
            assert entries == self._entries[slot], f"{source}: {entries} entries, not {self._entries[slot]}"
            assert orphans == self._orphans[slot], f"{source}: {orphans} orphans, not {self._orphans[slot]}"
            assert bool(self._with_orphans & bit) == bool(orphans)
            assert source is not None or (not entries and not self._quarantined & bit)

    # -- changes ---------------------------------------------------------------------------------------------

    def _store(self, slot: int, event: BlocksStored) -> Applied:
        bit = 1 << slot
        held = self._tiers[event.tier]
        parent = event.parent
        stored = unchanged = 0
        self._settle(held)
        for position, block in enumerate(event.hashes):
            known = self._parent.get(block, _ABSENT)
            if known is not _ABSENT and known != parent:
                # The rest of the run hangs below a refused block: refuse it too.
                self._count(slot, stored)
                return Applied(stored, 0, unchanged, conflicts=len(event.hashes) - position)
            mask = held.get(block, 0)
            if mask & bit:
                unchanged += 1
            else:
                self._gain(slot, block, parent)
                held[block] = mask | bit
                stored += 1
            parent = block
        self._count(slot, stored)
        return Applied(stored, 0, unchanged)

    def _gain(self, slot: int, block: BlockHash, parent: BlockHash | None) -> None:
        """Note that a holder is about to hold `block` in one more tier."""
        bit = 1 << slot
        if block not in self._parent:
            self._parent[block] = parent
            if parent is not None:
                self._adopt(parent, block)
        if self._holders(block) & bit:
            return
        if parent is not None and not self._holders(parent) & bit:
            self._orphans[slot] += 1
        self._orphans[slot] -= self._children_held(block, bit)

    def _remove(self, slot: int, event: BlocksRemoved) -> Applied:
        bit = 1 << slot
        held = self._tiers[event.tier]
        gone = 0
        for block in event.hashes:
            if not held.get(block, 0) & bit:
                continue
            self._discard(held, block, bit)
            gone += 1
            holders = self._holders(block)
            if holders & bit:
                continue
            parent = self._parent[block]
            if parent is not None and not self._holders(parent) & bit:
                self._orphans[slot] -= 1
            self._orphans[slot] += self._children_held(block, bit)
            if not holders:
                self._forget(block)
        self._count(slot, -gone)
        return Applied(0, gone, len(event.hashes) - gone)

    def _discard(self, held: dict[BlockHash, int], block: BlockHash, bit: int) -> None:
        rest = held[block] & ~bit
        if rest:
            held[block] = rest
        else:
            del held[block]

    def _forget(self, block: BlockHash) -> None:
        """Drop what is known of a block that nobody holds any more; its children keep naming it."""
        parent = self._parent.pop(block)
        if parent is None:
            return
        siblings = self._children[parent]
        if isinstance(siblings, set):
            siblings.discard(block)
            if len(siblings) == 1:
                self._children[parent] = siblings.pop()
        else:
            del self._children[parent]

    def _adopt(self, parent: BlockHash, block: BlockHash) -> None:
        siblings = self._children.get(parent)
        if siblings is None:
            self._children[parent] = block
        elif isinstance(siblings, set):
            siblings.add(block)
        else:
            self._children[parent] = {siblings, block}

    def _count(self, slot: int, delta: int) -> None:
        self._entries[slot] += delta
        bit = 1 << slot
        self._with_orphans = self._with_orphans | bit if self._orphans[slot] else self._with_orphans & ~bit
        self._settle()

    def _settle(self, filling: dict[BlockHash, int] | None = None) -> None:
        """Find the tiers to probe; `filling` is one that is about to hold something."""
        self._active = tuple(held for held in self._tiers.values() if held or held is filling)

    # -- questions -------------------------------------------------------------------------------------------

    def _slot_of(self, source: SourceId) -> int:
        slot = self._slot.get(source)
        if slot is None:
            raise LocalProtocolError(f"{source} is not registered with the index")
        return slot

    def _holders(self, block: BlockHash) -> int:
        mask = 0
        for held in self._active:
            mask |= held.get(block, 0)
        return mask

    def _children_held(self, block: BlockHash, bit: int) -> int:
        children = self._children.get(block)
        if children is None:
            return 0
        if isinstance(children, set):
            return sum(1 for child in children if self._holders(child) & bit)
        return 1 if self._holders(children) & bit else 0

    def _runs(self, held: dict[BlockHash, int]) -> Iterator[list[BlockHash]]:
        """Yield maximal paths of blocks with equal holders in one tier: the nodes of its radix tree."""
        for block, mask in held.items():
            parent = self._parent[block]
            if parent is not None and held.get(parent) == mask and self._children[parent] == block:
                continue  # inside its parent's run
            run = [block]
            child = self._children.get(block)
            while child is not None and not isinstance(child, set) and held.get(child) == mask:
                run.append(child)
                child = self._children.get(child)
            yield run

    def _walk(self, hashes: Sequence[BlockHash], alive: int, found: list[Match]) -> None:
        for depth, block in enumerate(hashes):
            rest = self._holders(block) & alive
            if rest != alive:
                self._report(alive & ~rest, depth, found)
                if not rest:
                    return
                alive = rest
        self._report(alive, len(hashes), found)

    def _bisect(self, hashes: Sequence[BlockHash], alive: int, found: list[Match]) -> None:
        last = len(hashes) - 1
        at_last = self._holders(hashes[last]) & alive
        self._report(at_last, last + 1, found)
        spans = [(0, last, alive, at_last)]
        while spans:
            low, high, at_low, at_high = spans.pop()
            if at_low == at_high:
                continue
            if high - low == 1:
                self._report(at_low & ~at_high, high, found)
                continue
            middle = (low + high) // 2
            at_middle = self._holders(hashes[middle]) & at_low
            spans.append((low, middle, at_low, at_middle))
            spans.append((middle, high, at_middle, at_high))

    def _report(self, mask: int, blocks: int, found: list[Match]) -> None:
        found.extend(Match(self._source_at(slot), blocks) for slot in _bits(mask))

    def _source_at(self, slot: int) -> SourceId:
        source = self._sources[slot]
        assert source is not None, "a bit of a slot without a holder"
        return source


_ABSENT = object()


def _bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
