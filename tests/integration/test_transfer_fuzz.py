"""Live exporter and importer against peers that send anything: see tests/fuzzing.py for the budget.

After every example a well-behaved peer was served beside it, no thread failed by accident, and pool memory
outside the granted rows is what it was.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.framing import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    Data,
    FrameType,
    decode_header,
    encode_data,
    encode_total,
)
from prfaas_sglang.core.layout import Hello, Layout, encode_hello, to_json
from prfaas_sglang.transfer import bundle
from prfaas_sglang.transfer.wire import IO_TIMEOUT_S
from tests.fuzzing import budget, cut_up, frames, mutations, payloads, raw_frame, splits, u8, u16, u32, u64
from tests.integration.transfer_support import LAYOUT, WAIT_S, Pair, assert_moved

#: Rooms of the well-behaved peer; a room is a secret of its two halves, so nobody else names them.
GOOD = itertools.count(1 << 62)
BAD = itertools.count(1 << 61)
BUNDLES = itertools.count()


class Errors(logging.Handler):
    """Collects what a thread logs when it fails by accident."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@contextmanager
def no_accident() -> Iterator[None]:
    """Fail when a thread of ours logs an error or dies meanwhile."""
    errors, root, hook = Errors(), logging.getLogger("prfaas_sglang"), threading.excepthook
    died: list[object] = []
    root.addHandler(errors)
    threading.excepthook = lambda args: died.append(args.exc_value)
    try:
        yield
    finally:
        threading.excepthook = hook
        root.removeHandler(errors)
    assert not errors.found, errors.found[0]
    assert not died, died


def hello(
    role: str = "decode",
    name: str | None = None,
    index: int = 0,
    layout: Layout = LAYOUT,
    codecs: Sequence[int] = (),
) -> bytes:
    name = f"bundle-{next(BUNDLES)}" if name is None else name
    payload = encode_hello(Hello(role, "B", "b-fuzz", 0, to_json(layout), name, index, tuple(codecs)))
    return raw_frame(FrameType.HELLO, 0, payload)


def read_to_end(sock: socket.socket) -> bytes:
    """Return what the peer says until it closes the connection; it must within WAIT_S."""
    sock.settimeout(WAIT_S)
    data = b""
    with suppress(ConnectionError):
        while chunk := sock.recv(65536):
            data += chunk
    return data


def serve_one(pair: Pair) -> None:
    """A well-behaved request from begin to end."""
    room = next(GOOD)
    pair.begin(room, [5, 3], state=1, aux=1)
    pair.prefill.wait(room, "grant")
    pair.exporter.send(room, [4, 9], states=[[2]], aux_row=2, last=True)
    pair.decode.wait(room, "done")
    pair.prefill.wait(room, "done")
    assert_moved(pair, [[4, 9], [2], [2]], [[5, 3], [1], [1]])


# --- the listening side ---


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with closing(Pair(staging_bytes=1 << 20, connections=2)) as value:
        serve_one(value)
        yield value


@given(
    st.booleans(),
    st.lists(frames(payloads(u64.filter(lambda n: n < 1 << 61))), max_size=8),
    mutations(),
    splits,
)
@budget(60)
def test_an_exporter_survives_any_decode_worker(  # type: ignore[no-untyped-def]
    pair: Pair, introduced: bool, parts: list[bytes], mutate, sizes: list[int]
) -> None:
    """It closes the connection when the peer has, or before; others are served; nothing of it stays."""
    with no_accident(), socket.create_connection(pair.address, timeout=WAIT_S) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(ConnectionError):
            if introduced:
                sock.sendall(hello())
            for piece in cut_up(mutate(parts), sizes):
                sock.sendall(piece)
        serve_one(pair)
        with suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)


