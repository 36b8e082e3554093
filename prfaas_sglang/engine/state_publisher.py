"""Publishes what a worker holds: a PUB stream with a replay ring, and full dumps on request.

One thread owns the sockets, the ring and the view of the content; `submit` is all that another thread does,
and costs it a queue entry. The scheduler never walks its tree for a dump: the view has followed every event.

Wire (docs/kv-events.md): PUB sends [topic, seq u64, batch]. ROUTER answers ["", seq u64] with every batch of
the ring from seq on and an end mark, as SGLang's own publisher does, and ["", page u64, "dump", dump u64]
with one page of a dump. Both bounded: a request is one short message, a page about 128 KiB, and what a slow
reader does not fetch is dropped by its queue's limit.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import zmq

from cache_service.core.events import AllCleared, Event
from cache_service.core.index_types import Needs
from cache_service.core.sequencing import END_SEQ
from cache_service.wire import worker_events
from cache_service.wire.worker_events import Declaration
from prfaas_sglang.core.worker_view import Change, WorkerView

log = logging.getLogger(__name__)

#: What happened since the last step, worked out on the publisher's thread (it may read device memory).
Step = Callable[[], tuple[Iterable[Event], Iterable[Change]]]

TOPIC = b"prfaas"
_MAX_REQUEST_BYTES = 1024
#: Steps that may wait for the thread; then `submit` waits for it. Some seconds of a busy scheduler.
_MAX_WAITING = 100_000
#: A dump is shared by those who ask within this time, and its pages are kept this long.
_DUMP_FRESH_S = 10.0
_DUMP_KEPT_S = 60.0
_WARN_EVERY_S = 10.0


class StatePublisher:
    """Follows one worker from its start. Raises zmq.ZMQError when an address cannot be bound."""

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str,
        page_size: int,
        needs: Needs,
        *,
        dp_rank: int = 0,
        ring_batches: int = 10_000,
    ) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        for socket in (self._pub, self._router):
            socket.set(zmq.LINGER, 0)
            # A replay and its end mark fit; a subscriber further behind has to ask again anyway.
            socket.set(zmq.SNDHWM, ring_batches + 1)
        self._router.set(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
        try:
            self._pub.bind(endpoint)
            self._router.bind(replay_endpoint)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self._dp_rank = dp_rank
        self._declaration = Declaration(page_size, needs)
        self._view = WorkerView()
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=ring_batches)
        self._next_seq = 0
        self._dump_id = 0
        self._dump: list[bytes] = []
        self._dump_made_s = 0.0
        self._dump_seq = 0
        self._waiting: deque[Step] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._warned_s = -_WARN_EVERY_S
        self._thread = threading.Thread(target=self._run, name="prfaas-state-events", daemon=True)
        self._thread.start()

    def submit(self, step: Step) -> None:
        """Hand over one step, in order. Waits only when the thread is far behind."""
        while len(self._waiting) >= _MAX_WAITING and self._thread.is_alive():
            time.sleep(0.001)
        self._waiting.append(step)
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Publish what was handed over, then stop. Idempotent."""
        if not self._closing:
            self._closing = True
            os.eventfd_write(self._bell, 1)
            self._thread.join()
            os.close(self._bell)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        try:
            self._publish([self._declaration])
            while not (self._closing and not self._waiting):
                ready = dict(poller.poll(1000))
                if self._bell in ready:
                    os.eventfd_read(self._bell)
                while self._waiting:
                    self._guard(self._take)
                if self._router in ready:
                    self._guard(self._serve)
                if self._dump and time.monotonic() - self._dump_made_s > _DUMP_KEPT_S:
                    self._dump = []
        finally:
            self._context.destroy(linger=0)

    def _guard(self, act: Callable[[], None]) -> None:
        """Survive: what a bad event or a reader's socket does must not end the stream."""
        try:
            act()
        except Exception:
            if time.monotonic() - self._warned_s >= _WARN_EVERY_S:
                self._warned_s = time.monotonic()
                log.exception("prfaas state events: a step failed")

    def _take(self) -> None:
        step = self._waiting.popleft()
        try:
            events = self._view.step(*step())
        except Exception:
            # What is held is no longer known: claim nothing of it.
            self._view = WorkerView()
            self._publish([AllCleared()])
            raise
        if events:
            self._publish(events)

    def _publish(self, items: Iterable[worker_events.Item]) -> None:
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        payload = worker_events.encode_batch(time.time(), self._dp_rank, items)
        self._ring.append((seq, payload))
        self._pub.send_multipart((TOPIC, seq.to_bytes(8, "big"), payload))

    def _serve(self) -> None:
        frames = self._router.recv_multipart(zmq.NOBLOCK)
        if len(frames) == 3 and len(frames[2]) == 8:
            self._replay(frames[0], int.from_bytes(frames[2], "big"))
        elif len(frames) == 5 and frames[3] == worker_events.DUMP:
            page, dump = (int.from_bytes(frame, "big") for frame in (frames[2], frames[4]))
            self._router.send_multipart((frames[0], b"", worker_events.DUMP, self._page(dump, page)))

    def _replay(self, client: bytes, start: int) -> None:
        for seq, payload in self._ring:
            if seq >= start:
                self._router.send_multipart((client, b"", seq.to_bytes(8, "big"), payload))
        self._router.send_multipart((client, b"", END_SEQ.to_bytes(8, "big"), b""))

    def _page(self, dump: int, page: int) -> bytes:
        if dump == 0:
            if not self._dump_is_fresh():
                self._make_dump()
            dump = self._dump_id
        if dump != self._dump_id or page >= len(self._dump):
            return worker_events.gone(dump)
        return self._dump[page]

    def _dump_is_fresh(self) -> bool:
        """Whether the kept dump is recent, and well inside the ring, so that a replay goes on from it."""
        behind = self._next_seq - self._dump_seq
        assert self._ring.maxlen is not None
        recent = time.monotonic() - self._dump_made_s <= _DUMP_FRESH_S
        return bool(self._dump) and recent and behind <= self._ring.maxlen // 2

    def _make_dump(self) -> None:
        # Random, so that the pages of two lives of a worker are not taken for one dump.
        self._dump_id = int.from_bytes(os.urandom(8), "big") or 1
        seq, anchor = self._ring[-1]
        self._dump_seq = seq
        items: list[worker_events.Item] = [self._declaration, *self._view.dump()]
        self._dump = worker_events.encode_dump(self._dump_id, seq, anchor, items)
        self._dump_made_s = time.monotonic()
