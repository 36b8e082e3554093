"""Decode's way to a prefill rank: TCP, TLS, hello."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache_service.core.errors import PrfaasError
from prfaas_sglang.core.layout import Hello
from prfaas_sglang.transfer.channel import Identity, dial_hello, no_rooms
from prfaas_sglang.transfer.imports import Address, Peer
from prfaas_sglang.transfer.tls import Tls
from prfaas_sglang.transfer.wire import ConnectionLost, Wire, tune

CONNECT_TIMEOUT_S = 5.0
CONNECT_ATTEMPTS = 3
#: How often a broken connection is dialed again.
REDIAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Dialer:
    """Connects one decode rank.

    Attributes:
        identity: who we are.
        tls: contexts for mutual TLS, None for plain TCP.
    """

    identity: Identity
    tls: Tls | None

    def reach(
        self, peer: Peer, bundle: str, parting: Callable[[], Sequence[int]], closed: Callable[[], bool]
    ) -> tuple[Wire, Hello]:
        """Connect the control connection; when there is something to resume, try for as long as that may.

        Returns and raises as `connect`.
        """
        pause = threading.Event()
        if peer.breaks > 1:
            pause.wait(min(1.0, 0.1 * 2**peer.breaks))
        while True:
            try:
                return self.connect(peer.address, bundle, 0, parting)
            except ConnectionLost as error:
                until_s = peer.resume_until_s
                refused = isinstance(error.__cause__, ConnectionRefusedError)  # the worker itself is gone
                if until_s is None or refused or closed() or time.monotonic() > until_s:
                    raise
                pause.wait(REDIAL_S)

    def connect(
        self, address: Address, bundle: str, index: int, parting: Callable[[], Sequence[int]] = no_rooms
    ) -> tuple[Wire, Hello]:
        """Connect number `index` of a bundle (see `dial_hello`); return it and what the peer said of itself.

        Raises ConnectionLost when the peer cannot be reached, RemoteProtocolError when one refuses the other.
        """
        host, port = address
        pause = threading.Event()
        for attempt in itertools.count(1):
            try:
                sock = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
                break
            except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
                if attempt >= CONNECT_ATTEMPTS:
                    raise ConnectionLost(f"cannot reach prefill worker {host}:{port}: {error}") from error
                pause.wait(0.2 * 2**attempt)
        tune(sock)
        wire = Wire(self.tls.connect(sock) if self.tls is not None else sock)
        try:
            return wire, dial_hello(wire, self.identity, bundle, index, parting)
        except PrfaasError:
            wire.release()
            raise
