"""Traffic for measuring a link from within one process: a TCP stream, numbered datagrams, a ping.

Sockets are opened on the two sides of the link and served by threads here, so that a test sees progress as a
variable and can wait for it. Arrivals are stamped by the kernel: how soon Python runs does not count.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tests.wan.link import Wan

_SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 33, 35
_CHUNK = 64 << 10


class Stream:
    """One TCP connection from one side to the other that sends as fast as it may.

    timeout_s: for the connection and for each send; the constructor raises TimeoutError.
    payload: sent once, and the receiver's SHA-256 is `digest()`; without it zeros are sent until `close`.
    """

    def __init__(
        self,
        wan: Wan,
        way: str = "a2b",
        *,
        payload: bytes | None = None,
        version: int = 4,
        cc: str = "",
        timeout_s: float = 30,
    ) -> None:
        sender, receiver = way[0], way[2]
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with wan.entered(receiver):
            server = socket.socket(family, socket.SOCK_STREAM)
        with wan.entered(sender):
            self._out = socket.socket(family, socket.SOCK_STREAM)
        self._out.settimeout(timeout_s)
        if cc:
            self._out.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, cc.encode())
        with server:
            server.bind((wan.address(receiver, version), 0))
            server.listen(1)
            server.settimeout(30)
            try:
                self._out.connect(server.getsockname()[:2])
            except OSError:
                self._out.close()
                raise
            self._in, _ = server.accept()
        self._in.settimeout(60)
        self._payload = payload
        self._hash = hashlib.sha256()
        self._progress = threading.Condition()
        self._samples: list[tuple[float, int]] = [(time.perf_counter(), 0)]
        self._stop = self._ended = False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def received(self) -> int:
        """Payload bytes that have arrived."""
        return self._samples[-1][1]

    def wait_received(self, count: int, timeout_s: float) -> None:
        """Return when `count` bytes have arrived in all. Raises TimeoutError."""
        with self._progress:
            if not self._progress.wait_for(lambda: self.received >= count, timeout_s):
                raise TimeoutError(f"{self.received} of {count} bytes in {timeout_s} s")

    def rate_bps(self, seconds: float) -> float:
        """Measure goodput over the next `seconds`."""
        first = self._samples[-1]
        time.sleep(seconds)
        last = self._samples[-1]
        return (last[1] - first[1]) * 8 / (last[0] - first[0]) if last[0] > first[0] else 0.0

    def digest(self, timeout_s: float) -> str:
        """SHA-256 of what arrived, once the payload has ended. Raises TimeoutError."""
        with self._progress:
            if not self._progress.wait_for(lambda: self._ended, timeout_s):
                raise TimeoutError(f"only {self.received} bytes in {timeout_s} s")
        return self._hash.hexdigest()

    def close(self) -> None:
        """Drop the connection."""
        self._stop = True
        for end in (self._out, self._in):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        self._out.close()
        self._in.close()

    def _send(self) -> None:
        with suppress(OSError):
            if self._payload is not None:
                self._out.sendall(self._payload)
                self._out.shutdown(socket.SHUT_WR)
                return
            zeros = bytes(1 << 20)
            while not self._stop:
                self._out.sendall(zeros)

    def _receive(self) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        total = 0
        with suppress(OSError):
            while count := self._in.recv_into(buffer, _CHUNK, socket.MSG_WAITALL):
                if self._payload is not None:
                    self._hash.update(buffer[:count])
                total += count
                with self._progress:
                    self._samples.append((time.perf_counter(), total))
                    self._progress.notify_all()
        with self._progress:
            self._ended = True
            self._progress.notify_all()


@dataclass(frozen=True)
class Goodput:
    """What one stream reached: payload bit/s, and the program that measured it."""

    bps: float
    tool: str


def goodput(wan: Wan, *, warm_s: float = 1.0, seconds: float = 2.0, cc: str = "") -> Goodput:
    """Goodput of one TCP stream from a to b after `warm_s`: by iperf3 if installed, else by Stream."""
    if shutil.which("iperf3") is None:
        with Stream(wan, cc=cc) as stream:
            time.sleep(warm_s)
            return Goodput(stream.rate_bps(seconds), "python")
    server = wan.start("b", ["iperf3", "-s", "-1", "--forceflush"], stdout=subprocess.PIPE, text=True)
    with server:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            assert server.poll() is None, "iperf3 -s ended"
        argv = ["iperf3", "-c", wan.address("b"), "-J", "-O", f"{warm_s:g}", "-t", f"{seconds:g}"]
        client = wan.start("a", [*argv, *(["-C", cc] if cc else [])], stdout=subprocess.PIPE, text=True)
        answer, _ = client.communicate(timeout=30)
        server.kill()
    return Goodput(json.loads(answer)["end"]["sum_received"]["bits_per_second"], "iperf3")


@contextmanager
def _datagram_pair(wan: Wan) -> Iterator[tuple[socket.socket, socket.socket]]:
    with wan.entered("a"):
        a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with wan.entered("b"):
        b = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with a, b:
        for side, end in (("a", a), ("b", b)):
            end.bind((wan.address(side), 0))
            end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 32 << 20)
            end.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            end.settimeout(10)
        a.connect(b.getsockname())
        yield a, b


def _receive_stamped(end: socket.socket) -> tuple[bytes, float]:
    data, ancillary, _, _ = end.recvmsg(65536, socket.CMSG_SPACE(16))
    seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
    return data, seconds + nanoseconds / 1e9


def round_trips(wan: Wan, count: int) -> list[float]:
    """Round trips of `count` ICMP echoes from a to b, one after another, seconds.

    The far kernel answers and the near one stamps the answer, so that no other process has to be scheduled.
    """
    times = []
    with wan.entered("a"):
        end = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with end:
        end.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        end.settimeout(10)
        end.connect((wan.address("b"), 0))
        for number in range(count):
            # type 8 (echo), code, checksum (of these 16-bit words), identifier, sequence number
            echo = struct.pack("!BBHHH", 8, 0, 0xFFFF - 0x0800 - number, 0, number)
            sent_s = time.time()
            end.send(echo)
            while True:
                data, arrived_s = _receive_stamped(end)
                kind, _, _, _, answered = struct.unpack_from("!BBHHH", data, 20)
                if (kind, answered) == (0, number):
                    break
            times.append(arrived_s - sent_s)
    return times


@dataclass(frozen=True)
class Arrival:
    """A datagram that arrived: its number, when it was sent and when the kernel had it (time.time)."""

    index: int
    sent_s: float
    arrived_s: float


def datagrams(wan: Wan, count: int, *, payload: int = 64, per_s: float = 40_000) -> list[Arrival]:
    """Send `count` numbered datagrams from a to b at a steady pace; return those that arrived, as they came.

    The end is known without a time-out: the sender goes on with end marks until one has arrived.
    """
    arrived: list[Arrival] = []
    ended = threading.Event()
    body = bytes(max(0, payload - 12))
    with _datagram_pair(wan) as (a, b):

        def collect() -> None:
            while True:
                data, now = _receive_stamped(b)
                index, sent = struct.unpack_from("!Id", data)
                if index == 0xFFFFFFFF:
                    ended.set()
                    return
                arrived.append(Arrival(index, sent, now))

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        start = time.time()
        for index in range(count):
            now = time.time()
            ahead = start + index / per_s - now
            if ahead > 0.0005:
                time.sleep(ahead)
                now = time.time()
            a.send(struct.pack("!Id", index, now) + body)
        deadline = time.perf_counter() + 10
        while not ended.wait(0.05) and time.perf_counter() < deadline:
            a.send(struct.pack("!Id", 0xFFFFFFFF, 0.0))
        thread.join(10)
    if not ended.is_set():
        raise TimeoutError("no end mark arrived in 10 s")
    return arrived