@pytest.mark.parametrize("kind", [FrameType.GRANT, FrameType.DATA, FrameType.HELLO])
def test_announced_lengths_take_no_memory(pair: Pair, kind: FrameType) -> None:
    """Frames of up to 4 GiB that never come, before and after the hello, on many connections."""
    tracemalloc.start()
    try:
        with no_accident(), ExitStack() as stack:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            bound = MAX_PAYLOAD_BYTES if kind is FrameType.DATA else MAX_CONTROL_BYTES
            for introduced, length in itertools.product((False, True), (bound, bound + 1, 2**32 - 1)):
                for _ in range(10):
                    sock = stack.enter_context(socket.create_connection(pair.address, timeout=WAIT_S))
                    sock.sendall(
                        (hello() if introduced else b"") + raw_frame(kind, 1, b"", length=length) + b"x" * 8
                    )
                    if length > bound or kind is FrameType.DATA:
                        read_to_end(sock)
            serve_one(pair)
            assert tracemalloc.get_traced_memory()[1] - before < 24 << 20
    finally:
        tracemalloc.stop()


def test_a_peer_that_asks_and_never_reads_is_dropped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers wait up to a bound, then its connection ends; others are served meanwhile."""
    monkeypatch.setattr(bundle, "MAX_CONTROL", 256)
    ping = raw_frame(FrameType.PING, 0, b"")
    with no_accident(), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(WAIT_S)
        sock.connect(pair.address)
        sock.sendall(hello())
        started = time.monotonic()
        assert floods(sock, ping * 1000, 3000) is False
        assert time.monotonic() - started < IO_TIMEOUT_S / 2  # not because the writer gave up
        serve_one(pair)


def floods(sock: socket.socket, data: bytes, times: int) -> bool:
    """Send and never read; False when the peer ended it."""
    try:
        for _ in range(times):
            sock.sendall(data)
    except ConnectionError:
        return False
    return True


# --- the dialing side ---


class Script:
    """A prefill worker that says hello and then whatever it is told, on two connections per bundle."""

    def __init__(self, layout: Layout = LAYOUT, codecs: Sequence[int] = ()) -> None:
        self._hello = hello("prefill", "", layout=layout, codecs=codecs)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(WAIT_S)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self.sockets: list[socket.socket] = []

    def accept(self) -> None:
        """Take a bundle's connections."""
        for _ in range(2):
            sock, _ = self._server.accept()
            self.sockets.append(sock)
            sock.settimeout(WAIT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            read_frame(sock)
            sock.sendall(self._hello)

    def hang_up(self) -> None:
        """Say no more; wait until the other side has read all of it and closed both connections."""
        self._server.close()
        for sock in self.sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        for sock in self.sockets:
            read_to_end(sock)
            sock.close()
        self.sockets.clear()

    def close(self) -> None:
        self._server.close()
        for sock in self.sockets:
            sock.close()


def read_frame(sock: socket.socket) -> tuple[FrameType, int, bytes]:
    header = decode_header(_exactly(sock, HEADER_BYTES))
    return header.type, header.transfer, _exactly(sock, header.length)


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = sock.recv(length - len(data))
        assert chunk
        data += chunk
    return data


PAGES, STATE, AUX = [7, 8, 300, 2], 3, 6
EXPECTED = [[bytes([65 + t * 4 + i]) * 4096 for i in range(4)] for t in range(2)]
STATE_BYTES, AUX_BYTES = b"s" * 50_000, (b"t" * 64, b"u" * 8)


def honest_frames(transfer: int, per_frame: int) -> list[bytes]:
    """Everything that the grant asks for, COMMIT first (order does not matter)."""
    total = 2 * 4 * 4096 + 50_000 + 72
    found = [raw_frame(FrameType.COMMIT, transfer, encode_total(total))]
    for tensor, first in itertools.product(range(2), range(0, 4, per_frame)):
        rows = EXPECTED[tensor][first : first + per_frame]
        found.append(data_frame(transfer, Data(0, tensor, first, len(rows)), b"".join(rows)))
    found.append(data_frame(transfer, Data(1, 0, 0, 1), STATE_BYTES))
    found += [data_frame(transfer, Data(2, t, 0, 1), AUX_BYTES[t]) for t in range(2)]
    return found


def data_frame(transfer: int, data: Data, rows: bytes, **wrong: int) -> bytes:
    return raw_frame(FrameType.DATA, transfer, encode_data(data) + rows, **wrong)


small = st.integers(0, 5)
#: Descriptors that may lie outside the grant, with rows of any length.
wild_rows = st.builds(
    lambda data, rows: encode_data(data) + rows,
    st.builds(Data, small | u16, small | u16, small | u32, small | u32, st.just(0) | u8),
    st.sampled_from([0, 1, 8, 64, 4095, 4096, 8192, 50_000]).map(lambda n: b"#" * n),
)


@given(
    st.sampled_from([1, 2, 4]),
    st.permutations(range(12)),
    st.lists(
        st.tuples(
            small | st.just(99), frames(wild_rows | payloads(u64), st.sampled_from([0, 1, 2**40]) | u64)
        ),
        max_size=3,
    ),
    st.lists(st.tuples(st.sampled_from(["mine", "mine", "other"]), wild_rows), max_size=2),
    mutations(),
    splits,
    st.integers(0, 12),
)
@budget(120)
def test_an_importer_survives_any_prefill_worker(  # type: ignore[no-untyped-def]
    pair: Pair, per_frame: int, order: Sequence[int], extra, wild, mutate, sizes, cut: int
) -> None:
    """Done means every granted row is what was sent; no other row ever changes; others are served."""
    room, before = next(BAD), [[bytes(b) for b in c] for c in pair.decode.buffers]
    with no_accident(), closing(Script()) as script:
        pair.importer.begin(room, script.address, PAGES, states=[[STATE]], aux_row=AUX, prefix_tokens=0)
        script.accept()
        kind, transfer, _ = read_frame(script.sockets[0])
        assert kind is FrameType.GRANT
        honest = honest_frames(transfer, per_frame)
        stream = [honest[i] for i in order if i < len(honest)]
        for at, part in extra:
            stream.insert(at, part)
        for whose, payload in wild:
            stream.append(raw_frame(FrameType.DATA, transfer + (whose == "other"), payload))
        # COMMIT may travel on the first connection only
        first = [f for n, f in enumerate(stream) if n >= cut or f[3] != FrameType.DATA]
        second = [f for n, f in enumerate(stream) if n < cut and f[3] == FrameType.DATA]
        sent = [mutate(first), b"".join(second)]
        for sock, data in zip(script.sockets, sent, strict=True):
            with suppress(ConnectionError):
                for piece in cut_up(data, sizes):
                    sock.sendall(piece)
        serve_one(pair)
        harmless = not extra and not wild and sent[0] == b"".join(first)
        if harmless:
            pair.decode.wait(room, "done")
        script.hang_up()
        pair.importer.abort(room, "over")  # it would be resumed on a new connection
    done = pair.decode.ended(room).outcome == "done"
    check_pools(pair, before, EXPECTED if done else None)


def check_pools(pair: Pair, before: list[list[bytes]], pages: list[list[bytes]] | None) -> None:
    """Granted rows are what was sent, when that is known; all others but the good peer's are untouched."""
    expected = [pages, [[STATE_BYTES]], [[AUX_BYTES[0]], [AUX_BYTES[1]]]]
    granted, good = [PAGES, [STATE], [AUX]], [{5, 3}, {1}, {1}]
    for component, tensors in enumerate(before):
        for tensor, old in enumerate(tensors):
            now = pair.decode.buffers[component][tensor]
            size = LAYOUT.components[component].row_bytes[tensor]
            guarded = bytearray(now)
            for i, row in enumerate(granted[component]):
                part = slice(row * size, (row + 1) * size)
                if pages is not None:
                    assert now[part] == expected[component][tensor][i]  # type: ignore[index]
                guarded[part] = now[part] = old[part]
            for row in good[component]:
                guarded[row * size : (row + 1) * size] = old[row * size : (row + 1) * size]
            assert guarded == old
