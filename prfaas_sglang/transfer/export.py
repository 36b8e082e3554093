"""One transfer as the prefill side sees it: what the engine offered, what decode granted, what is staged.

The engine's request and the transfer end apart: once everything is staged the engine gets its pages back
(`released`), and the transfer goes on by itself until decode says DONE.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from prfaas_sglang.core.framing import Data, FrameType, Missing, encode_data, encode_total
from prfaas_sglang.core.outbox import due_s
from prfaas_sglang.core.session import ExportSession, Part, ranges_of
from prfaas_sglang.transfer.bundle import Bundle
from prfaas_sglang.transfer.channel import Channel
from prfaas_sglang.transfer.compressor import Compressor
from prfaas_sglang.transfer.staging import Extent
from prfaas_sglang.transfer.telemetry import LinkSample, TransferRecord
from prfaas_sglang.transfer.wire import Wire

#: How long the engine waits for staging when it replaces pages of which layers went ahead.
COPY_TIMEOUT_S = 5.0


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
        parts: all that was offered so far, so that a broken connection can be made good.
        parked_s: when the connection that had the grant broke, None while there is one.
        sent_to: site and worker that granted.
        copying: parts on their way to staging memory.
        from_pool: something is sent straight from the pool: pages must stay until DONE.
        released: the engine was told that its request is over.
        dead: ended; set before pages or staging memory go back.
        ahead_bytes: row bytes that were offered before their chunk was computed.
        early_bytes: row bytes handed to TCP when prefill ended.
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
    parts: list[Part] = field(default_factory=list)
    parked_s: float | None = None
    sent_to: tuple[str, str] = ("unknown", "")
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
    ahead_bytes: int = 0
    early_bytes: int = 0
    holders: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    _copied: threading.Condition = field(init=False)

    def __post_init__(self) -> None:
        self._copied = threading.Condition(self.lock)

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
            self.parts.clear()
            self._give_back()
            self._copied.notify_all()
            return first

    def _give_back(self) -> None:
        if self.dead and not self.holders:
            while self.extents:
                self.free(self.extents.pop())

    @property
    def whole(self) -> bool:
        """True when every part was offered and copied."""
        return self.session.last_seen and not self.copying and not self.from_pool

    def record(self, outcome: str, reason: str, now_s: float) -> TransferRecord:
        """Return what is remembered of it when it has ended."""
        grant, prefilled_s = self.session.grant, self.prefill_end_s
        return TransferRecord(
            room=self.room,
            role="send",
            peer_site=self.sent_to[0],
            outcome=outcome,
            bytes=self.sent_bytes,
            wire_bytes=self.wire_bytes,
            pages=grant.pages if grant is not None else 0,
            seconds=now_s - (self.granted_s or self.opened_s),
            queued_s=self.queued_s(),
            exposed_s=now_s - prefilled_s if outcome == "done" and prefilled_s is not None else None,
            staged=self.kv is not None and not self.from_pool,
            ahead_bytes=self.ahead_bytes,
            early_bytes=self.early_bytes,
            reason=reason,
        )

    def stale(self, now_s: float, *, hold_s: float, park_s: float) -> str:
        """Return why it has waited too long for the other side, "" when it has not."""
        if self.channel is not None:
            late = not self.engine_opened and now_s - self.opened_s > hold_s
            return f"no request came for the grant in {hold_s:.0f} s" if late else ""
        if self.parked_s is not None:
            late = now_s - self.parked_s > park_s
            return f"connection to decode worker lost, and not resumed in {park_s:.0f} s" if late else ""
        late = now_s - (self.prefill_end_s or now_s) > hold_s
        return f"no decode worker asked for it in {hold_s:.0f} s" if late else ""

    def put(self, wire: Wire, compressor: Compressor, data: Data, views: list[memoryview]) -> None:
        """Send one frame whose rows are `views`, coded as the compressor says; on a writer thread."""
        data, parts = compressor.encode(data, views)
        with self.lock:  # before it is sent: DONE may be here before `send` returns
            self.sent_bytes += sum(map(len, views))
            self.wire_bytes += sum(map(len, parts))
        wire.send(FrameType.DATA, self.transfer, [encode_data(data), *parts])

    # --- with `lock` held ---

    def finished_copying(self) -> None:
        """One job less on its way to staging memory."""
        self.copying -= 1
        self._copied.notify_all()

    def copied(self) -> bool:
        """Wait until all that was offered is in staging memory; the lock is free meanwhile."""
        done = self._copied.wait_for(lambda: self.dead or not self.copying, COPY_TIMEOUT_S)
        return done and not self.dead and not self.from_pool

    def queue(self, part: Part) -> None:
        """Let a part go, or wait for the grant."""
        if self.dead:
            return
        self.parts.append(part)
        if self.channel is not None:
            self.channel.bundle.add(self.transfer, self.deadline_s, self.session.pieces(part))

    def attach(
        self, channel: Channel, transfer: int, now_s: float, missing: Sequence[Missing] | None = None
    ) -> None:
        """The session has its grant: let go what was offered, or what of it is `missing` after a break.

        Raises RemoteProtocolError when what was offered does not fit the grant.
        """
        ranges = None if missing is None else ranges_of(missing)
        offered = [self.session.pieces(part, ranges) for part in self.parts]
        self.channel, self.transfer, self.parked_s = channel, transfer, None
        self.sent_to = channel.peer.site, channel.peer.worker
        if self.granted_s is None:
            self.granted_s = now_s
        self.deadline_s = due_s(self.granted_s, self.session.total_bytes)
        for pieces in offered:
            channel.bundle.add(transfer, self.deadline_s, pieces)
        self.commit()

    def park(self, now_s: float) -> None:
        """The connection broke: wait for decode to resume on another."""
        self.channel, self.parked_s, self.committed = None, now_s, False

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


def with_load(sample: LinkSample, exports: Sequence[Export]) -> LinkSample:
    """Return the sample with what is under way on its link."""
    pending = sum(max(0, e.session.offered_bytes - e.sent_bytes) for e in exports)
    return replace(sample, open_transfers=len(exports), pending_bytes=pending)


@dataclass(slots=True)
class DecodePeer:
    """A decode worker's bundle and its connections."""

    bundle: Bundle
    site: str
    worker: str
    compressor: Compressor
    channels: list[Channel] = field(default_factory=list)
    transfers: dict[int, Export] = field(default_factory=dict)
    lost: bool = False
