"""Which piece goes next when several transfers share a bundle of connections.

Earliest virtual deadline first: a transfer is due when it was granted plus its size over a fixed slow rate,
so a small one overtakes a large one that came shortly before, and a large one that has waited long enough is
not overtaken any more. Pure; the shell takes one piece at a time, as late as it can.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from prfaas_sglang.core.plan import Piece

#: The rate that virtual deadlines assume. 1 MiB is due after 0.13 s, 256 MiB after 32 s.
DUE_BYTES_PER_S = 8 << 20


def due_s(granted_s: float, total_bytes: int) -> float:
    """Return a transfer's virtual deadline."""
    return granted_s + total_bytes / DUE_BYTES_PER_S


@dataclass(slots=True)
class _Entry:
    chunks: deque[Iterator[Piece]] = field(default_factory=deque)
    queued: bool = False


@dataclass(slots=True)
class Outbox:
    """Chunks of transfers waiting to be sent, ordered by the transfers' deadlines."""

    _heap: list[tuple[float, int]] = field(default_factory=list)
    _entries: dict[int, _Entry] = field(default_factory=dict)

    def add(self, transfer: int, deadline_s: float, pieces: Iterator[Piece]) -> None:
        """Queue a chunk of a transfer, behind the transfer's earlier chunks."""
        entry = self._entries.setdefault(transfer, _Entry())
        entry.chunks.append(pieces)
        if not entry.queued:
            entry.queued = True
            heapq.heappush(self._heap, (deadline_s, transfer))

    def drop(self, transfer: int) -> None:
        """Forget a transfer's chunks."""
        entry = self._entries.pop(transfer, None)
        if entry is not None:
            entry.chunks.clear()

    def take(self) -> tuple[int, Piece] | None:
        """Return the next piece and its transfer, None when nothing waits."""
        while self._heap:
            transfer = self._heap[0][1]
            entry = self._entries.get(transfer)
            while entry is not None and entry.chunks:
                piece = next(entry.chunks[0], None)
                if piece is not None:
                    return transfer, piece
                entry.chunks.popleft()
            heapq.heappop(self._heap)
            if entry is not None:
                del self._entries[transfer]
        return None

    def __bool__(self) -> bool:
        """True when a transfer is queued (its chunks may turn out to be exhausted)."""
        return bool(self._heap)
