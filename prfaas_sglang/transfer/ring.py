"""A bounded piece of pinned memory that frames pass through on their way to and from a device.

Slots of any size are cut from one range of bytes, first come first served, so that a large frame is never
overtaken for ever. A slot comes back at once (`give`) or when the device is through with it (`give_after`);
whoever finds no room waits for that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from cache_service.core.errors import TransferError
from prfaas_sglang.core.staging import Extents

#: How long a frame waits for room. Room is held by frames on their way through a socket, and a socket that
#: does not move for this long is given up by its own channel.
WAIT_S = 60.0
#: How often a waiting frame looks for slots whose owner went away without giving them back.
LOOK_S = 0.2


class Event(Protocol):
    """A point in the work of a device's stream."""

    def wait(self) -> None:
        """Block until it has passed; other threads run meanwhile. Raises TransferError (see Lane)."""

    def passed(self) -> bool:
        """Return whether it has passed. Raises TransferError likewise."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Bytes `offset` .. `offset + len(host)` of the ring."""

    offset: int
    host: memoryview


class Ring:
    """Slots of one range of pinned memory. Thread-safe.

    Args:
        host: all of it; a whole number of pages.
        wait_s: seconds that `take` waits.
    """

    def __init__(self, host: memoryview, wait_s: float = WAIT_S) -> None:
        self._host = host
        self._wait_s = wait_s
        self._extents = Extents(len(host))
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._pending: deque[tuple[Slot, Event]] = deque()
        self._abandoned: deque[Slot] = deque()

    @property
    def used_bytes(self) -> int:
        """Bytes that are not free; slots whose event has passed unnoticed are among them."""
        with self._changed:
            return self._extents.used

    def take(self, size: int) -> Slot:
        """Return `size` bytes, when there is room.

        Raises TransferError for more than the ring has, and when there is no room in time.
        """
        if size > self._extents.capacity:
            raise TransferError(
                f"a frame of {size} bytes in a ring of {self._extents.capacity}", reason="frame"
            )
        deadline_s = time.monotonic() + self._wait_s
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        try:
            while True:
                with self._changed:
                    turn = self._waiting[0] is ticket
                    if turn and (slot := self._cut(size)) is not None:
                        return slot
                    busy = self._pending[0][1] if turn and self._pending else None
                    if busy is None:
                        left_s = deadline_s - time.monotonic()
                        if left_s <= 0:
                            raise TransferError(
                                f"no room in the pinned ring for {self._wait_s:.0f} s", reason="ring"
                            )
                        self._changed.wait(min(left_s, LOOK_S))
                if busy is not None:
                    busy.wait()  # the device's own work: it never waits for a socket
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def give(self, slot: Slot) -> None:
        """Take a slot back; nothing uses it any more."""
        with self._changed:
            self._extents.free(slot.offset)
            self._changed.notify_all()

    def give_after(self, slot: Slot, event: Event) -> None:
        """Take a slot back when `event` has passed."""
        with self._changed:
            self._pending.append((slot, event))
            self._changed.notify_all()

    def abandon(self, slot: Slot) -> None:
        """Take a slot back some time soon. Takes no lock, so a finalizer may call it."""
        self._abandoned.append(slot)

    def settle(self) -> None:
        """Block until every event that was given before has passed."""
        with self._changed:
            events = [event for _, event in self._pending]
        for event in events:
            event.wait()
        with self._changed:
            self._reap()
            self._changed.notify_all()

    # --- with the lock held ---

    def _cut(self, size: int) -> Slot | None:
        self._reap()
        offset = self._extents.reserve(size)
        return None if offset is None else Slot(offset, self._host[offset : offset + size])

    def _reap(self) -> None:
        while self._abandoned:
            self._extents.free(self._abandoned.popleft().offset)
        while self._pending and self._pending[0][1].passed():
            self._extents.free(self._pending.popleft()[0].offset)
