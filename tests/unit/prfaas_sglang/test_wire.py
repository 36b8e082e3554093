"""Frames over one socket: however the bytes come, each is read once, and its rows land where they belong."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator, Sequence

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.framing import DATA_BYTES, HEADER_BYTES, FrameType
from prfaas_sglang.transfer import wire
from prfaas_sglang.transfer.wire import ConnectionLost, Wire
from tests.fuzzing import budget, cut_up, raw_frame, splits

WAIT_S = 20.0


def ends() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a TCP connection (a pair of local sockets knows no SO_RCVLOWAT)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Wire]]:
    near, far = ends()
    reader = Wire(far)
    with near:
        yield near, reader
    reader.release()


def rows_of(reader: Wire, length: int, cuts: Sequence[int]) -> bytes:
    """Read a payload's rows as an importer does: a wait, then what is there, into several views."""
    content = bytearray(length)
    edges = sorted({0, *(cut % length for cut in cuts), length})
    views = [memoryview(content)[a:b] for a, b in itertools.pairwise(edges)]
    while length:
        reader.wait_readable(length)
        count = reader.read_ready(views)
        length -= count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    return bytes(content)


payloads = st.lists(
    st.tuples(st.sampled_from([FrameType.DATA, FrameType.PING, FrameType.CANCEL]), st.binary(max_size=200)),
    min_size=1,
    max_size=8,
)


@given(payloads, splits, st.lists(st.integers(0, 300), max_size=4))
@budget(200)
def test_frames_are_read_as_they_were_sent(
    sent: list[tuple[FrameType, bytes]], sizes: list[int], cuts: list[int]
) -> None:
    """Frames of any length, in pieces of any size: what is read ahead of one belongs to the next."""
    stream = b"".join(raw_frame(kind, n, payload) for n, (kind, payload) in enumerate(sent))
    near, far = ends()
    reader = Wire(far)

    def write() -> None:
        for piece in cut_up(stream, sizes):
            near.sendall(piece)

    writer = threading.Thread(target=write)
    writer.start()
    found = []
    for _ in sent:
        header = reader.read_header(WAIT_S)
        assert header is not None
        if header.type is not FrameType.DATA:
            payload = reader.read_payload(header)
        elif header.length <= DATA_BYTES:
            payload = bytes(reader.read_exact(header.length))
        else:
            payload = bytes(reader.read_exact(DATA_BYTES))
            payload += rows_of(reader, header.length - DATA_BYTES, cuts)
        assert xxhash.xxh3_64_intdigest(payload) == header.checksum
        found.append((header.type, payload))
    assert found == sent
    writer.join(WAIT_S)
    near.close()
    with pytest.raises(ConnectionLost):
        reader.read_header(WAIT_S)
    reader.release()


def test_a_frame_of_a_stream_takes_about_one_wait_and_one_read(
    pair: tuple[socket.socket, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Header and descriptor come with the frame before, but where a read ends at a frame's last byte."""
    near, reader = pair
    frames, rows = 20, 16 << 10
    stream = raw_frame(FrameType.DATA, 1, bytes(DATA_BYTES) + b"r" * rows) * frames
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(stream))
    near.sendall(stream)
    reads, waits = [], []
    receive, poll = reader._stream.receive, reader._wait
    monkeypatch.setattr(reader._stream, "receive", lambda views: reads.append(receive(views)) or reads[-1])
    monkeypatch.setattr(reader, "_wait", lambda *args: waits.append(args) or poll(*args))
    for _ in range(frames):
        header = reader.read_header(WAIT_S)
        assert header is not None
        reader.read_exact(DATA_BYTES)
        assert rows_of(reader, rows, []) == b"r" * rows
    assert sum(reads) == len(stream)
    assert len(reads) <= 1.5 * frames
    assert len(waits) <= 1.5 * frames


def test_many_views_are_filled_in_order(pair: tuple[socket.socket, Wire]) -> None:
    """More views than one call takes: no byte goes astray, and the next header is intact."""
    near, reader = pair
    rows = bytes(range(256)) * 16
    near.sendall(raw_frame(FrameType.DATA, 1, bytes(DATA_BYTES) + rows) + raw_frame(FrameType.PING, 0, b""))
    header = reader.read_header(WAIT_S)
    assert header is not None
    reader.read_exact(DATA_BYTES)
    assert rows_of(reader, len(rows), range(len(rows))) == rows
    assert len(rows) > 2 * wire._IOV_MAX
    header = reader.read_header(WAIT_S)
    assert header is not None
    assert header.type is FrameType.PING


def test_what_was_read_ahead_counts_as_arrived(pair: tuple[socket.socket, Wire]) -> None:
    """A header that came with the frame before is returned at once, though the socket has nothing more."""
    near, reader = pair
    near.sendall(
        raw_frame(FrameType.DATA, 1, bytes(DATA_BYTES) + b"r" * 100) + raw_frame(FrameType.PING, 0, b"")
    )
    assert reader.read_header(WAIT_S) is not None
    reader.read_exact(DATA_BYTES)
    assert rows_of(reader, 100, []) == b"r" * 100
    assert len(reader._ahead) == HEADER_BYTES
    header = reader.read_header(0.0)
    assert header is not None
    assert header.type is FrameType.PING
    assert reader.read_header(0.0) is None
