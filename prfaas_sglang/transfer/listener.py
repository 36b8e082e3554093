"""Accepts decode workers: TCP, TLS, hello, and only then a place in the exporter.

Every connection is welcomed on a thread of its own, so that a silent or slow one holds up nobody.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from cache_service.core.errors import PrfaasError
from prfaas_sglang.core.framing import FrameType
from prfaas_sglang.core.layout import Hello
from prfaas_sglang.transfer.channel import Channel, Identity, receive_hello, refuse
from prfaas_sglang.transfer.telemetry import Telemetry
from prfaas_sglang.transfer.tls import Tls
from prfaas_sglang.transfer.wire import Wire, tune

logger = logging.getLogger(__name__)

Admit = Callable[[Wire, Hello], Channel]


class Listener:
    """One listening port.

    Args:
        identity: who we are.
        telemetry: counts connections and refusals.
        admit: makes the channel of an introduced peer; raises PrfaasError to refuse it.
        tls: contexts for mutual TLS, None for plain TCP.
    """

    def __init__(self, identity: Identity, telemetry: Telemetry, admit: Admit, tls: Tls | None) -> None:
        self._identity = identity
        self._telemetry = telemetry
        self._admit = admit
        self._tls = tls
        self._listener: socket.socket | None = None
        self._closed = False

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
        self._closed = True
        if self._listener is not None:
            try:
                self._listener.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                logger.debug("listener_shutdown %s", error)
            self._listener.close()

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
            self._refused(address, error)
            return
        try:
            hello = receive_hello(wire, self._identity)
            channel = self._place(wire, hello)
        except PrfaasError as error:
            self._refused(address, error)
            wire.release()
            return
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

    def _place(self, wire: Wire, hello: Hello) -> Channel:
        """Admit a peer, or tell it why not."""
        try:
            return self._admit(wire, hello)
        except PrfaasError as error:
            refuse(wire, error)
            raise

    def _refused(self, address: object, error: PrfaasError) -> None:
        logger.warning("peer_refused address=%s reason=%s", address, error)
        self._telemetry.refused(error.reason)
