"""Accepts decode workers: TCP, TLS, hello, and only then a place in the exporter.

Every connection is welcomed on a thread of its own, so that a silent or slow one holds up nobody. How long
that may take is bounded (`HANDSHAKE_S` for TLS, as much for the hello), and so is how many may be at it.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from cache_service.core.errors import PrfaasError, RemoteProtocolError
from prfaas_sglang.core.framing import FrameType, decode_room
from prfaas_sglang.core.layout import Hello
from prfaas_sglang.transfer.channel import Channel, Identity, LayoutMismatch, receive_hello, refuse
from prfaas_sglang.transfer.tcp_info import read_tcp_info
from prfaas_sglang.transfer.telemetry import Telemetry
from prfaas_sglang.transfer.tls import Tls, shake, shutdown
from prfaas_sglang.transfer.wire import ConnectionLost, Wire, tune

logger = logging.getLogger(__name__)

Admit = Callable[[Wire, Hello], Channel]
Cancel = Callable[[Hello, int], None]

#: Connections that have not introduced themselves yet: twice what MAX_PEERS honest workers need, who dial one
#: after the other. Each costs a thread and at most a hello of memory.
MAX_WAITING = 512
ACCEPT_PAUSE_S = 0.1
#: How long a refused peer may take back its rooms (a round trip and more), and how many.
PARTING_S = 2.0
MAX_PARTING = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Guest:
    """A connection that has not introduced itself yet."""

    sock: socket.socket
    host: str


class _Lobby:
    """The guests. When it is full a newcomer gets the place of another one. Thread-safe.

    The one who goes is the oldest of the address that has most: silent connections crowd out each other, and
    a peer that speaks at once is through before it is the oldest.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._guests: dict[_Guest, None] = {}  # oldest first

    def enter(self, guest: _Guest) -> None:
        """Give a newcomer a place."""
        with self._lock:
            if len(self._guests) >= self._places:
                counts = Counter(other.host for other in self._guests)
                crowd = max(counts, key=counts.__getitem__)
                oldest = next(other for other in self._guests if other.host == crowd)
                del self._guests[oldest]
                shutdown(oldest.sock)  # its thread closes it
            self._guests[guest] = None

    def leave(self, guest: _Guest) -> None:
        """Take a guest out, before its socket is closed; nothing when it was sent away."""
        with self._lock:
            self._guests.pop(guest, None)


class Listener:
    """One listening port.

    Args:
        identity: who we are.
        telemetry: counts connections and refusals.
        admit: makes the channel of an introduced peer; raises PrfaasError to refuse it.
        cancel: (peer, room), a peer that is refused, though it is one to talk to, takes back a room.
        tls: contexts for mutual TLS, None for plain TCP.
    """

    def __init__(
        self, identity: Identity, telemetry: Telemetry, admit: Admit, cancel: Cancel, tls: Tls | None
    ) -> None:
        self._identity = identity
        self._telemetry = telemetry
        self._admit = admit
        self._cancel = cancel
        self._tls = tls
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        self._lobby = _Lobby(MAX_WAITING)

    def listen(self, host: str, port: int) -> int:
        """Bind and accept in the background; return the port (useful for port 0).

        Raises OSError when the address is taken.
        """
        listener = self._listener = socket.create_server((host, port), backlog=64)
        threading.Thread(
            target=self._accept_loop, args=(listener,), name="prfaas-accept", daemon=True
        ).start()
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
        if self._listener is not None:
            try:
                self._listener.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                logger.debug("listener_shutdown %s", error)
            self._listener.close()

    def _accept_loop(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                sock, address = listener.accept()
            except OSError as error:
                if not self._closed.is_set():
                    logger.warning("accept_failed %s", error)
                self._closed.wait(ACCEPT_PAUSE_S)  # out of descriptors: it would fail again at once
                continue
            try:
                self._receive(sock, str(address[0]))
            except PrfaasError as error:
                sock.close()
                self._refused(str(address[0]), error)

    def _receive(self, sock: socket.socket, host: str) -> None:
        tune(sock)
        guest = _Guest(self._tls.wrap(sock) if self._tls is not None else sock, host)
        self._lobby.enter(guest)
        try:
            threading.Thread(target=self._welcome, args=(guest,), name="prfaas-welcome", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._send_away(guest, ConnectionLost(str(error)))

    def _welcome(self, guest: _Guest) -> None:
        sock = guest.sock
        try:
            if isinstance(sock, ssl.SSLSocket):
                shake(sock)
            wire = Wire(sock)
            hello = self._introduced(wire)
            channel = self._place(wire, hello)
        except PrfaasError as error:
            self._send_away(guest, None if _only_knocked(sock) else error)
            return
        except Exception as error:
            # a bug must end this connection, not leave it open
            logger.exception("welcome_failed")
            self._send_away(guest, RemoteProtocolError(f"internal: {error}", reason="internal"))
            return
        self._lobby.leave(guest)
        self._telemetry.connected(+1)
        try:
            # only now: the peer dials the bundle's other connections when it has our hello
            wire.send(FrameType.HELLO, 0, [self._identity.hello()])
        except PrfaasError as error:
            channel.never_started(error)
            return
        if hello.index == 0:
            logger.info("decode_worker_connected worker=%s site=%s", hello.worker, hello.site)
        channel.start()

    def _introduced(self, wire: Wire) -> Hello:
        try:
            return receive_hello(wire, self._identity)
        except LayoutMismatch as error:
            self._hear_out(wire, error.peer)
            raise

    def _place(self, wire: Wire, hello: Hello) -> Channel:
        """Admit a peer, or tell it why not."""
        try:
            return self._admit(wire, hello)
        except PrfaasError as error:
            refuse(wire, error)
            self._hear_out(wire, hello)
            raise

    def _hear_out(self, wire: Wire, peer: Hello) -> None:
        """Let a peer that was just told why it is refused take back its rooms.

        It has shown the same certificate and names as one that is admitted; whoever has not is not heard.
        """
        with suppress(PrfaasError), wire.within(PARTING_S):
            for _ in range(MAX_PARTING):
                header = wire.read_header(PARTING_S)
                if header is None or header.type is not FrameType.CANCEL:
                    return
                self._cancel(peer, decode_room(wire.read_payload(header)))

    def _send_away(self, guest: _Guest, error: PrfaasError | None) -> None:
        if error is not None:
            self._refused(guest.host, error)
        self._lobby.leave(guest)
        shutdown(guest.sock)
        guest.sock.close()

    def _refused(self, host: str, error: PrfaasError) -> None:
        logger.warning("peer_refused address=%s reason=%s", host, error)
        self._telemetry.refused(error.reason)


def _only_knocked(sock: socket.socket) -> bool:
    """Say whether the guest left without a word: it wanted to know whether somebody is here."""
    try:
        info = read_tcp_info(sock)
    except OSError:
        return False
    return info.closed_by_peer and info.received_bytes <= 1
