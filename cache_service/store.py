"""The delta log: how a service's index reaches its replicas.

Decides the contract that every store keeps (in-process here; etcd, peer streams: `replication/`) and how the
service feeds it. It must not know what a segment says: it keeps bytes in order.

The contract, which `tests/unit/cache_service/test_store.py` runs against every implementation:
* One log per (site, namespace), one writer. `begin` starts a writer's life: a higher epoch, an empty log, and
  every earlier writer is fenced: its `append` and `snapshot` raise LocalProtocolError, reason "fenced".
* Positions grow by one per segment within an epoch. `snapshot(payload, at)` says "`payload` replaces
  everything up to and including `at`"; the log below may be deleted.
* `watch(after)` yields what follows `after`, for ever. When that is gone (compacted, or of an earlier
  epoch) it yields a Snapshot first, and the reader starts over from it; a reader that has kept up never
  sees one.
* A log of more than `max_segments` refuses to grow (reason "log_full"): snapshot first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from cache_service.core import delta
from cache_service.core.delta import Change, Declared
from cache_service.core.errors import LocalProtocolError
from cache_service.core.ids import SourceId
from cache_service.core.index_protocol import BlockIndex
from cache_service.core.log import LogEntry, LogPosition, Segment, Snapshot


class DeltaLog(Protocol):
    """One site's log of one namespace."""

    async def begin(self) -> LogPosition:
        """Start a new writer's life and return the start of its epoch."""

    async def append(self, epoch: int, payload: bytes) -> LogPosition:
        """Add a segment and return its position. Raises LocalProtocolError when fenced or full."""

    async def snapshot(self, at: LogPosition, payload: bytes) -> None:
        """Replace everything up to `at`. Raises LocalProtocolError when fenced or `at` is not in the log."""

    def watch(self, after: LogPosition | None) -> AsyncIterator[LogEntry]:
        """Yield what follows `after` (None: everything), for ever."""


class InProcessLog:
    """A delta log in memory; its writers' epochs are above `epoch`."""

    def __init__(self, *, max_segments: int = 4096, epoch: int = 0) -> None:
        self._max_segments = max_segments
        self._snapshot = Snapshot(LogPosition(epoch, 0), b"")
        self._segments: deque[Segment] = deque()
        self._changed = asyncio.Condition()

    @property
    def end(self) -> LogPosition:
        """The position of the last segment or, without one, of the snapshot."""
        return self._segments[-1].position if self._segments else self._snapshot.position

    async def begin(self) -> LogPosition:
        """Start a new writer's life."""
        async with self._changed:
            self._snapshot = Snapshot(LogPosition(self.end.epoch + 1, 0), b"")
            self._segments.clear()
            self._changed.notify_all()
            return self._snapshot.position

    async def append(self, epoch: int, payload: bytes) -> LogPosition:
        """Add a segment."""
        async with self._changed:
            self._fence(epoch)
            if len(self._segments) >= self._max_segments:
                raise LocalProtocolError(
                    f"the log holds {self._max_segments} segments; snapshot it first", reason="log_full"
                )
            position = LogPosition(epoch, self.end.seq + 1)
            self._segments.append(Segment(position, payload))
            self._changed.notify_all()
            return position

    async def snapshot(self, at: LogPosition, payload: bytes) -> None:
        """Replace everything up to `at`."""
        async with self._changed:
            self._fence(at.epoch)
            if not self._snapshot.position <= at <= self.end:
                raise LocalProtocolError(
                    f"snapshot at {at}, but the log ends at {self.end}", reason="position"
                )
            self._snapshot = Snapshot(at, payload)
            while self._segments and self._segments[0].position <= at:
                self._segments.popleft()
            self._changed.notify_all()

    async def watch(self, after: LogPosition | None) -> AsyncIterator[LogEntry]:
        """Yield what follows `after`; a slow reader holds nothing back, it gets a snapshot."""
        while True:
            entry = self._next(after)
            if entry is None:
                async with self._changed:
                    await self._changed.wait_for(lambda at=after: self._next(at) is not None)  # type: ignore[misc]
                continue
            yield entry
            after = entry.position

    def _next(self, after: LogPosition | None) -> LogEntry | None:
        """Return the entry that follows `after`: O(1), positions in the log are consecutive."""
        base = self._snapshot.position
        if after is None or not base <= after <= self.end:
            return self._snapshot
        offset = after.seq - base.seq
        return self._segments[offset] if offset < len(self._segments) else None

    def _fence(self, epoch: int) -> None:
        if epoch != self.end.epoch:
            raise LocalProtocolError(
                f"epoch {epoch} is over; the log is in {self.end.epoch}", reason="fenced"
            )


