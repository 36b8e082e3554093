"""Several connections to one peer that share one queue: what each writer sends next, and how fast together.

Control frames of a connection go before data. Data pieces come from one outbox, earliest deadline first,
whichever connection can take one. A pacer thread samples TCP_INFO, caps the bundle's rate (`core/rate.py`)
and ends a connection that stands still (`core/stall.py`).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from cache_service.core.errors import PrfaasError
from prfaas_sglang.core.framing import FrameType
from prfaas_sglang.core.outbox import Outbox
from prfaas_sglang.core.plan import Piece
from prfaas_sglang.core.rate import RateController, Sample
from prfaas_sglang.core.stall import STALL_S, StallWatch
from prfaas_sglang.transfer.telemetry import LinkSample
from prfaas_sglang.transfer.wire import Buffer, ConnectionLost, Wire

SAMPLE_S = 0.02
#: Seconds that the share of busy time looks back.
BUSY_S = 1.0
#: Control frames that wait for one connection: more than every room of a busy worker needs.
MAX_CONTROL = 8192

Job = Callable[[Wire], None]
SendPiece = Callable[[Wire, int, Piece], None]
Observe = Callable[[LinkSample], None]


class Member(Protocol):
    """A connection as its bundle sees it."""

    wire: Wire
    index: int

    @property
    def failed(self) -> bool:
        """True once it has ended."""

    def fail(self, error: PrfaasError) -> None:
        """End it for a reason."""


class Bundle:
    """The shared queue of one peer's connections. Thread-safe."""

    def __init__(self) -> None:
        self._send_piece: SendPiece | None = None
        self._observe: Observe | None = None
        self._condition = threading.Condition()
        self._control: dict[int, deque[tuple[FrameType, int, Sequence[Buffer]]]] = {}
        self._outbox = Outbox()
        self._members: dict[int, Member] = {}
        self._closed = False
        self._rate = RateController()
        self._stalls = StallWatch()
        self._pacer: threading.Thread | None = None
        self._busy_ratio = 0.0
        self._sampled_s = time.monotonic()

    def on_piece(self, send_piece: SendPiece) -> None:
        """Set what puts one piece on a wire: (wire, transfer, piece), called on writer threads."""
        self._send_piece = send_piece

    def on_sample(self, observe: Observe) -> None:
        """Set who hears what the pacer samples; called on the pacer's thread."""
        self._observe = observe

    def join(self, member: Member) -> None:
        """Add a connection; its writer may ask for work from now on."""
        with self._condition:
            self._members[member.index] = member
            self._control.setdefault(member.index, deque())
            if self._send_piece is not None and self._pacer is None:
                self._pacer = threading.Thread(target=self._pace_loop, name="prfaas-pacer", daemon=True)
                self._pacer.start()

    def close(self) -> None:
        """No more work; writers and the pacer end."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def wake(self) -> None:
        """Make writers look again (one of them has failed)."""
        with self._condition:
            self._condition.notify_all()

    # --- producers ---

    def post(self, index: int, kind: FrameType, transfer: int, parts: Sequence[Buffer]) -> bool:
        """Queue a control frame on one connection; False when MAX_CONTROL wait there already."""
        with self._condition:
            queue = self._control.setdefault(index, deque())
            if len(queue) >= MAX_CONTROL:
                return False
            queue.append((kind, transfer, parts))
            self._condition.notify_all()
            return True

    def add(self, transfer: int, deadline_s: float, pieces: Iterator[Piece]) -> None:
        """Queue a chunk of a transfer for whichever connection is free."""
        with self._condition:
            self._outbox.add(transfer, deadline_s, pieces)
            self._condition.notify_all()

    def drop(self, transfer: int) -> None:
        """Forget what is queued of a transfer."""
        with self._condition:
            self._outbox.drop(transfer)

    # --- writers ---

    def wait_for_work(self, member: Member) -> bool:
        """Block until `member` has something to send; False when it should end."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._closed or member.failed or self._control[member.index] or self._outbox
            )
            return not (self._closed or member.failed)

    def next_job(self, member: Member) -> Job | None:
        """Return the next thing to put on `member`'s wire, None when another connection took it."""
        with self._condition:
            control = self._control[member.index]
            if control:
                kind, transfer, parts = control.popleft()
                return lambda wire: _send_control(wire, kind, transfer, parts)
            taken = self._outbox.take()
        if taken is None or self._send_piece is None:
            return None
        send_piece, (number, piece) = self._send_piece, taken
        return lambda wire: send_piece(wire, number, piece)

    # --- pacing ---

    def _pace_loop(self) -> None:
        applied: float | None = None
        while True:
            with self._condition:
                if not self._outbox:
                    idle = True
                    self._condition.wait_for(lambda: self._closed or self._outbox, 0.5)
                else:
                    idle = False
                    self._condition.wait_for(lambda: self._closed, SAMPLE_S)
                if self._closed:
                    return
                members = list(self._members.values())
                wires = [m.wire for m in members]
            cap = self._sample(members, busy=not idle)
            if cap != applied:
                applied = cap
                for wire in wires:
                    wire.pace(None if cap is None else cap / len(wires))

    def _sample(self, members: list[Member], *, busy: bool) -> float | None:
        by_index = {m.index: info for m in members if (info := m.wire.tcp_info()) is not None}
        infos = list(by_index.values())
        if not infos:
            return self._rate.cap_bytes_per_s
        now_s = time.monotonic()
        weight = min(1.0, (now_s - self._sampled_s) / BUSY_S)
        self._busy_ratio += weight * (busy - self._busy_ratio)
        self._sampled_s = now_s
        flows = {index: (info.delivered_bytes, info.unacknowledged) for index, info in by_index.items()}
        for index in self._stalls.update(now_s, flows):
            self._members[index].fail(ConnectionLost(f"nothing acknowledged for {STALL_S:.0f} s"))
        sample = Sample(
            now_s=now_s,
            acked_bytes=sum(i.delivered_bytes for i in infos),
            srtt_s=statistics.median(i.srtt_s for i in infos),
            min_rtt_s=max(1e-5, min(i.min_rtt_s for i in infos)),
            busy=busy,
        )
        cap = self._rate.update(sample)
        if self._observe is not None:
            self._observe(
                LinkSample(
                    srtt_s=sample.srtt_s,
                    min_rtt_s=sample.min_rtt_s,
                    goodput_bytes_per_s=self._rate.goodput_bytes_per_s if busy else 0.0,
                    cap_bytes_per_s=cap,
                    sent_bytes=sum(i.sent_bytes for i in infos),
                    retransmitted_bytes=sum(i.retransmitted_bytes for i in infos),
                    busy_ratio=self._busy_ratio,
                )
            )
        return cap


def _send_control(wire: Wire, kind: FrameType, transfer: int, parts: Sequence[Buffer]) -> None:
    wire.send(kind, transfer, parts)
