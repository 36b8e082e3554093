"""Mutual TLS for the data connections: contexts, the handshake, and the names a certificate speaks for.

Both sides present a certificate of the same authority; a peer's certificate must name, as a DNS entry of its
subject alternative names, the site that the peer says it is. TLS 1.3 only. The ssl module's objects are not
safe for a reader and a writer thread at once (CPython 3.11), so one lock covers each non-blocking call.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cache_service.core.errors import ConfigError, RemoteProtocolError

HANDSHAKE_S = 10.0


class TlsRefused(RemoteProtocolError):
    """The TLS handshake failed, or the certificate is not for who the peer says it is."""

    reason = "tls"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files: the authority that peers must have, our certificate chain, our key."""

    ca: str
    cert: str
    key: str


class Tls:
    """The two contexts of one worker. Raises ConfigError naming the file that cannot be used."""

    def __init__(self, files: TlsFiles) -> None:
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, files)
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, files)

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """Return the listening side of a connection before its handshake (see `shake`); no I/O.

        Raises TlsRefused when the peer is gone already.
        """
        try:
            return self._server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            raise TlsRefused(f"TLS handshake failed: {error}") from error

    def connect(self, sock: socket.socket) -> ssl.SSLSocket:
        """Shake hands as the dialing side. Raises TlsRefused, the socket closed."""
        try:
            wrapped = self._client.wrap_socket(sock, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            sock.close()
            raise TlsRefused(f"TLS handshake failed: {error}") from error
        try:
            shake(wrapped)
        except TlsRefused:
            wrapped.close()
            raise
        return wrapped


def shake(sock: ssl.SSLSocket) -> None:
    """Shake hands within HANDSHAKE_S, however slowly the bytes come. Raises TlsRefused."""
    sock.settimeout(HANDSHAKE_S)
    try:
        sock.do_handshake()
    except (OSError, ValueError) as error:
        raise TlsRefused(f"TLS handshake failed: {error}") from error


def shutdown(sock: socket.socket) -> None:
    """End a connection in both directions; wakes threads that wait on it.

    SSLSocket's own shutdown first forgets that the socket is encrypted: a thread that sends in that moment
    would send in the clear.
    """
    with suppress(OSError):  # not connected any more
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no resumption: every connection shows its certificate
    context.check_hostname = False  # the site is checked instead, see `check_site`
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls.ca: {files.ca} cannot be used: {error}") from error
    try:
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls.cert, tls.key: {files.cert}, {files.key} cannot be used: {error}") from error
    return context


def names_of(sock: ssl.SSLSocket) -> frozenset[str]:
    """Return the DNS names that a peer's certificate speaks for, in lower case."""
    certificate = sock.getpeercert() or {}
    entries: Sequence[tuple[str, str]] = certificate.get("subjectAltName", ())  # type: ignore[assignment]
    return frozenset(value.lower() for kind, value in entries if kind == "DNS")


def check_site(sock: socket.socket, site: str) -> None:
    """Raise TlsRefused unless the connection is plain, or its certificate names `site`."""
    if not isinstance(sock, ssl.SSLSocket):
        return
    names = names_of(sock)
    if site.lower() not in names:
        shown = ", ".join(sorted(names)) or "no name"
        raise TlsRefused(f"the peer says it is site {site!r}, its certificate is for {shown}")


class TlsStream:
    """Non-blocking scatter-gather reads and writes on an SSLSocket, as a plain socket gives them."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, views: Sequence[memoryview]) -> int:
        """Write a first part of `views`; return its length. Raises BlockingIOError when nothing fits."""
        with self._lock:
            try:
                return self._sock.send(views[0])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                raise BlockingIOError from None

    def receive(self, views: Sequence[memoryview]) -> int:
        """Fill `views` with what is there; return how much, 0 at the end. Raises BlockingIOError."""
        total = 0
        with self._lock:
            for view in views:
                while len(view):
                    try:
                        count = self._sock.recv_into(view)
                    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        if total:
                            return total
                        raise BlockingIOError from None
                    if count == 0:
                        return total
                    total += count
                    view = view[count:]
        return total

    @property
    def buffered(self) -> bool:
        """True when decrypted bytes wait here, which poll() cannot see."""
        with self._lock:
            return self._sock.pending() > 0


class PlainStream:
    """The same on a plain socket."""

    buffered = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, views: Sequence[memoryview]) -> int:
        """Write a first part of `views`; return its length. Raises BlockingIOError when nothing fits."""
        return self._sock.sendmsg(views)

    def receive(self, views: Sequence[memoryview]) -> int:
        """Fill `views` with what is there; return how much, 0 at the end. Raises BlockingIOError."""
        return self._sock.recvmsg_into(views)[0]
