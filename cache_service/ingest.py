"""One worker's KV event stream: ZMQ -> sequencer -> index.

Decides when a stream is asked for a replay and what a lost connection means. Every step on a batch is the
sequencer's; this module performs it. Nothing a worker sends may stop the service.

    CONNECTING --handshake--> SYNCING --replayed--> LIVE --disconnected--> STALE --lease over--> GONE
                                 ^                                           |                    |
                                 +-------------------handshake---------------+--------------------+

The outside facts: SGLang's publisher (core/sequencing.py), and ZMQ: SUB reconnects by itself, its monitor
tells of the handshake and the loss of a connection, and heartbeats (ZMTP ping) find a peer that is silently
gone.

A batch that PUB sends between the end of a replay and the arrival of our subscription is lost without a
trace, and so is the last batch before a worker falls silent. So a stream is also probed: soon after each
replay, and whenever it has been silent for `probe_s`, the last batch is compared with the worker's ring.

A worker with our plugin also answers with a full dump of what it holds at one position of its stream. It is
asked for whenever nothing is known, in place of the ring's past: at the start, beyond the ring, in a new
life. Until such a worker has declared what its model needs, nothing of it counts as usable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from cache_service import logs
from cache_service.config import IngestConfig, WorkerConfig
from cache_service.core.errors import RemoteProtocolError
from cache_service.core.index_types import Needs
from cache_service.core.sequencing import END_SEQ, Sequencer, Step
from cache_service.metrics import Happening
from cache_service.native import AnyBatch
from cache_service.state import IndexState
from cache_service.wire import formats, worker_events
from cache_service.wire.codec import SourceState, SourceStats
from cache_service.wire.kv_events import Batch

log = logging.getLogger(__name__)

#: A batch of 64 MiB would store 200,000 blocks with their token ids; a larger frame closes the connection.
MAX_FRAME_BYTES = 64 * 1024 * 1024
#: Above SGLang's ring of 10,000 batches, so that an answer fits our queue; ROUTER drops what does not.
_REPLAY_QUEUE = 20_000
#: The publisher writes an answer in one go; a pause this long inside it means that its end was dropped.
_REPLAY_PAUSE_S = 0.5
#: Requests for one synchronisation. Each brings what fits between the two queues, so a full ring needs a few.
_MAX_ROUNDS = 32
#: One answer longer than this is asked again from where it got to, after the timers had their turn.
_MAX_ANSWER_BATCHES = 100_000
#: After so many failed synchronisations the stream goes on from the present, without its past.
_ATTEMPTS = 3
_RETRY_S = (0.2, 1.0)
_WITHOUT_REPLAY_S = 30.0
_FIRST_PROBE_S = 0.25
#: A worker that is silent for so long does not answer, as far as a service that starts is concerned.
_ANSWER_S = 2.0
#: A dump is made beside a scheduler that may keep the interpreter for itself; nothing is claimed meanwhile.
_DUMP_WAIT_S = 30.0
_WARN_EVERY_S = 10.0
_HEARTBEAT_MS = 2000
_LIVE_BURST = 32
#: More than any worker has: nothing is usable.
_UNDECLARED = Needs(state=True, window_blocks=1 << 20)


@dataclass(frozen=True, slots=True)
class _Frame:
    seq: int
    payload: bytes
    batch: AnyBatch | None  # None: no batch
    sent_unix_s: float | None


class SourceStream:
    """Follows one (worker, dp rank) for as long as `run` runs."""

    def __init__(
        self, context: zmq.asyncio.Context, worker: WorkerConfig, config: IngestConfig, state: IndexState
    ) -> None:
        self._context = context
        self._worker = worker
        self._config = config
        self._index = state
        self._source = worker.source
        self._site = worker.site
        self._sequencer = Sequencer()
        self._reader = formats.reader(
            worker.format, page_size=state.namespace.page_size, dp_rank=self._source.dp_rank
        )
        self._dumps = worker.format == "prfaas"
        needs = _UNDECLARED if self._dumps else Needs(worker.needs_state, worker.swa_window_blocks)
        state.declare(self._source, needs)
        self._connected = False
        #: Whether batches are known to be missing, or may be: a failed replay then has consequences.
        self._in_doubt = False
        self._failed_attempts = 0
        #: Whether the past was given up although the ring may have it.
        self._past_skipped = False
        self._counts: Counter[Happening] = Counter()
        self._warned_s: dict[Happening, float] = {}
        #: When the timers have something to do (loop time); None when not.
        self._sync_at_s: float | None = None
        self._drop_at_s: float | None = None
        #: When the worker last said something (loop time), and whether its past was taken or given up.
        self._spoke_s = self._now()
        self._settled = False
        self._replay_off_until_s = 0.0
        self._state = SourceState.CONNECTING
        state.metrics.source_state(self._site, None, self._state.name.lower())

    @property
    def name(self) -> str:
        """Worker and rank, for people."""
        return f"{self._source.worker_id}/{self._source.dp_rank}"

    def stats(self) -> SourceStats:
        """Return how the stream is doing."""
        return SourceStats(
            source=self._source,
            site=self._index.site_of(self._source),
            state=self._state,
            next_seq=self._sequencer.next_seq,
            entries=self._index.index.held_blocks(self._source),
            truncated=self._sequencer.truncated,
            counts={kind.value: number for kind, number in self._counts.items()},
        )

    @property
    def behind(self) -> bool:
        """Whether the worker answers and what it held before this service started is still to be taken."""
        return not self._settled and self._now() - self._spoke_s < _ANSWER_S

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        subscriber = self._subscriber()
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        monitor = subscriber.get_monitor_socket(events)
        poller = zmq.asyncio.Poller()
        poller.register(subscriber, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        subscriber.connect(self._worker.events)
        try:
            while True:
                ready = dict(await poller.poll(self._wait_ms()))
                if monitor in ready:
                    message = await recv_monitor_message(monitor)
                    if message["event"] == zmq.EVENT_CONNECT_RETRIED:
                        self._settled = True  # nobody listens there
                    else:
                        await self._connection_changed(message["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
                if subscriber in ready:
                    await self._drain(subscriber)
                await self._timers()
                await asyncio.sleep(0)  # polling a busy socket does not yield
        finally:
            with contextlib.suppress(zmq.ZMQError):
                subscriber.disable_monitor()
            monitor.close(linger=0)
            subscriber.close(linger=0)

    # -- connection and time ---------------------------------------------------------------------------------

    async def _connection_changed(self, connected: bool) -> None:
        self._connected = connected
        if connected:
            self._spoke_s = self._now()
            self._drop_at_s = None
            self._failed_attempts, self._in_doubt = 0, True
            self._enter(SourceState.SYNCING)
            await self._synchronise()
        elif self._state is not SourceState.GONE:
            self._settled = True
            self._count(Happening.DISCONNECTED, warn=True)
            self._sync_at_s = None
            self._drop_at_s = self._now() + self._config.lease_s
            self._index.index.quarantine(self._source)
            self._enter(SourceState.STALE)

    async def _timers(self) -> None:
        now_s = self._now()
        if self._drop_at_s is not None and now_s >= self._drop_at_s:
            self._drop_at_s = None
            self._forget(Happening.LEASE)
            self._enter(SourceState.GONE)
        if self._sync_at_s is not None and now_s >= self._sync_at_s:
            await self._synchronise()

    def _wait_ms(self) -> int:
        due = [at for at in (self._sync_at_s, self._drop_at_s) if at is not None]
        return max(0, int((min(due) - self._now()) * 1000) + 1) if due else -1

    # -- live batches ----------------------------------------------------------------------------------------

    async def _drain(self, subscriber: zmq.asyncio.Socket) -> None:
        for _ in range(_LIVE_BURST):
            try:
                frames = await subscriber.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            await self._live(frames)

    async def _live(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or (frame := self._read(frames[1], frames[2])) is None:
            self._count(Happening.GARBAGE, warn=True, problem=f"{len(frames)} frames, or no sequence number")
            return
        step = self._place(frame)
        if step is Step.REPLAY and self._can_replay():
            if self._failed_attempts or not self._connected:
                self._count(Happening.DEFERRED)
                return
            self._in_doubt = True
            self._count(Happening.GAP, warn=True, expected=self._sequencer.next_seq, got=frame.seq)
            if not await self._synchronise():
                return
            step = self._place(frame)
            if step is Step.REPLAY:
                self._count(Happening.UNEXPLAINED, warn=True, got=frame.seq)
                return
        if step is Step.REPLAY:
            if self._sequencer.next_seq:
                self._forget(Happening.LOST)
            self._sequencer.skip_to(frame.seq, frame.payload, frame.sent_unix_s)
            self._past_skipped = True
            self._apply(frame)
        elif step is Step.SKIP:
            self._count(Happening.DUPLICATE)
        if self._state is SourceState.LIVE and not self._failed_attempts:
            self._probe_in(self._config.probe_s)

    def _place(self, frame: _Frame) -> Step:
        step = self._sequencer.live(frame.seq, frame.payload, frame.sent_unix_s)
        if step is Step.APPLY:
            self._apply(frame)
        return step

    # -- replay ----------------------------------------------------------------------------------------------

    async def _synchronise(self) -> bool:
        """Bring the stream up to the worker's ring; False, with a retry set, when there is no answer."""
        self._sync_at_s = None
        if self._worker.replay is None:
            self._without_replay()
            return True
        for _ in range(_MAX_ROUNDS):
            if self._dumps and not self._sequencer.placed and not await self._take_dump():
                break
            step = await self._replay_round()
            if step is Step.DONE and self._past_skipped:
                self._past_skipped = False  # the replay is back: take the past from it
                self._forget(Happening.LOST)
            elif step is Step.DONE:
                self._failed_attempts, self._in_doubt = 0, False
                self._go_live(_FIRST_PROBE_S if self._state is not SourceState.LIVE else self._config.probe_s)
                return True
            elif step is Step.RESTART:
                self._in_doubt = True
                self._forget(Happening.EPOCH)
            elif step is None:
                break
        self._replay_failed()
        return False

    async def _take_dump(self) -> bool:
        """Take what the worker holds, page by page; False, and nothing known, when that fails."""
        dealer = self._dealer()
        dump, page, pages = 0, 0, 1
        try:
            while page < pages:
                request = worker_events.dump_request(dump, page)
                await dealer.send_multipart([b"", *request], zmq.NOBLOCK)
                wait_s = self._config.replay_timeout_s if page else _DUMP_WAIT_S
                async with asyncio.timeout(wait_s):  # not wait_for: see _replay_round
                    frames = await dealer.recv_multipart()
                self._spoke_s = self._now()
                found = self._index.decode_page(frames[-1])
                if found.page != page or found.pages < 1 or (page and found.dump != dump):
                    raise RemoteProtocolError(f"page {page} of dump {dump} is gone", reason="dump_gone")
                if page == 0:
                    self._count(Happening.DUMP)
                    self._index.clear(self._source)
                self._apply_decoded(found.batch, found.seq)
                dump, page, pages = found.dump, page + 1, found.pages
            sent_unix_s = self._decode(found.anchor).sent_unix_s
        except (TimeoutError, zmq.ZMQError, RemoteProtocolError) as error:
            self._count(Happening.GARBAGE, warn=True, problem=f"no dump: {error or 'no answer'}")
            self._forget(Happening.LOST)
            return False
        finally:
            dealer.close(linger=0)
        self._sequencer.resume(found.seq, found.anchor, sent_unix_s)
        return True

    async def _replay_round(self) -> Step | None:
        """Ask once from the sequencer's anchor; None when the answer stops short."""
        dealer = self._dealer()
        try:
            start = self._sequencer.begin_replay()
            reached = self._sequencer.next_seq
            wait_s = self._config.replay_timeout_s
            await dealer.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)
            for received in range(_MAX_ANSWER_BATCHES):
                # Not wait_for: before Python 3.12 it loses a cancellation that meets an answer.
                async with asyncio.timeout(wait_s):
                    frames = await dealer.recv_multipart()
                self._spoke_s = self._now()
                wait_s = min(wait_s, _REPLAY_PAUSE_S)
                step = self._replayed(frames)
                if step not in (Step.APPLY, Step.SKIP, Step.LOST):
                    return step
                if received % 16 == 15:
                    await asyncio.sleep(0)  # recv does not yield while batches are waiting
            return Step.AGAIN
        except TimeoutError:
            # ROUTER dropped the end of a long answer, end mark and all: what came was not in vain.
            return Step.AGAIN if self._sequencer.next_seq > reached else None
        except zmq.ZMQError:
            return None
        finally:
            dealer.close(linger=0)

    def _replayed(self, frames: list[bytes]) -> Step | None:
        """Place one message of an answer: ["", seq, payload], with a topic before seq since SGLang 0.5.23."""
        if len(frames) not in (3, 4) or (frame := self._read(frames[-2], frames[-1])) is None:
            self._count(Happening.GARBAGE, warn=True, problem=f"{len(frames)} frames in a replay")
            return None
        if frame.seq == END_SEQ and not frame.payload:
            return self._sequencer.replay_end()
        step = self._sequencer.replayed(frame.seq, frame.payload, frame.sent_unix_s)
        if step is Step.LOST:
            if self._dumps:
                self._in_doubt = True
                self._forget(Happening.LOST)
                return Step.AGAIN
            self._drop(Happening.LOST)
        if step in (Step.APPLY, Step.LOST):
            self._count(Happening.REPLAYED)
            self._apply(frame)
        return step

    def _replay_failed(self) -> None:
        self._settled = True
        self._count(Happening.REPLAY_FAILED, warn=True, endpoint=self._worker.replay)
        if not self._connected:
            return
        if not self._in_doubt:
            self._probe_in(self._config.probe_s)  # a probe that a busy worker did not answer
            return
        self._failed_attempts += 1
        if self._failed_attempts < _ATTEMPTS:
            self._sync_at_s = self._now() + _RETRY_S[min(self._failed_attempts, len(_RETRY_S)) - 1]
            return
        # The worker lives, its replay does not: better the present alone than nothing.
        self._failed_attempts, self._in_doubt = 0, False
        self._replay_off_until_s = self._now() + _WITHOUT_REPLAY_S
        self._without_replay()
        self._probe_in(_WITHOUT_REPLAY_S)

    def _without_replay(self) -> None:
        """Go on without knowing whether this is the life we knew."""
        if self._sequencer.next_seq:
            self._forget(Happening.LOST)
        self._go_live(None)

    def _can_replay(self) -> bool:
        return self._worker.replay is not None and self._now() >= self._replay_off_until_s

    # -- index -----------------------------------------------------------------------------------------------

    def _read(self, seq: bytes, payload: bytes) -> _Frame | None:
        if len(seq) != 8:
            return None
        number = int.from_bytes(seq, "big")
        if number == END_SEQ:
            return _Frame(number, payload, None, None)
        try:
            batch = self._decode(payload)
        except RemoteProtocolError as error:
            self._count(Happening.GARBAGE, warn=True, problem=str(error), seq=number)
            return _Frame(number, payload, None, None)
        return _Frame(number, payload, batch, batch.sent_unix_s)

    def _apply(self, frame: _Frame) -> None:
        self._count(Happening.APPLIED)
        if frame.batch is None:
            return
        if self._reader is not None and isinstance(frame.batch, Batch):
            self._apply_read(self._reader, frame.batch, frame.seq)
            return
        self._apply_decoded(frame.batch, frame.seq)

    def _decode(self, payload: bytes) -> AnyBatch:
        """Decode a batch; SGLang's own and our plugin's the index decodes itself."""
        if self._reader is not None:
            return self._reader.decode(payload)
        return self._index.decode(self._source, payload, "prfaas" if self._dumps else "sglang")

    def _apply_decoded(self, batch: AnyBatch, seq: int) -> None:
        self._refused(batch.refused, seq)
        self._index.apply_batch(self._source, batch)

    def _apply_read(self, reader: formats.Reader, batch: Batch[Any], seq: int) -> None:
        usable, refused = reader.core_events(batch)
        self._refused(refused, seq)
        self._index.apply(self._source, usable)

    def _refused(self, problems: Iterable[RemoteProtocolError], seq: int) -> None:
        for problem in problems:
            self._count(Happening.REFUSED_EVENT, warn=True, problem=str(problem), seq=seq)

    def _forget(self, why: Happening) -> None:
        self._sequencer.forget()
        self._drop(why)
        if self._dumps:
            self._index.declare(self._source, _UNDECLARED)

    def _drop(self, why: Happening) -> None:
        if self._reader is not None:
            self._reader.forget()
        self._count(why, warn=True, dropped_entries=self._index.clear(self._source))

    def _go_live(self, probe_s: float | None) -> None:
        self._settled = True
        if self._state is not SourceState.LIVE:
            self._index.index.restore(self._source)
            self._enter(SourceState.LIVE)
        self._sync_at_s = None
        if probe_s is not None:
            self._probe_in(probe_s)

    def _probe_in(self, seconds: float) -> None:
        if self._worker.replay is not None:
            self._sync_at_s = max(self._now() + seconds, self._replay_off_until_s)

    # -- small things ----------------------------------------------------------------------------------------

    def _subscriber(self) -> zmq.asyncio.Socket:
        subscriber = self._context.socket(zmq.SUB)
        subscriber.set(zmq.RCVHWM, self._config.queue_batches)
        subscriber.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        subscriber.set(zmq.LINGER, 0)
        subscriber.set(zmq.RECONNECT_IVL, 100)
        subscriber.set(zmq.RECONNECT_IVL_MAX, 2000)
        subscriber.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        subscriber.set(zmq.HEARTBEAT_TIMEOUT, 3 * _HEARTBEAT_MS)
        subscriber.subscribe(self._worker.topic)
        return subscriber

    def _dealer(self) -> zmq.asyncio.Socket:
        assert self._worker.replay is not None
        dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.RCVHWM, _REPLAY_QUEUE)
        dealer.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        dealer.connect(self._worker.replay)
        return dealer

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _enter(self, state: SourceState) -> None:
        if state is self._state:
            return
        self._index.metrics.source_state(self._site, self._state.name.lower(), state.name.lower())
        self._state = state
        logs.event(log, "source_state", state=state.name.lower(), **self._who())

    def _count(self, kind: Happening, *, warn: bool = False, **facts: Any) -> None:
        self._counts[kind] += 1
        self._index.metrics.happened(self._site, kind)
        if not warn:
            return
        now_s = self._now()
        if now_s - self._warned_s.get(kind, -_WARN_EVERY_S) >= _WARN_EVERY_S:
            self._warned_s[kind] = now_s
            total = self._counts[kind]
            logs.event(log, f"source_{kind.value}", logging.WARNING, total=total, **self._who(), **facts)

    def _who(self) -> dict[str, Any]:
        return {"worker_id": self._source.worker_id, "dp_rank": self._source.dp_rank, "site": self._site}
