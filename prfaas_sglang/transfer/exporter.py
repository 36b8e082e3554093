"""Prefill's shell: listens, takes grants, sends chunks.

Calls from the scheduler thread (`send`, `abort`, `release`) only put work on queues; sockets are touched by
each channel's own threads. Rows are read straight from pool memory: the caller keeps the pages until
`on_done` or `on_failed`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cache_service.core.errors import PrfaasError, RemoteProtocolError, TransferError
from prfaas_sglang.core.framing import (
    FrameType,
    Grant,
    Header,
    decode_grant,
    decode_reason,
    decode_total,
    encode_data,
    encode_reason,
    encode_total,
)
from prfaas_sglang.core.layout import Hello
from prfaas_sglang.core.outbox import due_s
from prfaas_sglang.core.plan import DEFAULT_FRAME_BYTES, Piece
from prfaas_sglang.core.session import ExportSession
from prfaas_sglang.transfer.bundle import Bundle
from prfaas_sglang.transfer.channel import Channel, Identity, receive_hello, refuse
from prfaas_sglang.transfer.memory import RowMemory
from prfaas_sglang.transfer.telemetry import Telemetry, TransferRecord
from prfaas_sglang.transfer.tls import Tls
from prfaas_sglang.transfer.wire import ConnectionLost, Wire, tune

logger = logging.getLogger(__name__)

#: Decode workers connected at once, and grants waiting for their request: bounds against a broken peer.
MAX_PEERS = 256
MAX_GRANTS = 4096


@dataclass(slots=True)
class Export:
    """One granted transfer. `channel` is the control connection that brought the grant.

    `dead` is set before the pages go back to the engine; the writer threads look at it between frames.
    """

    channel: Channel
    transfer: int
    session: ExportSession
    since_s: float
    deadline_s: float
    dead: bool = False
    committed: bool = False


@dataclass(slots=True)
class _Peer:
    """A decode worker's bundle and its connections."""

    bundle: Bundle
    worker: str
    channels: list[Channel] = field(default_factory=list)
    transfers: dict[int, Export] = field(default_factory=dict)
    lost: bool = False


