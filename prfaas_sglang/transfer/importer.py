"""Decode's shell: dials prefill workers, grants pages, writes what arrives into the pools.

Decode dials, so a NAT or firewall in front of it does not matter. A transfer that was aborted is never
written again: every write happens under the transfer's lock, which is never held while waiting for the net.
Where rows land through a device's queue, a transfer has ended when that queue has done what it was given.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from cache_service.core.errors import IntegrityError, PrfaasError, RemoteProtocolError, TransferError
from prfaas_sglang.core.framing import (
    DATA_BYTES,
    MAX_MISSING,
    RAW,
    Data,
    FrameType,
    Grant,
    Header,
    decode_data,
    decode_reason,
    decode_total,
    encode_grant,
    encode_reason,
    encode_resume,
    encode_room,
    encode_total,
)
from prfaas_sglang.core.session import ImportSession
from prfaas_sglang.transfer.bundle import Bundle
from prfaas_sglang.transfer.channel import Channel, Identity
from prfaas_sglang.transfer.codec import decode
from prfaas_sglang.transfer.dial import Dialer
from prfaas_sglang.transfer.imports import Address, Import, Peer
from prfaas_sglang.transfer.lifeline import watch
from prfaas_sglang.transfer.memory import Landing, PoolMemory, scatter
from prfaas_sglang.transfer.telemetry import Telemetry, TransferRecord
from prfaas_sglang.transfer.tls import Tls
from prfaas_sglang.transfer.wire import ConnectionLost, Wire

logger = logging.getLogger(__name__)

DEFAULT_CONNECTIONS = 2
#: How long transfers of a broken connection try to be resumed.
RESUME_S = 20.0
#: Rooms given up before the connection was there.
MAX_CANCELLED = 1024


class Importer:
    """The receiving side of one decode rank.

    Args:
        identity: who we are and our layout.
        memory: pool rows to write.
        telemetry: where ended transfers are recorded.
        on_progress: (room), the first rows arrived.
        on_done: (room), every granted row is in the pools, verified.
        on_failed: (room, reason).
        connections: TCP connections per prefill rank.
        tls: contexts for mutual TLS, None for plain TCP.
    Callbacks run on channel threads and must not block.
    """

    def __init__(
        self,
        identity: Identity,
        memory: PoolMemory,
        telemetry: Telemetry,
        *,
        on_progress: Callable[[int], None],
        on_done: Callable[[int], None],
        on_failed: Callable[[int, str], None],
        connections: int = DEFAULT_CONNECTIONS,
        tls: Tls | None = None,
    ) -> None:
        self._dialer = Dialer(identity, tls)
        self._connections = connections
        self._identity = identity
        self._memory = memory
        self._telemetry = telemetry
        self._on_progress = on_progress
        self._on_done = on_done
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._peers: dict[Address, Peer] = {}
        self._by_room: dict[int, tuple[Peer, Import]] = {}
        self._numbers = itertools.count(1)
        self._closed = False
        telemetry.watch_open(lambda: len(self._by_room))

    # --- called by the engine's scheduler thread ---

    def connect(self, address: Address) -> None:
        """Start dialing a prefill worker if it is not connected; returns at once."""
        with self._lock:
            self._peer(address)

    def begin(
        self,
        room: int,
        address: Address,
        pages: Sequence[int],
        *,
        states: Sequence[Sequence[int]],
        aux_row: int,
        prefix_tokens: int,
    ) -> None:
        """Grant rows to the prefill worker at `address` and expect them; returns at once.

        Args:
            room: bootstrap room.
            pages: our page numbers for the prompt after the held prefix.
            states: our rows per state component, in the layout's order.
            aux_row: our metadata row.
            prefix_tokens: tokens of the prompt that are held already.
        """
        grant = Grant(room, len(pages), prefix_tokens, tuple(len(s) for s in states))
        us = self._identity
        session = ImportSession(us.layout, pages, states, aux_row, us.codecs)
        item = Import(room, next(self._numbers), session, grant, time.monotonic())
        with self._lock:
            peer = self._peer(address)
            peer.imports[item.transfer] = item
            self._by_room[room] = (peer, item)
            channel = peer.channel
            if channel is not None:
                item.granted = True
                channel.post(FrameType.GRANT, item.transfer, [encode_grant(grant)])

    def abort(self, room: int, reason: str) -> None:
        """Stop receiving a room and tell prefill. After this returns its rows are not written any more."""
        with self._lock:
            found = self._by_room.get(room)
        if found is None:
            return
        peer, item = found
        if self._end(peer, item, "failed", reason):
            channel = self._channel_or_cancel(room, peer.address)
            if channel is not None:
                channel.post(FrameType.ABORT, item.transfer, [encode_reason(reason)])

    def cancel(self, room: int, address: Address) -> None:
        """Tell the prefill worker at `address` that nothing will be granted for a room; returns at once.

        It may have the room's KV in staging memory. Lost when the worker cannot be reached: it gives the
        room up by itself then, later.
        """
        channel = self._channel_or_cancel(room, address)
        if channel is not None:
            channel.post(FrameType.CANCEL, 0, [encode_room(room)])

    def _channel_or_cancel(self, room: int, address: Address) -> Channel | None:
        """Return the control connection; without one, the next that is dialed takes the room back."""
        with self._lock:
            peer = self._peer(address)
            if peer.channel is not None and not peer.channel.failed:
                return peer.channel
            if len(peer.cancelled) < MAX_CANCELLED:
                peer.cancelled.append(room)
            return None

    def close(self) -> None:
        """End every channel."""
        self._closed = True
        with self._lock:
            channels = [channel for peer in self._peers.values() for channel in peer.channels]
        for channel in channels:
            channel.close()
        for channel in channels:
            channel.join(5.0)

    # --- dialing ---

    def _peer(self, address: Address) -> Peer:
        peer = self._peers.setdefault(address, Peer(address))
        if not peer.channels and not peer.dialing and not self._closed:
            peer.dialing = True
            name = f"prfaas-dial-{address[0]}:{address[1]}"
            threading.Thread(target=self._dial, args=(peer,), name=name, daemon=True).start()
        return peer

    def _dial(self, peer: Peer) -> None:
        """Connect the control connection, then the data connections, to one prefill rank."""
        bundle, name = Bundle(), secrets.token_hex(16)
        handler = _PeerHandler(self, peer)
        doomed: list[Import] | None = None

        def parting() -> list[int]:
            """Return the rooms that end when one side refuses the other, for prefill to forget them."""
            nonlocal doomed
            with self._lock:
                doomed = list(peer.imports.values())
                rooms = [*peer.cancelled, *(item.room for item in doomed)]
                peer.cancelled.clear()
                return rooms

        try:
            wire, hello = self._dialer.reach(peer, name, parting, lambda: self._closed)
        except PrfaasError as error:
            logger.warning("prefill_worker_unreachable address=%s:%d reason=%s", *peer.address, error)
            self._telemetry.refused(error.reason)
            with self._lock:
                peer.dialing = False
                peer.resume_until_s = None
                items = list(peer.imports.values()) if doomed is None else doomed
                if doomed is None:
                    peer.cancelled.clear()
                if peer.cancelled or peer.imports.keys() - {item.transfer for item in items}:
                    self._peer(peer.address)  # what came after the parting asks for itself
            self._fail_all(peer, items, str(error))
            return
        logger.info("prefill_worker_connected worker=%s site=%s", hello.worker, hello.site)
        channel = Channel(wire, hello, handler, bundle, 0)
        with self._lock:
            peer.dialing = False
            peer.channel = channel
            self._join(peer, channel)
            too_scattered = [item for item in peer.imports.values() if not self._ask(channel, item)]
            for room in (*peer.cancelled, *(item.room for item in too_scattered)):
                channel.post(FrameType.CANCEL, 0, [encode_room(room)])
            peer.cancelled.clear()
        channel.start()
        watch(peer.address, channel, lambda: peer.expecting(channel))
        self._fail_all(peer, too_scattered, "what arrived before the connection broke is too scattered")
        for index in range(1, self._connections):
            try:
                wire, hello = self._dialer.connect(peer.address, name, index)
            except PrfaasError as error:
                # the bundle works with fewer connections
                logger.warning("data_connection_failed address=%s:%d reason=%s", *peer.address, error)
                return
            extra = Channel(wire, hello, handler, bundle, index)
            with self._lock:
                current = peer.channel is channel
                if current:
                    self._join(peer, extra)
            if not current:
                wire.release()
                return
            extra.start()

    @staticmethod
    def _ask(channel: Channel, item: Import) -> bool:
        """Send a transfer's grant, or after a break what is missing of it; False when that is too much."""
        with item.lock:
            missing = item.session.resume()
            nothing_arrived = not item.session.received_bytes
        if nothing_arrived:  # the grant itself may have been lost
            item.granted = True
            channel.post(FrameType.GRANT, item.transfer, [encode_grant(item.grant)])
            return True
        if len(missing) > MAX_MISSING:
            return False
        channel.post(FrameType.RESUME, item.transfer, [encode_resume(item.room, missing)])
        return True

    def _join(self, peer: Peer, channel: Channel) -> None:
        peer.channels.append(channel)
        channel.bundle.join(channel)
        self._telemetry.connected(+1)

    # --- reader threads ---

    def frame(self, peer: Peer, channel: Channel, header: Header) -> None:
        """Handle a frame from prefill."""
        with self._lock:
            item = peer.imports.get(header.transfer)
        if header.type is FrameType.DATA:
            self._data(peer, channel, header, item)
            return
        if channel.index != 0:
            raise RemoteProtocolError(f"{header.type.name} on a data connection", reason="direction")
        payload = channel.wire.read_payload(header)
        match header.type:
            case FrameType.COMMIT:
                if item is not None:
                    with item.lock:
                        item.session.commit(decode_total(payload))
                    self._finish_if_complete(peer, item)
            case FrameType.ABORT:
                if item is not None and self._end(peer, item, "failed", decode_reason(payload)):
                    self._on_failed(item.room, f"prefill gave up: {decode_reason(payload)}")
            case _:
                raise RemoteProtocolError(f"{header.type.name} from a prefill worker", reason="direction")

    def _data(self, peer: Peer, channel: Channel, header: Header, item: Import | None) -> None:
        wire = channel.wire
        if header.length <= DATA_BYTES:
            raise RemoteProtocolError("data: no rows", reason="length")
        head = wire.read_exact(DATA_BYTES)
        left = header.length - DATA_BYTES
        if item is None:
            wire.discard(left)  # aborted by us while this was on its way
            return
        data = decode_data(head)
        with item.lock:
            rows = item.session.place(data, left)
        if data.codec != RAW:
            payload = wire.read_exact(left)
            if xxhash.xxh3_64_intdigest(head + payload) != header.checksum:
                self._corrupt(peer, item, data)
                return
            begin_s = time.perf_counter()
            content = decode(self._identity.layout, data, payload)
            self._telemetry.decoded(channel.peer.site, data.codec, time.perf_counter() - begin_s)
            if self._land(item, self._memory.landing(data.component, data.tensor, rows), data, content):
                self._landed(peer, item)
            return
        landing = self._memory.landing(data.component, data.tensor, rows)
        filled = False
        try:
            filled = self._fill(wire, item, list(landing.views), left)
        finally:
            if not filled:
                landing.drop()
        if not filled:
            return
        digest = xxhash.xxh3_64(head)
        for view in landing.views:
            digest.update(view)
        if digest.intdigest() != header.checksum:
            landing.drop()
            self._corrupt(peer, item, data)
            return
        if self._land(item, landing, data):
            self._landed(peer, item)

    def _landed(self, peer: Peer, item: Import) -> None:
        peer.resume_until_s, peer.breaks = None, 0
        self._finish_if_complete(peer, item)

    def _land(self, item: Import, landing: Landing, data: Data, content: memoryview | None = None) -> bool:
        """Give the rows their verified bytes; False when the transfer died meanwhile (nothing is written).

        `content` has the bytes when they were not received into the landing's own memory.
        """
        with item as alive:
            if not alive:
                landing.drop()
                return False
            if content is not None:
                scatter(content, landing.views)
            landing.land()
            with item.lock:
                first = item.session.received_bytes == 0
                item.session.arrived(data)
        if first:
            self._on_progress(item.room)
        return True

    def _fill(self, wire: Wire, item: Import, views: list[memoryview], left: int) -> bool:
        """Receive `left` bytes into `views`; False when the transfer died meanwhile (bytes discarded)."""
        while left:
            wire.wait_readable(left)  # first: what is there by now is rarely all of it
            with item as alive:
                if not alive:
                    break
                count = wire.read_ready(views)
            left -= count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        if left:
            wire.discard(left)
            return False
        return True

    def _corrupt(self, peer: Peer, item: Import, data: Data) -> None:
        error = IntegrityError(f"checksum mismatch in component {data.component} tensor {data.tensor}")
        if self._end(peer, item, "failed", str(error)):
            self._tell(peer, FrameType.ABORT, item.transfer, encode_reason(str(error)))
            self._on_failed(item.room, str(error))

    def _finish_if_complete(self, peer: Peer, item: Import) -> None:
        with item.lock:
            complete = item.session.complete
        if complete:
            self._memory.settle()  # what landed may still be on its way into the pool
        if complete and self._end(peer, item, "done", ""):
            self._tell(peer, FrameType.DONE, item.transfer, encode_total(item.session.received_bytes))
            self._on_done(item.room)

    @staticmethod
    def _tell(peer: Peer, kind: FrameType, transfer: int, payload: bytes) -> None:
        channel = peer.channel
        if channel is not None:
            channel.post(kind, transfer, [payload])

    def lost(self, peer: Peer, channel: Channel, error: PrfaasError) -> None:
        """End the whole bundle of a lost channel (see channel.Handler).

        Its transfers are resumed on a new one when the connection broke, and fail when the peer broke the
        protocol.
        """
        self._telemetry.connected(-1)
        now_s = time.monotonic()
        broke = isinstance(error, ConnectionLost) and not self._closed
        with self._lock:
            if peer.resume_until_s is not None and now_s > peer.resume_until_s:
                broke = False
            peer.channels.remove(channel)
            control = peer.channel
            first = control is not None and control.bundle is channel.bundle
            others = [c for c in peer.channels if c.bundle is channel.bundle]
            items = [item for item in peer.imports.values() if item.granted] if first else []
            if first:
                peer.channel = None
                peer.breaks += 1
                if broke and items and peer.resume_until_s is None:
                    peer.resume_until_s = now_s + RESUME_S
            if peer.cancelled or any(broke or not item.granted for item in peer.imports.values()):
                self._peer(peer.address)  # dials once every reader has ended
            self._forget(peer)
        if not first:
            return
        channel.bundle.close()
        for other in others:
            other.fail(error)
        if isinstance(error, RemoteProtocolError):
            self._telemetry.refused(error.reason)
        if not self._closed:
            logger.warning(
                "prefill_worker_lost worker=%s transfers=%d reason=%s", channel.peer.worker, len(items), error
            )
        if not broke:
            self._fail_all(peer, items, f"connection to prefill worker lost: {error}")

    def _fail_all(self, peer: Peer, items: list[Import], reason: str) -> None:
        for item in items:
            if self._end(peer, item, "failed", reason):
                self._on_failed(item.room, reason)
        with self._lock:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        """Drop an address that nothing is left of: addresses come with requests. With the lock held."""
        if not (peer.channels or peer.dialing or peer.imports):
            self._peers.pop(peer.address, None)

    def _end(self, peer: Peer, item: Import, outcome: str, reason: str) -> bool:
        """End a transfer once; True for the call that did. Nothing is written when any call returns."""
        first = item.end()
        if outcome != "done":
            try:
                self._memory.settle()  # what landed may still be on its way into rows that are free now
            except TransferError as error:
                logger.error("kv_settle_failed room=%d reason=%s", item.room, error)
        if not first:
            return False
        with self._lock:
            peer.imports.pop(item.transfer, None)
            if self._by_room.get(item.room, (None, None))[1] is item:
                del self._by_room[item.room]
        self._telemetry.record(
            TransferRecord(
                room=item.room,
                role="receive",
                peer_site=peer.channel.peer.site if peer.channel is not None else "unknown",
                outcome=outcome,
                bytes=item.session.received_bytes,
                pages=item.grant.pages,
                seconds=time.monotonic() - item.since_s,
                reason=reason,
            )
        )
        return True


@dataclass(frozen=True, slots=True)
class _PeerHandler:
    """Frames of one prefill worker's channel, bound to that peer."""

    importer: Importer
    peer: Peer

    def frame(self, channel: Channel, header: Header) -> None:
        self.importer.frame(self.peer, channel, header)

    def lost(self, channel: Channel, error: PrfaasError) -> None:
        self.importer.lost(self.peer, channel, error)
