"""The reading end of replication: another site's entries in this service's index.

Decides whose a worker is when two sites name it (the first keeps it, our own always), when a site's entries
are offered, and how much is applied before the event loop has its turn.
"""

from __future__ import annotations

import asyncio
import logging
from enum import Enum

from cache_service import logs
from cache_service.core import delta
from cache_service.core.delta import Change
from cache_service.core.events import BlocksStored
from cache_service.core.ids import SiteId, SourceId
from cache_service.core.index_protocol import BlockIndex
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
    """Indexes by stride: 1 is the service's own, where a block is a block; in others it stands for more."""

    def __init__(self, own: BlockIndex) -> None:
        self.by_stride: dict[int, BlockIndex] = {1: own}

    def of(self, stride: int) -> BlockIndex:
        """Return the index of a stride, made when it is new."""
        return self.by_stride.setdefault(stride, make_index())


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
        self._index.apply(source, event)

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
    if not isinstance(event, BlocksStored) or len(event.hashes) <= _SLICE_BLOCKS:
        return [change]
    cut: list[Change] = []
    parent = event.parent
    for at in range(0, len(event.hashes), _SLICE_BLOCKS):
        run = event.hashes[at : at + _SLICE_BLOCKS]
        cut.append((source, BlocksStored(run, parent, event.tier)))
        parent = run[-1]
    return cut
