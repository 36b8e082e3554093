"""One TCP connection that carries frames: exact, bounded, scatter-gather reads and writes.

The socket is non-blocking and every wait is a poll with a deadline, so that one thread may read while another
writes and `close()` wakes both. Nothing here interprets a payload.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence

import xxhash

from cache_service.core.errors import DeadlineExceeded, RemoteProtocolError, TransferError
from prfaas_sglang.core.framing import (
    DATA_BYTES,
    HEADER_BYTES,
    FrameType,
    Header,
    decode_header,
    encode_header,
)
from prfaas_sglang.transfer.tcp_info import TcpInfo, read_tcp_info
from prfaas_sglang.transfer.tls import PlainStream, TlsStream, check_site, shutdown

#: A peer that takes or gives no byte for this long in the middle of a frame is gone.
IO_TIMEOUT_S = 20.0
_IOV_MAX = 1024
_SCRATCH_BYTES = 256 << 10
#: What is read beyond the bytes that are asked for: the next frame's header, and its descriptor.
_BEYOND_BYTES = HEADER_BYTES + DATA_BYTES
#: Unsent bytes that the kernel may hold per connection: what an urgent frame waits behind.
UNSENT_BYTES = 256 << 10
#: A reader that waits for more than this is woken when this much is there.
WAKE_BYTES = 256 << 10
SO_MAX_PACING_RATE = 47
TCP_RTO_MAX_MS = 44
_UNLIMITED = (1 << 64) - 1

Buffer = bytes | bytearray | memoryview


class ConnectionLost(TransferError):
    """The connection ended; everything that rode on it fails."""

    reason = "connection_lost"


def tune(sock: socket.socket) -> None:
    """Set the options of every data connection. Raises ConnectionLost (and closes) when it is gone already.

    No Nagle, keep-alive, bounded unacknowledged time, a small unsent backlog, and bbr where the host lets us
    ask for it (its loss model keeps the rate on a WAN; the host's default serves otherwise).
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
    with contextlib.suppress(OSError):  # Linux 6.15: after a partition, try again at least once a second
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 1000)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IO_TIMEOUT_S * 1000))
    except OSError as error:
        sock.close()
        raise ConnectionLost(f"socket options: {error}") from error


