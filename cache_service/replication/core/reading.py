"""What a reader makes of a log's keys: a listing, then events, into segments and snapshots in order.

Decides what is yielded and when a value is refused; it must not know what a payload says. A refusal
(RemoteProtocolError) ends the reader: the log cannot be followed past it until it starts anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.log import LogEntry, LogPosition, Segment, Snapshot
from cache_service.replication.core.layout import Head, LogKeys, PartKey, join, open_frame


class LogReader:
    """Follows one log. After a listing (`page` per page) come changes (`put`), revision by revision.

    `position` is where the reader is, None before the first entry; the entries a call returns are in order.
    Deletions need no word: what is deleted is below a head that is put at the same revision, or the whole log
    (`gone`).
    """

    def __init__(self, keys: LogKeys, after: LogPosition | None) -> None:
        self._keys = keys
        self.position = after
        self._listed: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []

    def page(self, kvs: Iterable[tuple[bytes, bytes]], *, first: bool, last: bool) -> list[LogEntry]:
        """Take a page of a listing."""
        if first:
            self._listed = {}
        self._listed.update(kvs)
        if not last:
            return []
        listed, self._listed = self._listed, {}
        return list(self._read_listing(listed))

    def put(self, key: bytes, value: bytes) -> list[LogEntry]:
        """Take a key that was written."""
        if key == self._keys.head:
            return self._new_head(Head.decode(value))
        part = self._keys.parse(key)
        if part is None or part.snapshot:
            return []
        entry = self._segment_part(part, value)
        return [entry] if entry else []

    def deleted(self, key: bytes) -> list[LogEntry]:
        """Take a key that was deleted: without its head, a log says nothing any more (its lease ran out)."""
        if key != self._keys.head or self.position is None:
            return []
        return self._restart(LogPosition(self.position.epoch, 0), b"")

    def _new_head(self, head: Head) -> list[LogEntry]:
        at = LogPosition(head.epoch, head.seq)
        if self.position is not None and self.position.epoch == at.epoch and self.position >= at:
            return []  # a snapshot of what this reader has
        if head.parts == 0:
            return self._restart(at, b"")
        raise RemoteProtocolError(f"log at {self.position}: a snapshot at {at} came first", reason="hole")

    def _restart(self, at: LogPosition, payload: bytes) -> list[LogEntry]:
        self.position, self._pieces = at, []
        return [Snapshot(at, payload)]

    def _segment_part(self, key: PartKey, value: bytes) -> Segment | None:
        position = self.position
        if position is None or key.epoch != position.epoch or key.seq <= position.seq:
            return None  # of a life that is over, or under the snapshot
        if key.seq != position.seq + 1 or key.part != len(self._pieces):
            raise RemoteProtocolError(f"log at {position}: {key} follows", reason="hole")
        parts, piece = open_frame(key, value)
        self._pieces.append(piece)
        if len(self._pieces) < parts:
            return None
        payload, self._pieces = join(self._pieces), []
        self.position = LogPosition(key.epoch, key.seq)
        return Segment(self.position, payload)

    def _read_listing(self, listed: dict[bytes, bytes]) -> Iterator[LogEntry]:
        known, self._pieces = self.position, []
        value = listed.get(self._keys.head)
        if value is None:
            if known is not None:
                yield from self._restart(LogPosition(known.epoch, 0), b"")
            return
        head = Head.decode(value)
        base = LogPosition(head.epoch, head.seq)
        found = [
            (part, value) for key, value in listed.items() if (part := self._keys.parse(key)) is not None
        ]
        log = [(part, value) for part, value in found if not part.snapshot and part.epoch == base.epoch]
        end = max((part.seq for part, _ in log), default=base.seq)
        if known is None or known.epoch != base.epoch or not base.seq <= known.seq <= end:
            yield from self._restart(base, self._snapshot(head, listed))
        for part, value in sorted(log, key=lambda item: (item[0].seq, item[0].part)):
            if (entry := self._segment_part(part, value)) is not None:
                yield entry

    def _snapshot(self, head: Head, listed: dict[bytes, bytes]) -> bytes:
        if head.parts == 0:
            return b""
        prefix = self._keys.snapshot(head.epoch, head.seq)
        pieces = []
        for number in range(head.parts):
            value = listed.get(prefix + b"%04x" % number)
            if value is None:
                raise RemoteProtocolError(f"snapshot at {head}: part {number} is missing", reason="hole")
            parts, piece = open_frame(PartKey(True, head.epoch, head.seq, number), value)
            if parts != head.parts:
                raise RemoteProtocolError(f"snapshot at {head}: part {number} of {parts}", reason="malformed")
            pieces.append(piece)
        return join(pieces)
