"""One transfer as the prefill side sees it: what the engine offered, what decode granted, what is staged.

The engine's request and the transfer end apart: once everything is staged the engine gets its pages back
(`released`), and the transfer goes on by itself until decode says DONE.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prfaas_sglang.core.framing import FrameType, encode_total
from prfaas_sglang.core.outbox import due_s
from prfaas_sglang.core.session import ExportSession, Part
from prfaas_sglang.transfer.channel import Channel
from prfaas_sglang.transfer.staging import Extent


@dataclass(slots=True)
class Export:
    """One room's transfer. `lock` guards everything but the counters of the writer threads.

    Attributes:
        room: bootstrap room.
        session: the pure half.
        opened_s: when this side first heard of it, monotonic seconds; the other times likewise.
        free: gives one extent of staging memory back.
        engine_opened: the engine has the request.
        channel: control connection that brought the grant, None before.
        transfer: decode's number for it.
        deadline_s: virtual deadline in the bundle's queue.
        kv: staging memory of the KV pages, None when there was no room.
        extents: offsets of all staging memory it holds.
        ready: parts that wait for the grant.
        copying: parts on their way to staging memory.
        from_pool: something is sent straight from the pool: pages must stay until DONE.
        released: the engine was told that its request is over.
        dead: ended; set before pages or staging memory go back.
    """

    room: int
    session: ExportSession
    opened_s: float
    free: Callable[[int], None]
    engine_opened: bool = False
    channel: Channel | None = None
    transfer: int = 0
    deadline_s: float = 0.0
    kv: Extent | None = None
    extents: list[int] = field(default_factory=list)
    ready: list[Part] = field(default_factory=list)
    copying: int = 0
    from_pool: bool = False
    released: bool = False
    committed: bool = False
    dead: bool = False
    granted_s: float | None = None
    offered_s: float | None = None
    first_sent_s: float | None = None
    prefill_end_s: float | None = None
    sent_bytes: int = 0
    wire_bytes: int = 0
    holders: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Keep the staging memory while a thread reads or writes it; False when it is gone."""
        with self.lock:
            alive = not self.dead
            self.holders += alive
        try:
            yield alive
        finally:
            if alive:
                with self.lock:
                    self.holders -= 1
                    self._give_back()

    def end(self) -> bool:
        """Mark it dead and give its staging memory back once nobody holds it; False when it was dead."""
        with self.lock:
            first, self.dead = not self.dead, True
            self.ready.clear()
            self._give_back()
            return first

    def _give_back(self) -> None:
        if self.dead and not self.holders:
            while self.extents:
                self.free(self.extents.pop())

    @property
    def whole(self) -> bool:
        """True when every part was offered and copied."""
        return self.session.last_seen and not self.copying and not self.from_pool

    # --- with `lock` held ---

    def queue(self, part: Part) -> None:
        """Let a part go, or wait for the grant."""
        if self.dead:
            return
        if self.channel is None:
            self.ready.append(part)
        else:
            self.channel.bundle.add(self.transfer, self.deadline_s, self.session.pieces(part))

    def attach(self, channel: Channel, transfer: int, now_s: float) -> None:
        """The session has its grant: let what is ready go.

        Raises RemoteProtocolError when what is ready does not fit the grant.
        """
        ready = [self.session.pieces(part) for part in self.ready]
        self.ready.clear()
        self.channel, self.transfer, self.granted_s = channel, transfer, now_s
        self.deadline_s = due_s(now_s, self.session.total_bytes)
        for pieces in ready:
            channel.bundle.add(transfer, self.deadline_s, pieces)
        self.commit()

    def commit(self) -> None:
        """Say how much it is, once the last chunk and the grant are here."""
        if self.channel is not None and self.session.last_seen and not self.committed:
            # order does not matter: the import is complete when this and every row are there
            self.committed = True
            total = encode_total(self.session.total_bytes)
            self.channel.post(FrameType.COMMIT, self.transfer, [total])

    def queued_s(self) -> float:
        """Return the seconds that the first piece waited for its turn, once it could go."""
        if self.first_sent_s is None or self.granted_s is None or self.offered_s is None:
            return 0.0
        return max(0.0, self.first_sent_s - max(self.granted_s, self.offered_s))
