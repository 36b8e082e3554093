"""Store and forward: takes KV off the engine's pool, so that its pages need not wait for the link.

Copying is the stager thread's work; the engine's thread only queues it. Staging memory is written and read
only by those who hold its export (see Export.hold), and given back when the last of them has left.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from prfaas_sglang.core.layout import KV, Layout
from prfaas_sglang.core.plan import Piece
from prfaas_sglang.core.session import Part
from prfaas_sglang.transfer.export import Export
from prfaas_sglang.transfer.memory import PoolMemory
from prfaas_sglang.transfer.staging import Extent, Staging, groups, part_bytes, place_kv, place_rows

logger = logging.getLogger(__name__)

#: How often the stager looks for what has waited too long.
TIDY_S = 2.0


class Store:
    """Staging memory of one prefill rank and the thread that fills it.

    Args:
        layout, memory: the pools.
        capacity_bytes: bytes of staging memory, 0 for none.
        on_whole: (room), all of a room is in staging memory; called on the stager's thread.
        tidy: called there every TIDY_S.
    """

    def __init__(
        self,
        layout: Layout,
        memory: PoolMemory,
        capacity_bytes: int,
        *,
        on_whole: Callable[[int], None],
        tidy: Callable[[], None],
    ) -> None:
        self._layout = layout
        self._staging = Staging(memory, capacity_bytes)
        self._on_whole = on_whole
        self._tidy = tidy
        self._jobs: queue.SimpleQueue[tuple[Export, list[Part]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="prfaas-stager", daemon=True)
        self._thread.start()

    @property
    def capacity_bytes(self) -> int:
        """Bytes of staging memory."""
        return self._staging.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of it that transfers have."""
        return self._staging.used_bytes

    def free(self, offset: int) -> None:
        """Take an extent back."""
        self._staging.free(offset)

    def view(self, piece: Piece) -> memoryview:
        """Return the bytes of a staged piece."""
        assert piece.staged is not None
        row_bytes = self._layout.components[piece.data.component].row_bytes
        return self._staging.view(piece.staged, row_bytes[piece.data.tensor] * piece.data.count)

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        self._jobs.put(None)
        self._thread.join(5.0)

    # --- with export.lock held ---

    def reserve(self, export: Export) -> bool:
        """Reserve memory for the KV pages to come; True when the room has it."""
        session = export.session
        begun = export.kv is not None or export.from_pool
        if not begun and not export.dead and session.prompt_pages is not None:
            first = max(session.prefix_pages, session.offered_pages)
            pages = session.prompt_pages - first
            offset = self._staging.reserve(max(1, pages * self._layout.components[KV].bytes_per_row))
            if offset is not None:
                export.extents.append(offset)
                export.kv = Extent(offset, first, pages)
        return export.kv is not None

    def offer(self, export: Export, parts: list[Part]) -> None:
        """Send parts on their way, through staging memory where the room has it."""
        if export.offered_s is None:
            export.offered_s = time.monotonic()
        placed = self._placed(export, parts)
        for part in placed:
            if part.staged is None:
                export.from_pool = True
                export.queue(part)
        staged = [part for part in placed if part.staged is not None]
        if staged or export.session.last_seen:
            export.copying += 1
            self._jobs.put((export, staged))

    def _placed(self, export: Export, parts: list[Part]) -> list[Part]:
        placed: list[Part] = []
        for part in parts:
            if part.component == KV:
                if export.kv is None:
                    placed.append(part)
                elif (found := place_kv(self._layout, part, export.kv)) is not None:
                    placed.append(found)
        rest = [part for part in parts if part.component != KV]
        if rest and export.kv is not None:
            offset = self._staging.reserve(sum(part_bytes(self._layout, part) for part in rest))
            if offset is not None:
                export.extents.append(offset)
                rest = place_rows(self._layout, rest, offset)
        return placed + rest

    # --- the stager's thread ---

    def _loop(self) -> None:
        tidied_s = time.monotonic()
        while True:
            try:
                job = self._jobs.get(timeout=TIDY_S)
                if job is None:
                    return
                self._copy(*job)
            except queue.Empty:
                pass
            except Exception:
                # a bug with one transfer must not end the thread that all share
                logger.exception("staging_failed")
            if time.monotonic() - tidied_s >= TIDY_S:
                tidied_s = time.monotonic()
                self._tidy()

    def _copy(self, export: Export, parts: list[Part]) -> None:
        """Copy parts and let each go as it is there."""
        for part in parts:
            for group in groups(self._layout, part):
                with export.hold() as alive:
                    if not alive:
                        return
                    self._staging.copy(self._layout, group)
                with export.lock:
                    export.queue(replace(group, mark=None))
        with export.lock:
            export.finished_copying()
            whole = export.whole and not export.dead and not export.released
            export.released |= whole
        if whole:
            self._on_whole(export.room)
