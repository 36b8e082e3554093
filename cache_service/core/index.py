"""The prefix index: which worker holds which block, and how long a prefix of a query each holds.

Decides what `match` answers; it must not guess: a block counts for a holder only while an event said so and
none took it back, and a prefix ends at the first block that its holder lacks, whatever lies behind.

Shape. Per tier one dict from block hash to a bitset of holders (bit = slot of the holder), and likewise per
tier for each of the groups beside full attention (`Group`: states, windows). Beside them the parent of every
held block and its known children, which serve two purposes. Per holder they give the **tops**, its blocks
whose parent it does not hold; from those every block of one holder is reached without looking at others'.
A top that has a parent is an **orphan**. A holder without orphans is downward closed, so along a chain of
hashes "holds block i" is monotone and its depth is found by bisection; only holders with orphans (a lost
event, an inner block evicted) are walked block by block. The walk costs O(n), the bisection O(k log n) for k
different depths. What of a prefix is usable: core/index_search.py.

The outside fact: a block's hash covers its whole prefix (core/blocks.py), so a hash has one parent. An
event that names another is refused for that block and counted (`Applied.conflicts`).

Group entries stand for themselves: a state may be known before its block is, or outlive it; `match` counts
it only inside a matched prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cache_service.core import index_check, index_dump
from cache_service.core.errors import ConfigError, LocalProtocolError
from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.index_chains import Chains
from cache_service.core.index_evict import evict_to_budget
from cache_service.core.index_lru import Uses
from cache_service.core.index_search import (
    Held,
    Probe,
    bisect,
    bits,
    discard,
    probe_any,
    usable_by_slot,
    walk,
)
from cache_service.core.index_types import Applied, IndexCounts, Match, Needs, best_per_site

__all__ = ["Applied", "IndexCounts", "Match", "Needs", "PrefixIndex", "best_per_site"]

#: Estimates for CPython 3.11, held against the truth by tests/unit/cache_service/test_index.py: a block with
#: its parent and child entries; a row of a tier's or group's dict; one holder's entry in a group.
BLOCK_BYTES = 130
ROW_BYTES = 70
GROUP_ENTRY_BYTES = 45


class PrefixIndex:
    """Blocks of one namespace and who holds them. Not thread-safe; every method is synchronous.

    `budget_bytes` bounds the estimate of what it takes; above it, the leaf blocks used longest ago (by a
    store or a match) are forgotten, for all holders. 0 for no bound. Raises ConfigError for less.
    """

    def __init__(self, *, budget_bytes: int = 0) -> None:
        if budget_bytes < 0:
            raise ConfigError(f"budget_bytes: {budget_bytes} is negative; give a number of bytes, 0 for none")
        self._tiers: dict[Tier, Held] = {tier: {} for tier in Tier}
        self._groups: dict[Group, dict[Tier, Held]] = {g: {tier: {} for tier in Tier} for g in Group}
        #: The tiers that hold anything: what a probe of `match` has to look at.
        self._active: tuple[Held, ...] = ()
        self._chains = Chains()
        self._slot: dict[SourceId, int] = {}
        self._sources: list[SourceId | None] = []
        #: By slot: the holder's place in the order of names.
        self._rank: list[int] = []
        self._tops: list[set[BlockHash]] = []
        self._orphans: list[int] = []
        self._blocks: list[int] = []
        self._entries: list[int] = []
        #: By slot: blocks at which the holder has an entry of a group, and how many entries.
        self._grouped: list[set[BlockHash]] = []
        self._group_entries: list[int] = []
        #: Holders by what their model needs, where that is anything.
        self._needs: dict[Needs, int] = {}
        self._with_orphans = 0
        self._quarantined = 0
        self._revision = 0
        self._budget_bytes = budget_bytes
        self._uses = Uses(self._chains) if budget_bytes else None
        self._evicted = 0

    @property
    def revision(self) -> int:
        """Grows with every change that a `match` could see."""
        return self._revision

    def sources(self) -> tuple[SourceId, ...]:
        """Return the registered holders, by slot."""
        return tuple(source for source in self._sources if source is not None)

    def add(self, source: SourceId) -> None:
        """Register a holder that holds nothing yet; no effect when it is registered. O(holders)."""
        if source in self._slot:
            return
        if None in self._sources:
            slot = self._sources.index(None)
            self._sources[slot] = source
        else:
            slot = len(self._sources)
            self._sources.append(source)
            for numbers in (self._rank, self._orphans, self._blocks, self._entries, self._group_entries):
                numbers.append(0)
            self._tops.append(set())
            self._grouped.append(set())
        self._slot[source] = slot
        for rank, name in enumerate(sorted(self._slot)):
            self._rank[self._slot[name]] = rank

    def declare(self, source: SourceId, needs_state: bool, swa_window_blocks: int) -> None:
        """Say what a holder's model needs beside full-attention blocks; until then, nothing.

        Raises ConfigError for a negative window, LocalProtocolError when `source` was not added.
        """
        if swa_window_blocks < 0:
            raise ConfigError(f"swa_window_blocks: {swa_window_blocks} is negative; give blocks, 0 for none")
        slot = self._slot_of(source)
        self._forget_needs(1 << slot)
        needs = Needs(needs_state, swa_window_blocks)
        if needs != Needs():
            self._needs[needs] = self._needs.get(needs, 0) | 1 << slot
        self._revision += 1

    def drop(self, source: SourceId) -> int:
        """Forget a holder and what it holds; return how many entries went. O(its blocks)."""
        gone = self.clear(source)
        slot = self._slot.pop(source)
        self._sources[slot] = None
        self._quarantined &= ~(1 << slot)
        self._forget_needs(1 << slot)
        return gone

    def quarantine(self, source: SourceId) -> None:
        """Leave a holder out of every answer, and keep what it holds."""
        self._quarantined |= 1 << self._slot_of(source)
        self._revision += 1

    def restore(self, source: SourceId) -> None:
        """Undo `quarantine`."""
        self._quarantined &= ~(1 << self._slot_of(source))
        self._revision += 1

    def match(self, hashes: Sequence[BlockHash], limit_blocks: int | None = None) -> list[Match]:
        """Return every holder of a non-empty prefix of `hashes`, deepest first, then by name.

        `hashes` is one chain: each is the block hash below the one before it. `usable` is at most
        `limit_blocks` (a request computes its last token itself); None for no limit.
        """
        if not hashes:
            return []
        first = self._holders(hashes[0]) & ~self._quarantined
        if not first:
            return []
        # One tier is the common case: then a probe is one look into its dict.
        probe = self._active[0].get if len(self._active) == 1 else self._holders
        depths: dict[int, int] = {}
        walked = first & self._with_orphans
        if walked:
            walk(hashes, probe, walked, depths)
        if first != walked:
            bisect(hashes, probe, first & ~walked, depths)
        limit = len(hashes) if limit_blocks is None else max(0, limit_blocks)
        hybrid: dict[int, int] = {}
        for needs, members in self._needs.items():
            # Without any entry of a group there is no boundary to look for.
            able = sum(1 << slot for slot in bits(members & first) if self._grouped[slot])
            probes = (self._probe_group(group) for group in (Group.STATE, Group.SWA))
            hybrid |= usable_by_slot(hashes, limit, depths, (needs, members, able), *probes)
        found: list[Match] = []
        for depth in sorted(depths, reverse=True):
            usable = min(depth, limit)
            for slot in self._by_name(depths[depth]):
                found.append(Match(self._source_at(slot), depth, hybrid.get(slot, usable)))
        if self._uses is not None:
            self._uses.touch(hashes[found[0].matched - 1])
        return found

    def held_blocks(self, source: SourceId) -> int:
        """Return how many (block, tier) entries a holder has."""
        return self._entries[self._slot_of(source)]

    def counts(self) -> IndexCounts:
        """Return the sizes; O(holders)."""
        return IndexCounts(
            blocks=len(self._chains.parent),
            entries=sum(self._entries),
            holders=len(self._slot),
            orphans=sum(self._orphans),
            group_entries=sum(self._group_entries),
        )

    @property
    def evicted_blocks(self) -> int:
        """Blocks forgotten to keep the budget, ever."""
        return self._evicted

    @property
    def bytes_estimate(self) -> int:
        """What the content takes, about; the budget is held against this."""
        rows = sum(map(len, (*self._active, *self._group_tables())))
        return (
            BLOCK_BYTES * len(self._chains.parent)
            + (ROW_BYTES + len(self._sources) // 8) * rows
            + GROUP_ENTRY_BYTES * sum(self._group_entries)
        )

    def nodes(self) -> int:
        """Return how many radix nodes (maximal runs of equal holders) the blocks make; O(blocks)."""
        return sum(1 for held in self._tiers.values() for _ in index_dump.runs(self, held))

    def apply(self, source: SourceId, event: Event) -> Applied:
        """Change the index by one event of a registered holder.

        Cost: O(blocks in the event), or O(blocks of the holder) for AllCleared.
        Raises LocalProtocolError when `source` was not added.
        """
        slot = self._slot_of(source)
        match event:
            case BlocksStored():
                applied = self._store(slot, event)
            case BlocksRemoved():
                applied = self._remove(slot, event)
            case GroupStored():
                applied = self._store_group(slot, event)
            case GroupRemoved():
                applied = self._remove_group(slot, event)
            case AllCleared():
                return Applied(removed=self.clear(source))
        if applied.stored or applied.removed:
            self._revision += 1
        if self._uses is not None:
            evict_to_budget(self, self._uses)
        return applied

    def clear(self, source: SourceId) -> int:
        """Remove all that a holder holds; return how many entries went. O(its blocks)."""
        slot = self._slot_of(source)
        gone = self._entries[slot] + self._group_entries[slot]
        if not gone:
            return 0
        bit = 1 << slot
        for block in self._held_by(slot):
            for held in self._active:
                discard(held, block, bit)
            if not self._holders(block):
                self._chains.forget(block)
                if self._uses is not None:
                    self._uses.drop(block)
                    self._uses.unplaced = True
        for block in self._grouped[slot]:
            for held in self._group_tables():
                discard(held, block, bit)
        self._tops[slot].clear()
        self._grouped[slot].clear()
        self._orphans[slot] = self._blocks[slot] = self._entries[slot] = self._group_entries[slot] = 0
        self._with_orphans &= ~bit
        self._settle()
        self._revision += 1
        return gone

    def copy(self) -> PrefixIndex:
        """Return an index of its own with the same content: some 0.1 us a block, far less than a dump."""
        other = PrefixIndex(budget_bytes=self._budget_bytes)
        other._tiers = {tier: held.copy() for tier, held in self._tiers.items()}
        other._groups = {g: {tier: held.copy() for tier, held in t.items()} for g, t in self._groups.items()}
        other._settle()
        other._chains = self._chains.copy()
        other._slot = self._slot.copy()
        other._sources = self._sources.copy()
        other._rank = self._rank.copy()
        other._tops = [tops.copy() for tops in self._tops]
        other._orphans = self._orphans.copy()
        other._blocks = self._blocks.copy()
        other._entries = self._entries.copy()
        other._grouped = [grouped.copy() for grouped in self._grouped]
        other._group_entries = self._group_entries.copy()
        other._needs = self._needs.copy()
        other._with_orphans = self._with_orphans
        other._quarantined = self._quarantined
        other._revision = self._revision
        other._uses = self._uses.copy(other._chains) if self._uses is not None else None
        other._evicted = self._evicted
        return other

    def dump(self) -> Iterator[tuple[SourceId, BlocksStored | GroupStored]]:
        """Yield events that rebuild the content in an empty index: path-compressed runs of equal holders.

        The index must not change before the iterator ends. O(entries).
        """
        return index_dump.dump(self)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; O(entries)."""
        index_check.check(self)

    def _store(self, slot: int, event: BlocksStored) -> Applied:
        bit = 1 << slot
        held = self._tiers[event.tier]
        parent = event.parent
        stored = unchanged = conflicts = 0
        self._settle(held)
        for position, block in enumerate(event.hashes):
            known = self._chains.parent.get(block, _ABSENT)
            if known is not _ABSENT and known != parent:
                # The rest of the run hangs below a refused block: refuse it too.
                conflicts = len(event.hashes) - position
                break
            mask = held.get(block, 0)
            if mask & bit:
                unchanged += 1
            else:
                self._gain(slot, block, parent)
                held[block] = mask | bit
                stored += 1
            parent = block
        if self._uses is not None and parent in self._chains.parent:
            self._uses.touch(parent)
        self._count(slot, stored)
        return Applied(stored, 0, unchanged, conflicts)

    def _gain(self, slot: int, block: BlockHash, parent: BlockHash | None) -> None:
        """Note that a holder is about to hold `block` in one more tier."""
        bit = 1 << slot
        if block not in self._chains.parent:
            self._chains.add(block, parent)
            if self._uses is not None and parent is not None:
                self._uses.drop(parent)
        elif self._holders(block) & bit:
            return
        self._blocks[slot] += 1
        if parent is None:
            self._tops[slot].add(block)
        elif not self._holders(parent) & bit:
            self._tops[slot].add(block)
            self._orphans[slot] += 1
        for child in self._children_held(block, bit):
            self._tops[slot].discard(child)
            self._orphans[slot] -= 1

    def _lose(self, slot: int, block: BlockHash) -> None:
        """Note that a holder has `block` in no tier any more."""
        bit = 1 << slot
        tops = self._tops[slot]
        self._blocks[slot] -= 1
        if block in tops:
            tops.discard(block)
            if self._chains.parent[block] is not None:
                self._orphans[slot] -= 1
        for child in self._children_held(block, bit):
            tops.add(child)
            self._orphans[slot] += 1

    def _remove(self, slot: int, event: BlocksRemoved) -> Applied:
        bit = 1 << slot
        held = self._tiers[event.tier]
        gone = 0
        for block in event.hashes:
            if not discard(held, block, bit):
                continue
            gone += 1
            holders = self._holders(block)
            if not holders & bit:
                self._lose(slot, block)
            if not holders:
                self._forget(block)
        if self._uses is not None:
            self._uses.settle()
        self._count(slot, -gone)
        return Applied(0, gone, len(event.hashes) - gone)

    def _store_group(self, slot: int, event: GroupStored) -> Applied:
        bit = 1 << slot
        held = self._groups[event.group][event.tier]
        stored = 0
        for block in event.hashes:
            mask = held.get(block, 0)
            if not mask & bit:
                held[block] = mask | bit
                self._grouped[slot].add(block)
                stored += 1
        self._group_entries[slot] += stored
        return Applied(stored, 0, len(event.hashes) - stored)

    def _remove_group(self, slot: int, event: GroupRemoved) -> Applied:
        bit = 1 << slot
        held = self._groups[event.group][event.tier]
        gone = 0
        for block in event.hashes:
            if discard(held, block, bit):
                gone += 1
                if not any(other.get(block, 0) & bit for other in self._group_tables()):
                    self._grouped[slot].discard(block)
        self._group_entries[slot] -= gone
        return Applied(0, gone, len(event.hashes) - gone)

    def _forget(self, block: BlockHash) -> None:
        """Drop what is known of a block that nobody holds any more."""
        parent = self._chains.forget(block)
        if self._uses is not None:
            self._uses.gone(block, parent)

    def _count(self, slot: int, delta: int) -> None:
        self._entries[slot] += delta
        bit = 1 << slot
        self._with_orphans = self._with_orphans | bit if self._orphans[slot] else self._with_orphans & ~bit
        self._settle()

    def _settle(self, filling: Held | None = None) -> None:
        """Find the tiers to probe; `filling` is one that is about to hold something."""
        self._active = tuple(held for held in self._tiers.values() if held or held is filling)

    def _forget_needs(self, bit: int) -> None:
        self._needs = {needs: rest for needs, mask in self._needs.items() if (rest := mask & ~bit)}

    def _slot_of(self, source: SourceId) -> int:
        slot = self._slot.get(source)
        if slot is None:
            raise LocalProtocolError(f"{source} is not registered with the index")
        return slot

    def _source_at(self, slot: int) -> SourceId:
        source = self._sources[slot]
        assert source is not None, "a bit of a slot without a holder"
        return source

    def _by_name(self, mask: int) -> list[int]:
        slots = list(bits(mask))
        slots.sort(key=self._rank.__getitem__)
        return slots

    def _group_tables(self) -> Iterator[Held]:
        return (held for tiers in self._groups.values() for held in tiers.values() if held)

    def _holders(self, block: BlockHash) -> int:
        mask = 0
        for held in self._active:
            mask |= held.get(block, 0)
        return mask

    def _probe_group(self, group: Group) -> Probe:
        return probe_any([held for held in self._groups[group].values() if held])

    def _children_held(self, block: BlockHash, bit: int) -> list[BlockHash]:
        return [child for child in self._chains.children_of(block) if self._holders(child) & bit]

    def _held_by(self, slot: int) -> list[BlockHash]:
        """Return a holder's blocks: down from its tops."""
        bit = 1 << slot
        blocks = list(self._tops[slot])
        for block in blocks:
            blocks += self._children_held(block, bit)
        if len(blocks) != self._blocks[slot]:
            # Only lies make a cycle of parents, which no top reaches.
            return [block for block in self._chains.parent if self._holders(block) & bit]
        return blocks


_ABSENT = object()