class LogWriter:
    """Feeds one log with an index's changes: collects them, appends them, snapshots when the log has grown.

    `add` is called with every change the index has taken, at once; `flush` by a timer, one at a time. What
    waits is bounded: past `max_pending_blocks`, or after a failed append, the next flush starts a new epoch
    whose first segment is the whole index, so that no reader can miss what was dropped.
    """

    def __init__(
        self,
        log: DeltaLog,
        index: BlockIndex,
        *,
        max_pending_blocks: int = 1 << 20,
        snapshot_bytes: int = 1 << 20,
        snapshot_segments: int = 2048,
    ) -> None:
        self._log = log
        self._index = index
        self._max_pending_blocks = max_pending_blocks
        self._snapshot_bytes = snapshot_bytes
        self._snapshot_segments = snapshot_segments
        self._epoch: int | None = None
        self._pending: list[Change] = []
        self._pending_blocks = 0
        #: What an index does not dump: what the sources' models need.
        self._declared: dict[SourceId, Declared] = {}
        self._last_snapshot_bytes = 0
        self._snapshotting: asyncio.Task[None] | None = None
        #: Bytes and segments of the log above its last snapshot.
        self.log_bytes = 0
        self.log_segments = 0
        #: Bytes of every segment so far.
        self.written_bytes = 0

    def add(self, change: Change) -> None:
        """Note a change that the index has taken."""
        source, event = change
        if isinstance(event, Declared):
            self._declared[source] = event
        self._pending_blocks += 1 + len(getattr(event, "hashes", ()))
        if self._pending_blocks > self._max_pending_blocks:
            self.start_over()
        if self._epoch is not None:
            self._pending.append(change)

    async def flush(self) -> None:
        """Append what waits; start a snapshot when the log outweighs the index it describes.

        For a snapshot the index is copied at once and dumped in a thread; it is written while the next
        segments are appended. Raises what the log raised, of the last snapshot too.
        """
        try:
            if self._snapshotting is not None and self._snapshotting.done():
                done, self._snapshotting = self._snapshotting, None
                done.result()
            if self._epoch is None:
                await self._begin()
            elif self._pending:
                await self._append(self._epoch)
        except BaseException:
            self.start_over()
            raise

    async def settled(self) -> None:
        """Wait for a snapshot that is being written."""
        if self._snapshotting is not None:
            await asyncio.wait({self._snapshotting})

    async def close(self) -> None:
        """Give up a snapshot that is being written."""
        if self._snapshotting is not None:
            self._snapshotting.cancel()
            await asyncio.wait({self._snapshotting})

    async def _begin(self) -> None:
        await self.close()
        self._snapshotting = None
        epoch = (await self._log.begin()).epoch
        # One instant, no await: the copy, and the epoch from which `add` collects again.
        everything = self._everything()
        self._epoch = epoch
        self._pending, self._pending_blocks = [], 0
        self.log_bytes = self.log_segments = self._last_snapshot_bytes = 0
        counts = everything.index.counts()
        if everything.declared or counts.entries or counts.group_entries:
            # A segment, not a snapshot: readers start the epoch from nothing and must not miss it.
            payload = await _dump(everything)
            await self._log.append(epoch, payload)
            self._last_snapshot_bytes = len(payload)
            self.written_bytes += len(payload)

    async def _append(self, epoch: int) -> None:
        payload = delta.encode(self._pending)
        self._pending, self._pending_blocks = [], 0
        everything = self._everything() if self._due(len(payload)) else None
        position = await self._log.append(epoch, payload)
        self.log_bytes += len(payload)
        self.log_segments += 1
        self.written_bytes += len(payload)
        if everything is not None:
            self._snapshotting = asyncio.create_task(self._snapshot(position, everything), name="snapshot")

    async def _snapshot(self, at: LogPosition, everything: _Everything) -> None:
        log_bytes, log_segments = self.log_bytes, self.log_segments
        payload = await _dump(everything)
        await self._log.snapshot(at, payload)
        self._last_snapshot_bytes = len(payload)
        self.log_bytes -= log_bytes
        self.log_segments -= log_segments

    def start_over(self) -> None:
        """Let the next flush begin a new epoch with all there is: the log is gone, or what waits too long."""
        self._epoch = None
        self._pending, self._pending_blocks = [], 0

    def _due(self, more_bytes: int) -> bool:
        if self._snapshotting is not None:
            return False
        limit = max(self._snapshot_bytes, 2 * self._last_snapshot_bytes)
        return self.log_bytes + more_bytes > limit or self.log_segments + 1 >= self._snapshot_segments

    def _everything(self) -> _Everything:
        return _Everything(tuple(self._declared.items()), self._index.copy())


@dataclass(frozen=True, slots=True)
class _Everything:
    """A copy of all that a snapshot says."""

    declared: tuple[tuple[SourceId, Declared], ...]
    index: BlockIndex


async def _dump(everything: _Everything) -> bytes:
    # What is needed first: a reader never holds blocks of a model that it takes for another.
    return await asyncio.to_thread(lambda: delta.encode([*everything.declared, *everything.index.dump()]))


def apply_entry(index: BlockIndex, entry: LogEntry) -> None:
    """Bring a replica up to `entry`. Raises RemoteProtocolError for bytes that are no segment."""
    changes = delta.decode(entry.payload) if entry.payload else []
    if isinstance(entry, Snapshot):
        for source in index.sources():
            index.drop(source)
    for source, event in changes:
        index.add(source)
        if isinstance(event, Declared):
            index.declare(source, event.needs_state, event.swa_window_blocks)
        else:
            index.apply(source, event)