class Exporter:
    """The sending side of one prefill rank.

    Args:
        identity: who we are and our layout.
        memory: pool rows to read.
        telemetry: where ended transfers are recorded.
        on_grant: (room, grant), a decode worker is ready to receive.
        on_done: (room), decode has verified every byte.
        on_failed: (room, reason).
        frame_bytes: bound of one frame's row bytes.
        tls: contexts for mutual TLS, None for plain TCP.
    Callbacks run on channel threads and must not block.
    """

    def __init__(
        self,
        identity: Identity,
        memory: RowMemory,
        telemetry: Telemetry,
        *,
        on_grant: Callable[[int, Grant], None],
        on_done: Callable[[int], None],
        on_failed: Callable[[int, str], None],
        frame_bytes: int = DEFAULT_FRAME_BYTES,
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._frame_bytes = frame_bytes
        self._identity = identity
        self._memory = memory
        self._telemetry = telemetry
        self._on_grant = on_grant
        self._on_done = on_done
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._exports: dict[int, Export] = {}  # by room
        self._peers: dict[str, _Peer] = {}  # by bundle id
        self._listener: socket.socket | None = None
        self._closed = False

    def listen(self, host: str, port: int) -> int:
        """Bind and accept in the background; return the port (useful for port 0).

        Raises OSError when the address is taken.
        """
        listener = socket.create_server((host, port), backlog=64)
        self._listener = listener
        threading.Thread(
            target=self._accept_loop, args=(listener,), name="prfaas-accept", daemon=True
        ).start()
        return int(listener.getsockname()[1])

    # --- called by the engine's scheduler thread ---

    def grant(self, room: int) -> Grant | None:
        """Return the grant that is there for a room, if any."""
        with self._lock:
            export = self._exports.get(room)
            return export.session.grant if export is not None and not export.dead else None

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

        Raises TransferError when the room has no live grant, LocalProtocolError when the grant does not
        cover the chunk.
        """
        with self._lock:
            export = self._exports.get(room)
        if export is None or export.dead:
            raise TransferError("the decode worker is gone", reason="no_grant")
        pieces = export.session.chunk(pages, states=states, aux_row=aux_row, last=last)
        export.channel.bundle.add(export.transfer, export.deadline_s, pieces)
        if last:
            # order does not matter: the import is complete when this and every row are there
            export.committed = True
            total = encode_total(export.session.total_bytes)
            export.channel.post(FrameType.COMMIT, export.transfer, [total])

    def abort(self, room: int, reason: str) -> None:
        """Give a room up and tell decode; its pages may be reused at once."""
        export = self._end(room, "failed", reason)
        if export is not None:
            export.channel.post(FrameType.ABORT, export.transfer, [encode_reason(reason)])

    def close(self) -> None:
        """Stop listening and end every channel."""
        self._closed = True
        if self._listener is not None:
            try:
                self._listener.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                logger.debug("listener_shutdown %s", error)
            self._listener.close()
        with self._lock:
            channels = [channel for peer in self._peers.values() for channel in peer.channels]
        for channel in channels:
            channel.close()
        for channel in channels:
            channel.join(5.0)

    # --- writer threads ---

    def _send_piece(self, peer: _Peer, wire: Wire, transfer: int, piece: Piece) -> None:
        export = peer.transfers.get(transfer)
        if export is None or export.dead:
            return
        views = self._memory.views(piece.data.component, piece.data.tensor, piece.rows)
        wire.send(FrameType.DATA, transfer, [encode_data(piece.data), *views])

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
                    reason = f"decode gave up: {decode_reason(payload)}"
                    self._end(export.session.grant.room, "failed", reason, notify=True)
            case _:
                raise RemoteProtocolError(f"{header.type.name} from a decode worker", reason="direction")

    def lost(self, channel: Channel, error: PrfaasError) -> None:
        """End the whole bundle of a lost channel and fail its rooms (see channel.Handler)."""
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
            rooms = [e.session.grant.room for e in peer.transfers.values()]
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
                "decode_worker_lost worker=%s rooms=%d reason=%s", channel.peer.worker, len(rooms), error
            )
        for room in rooms:
            self._end(room, "failed", f"connection to decode worker lost: {error}", notify=True)

    def _peer_of(self, channel: Channel) -> _Peer | None:
        with self._lock:
            return self._peers.get(channel.peer.bundle)

    def _granted(self, channel: Channel, transfer: int, grant: Grant) -> None:
        layout = self._identity.layout
        if transfer == 0 or len(grant.state_rows) != len(layout.states):
            raise RemoteProtocolError("grant: does not fit the layout", reason="grant")
        now_s = time.monotonic()
        session = ExportSession(layout, grant, self._frame_bytes)
        export = Export(channel, transfer, session, now_s, due_s(now_s, session.granted_bytes()))
        peer = self._peer_of(channel)
        if peer is None:
            return  # the bundle is ending
        with self._lock:
            taken = (
                grant.room in self._exports
                or transfer in peer.transfers
                or len(self._exports) >= MAX_GRANTS
                or peer.lost
            )
            if not taken:
                self._exports[grant.room] = export
                peer.transfers[transfer] = export
        if taken:
            channel.post(FrameType.ABORT, transfer, [encode_reason("room is in use, or too many grants")])
            return
        self._on_grant(grant.room, grant)

    def _done(self, channel: Channel, transfer: int, total_bytes: int) -> None:
        export = self._find(channel, transfer)
        if export is None:
            return  # ended here meanwhile
        if not export.committed or total_bytes != export.session.total_bytes:
            raise RemoteProtocolError("done: before the end, or of other bytes", reason="done")
        room = export.session.grant.room
        if self._end(room, "done", "") is not None:
            self._on_done(room)

    def _find(self, channel: Channel, transfer: int) -> Export | None:
        peer = self._peer_of(channel)
        return peer.transfers.get(transfer) if peer is not None else None

    def _end(self, room: int, outcome: str, reason: str, *, notify: bool = False) -> Export | None:
        with self._lock:
            export = self._exports.pop(room, None)
        if export is None:
            return None
        export.dead = True
        export.channel.bundle.drop(export.transfer)
        peer = self._peer_of(export.channel)
        if peer is not None:
            peer.transfers.pop(export.transfer, None)
        self._telemetry.record(
            TransferRecord(
                room=room,
                role="send",
                peer_site=export.channel.peer.site,
                outcome=outcome,
                bytes=export.session.total_bytes,
                pages=export.session.grant.pages,
                seconds=time.monotonic() - export.since_s,
                reason=reason,
            )
        )
        if notify:
            self._on_failed(room, reason)
        return export

    # --- accepting ---

    def _accept_loop(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                sock, address = listener.accept()
            except OSError as error:
                if self._closed:
                    return
                logger.warning("accept_failed %s", error)
                continue
            threading.Thread(
                target=self._welcome, args=(sock, address), name="prfaas-welcome", daemon=True
            ).start()

    def _welcome(self, sock: socket.socket, address: object) -> None:
        try:
            tune(sock)
            wire = Wire(self._tls.accept(sock) if self._tls is not None else sock)
        except PrfaasError as error:
            logger.warning("peer_refused address=%s reason=%s", address, error)
            self._telemetry.refused(error.reason)
            return
        try:
            hello = receive_hello(wire, self._identity)
            channel = self._admit(wire, hello)
        except PrfaasError as error:
            logger.warning("peer_refused address=%s reason=%s", address, error)
            self._telemetry.refused(error.reason)
            wire.release()
            return
        self._telemetry.connected(+1)
        try:
            # only now: the peer dials the bundle's other connections when it has our hello
            wire.send(FrameType.HELLO, 0, [self._identity.hello()])
        except PrfaasError as error:
            wire.release()
            self.lost(channel, error)
            return
        if hello.index == 0:
            logger.info("decode_worker_connected worker=%s site=%s", hello.worker, hello.site)
        channel.start()

    def _admit(self, wire: Wire, hello: Hello) -> Channel:
        """Make the channel of a new connection; tell the peer when there is no place for it."""
        try:
            return self._place(wire, hello)
        except PrfaasError as error:
            refuse(wire, error)
            raise

    def _place(self, wire: Wire, hello: Hello) -> Channel:
        """Put a new connection where it belongs: the first of a bundle, or one more of a known one."""
        with self._lock:
            peer = self._peers.get(hello.bundle)
            if hello.index == 0:
                if peer is not None:
                    raise RemoteProtocolError("hello.bundle: is in use", reason="bundle")
                if len(self._peers) >= MAX_PEERS:
                    raise ConnectionLost(f"{MAX_PEERS} decode workers are connected")
                peer = _Peer(Bundle(), hello.worker)
                owner = peer
                peer.bundle.on_piece(
                    lambda wire, transfer, piece: self._send_piece(owner, wire, transfer, piece)
                )
                peer.bundle.on_sample(
                    lambda sample: self._telemetry.sampled(hello.site, hello.bundle, sample)
                )
                self._peers[hello.bundle] = peer
            elif peer is None or peer.lost or peer.worker != hello.worker:
                raise RemoteProtocolError("hello.bundle: is not known", reason="bundle")
            elif any(c.index == hello.index for c in peer.channels):
                raise RemoteProtocolError("hello.index: is in use", reason="bundle")
            channel = Channel(wire, hello, self, peer.bundle, hello.index)
            peer.channels.append(channel)
            peer.bundle.join(channel)
        return channel