class Wire:
    """Frames over one connected socket. One reader thread and one writer thread at most.

    All methods raise ConnectionLost when the peer closed or stalled, RemoteProtocolError when its bytes are
    not this protocol.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._stream: TlsStream | PlainStream = (
            TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else PlainStream(sock)
        )
        self._closed = False
        self._deadline_s = math.inf
        self._lowat = 1
        self._beyond = memoryview(bytearray(_BEYOND_BYTES))
        self._ahead = self._beyond[:0]  # the part of it that is to be read next
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    # --- writing ---

    def wait_writable(self) -> None:
        """Block until the socket takes more with little unsent before it (see `tune`).

        Raises ConnectionLost after IO_TIMEOUT_S.
        """
        self._wait(self._writable, IO_TIMEOUT_S, "peer takes no data")

    def send(self, kind: FrameType, transfer: int, parts: Sequence[Buffer] = ()) -> int:
        """Write one frame whose payload is `parts` in order; return the payload's length in bytes."""
        digest = xxhash.xxh3_64()
        length = 0
        for part in parts:
            digest.update(part)
            length += len(part)
        head = encode_header(Header(kind, length, transfer, digest.intdigest()))
        if parts and len(parts[0]) <= DATA_BYTES:
            head, parts = head + parts[0], parts[1:]  # one TLS record less
        self._send_all([memoryview(head), *(memoryview(part) for part in parts)])
        return length

    def _send_all(self, views: list[memoryview]) -> None:
        index = 0
        while index < len(views):
            try:
                sent = self._stream.send(views[index : index + _IOV_MAX])
            except BlockingIOError:
                sent = 0
            except (OSError, ValueError) as error:
                raise ConnectionLost(f"send: {error}") from error
            full = not (sent and self._tls)  # a plain socket that took only a part would take no more now
            while index < len(views) and sent >= len(views[index]):
                sent -= len(views[index])
                index += 1
            if index < len(views):
                views[index] = views[index][sent:]
                if full:
                    self._wait(self._writable, IO_TIMEOUT_S, "peer takes no data")

    # --- reading ---

    def read_header(self, timeout_s: float) -> Header | None:
        """Return the next frame's header, or None when no byte came within `timeout_s`."""
        if not (self._ahead or self._stream.buffered):
            self._wake_at(1)
            try:
                self._wait(self._readable, timeout_s, "idle")
            except DeadlineExceeded:
                return None
        return decode_header(self.read_exact(HEADER_BYTES, beyond=DATA_BYTES))

    def read_payload(self, header: Header) -> bytes:
        """Read and verify a control frame's payload.

        Raises RemoteProtocolError on a wrong checksum, and for DATA before anything of it is read: what
        takes DATA reads it in its own way, and its bound is too large for everyone else.
        """
        if header.type is FrameType.DATA:
            raise RemoteProtocolError("DATA to a side that takes none", reason="direction")
        payload = bytes(self.read_exact(header.length))
        if xxhash.xxh3_64_intdigest(payload) != header.checksum:
            raise RemoteProtocolError(f"{header.type.name}: checksum mismatch", reason="checksum")
        return payload

    def read_exact(self, length: int, *, beyond: int = 0) -> bytes | bytearray:
        """Read exactly `length` bytes (bounded by the header's checks), and up to `beyond` ahead."""
        if len(self._ahead) >= length:
            found, self._ahead = bytes(self._ahead[:length]), self._ahead[length:]
            return found
        data = bytearray(length)
        view = memoryview(data)
        while len(view):
            view = view[self.read_some([view], beyond=beyond) :]
        return data

    def wait_readable(self, at_least: int = 1) -> None:
        """Block until `at_least` bytes (bounded by WAKE_BYTES), or the end, are there.

        Fewer, larger reads cost a third of the processor time. Raises ConnectionLost after IO_TIMEOUT_S.
        """
        if self._ahead or self._stream.buffered:
            return
        # under TLS a part may have left the kernel's buffer already, so its count says nothing
        self._wake_at(1 if self._tls else max(1, min(at_least, WAKE_BYTES)))
        try:
            self._wait(self._readable, IO_TIMEOUT_S, "peer sends no data")
        except DeadlineExceeded as error:
            raise ConnectionLost(str(error)) from error

    def _wake_at(self, count: int) -> None:
        if count != self._lowat:
            self._lowat = count
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def read_some(self, views: Sequence[memoryview], *, beyond: int = 0) -> int:
        """Read at least one byte into `views`, waiting for it; return how many (see `read_ready`)."""
        while True:
            count = self.read_ready(views, beyond=beyond)
            if count:
                return count
            self.wait_readable()

    def read_ready(self, views: Sequence[memoryview], *, beyond: int = _BEYOND_BYTES) -> int:
        """Read what is there into `views` without waiting; return how many bytes, 0 when nothing is.

        Up to `beyond` bytes that follow are read with them and kept for the next read: a call less.
        """
        if self._ahead:
            return self._take_ahead(views)
        views = views[: _IOV_MAX - 1]
        wanted = sum(map(len, views))
        try:
            count = self._stream.receive([*views, self._beyond[:beyond]])
        except BlockingIOError:
            return 0
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"receive: {error}") from error
        if count == 0:
            raise ConnectionLost("the peer closed the connection")
        if count > wanted:
            self._ahead = self._beyond[: count - wanted]
        return min(count, wanted)

    def _take_ahead(self, views: Sequence[memoryview]) -> int:
        """Fill `views` with bytes that were read ahead."""
        taken = 0
        for view in views:
            part = self._ahead[: len(view)]
            view[: len(part)] = part
            self._ahead = self._ahead[len(part) :]
            taken += len(part)
        return taken

    def discard(self, length: int) -> None:
        """Read `length` bytes and throw them away."""
        scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
        while length:
            length -= self.read_some([scratch[: min(length, len(scratch))]])

    def check_site(self, site: str) -> None:
        """Raise TlsRefused when the peer's certificate is not for `site` (a plain connection has none)."""
        check_site(self._sock, site)

    # --- rate ---

    def pace(self, bytes_per_s: float | None) -> None:
        """Cap the sending rate of this connection in the kernel; None lifts the cap."""
        value = _UNLIMITED if bytes_per_s is None else max(1, int(bytes_per_s))
        with contextlib.suppress(OSError):  # it may be closed already
            self._sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", value))

    def tcp_info(self) -> TcpInfo | None:
        """Return what TCP reports now, None when the connection is closed."""
        try:
            return read_tcp_info(self._sock)
        except OSError:
            return None

    # --- life ---

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Bound everything that is read and written meanwhile, all waits together, not each one.

        A peer that sends a byte now and then stays below every other bound.
        """
        self._deadline_s = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline_s = math.inf

    def _wait(self, poller: select.poll, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._closed:
                raise ConnectionLost("closed")
            now_s = time.monotonic()
            if now_s > self._deadline_s:
                raise ConnectionLost("the peer is too slow")
            left = min(deadline, self._deadline_s) - now_s
            if poller.poll(max(0.0, left) * 1000):
                return
            if now_s >= deadline:
                error = f"{what} for {timeout_s:.0f} s"
                if poller is self._writable:
                    raise ConnectionLost(error)
                raise DeadlineExceeded(error)

    def close(self) -> None:
        """End the connection in both directions; wakes a thread that waits on it. Idempotent."""
        self._closed = True
        shutdown(self._sock)

    def release(self) -> None:
        """Free the descriptor, once both threads have left."""
        self.close()
        self._sock.close()
