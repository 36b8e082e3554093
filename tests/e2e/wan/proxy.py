"""A TCP proxy that flips one bit of what a prefill worker sends, once: what no checksum of TCP would show.

It stands on the prefill side, in front of the worker's listener; a test sends requests to its port instead.
It knows the frames (docs/wire-protocol.md), so that a test can say where the bit is.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from prfaas_sglang.core.framing import DATA_BYTES, HEADER_BYTES, FrameType, decode_header
from tests.wan.link import Wan

#: Where in the bytes of one frame a bit is flipped, by the name of what is hit.
PLACES = {"row": HEADER_BYTES + DATA_BYTES + 100, "position": HEADER_BYTES + 4, "header": 8}


@dataclass
class FlipProxy:
    """See `flipping`. `after` is the number of DATA frames, over all connections, that pass unharmed."""

    wan: Wan
    target: tuple[str, int]
    place: str
    after: int
    listener: socket.socket
    flipped: threading.Event = field(default_factory=threading.Event)
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sockets: list[socket.socket] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The port to name instead of the worker's."""
        port: int = self.listener.getsockname()[1]
        return port

    @property
    def connections(self) -> int:
        """How many connections it has accepted."""
        return len(self._sockets) // 2

    def run(self) -> None:
        """Accept until `close`."""
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            with self.wan.entered("a"):
                far = socket.create_connection(self.target, 10)
            far.settimeout(None)
            with self._lock:
                self._sockets += [near, far]
            threading.Thread(target=self._pump, args=(near, far), daemon=True).start()
            threading.Thread(target=self._frames, args=(far, near), daemon=True).start()

    def close(self) -> None:
        """End every connection."""
        for sock in (self.listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def _frames(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as stream:
            while head := stream.read(HEADER_BYTES):
                header = decode_header(head)
                frame = bytearray(head + stream.read(header.length))
                if header.type is FrameType.DATA and self._due():
                    frame[PLACES[self.place]] ^= 1
                sink.sendall(frame)
            sink.shutdown(socket.SHUT_RDWR)

    def _due(self) -> bool:
        with self._lock:
            self._seen += 1
            due = self._seen == self.after + 1
        if due:
            self.flipped.set()
        return due


@contextlib.contextmanager
def flipping(wan: Wan, port: int, place: str, after: int) -> Iterator[FlipProxy]:
    """Run a proxy on side a in front of the listener at `port`; it flips one bit at `place` (PLACES)."""
    with wan.entered("a"):
        listener = socket.create_server((wan.address("a"), 0))
    proxy = FlipProxy(wan, ("127.0.0.1", port), place, after, listener)
    threading.Thread(target=proxy.run, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.close()
