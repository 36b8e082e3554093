"""Prefill's shell: takes grants, stages what the engine computes, sends it.

Calls from the scheduler thread (`open`, `send`, `send_ahead`, `release`, `abort`) only put work on queues;
sockets are touched by each channel's own threads, staging memory by the stager's.

A room with staging memory needs no grant to begin, and the engine gets its pages back (`on_done`) when all is
copied. A room without is sent straight from the pool: it waits for its grant, and its pages stay until decode
has verified every byte.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from cache_service.core.errors import (
    LocalProtocolError,
    PrfaasError,
    RemoteProtocolError,
    TransferError,
)
from prfaas_sglang.core.framing import (
    RAW,
    FrameType,
    Grant,
    Header,
    Missing,
    decode_grant,
    decode_reason,
    decode_resume,
    decode_room,
    decode_total,
    encode_reason,
)
from prfaas_sglang.core.layout import Hello
from prfaas_sglang.core.plan import DEFAULT_FRAME_BYTES, Piece
from prfaas_sglang.core.session import ExportSession
from prfaas_sglang.transfer.bundle import Bundle
from prfaas_sglang.transfer.channel import Channel, Identity
from prfaas_sglang.transfer.compressor import Compressor
from prfaas_sglang.transfer.export import DecodePeer, Export, with_load
from prfaas_sglang.transfer.listener import Listener
from prfaas_sglang.transfer.memory import PoolMemory
from prfaas_sglang.transfer.store import Store
from prfaas_sglang.transfer.telemetry import LinkSample, Telemetry
from prfaas_sglang.transfer.tls import Tls
from prfaas_sglang.transfer.wire import ConnectionLost, Wire

logger = logging.getLogger(__name__)

#: Decode workers connected at once, and grants waiting for their request: bounds against a broken peer.
MAX_PEERS = 256
MAX_GRANTS = 4096
MAX_GRANTS_PER_PEER = 1024
#: How long a transfer whose connection broke waits for decode to resume it: decode may hear of the break by
#: silence only (channel.PING_S * MISSED), and then has to dial.
PARK_S = 30.0
#: Rooms that decode gave up before it granted anything, remembered for a request that comes later.
MAX_CANCELLED = 1024


class Exporter:
    """The sending side of one prefill rank.

    Args:
        identity: who we are and our layout.
        memory: pool rows to read.
        telemetry: where ended transfers are recorded.
        on_grant: (room, grant), a decode worker is ready to receive.
        on_done: (room), the engine may have the room's pages back: all is staged, or delivered.
        on_failed: (room, reason), instead of on_done.
        frame_bytes: bound of one frame's row bytes.
        staging_bytes: host memory for store and forward, 0 for none.
        hold_s: seconds that a staged room waits for its grant.
        park_s: seconds that a transfer whose connection broke waits to be resumed.
        tls: contexts for mutual TLS, None for plain TCP.
    Callbacks run on channel threads or the stager's and must not block.
    """

    def __init__(
        self,
        identity: Identity,
        memory: PoolMemory,
        telemetry: Telemetry,
        *,
        on_grant: Callable[[int, Grant], None],
        on_done: Callable[[int], None],
        on_failed: Callable[[int, str], None],
        frame_bytes: int = DEFAULT_FRAME_BYTES,
        staging_bytes: int = 0,
        hold_s: float = 300.0,
        park_s: float = PARK_S,
        tls: Tls | None = None,
    ) -> None:
        self._frame_bytes = frame_bytes
        self._identity = identity
        self._memory = memory
        self._telemetry = telemetry
        self._on_grant = on_grant
        self._on_done = on_done
        self._on_failed = on_failed
        self._hold_s = hold_s
        self._park_s = park_s
        self._lock = threading.Lock()
        self._exports: dict[int, Export] = {}  # by room
        self._cancelled: OrderedDict[int, None] = OrderedDict()
        self._peers: dict[str, DecodePeer] = {}  # by bundle id
        self._store = Store(identity.layout, memory, staging_bytes, on_whole=self._on_done, tidy=self._tidy)
        self._listener = Listener(identity, telemetry, self._admit, self._cancel, tls)
        self._closed = False
        telemetry.watch_staging(self._store)
        telemetry.watch_open(lambda: len(self._exports))

    def listen(self, host: str, port: int) -> int:
        """Bind and accept in the background; return the port. Raises OSError when the address is taken."""
        return self._listener.listen(host, port)

    # --- called by the engine's scheduler thread ---

    def open(self, room: int, prompt_pages: int) -> bool:
        """Announce a request; True when its prefill may begin (its grant is there, or staging memory is).

        May be called again until it says so.

        Raises TransferError when decode has given the room up, RemoteProtocolError when its grant does not
        fit the prompt.
        """
        with self._lock:
            if room in self._cancelled:
                raise TransferError("decode gave up before it granted anything", reason="cancelled")
            export = self._exports.get(room)
            if export is None:
                export = self._exports[room] = self._export(room)
        with export.lock:
            if not export.engine_opened:
                export.engine_opened = True
                export.session.prompt_pages = prompt_pages
                if export.session.grant is not None:
                    export.session.accept(export.session.grant)
            return self._store.reserve(export) or export.channel is not None

    def grant(self, room: int) -> Grant | None:
        """Return the grant that is there for a room, if any."""
        with self._lock:
            export = self._exports.get(room)
        return None if export is None or export.dead else export.session.grant

    def mark(self) -> object:
        """Return a mark of what the engine has queued so far (see PoolMemory.mark)."""
        return self._memory.mark()

    def send_ahead(
        self,
        room: int,
        pages: Sequence[int],
        tensors: Sequence[int],
        *,
        first: int | None = None,
        mark: object = None,
    ) -> bool:
        """Queue some KV tensors of pages whose chunk is still computed (arguments as ExportSession.ahead).

        `mark` is what `mark()` returned when the rows were final, by default now. False when nothing was
        queued: without staging memory the pages would have to stay as they are until decode has them, and
        the engine may still replace them by equal ones. Raises as `send`.
        """
        export = self._live(room)
        mark = self._memory.mark() if mark is None else mark
        with export.lock:
            if not self._store.reserve(export):
                return False
            self._store.offer(export, [export.session.ahead(pages, tensors, mark, first=first)])
            export.ahead_bytes += export.session.page_bytes(tensors) * len(pages)
            return True

    def send(
        self,
        room: int,
        pages: Sequence[int],
        *,
        states: Sequence[Sequence[int] | None] | None = None,
        aux_row: int | None = None,
        last: bool = False,
    ) -> None:
        """Queue the next chunk of a room (arguments as ExportSession.chunk).

        Raises TransferError when the room is not open or given up, LocalProtocolError when the chunk does
        not fit the prompt or the grant.
        """
        export = self._live(room)
        with export.lock:
            self._store.reserve(export)
            parts = export.session.chunk(
                pages,
                states=states,
                aux_row=aux_row,
                last=last,
                mark=self._memory.mark(),
                ahead_copied=export.session.moved(pages) and export.copied(),
            )
            if last:
                export.prefill_end_s, export.early_bytes = time.monotonic(), export.sent_bytes
            self._store.offer(export, parts)
            export.commit()

    def release(self, room: int) -> None:
        """The engine is through with a room: give the transfer up unless it goes on from staging memory."""
        with self._lock:
            export = self._exports.get(room)
        if export is not None and not export.released:
            self.abort(room, "prefill released the request")

    def abort(self, room: int, reason: str, *, notify: bool = False) -> None:
        """Give a room up and tell decode (and the engine with `notify`); its pages may be reused at once."""
        export = self._end(room, "failed", reason, notify=notify)
        if export is not None and export.channel is not None:
            export.channel.post(FrameType.ABORT, export.transfer, [encode_reason(reason)])

    def close(self) -> None:
        """Stop listening and end every channel."""
        self._closed = True
        self._listener.close()
        with self._lock:
            channels = [channel for peer in self._peers.values() for channel in peer.channels]
        for channel in channels:
            channel.close()
        for channel in channels:
            channel.join(5.0)
        self._store.close()

    # --- rooms ---

    def _export(self, room: int) -> Export:
        session = ExportSession(self._identity.layout, self._frame_bytes)
        return Export(room, session, time.monotonic(), self._store.free)

    def _live(self, room: int) -> Export:
        with self._lock:
            export = self._exports.get(room)
        if export is None or export.dead:
            raise TransferError("the decode worker is gone", reason="no_grant")
        return export

    def _tidy(self) -> None:
        """End rooms that are ready and whose grant never came; on the stager's thread."""
        now_s = time.monotonic()
        with self._lock:
            waiting = [e for e in self._exports.values() if e.channel is None or not e.engine_opened]
        for export in waiting:
            reason = export.stale(now_s, hold_s=self._hold_s, park_s=self._park_s)
            if reason:
                self.abort(export.room, reason, notify=True)

    # --- writer threads ---

    def _send_piece(self, peer: DecodePeer, wire: Wire, transfer: int, piece: Piece) -> None:
        export = peer.transfers.get(transfer)
        if export is None:
            return
        with export.hold() as alive:
            if not alive:
                return
            if export.first_sent_s is None:
                export.first_sent_s = time.monotonic()
            if piece.staged is not None:
                export.put(wire, peer.compressor, piece.data, [self._store.view(piece)])
                return
            data = piece.data
            with self._memory.reading(piece.mark, data.component, data.tensor, piece.rows) as views:
                export.put(wire, peer.compressor, piece.data, views)

    def _sampled(self, peer: DecodePeer, hello: Hello, sample: LinkSample) -> None:
        peer.compressor.sampled(sample.goodput_bytes_per_s, len(peer.channels))
        with self._lock:
            exports = list(peer.transfers.values())
        self._telemetry.sampled(hello.site, hello.bundle, with_load(sample, exports))

    # --- reader threads ---

    def frame(self, channel: Channel, header: Header) -> None:
        """Handle a frame from decode (see channel.Handler)."""
        payload = channel.wire.read_payload(header)
        if channel.index != 0:
            raise RemoteProtocolError(f"{header.type.name} on a data connection", reason="direction")
        match header.type:
            case FrameType.GRANT:
                self._granted(channel, header.transfer, decode_grant(payload))
            case FrameType.DONE:
                self._done(channel, header.transfer, decode_total(payload))
            case FrameType.ABORT:
                export = self._find(channel, header.transfer)
                if export is not None:
                    self._end(export.room, "failed", f"decode gave up: {decode_reason(payload)}", notify=True)
            case FrameType.RESUME:
                self._resume(channel, header.transfer, *decode_resume(payload))
            case FrameType.CANCEL:
                self._cancel(channel.peer, decode_room(payload))
            case _:
                raise RemoteProtocolError(f"{header.type.name} from a decode worker", reason="direction")

    def lost(self, channel: Channel, error: PrfaasError) -> None:
        """End the whole bundle of a lost channel (see channel.Handler).

        Its rooms wait to be resumed when the connection broke, and fail when the peer broke the protocol.
        """
        peer = self._peer_of(channel)
        self._telemetry.connected(-1)
        if peer is None:
            return
        with self._lock:
            first, peer.lost = not peer.lost, True
            peer.channels.remove(channel)
            if not peer.channels:
                self._peers.pop(channel.peer.bundle, None)
            others = list(peer.channels)
            exports = list(peer.transfers.values()) if first else []
            if first:
                peer.transfers.clear()
        if not first:
            return
        peer.bundle.close()
        self._telemetry.closed(channel.peer.site, channel.peer.bundle)
        for other in others:
            other.fail(error)
        if isinstance(error, RemoteProtocolError):
            self._telemetry.refused(error.reason)
        if not self._closed:
            logger.warning(
                "decode_worker_lost worker=%s rooms=%d reason=%s", channel.peer.worker, len(exports), error
            )
        for export in exports:
            if isinstance(error, ConnectionLost) and not self._closed:
                with export.lock:
                    if export.channel is not None and export.channel.bundle is peer.bundle:
                        export.park(time.monotonic())
            else:
                self._end(export.room, "failed", f"connection to decode worker lost: {error}", notify=True)

    def _peer_of(self, channel: Channel) -> DecodePeer | None:
        with self._lock:
            return self._peers.get(channel.peer.bundle)

    def _granted(self, channel: Channel, transfer: int, grant: Grant) -> None:
        if transfer == 0:
            raise RemoteProtocolError("grant: transfer 0 is the connection itself", reason="grant")
        peer = self._peer_of(channel)
        if peer is None:
            return  # the bundle is ending
        with self._lock:
            export = self._exports.get(grant.room)
            again = export is not None and export.session.grant is not None
            taken = (
                transfer in peer.transfers
                or len(peer.transfers) >= MAX_GRANTS_PER_PEER
                or len(self._exports) >= MAX_GRANTS
                or peer.lost
            )
            if not taken and not again:
                if export is None:
                    export = self._exports[grant.room] = self._export(grant.room)
                peer.transfers[transfer] = export
        if again and export is not None and export.session.grant == grant:
            self._resume(channel, transfer, grant.room, None)
            return
        if taken or again or export is None:
            channel.post(FrameType.ABORT, transfer, [encode_reason("room is in use, or too many grants")])
            return
        try:
            with export.lock:
                export.session.accept(grant)
                export.attach(channel, transfer, time.monotonic())
        except (LocalProtocolError, RemoteProtocolError) as error:
            # the two engines disagree about this request; the connection itself is sound
            channel.post(FrameType.ABORT, transfer, [encode_reason(str(error))])
            with self._lock:
                peer.transfers.pop(transfer, None)
            self._end(grant.room, "failed", str(error), notify=True)
            return
        self._on_grant(grant.room, grant)

    def _resume(self, channel: Channel, transfer: int, room: int, missing: list[Missing] | None) -> None:
        """Send again what a broken connection lost (None: all of it)."""
        found = self._move(channel, transfer, room)
        if found is None:
            channel.post(FrameType.ABORT, transfer, [encode_reason("room is in use, or not known")])
            return
        export, before = found
        if before is not None:  # this side has not heard of the break yet
            before.fail(ConnectionLost("its decode worker goes on over another connection"))
        with export.lock:
            export.committed = False
            export.attach(channel, transfer, time.monotonic(), missing)
        self._telemetry.resumed()

    def _move(self, channel: Channel, transfer: int, room: int) -> tuple[Export, Channel | None] | None:
        """Give a granted room to another connection of the same decode worker; None when that is not so."""
        with self._lock:
            peer = self._peers.get(channel.peer.bundle)
            export = self._exports.get(room)
            if (
                peer is None
                or peer.lost
                or transfer in peer.transfers
                or export is None
                or export.dead
                or export.session.grant is None
                or export.sent_to != (channel.peer.site, channel.peer.worker)
            ):
                return None
            before = export.channel
            if before is not None:
                if before.peer.bundle == channel.peer.bundle:
                    return None
                old = self._peers.get(before.peer.bundle)
                if old is not None:
                    old.transfers.pop(export.transfer, None)
            peer.transfers[transfer] = export
            return export, before

    def _done(self, channel: Channel, transfer: int, total_bytes: int) -> None:
        export = self._find(channel, transfer)
        if export is None:
            return  # ended here meanwhile
        if not export.committed or total_bytes != export.session.total_bytes:
            raise RemoteProtocolError("done: before the end, or of other bytes", reason="done")
        if self._end(export.room, "done", "") is not None and not export.released:
            self._on_done(export.room)

    def _cancel(self, peer: Hello, room: int) -> None:
        """A decode worker will not (or not again) ask for a room."""
        with self._lock:
            export = self._exports.get(room)
            if export is None:
                self._cancelled[room] = None
                while len(self._cancelled) > MAX_CANCELLED:
                    self._cancelled.popitem(last=False)
        if export is None:
            return
        if export.session.grant is None:
            self._end(room, "failed", "decode gave up before it granted anything", notify=True)
        elif export.sent_to == (peer.site, peer.worker):
            self._end(room, "failed", "decode gave up after its connection broke", notify=True)

    def _find(self, channel: Channel, transfer: int) -> Export | None:
        peer = self._peer_of(channel)
        return peer.transfers.get(transfer) if peer is not None else None

    def _end(self, room: int, outcome: str, reason: str, *, notify: bool = False) -> Export | None:
        with self._lock:
            export = self._exports.pop(room, None)
        if export is None:
            return None
        export.end()
        channel = export.channel
        if channel is not None:
            channel.bundle.drop(export.transfer)
            peer = self._peer_of(channel)
            if peer is not None:
                peer.transfers.pop(export.transfer, None)
        self._telemetry.record(export.record(outcome, reason, time.monotonic()))
        if notify and not export.released:
            self._on_failed(room, reason)
        return export

    # --- accepting ---

    def _admit(self, wire: Wire, hello: Hello) -> Channel:
        """Put a new connection where it belongs: the first of a bundle, or one more of a known one."""
        with self._lock:
            peer = self._peers.get(hello.bundle)
            if hello.index == 0:
                if peer is not None:
                    raise RemoteProtocolError("hello.bundle: is in use", reason="bundle")
                if len(self._peers) >= MAX_PEERS:
                    raise ConnectionLost(f"{MAX_PEERS} decode workers are connected")
                codecs = self._identity.codecs & {RAW, *hello.codecs}
                observe = partial(self._telemetry.encoded, hello.site)
                compressor = Compressor(self._identity.layout, codecs, observe)
                peer = DecodePeer(Bundle(), hello.site, hello.worker, compressor)
                owner = peer
                peer.bundle.on_piece(
                    lambda wire, transfer, piece: self._send_piece(owner, wire, transfer, piece)
                )
                peer.bundle.on_sample(lambda sample: self._sampled(owner, hello, sample))
                self._peers[hello.bundle] = peer
            elif peer is None or peer.lost or (peer.site, peer.worker) != (hello.site, hello.worker):
                raise RemoteProtocolError("hello.bundle: is not known", reason="bundle")
            elif any(c.index == hello.index for c in peer.channels):
                raise RemoteProtocolError("hello.index: is in use", reason="bundle")
            channel = Channel(wire, hello, self, peer.bundle, hello.index)
            peer.channels.append(channel)
            peer.bundle.join(channel)
        return channel
