"""The prefix index kept in C++: the answers of core/index.py, in less time and memory.

Decides only how names become slots; everything else is in index.hpp. Without the compiled module (`missing`
says why) nothing here can be made; `cache_service.native` knows what to use instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import Literal

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
from cache_service.core.index_types import Applied, IndexCounts, Match, Needs
from cache_service.wire.worker_events import DumpPage

try:
    import cache_service.native._index as _index
except ImportError as _error:
    #: Why the native core cannot run here; None when it can.
    missing: str | None = str(_error)
else:
    missing = None

#: Formats of event streams (wire/formats.py) whose batches C++ decodes.
NativeFormat = Literal["sglang", "prfaas"]

#: held.hpp: rows of holders, by group and tier.
_ROW = {(group, tier): (1 + place) * len(Tier) + tier for place, group in enumerate(Group) for tier in Tier}
_OF_ROW = {row: key for key, row in _ROW.items()}
#: Some 20 us of looking, 0.2 ms when all of them go.
SWEEP_BLOCKS = 1024
_STORED, _REMOVED, _CLEARED, _GROUP_STORED, _GROUP_REMOVED = range(5)


class DecodedBatch:
    """A batch of KV events of which every one is known and true, kept as C++ decoded it.

    Attributes:
        sent_unix_s: wall clock of the publisher.
        refused: nothing; as `wire.kv_events.Batch` has it.
        needs: what the worker's model needs, where the batch says it.
    """

    __slots__ = ("native",)

    refused: tuple[()] = ()

    def __init__(self, native: _index.Batch) -> None:
        self.native = native

    @property
    def sent_unix_s(self) -> float:
        return self.native.sent_unix_s

    @property
    def needs(self) -> Needs | None:
        needs = self.native.needs
        return None if needs is None else Needs(*needs)

    def __len__(self) -> int:
        return len(self.native)

    def event(self, position: int) -> Event:
        """Return an event as a value."""
        kind, row, parent, hashes = self.native.event(position)
        if kind == _CLEARED:
            return AllCleared()
        blocks = tuple(map(BlockHash, hashes))
        if kind in (_GROUP_STORED, _GROUP_REMOVED):
            group, tier = _OF_ROW[row]
            return (GroupStored if kind == _GROUP_STORED else GroupRemoved)(group, blocks, tier)
        if kind == _REMOVED:
            return BlocksRemoved(blocks, Tier(row))
        return BlocksStored(blocks, None if parent is None else BlockHash(parent), Tier(row))


def decode_batch(
    payload: bytes, *, page_size: int, dp_rank: int, format: NativeFormat = "sglang"
) -> DecodedBatch | None:
    """Decode a batch as `decode_batch` of `wire.kv_events` or `wire.worker_events` does.

    None when that has, or may have, a complaint.
    """
    decode = _index.decode_prfaas if format == "prfaas" else _index.decode_sglang
    native = decode(payload, page_size, dp_rank)
    return None if native is None else DecodedBatch(native)


def decode_page(payload: bytes, *, page_size: int) -> DumpPage[DecodedBatch] | None:
    """Decode a page of a dump as `wire.worker_events.decode_page` does; None as `decode_batch`."""
    found = _index.decode_page(payload, page_size)
    if found is None:
        return None
    dump, page, pages, seq, anchor, native = found
    return DumpPage(dump, page, pages, seq, anchor, DecodedBatch(native))


class NativeIndex:
    """A `core.index.PrefixIndex` in C++; see there.

    `clear` and `drop` are O(distinct holder sets). The memory of blocks that nobody holds after them comes
    back as the index changes: each change looks at `sweep_blocks` more.
    """

    def __init__(self, *, budget_bytes: int = 0, sweep_blocks: int = SWEEP_BLOCKS) -> None:
        if budget_bytes < 0:
            raise ConfigError(f"budget_bytes: {budget_bytes} is negative; give a number of bytes, 0 for none")
        if not 1 <= sweep_blocks <= 1 << 30:
            raise ConfigError(f"sweep_blocks: {sweep_blocks} is not in 1..{1 << 30}")
        self._core = _index.Index(budget_bytes, sweep_blocks, Match)
        self._slot: dict[SourceId, int] = {}
        self._sources: list[SourceId | None] = []

    @property
    def revision(self) -> int:
        """Grows with every change that a `match` could see."""
        return self._core.revision

    @property
    def evicted_blocks(self) -> int:
        """Blocks forgotten to keep the budget, ever."""
        return self._core.evicted

    @property
    def bytes_estimate(self) -> int:
        """What the content takes, about; the budget is held against this."""
        return self._core.bytes_estimate

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
        self._slot[source] = slot
        self._name()

    def declare(self, source: SourceId, needs_state: bool, swa_window_blocks: int) -> None:
        """Say what a holder's model needs beside full-attention blocks; until then, nothing."""
        if swa_window_blocks < 0:
            raise ConfigError(f"swa_window_blocks: {swa_window_blocks} is negative; give blocks, 0 for none")
        # no prompt has more blocks than 32 bits say
        self._core.declare(self._slot_of(source), needs_state, min(swa_window_blocks, 0xFFFFFFFF))

    def drop(self, source: SourceId) -> int:
        """Forget a holder and what it holds; return how many entries went."""
        gone = self.clear(source)
        slot = self._slot.pop(source)
        self._sources[slot] = None
        self._core.release(slot)
        self._name()
        return gone

    def quarantine(self, source: SourceId) -> None:
        """Leave a holder out of every answer, and keep what it holds."""
        self._core.quarantine(self._slot_of(source), True)

    def restore(self, source: SourceId) -> None:
        """Undo `quarantine`."""
        self._core.quarantine(self._slot_of(source), False)

    def match(self, hashes: Sequence[BlockHash], limit_blocks: int | None = None) -> list[Match]:
        """Return every holder of a non-empty prefix of `hashes`, deepest first, then by name."""
        return self._core.match(hashes, limit_blocks)

    def held_blocks(self, source: SourceId) -> int:
        """Return how many (block, tier) entries a holder has."""
        return self._core.entries(self._slot_of(source))

    def counts(self) -> IndexCounts:
        """Return the sizes; O(holders)."""
        blocks, entries, orphans, group_entries = self._core.counts()
        return IndexCounts(blocks, entries, len(self._slot), orphans, group_entries)

    def nodes(self) -> int:
        """Return how many radix nodes (maximal runs of equal holders) the blocks make; O(blocks)."""
        return self._core.nodes()

    def apply(self, source: SourceId, event: Event) -> Applied:
        """Change the index by one event of a registered holder.

        Raises LocalProtocolError when `source` was not added.
        """
        slot = self._slot_of(source)
        match event:
            case BlocksStored():
                return Applied(*self._core.store(slot, event.tier, event.hashes, event.parent))
            case BlocksRemoved():
                return Applied(*self._core.remove(slot, event.tier, event.hashes))
            case GroupStored():
                return Applied(*self._core.store_group(slot, _ROW[event.group, event.tier], event.hashes))
            case GroupRemoved():
                return Applied(*self._core.remove_group(slot, _ROW[event.group, event.tier], event.hashes))
            case AllCleared():
                return Applied(removed=self._core.clear(slot))

    def apply_decoded(self, source: SourceId, batch: DecodedBatch) -> list[Applied]:
        """Apply a batch in order; return what each of its events changed.

        Raises LocalProtocolError when `source` was not added.
        """
        return list(starmap(Applied, self._core.apply_batch(self._slot_of(source), batch.native)))

    def clear(self, source: SourceId) -> int:
        """Remove all that a holder holds; return how many entries went."""
        return self._core.clear(self._slot_of(source))

    def copy(self) -> NativeIndex:
        """Return an index of its own with the same content."""
        other = NativeIndex()
        other._core = self._core.copy()
        other._slot = self._slot.copy()
        other._sources = self._sources.copy()
        return other

    def dump(self) -> Iterator[tuple[SourceId, BlocksStored | GroupStored]]:
        """Yield events that rebuild the content in an empty index: path-compressed runs of equal holders."""
        for hashes, parent, tier, slots in self._core.runs():
            below = None if parent is None else BlockHash(parent)
            event = BlocksStored(tuple(map(BlockHash, hashes)), below, Tier(tier))
            yield from ((self._source_at(slot), event) for slot in slots)
        for row, hashes, slots in self._core.grouped():
            group, at = _OF_ROW[row]
            part = GroupStored(group, tuple(map(BlockHash, hashes)), at)
            yield from ((self._source_at(slot), part) for slot in slots)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; O(entries)."""
        problem = self._core.check()
        assert not problem, problem
        assert {slot: source for source, slot in self._slot.items()} == {
            slot: source for slot, source in enumerate(self._sources) if source is not None
        }

    def _name(self) -> None:
        order = [self._slot[source] for source in sorted(self._slot)]
        self._core.name(list(self._sources), order)

    def _slot_of(self, source: SourceId) -> int:
        slot = self._slot.get(source)
        if slot is None:
            raise LocalProtocolError(f"{source} is not registered with the index")
        return slot

    def _source_at(self, slot: int) -> SourceId:
        source = self._sources[slot]
        assert source is not None, "an entry of a slot without a holder"
        return source
