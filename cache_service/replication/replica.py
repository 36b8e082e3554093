"""The reading end of replication: another site's entries in this service's index.

Decides whose a worker is when two sites name it (the first keeps it, our own always), when a site's entries
are offered, and how much is applied before the event loop has its turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from cache_service import logs
from cache_service.core import delta
from cache_service.core.coarse import CoarseIndex
from cache_service.core.delta import Change, Declared
from cache_service.core.events import AllCleared, BlocksStored
from cache_service.core.ids import BlockHash, SiteId, SourceId
from cache_service.core.index_protocol import BlockIndex
from cache_service.core.index_types import Match
from cache_service.core.log import LogEntry, LogPosition, Snapshot
from cache_service.native import make_index

log = logging.getLogger(__name__)

#: Blocks applied before other tasks run: some 2 ms.
_SLICE_BLOCKS = 4096
#: A payload of this size is decoded in a thread.
_LARGE_BYTES = 64 * 1024
MAX_SOURCES = 4096


class Withheld(Enum):
    """Why a site's entries are kept and not offered."""

    DEAD = "dead"  # its live lease is gone, or its stream is cut
    BROKEN = "broken"  # its log does not parse: what is here may be wrong


class Claims:
    """Which site a source belongs to."""

    def __init__(self, own: dict[SourceId, SiteId]) -> None:
        self._own = frozenset(own)
        self._sites = dict(own)

    def claim(self, source: SourceId, site: SiteId) -> bool:
        """Say whether `site` has the source, which it takes when nobody has."""
        if source in self._own:
            return False
        return self._sites.setdefault(source, site) == site

    def release(self, source: SourceId) -> None:
        """Give a source up that is no longer in the index."""
        del self._sites[source]

    def site_of(self, source: SourceId) -> SiteId:
        """Return whose the source is."""
        return self._sites[source]


class Indexes:
    """The service's own index, and one for each stride that other sites publish with.

    `budget_bytes` bounds each of the latter; 0 for no bound.
    """

    def __init__(self, own: BlockIndex, *, budget_bytes: int = 0) -> None:
        self.own = own
        self._budget_bytes = budget_bytes
        self._coarse: dict[int, CoarseIndex] = {}

    def of(self, stride: int) -> BlockIndex | CoarseIndex:
        """Return the index of a stride, made when it is new; with stride 1 a block is a block: our own."""
        if stride == 1:
            return self.own
        if stride not in self._coarse:
            self._coarse[stride] = CoarseIndex(stride, make_index(budget_bytes=self._budget_bytes))
        return self._coarse[stride]

    def match(self, hashes: Sequence[BlockHash], limit_blocks: int) -> list[Match]:
        """Return every holder of a prefix, here or elsewhere: as PrefixIndex.match, in blocks."""
        found = self.own.match(hashes, limit_blocks)
        if self._coarse:
            for index in self._coarse.values():
                found += index.match(hashes, limit_blocks)
            found.sort(key=lambda m: (-m.matched, m.source))
        return found


class RemoteSite:
    """What one other site publishes. Entries are applied one at a time, by one task."""

    def __init__(self, site: SiteId, stride: int, indexes: Indexes, claims: Claims) -> None:
        self.site = site
        self.stride = stride
        self._indexes = indexes
        self._index = indexes.of(stride)
        self._claims = claims
        self._sources: set[SourceId] = set()
        self._refused: set[SourceId] = set()
        self._withheld: set[Withheld] = {Withheld.DEAD}
        #: Where this replica is in the site's log.
        self.position: LogPosition | None = None
        #: Segments applied, snapshots started over from, changes refused because another site has the source.
        self.segments = self.rebuilds = self.refused_changes = 0

    @property
    def withheld(self) -> frozenset[Withheld]:
        """Why it is not offered; empty while it is."""
        return frozenset(self._withheld)

    @property
    def entries(self) -> int:
        """How many entries of it the index holds."""
        return sum(self._index.held_blocks(source) for source in self._sources)

    def withhold(self, why: Withheld) -> None:
        """Keep its entries and do not offer them."""
        if why not in self._withheld:
            self._withheld.add(why)
            self._mark()

    def offer(self, why: Withheld) -> None:
        """Undo `withhold` for this reason."""
        if why in self._withheld:
            self._withheld.discard(why)
            self._mark()

    async def apply(self, entry: LogEntry) -> None:
        """Bring the replica up to `entry`. Raises RemoteProtocolError for bytes that are no segment."""
        payload = entry.payload
        if len(payload) > _LARGE_BYTES:
            changes = await asyncio.to_thread(delta.decode, payload)
        else:
            changes = delta.decode(payload) if payload else []
        if isinstance(entry, Snapshot):
            self.drop()
            self.rebuilds += 1
        else:
            self.segments += 1
        done = 0
        for change in changes:
            for part in _slices(change):
                self._apply(part)
                done += len(getattr(part[1], "hashes", ())) + 1
                if done > _SLICE_BLOCKS:
                    done = 0
                    await asyncio.sleep(0)
        self.position = entry.position

    def drop(self) -> None:
        """Forget all it published."""
        for source in self._sources:
            self._index.drop(source)
            self._claims.release(source)
        self._sources.clear()
        self.position = None

    def restride(self, stride: int) -> None:
        """Start over with another meaning of a block."""
        self.drop()
        self.stride, self._index = stride, self._indexes.of(stride)

    def _apply(self, change: Change) -> None:
        source, event = change
        if source not in self._sources and not self._take(source):
            self.refused_changes += 1
            return
        if not isinstance(event, Declared):
            self._index.apply(source, event)
        elif isinstance(self._index, CoarseIndex):
            self._index.declare(source, event)
        else:
            self._index.declare(source, event.needs_state, event.swa_window_blocks)

    def _take(self, source: SourceId) -> bool:
        if len(self._sources) >= MAX_SOURCES or not self._claims.claim(source, self.site):
            if source not in self._refused and len(self._refused) < MAX_SOURCES:
                self._refused.add(source)
                logs.event(
                    log, "replica_source_refused", logging.WARNING, site=self.site, worker_id=source.worker_id
                )
            return False
        self._sources.add(source)
        self._index.add(source)
        if self._withheld:
            self._index.quarantine(source)
        return True

    def _mark(self) -> None:
        for source in self._sources:
            if self._withheld:
                self._index.quarantine(source)
            else:
                self._index.restore(source)


def _slices(change: Change) -> list[Change]:
    """Cut a long run, so that no event holds the loop up."""
    source, event = change
    if isinstance(event, AllCleared | Declared) or len(event.hashes) <= _SLICE_BLOCKS:
        return [change]
    cut: list[Change] = []
    for at in range(0, len(event.hashes), _SLICE_BLOCKS):
        part = replace(event, hashes=event.hashes[at : at + _SLICE_BLOCKS])
        if isinstance(part, BlocksStored) and at:
            part = replace(part, parent=event.hashes[at - 1])
        cut.append((source, part))
    return cut
