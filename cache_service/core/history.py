"""The latest changes of an index, for those who follow it: bounded, and shared by all of them.

Decides what a follower gets and when it has fallen behind; it must not know how changes travel. Nothing is
remembered until somebody asks to follow (`start`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import AllCleared, BlocksStored, Event
from cache_service.core.ids import SourceId

Change = tuple[SourceId, Event]


class FellBehind(RemoteProtocolError):
    """What the follower wants next is not remembered: start over from a dump."""

    reason = "fell_behind"


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes in order; `revision` is what a follower has with them, `position` where it goes on."""

    changes: list[Change]
    revision: int
    position: int


class History:
    """Changes with the index's revision behind each; at most `max_blocks` hashes are kept."""

    def __init__(self, *, max_blocks: int = 1 << 18) -> None:
        self._max_blocks = max_blocks
        self._revisions: list[int] = []
        self._changes: list[Change] = []
        self._blocks = 0
        self._forgotten = 0
        #: Absolute position of `_changes[0]`.
        self._base = 0
        #: Everything behind this revision is remembered.
        self._floor = 0
        #: Whether changes are to be added.
        self.wanted = False

    @property
    def end(self) -> int:
        """Where a follower starts that wants only what comes."""
        return self._base + len(self._changes)

    def start(self, revision: int) -> None:
        """Remember from `revision`, the index's own, on; no effect when it does already."""
        if not self.wanted:
            self.wanted, self._floor = True, revision

    def stop(self) -> None:
        """Forget everything and remember nothing more."""
        self._base = self.end
        self._revisions, self._changes, self._blocks, self._forgotten = [], [], 0, 0
        self.wanted = False

    def add(self, revision: int, change: Change) -> None:
        """Note a change after which the index has `revision`."""
        self._revisions.append(revision)
        self._changes.append(change)
        self._blocks += _size(change)
        while self._blocks > self._max_blocks:
            self._blocks -= _size(self._changes[self._forgotten])
            self._floor = self._revisions[self._forgotten]
            self._forgotten += 1
        if self._forgotten > 1024 and 2 * self._forgotten > len(self._changes):
            del self._changes[: self._forgotten], self._revisions[: self._forgotten]
            self._base += self._forgotten
            self._forgotten = 0

    def position(self, revision: int) -> int:
        """Return where a follower goes on that has `revision`. Raises FellBehind."""
        if not self.wanted or revision < self._floor:
            raise FellBehind(f"revision: {revision} is not remembered; start over from Dump")
        return self._base + bisect_right(self._revisions, revision, lo=self._forgotten)

    def read(self, position: int, revision: int, max_blocks: int) -> Batch:
        """Return what follows `position`, up to about `max_blocks` hashes; empty at the end.

        `revision` is what the follower has. Raises FellBehind.
        """
        at = position - self._base
        if not self.wanted or at < self._forgotten:
            raise FellBehind(
                f"revision: {revision} is no longer remembered: this client reads too slowly; "
                "start over from Dump"
            )
        start = at
        blocks = 0
        while at < len(self._changes) and (at == start or blocks < max_blocks):
            blocks += _size(self._changes[at])
            at += 1
        if at > start:
            revision = self._revisions[at - 1]
            if at < len(self._changes) and self._revisions[at] == revision:
                revision -= 1  # the rest of this revision is to come
        return Batch(self._changes[start:at], revision, self._base + at)


def slices(changes: Iterator[Change] | Sequence[Change], max_blocks: int) -> Iterator[list[Change]]:
    """Yield the changes in pages of at most `max_blocks` hashes; longer ones are cut, chains kept whole."""
    page: list[Change] = []
    room = max_blocks
    for source, event in changes:
        if isinstance(event, AllCleared):
            page.append((source, event))
            room -= 1
        else:
            hashes = getattr(event, "hashes", ())
            done = 0
            while done < len(hashes):
                if room <= 0:
                    yield page
                    page, room = [], max_blocks
                part = replace(event, hashes=hashes[done : done + room])
                if done and isinstance(part, BlocksStored):
                    part = replace(part, parent=hashes[done - 1])
                page.append((source, part))
                done += len(part.hashes)
                room -= len(part.hashes)
        if room <= 0:
            yield page
            page, room = [], max_blocks
    if page:
        yield page


def _size(change: Change) -> int:
    return 1 + len(getattr(change[1], "hashes", ()))
