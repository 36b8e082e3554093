"""Exporter and importer over real sockets: rows arrive bit-exact; a fault is a reason, never a wrong row."""

from __future__ import annotations

import dataclasses
import json
import queue
import random
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
import xxhash

from cache_service.core.errors import TransferError
from prfaas_sglang.core.framing import HEADER_BYTES, FrameType, Grant, Header, decode_header, encode_header
from prfaas_sglang.core.layout import Hello, encode_hello, to_json
from prfaas_sglang.transfer import importer, telemetry
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.telemetry import LinkSample, Telemetry
from tests.integration.transfer_support import LAYOUT, ROWS, WAIT_S, Pair, Side, assert_moved


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair()) as value:
        yield value


def test_chunked_transfers_arrive_bit_exact_and_touch_nothing_else(pair: Pair) -> None:
    """Several rooms at once, in chunks, scattered pages: granted rows equal the source, others stay."""
    rng = random.Random(3)
    before = [[bytes(b) for b in c] for c in pair.decode.buffers]
    pages_out, pages_in = rng.sample(range(512), 300), rng.sample(range(512), 300)
    jobs = []
    for room in range(6):
        part = slice(room * 50, room * 50 + 50)
        jobs.append((room, [pages_out[part], [room], [room]], [pages_in[part], [15 - room], [7 - room]]))
    for room, _, dst in jobs:
        pair.begin(room, dst[0], state=dst[1][0], aux=dst[2][0])
    for room, src, _ in jobs:
        pair.prefill.wait(room, "grant")
        assert pair.exporter.grant(room) == Grant(room, 50, 0, (1,))
        pair.exporter.send(room, src[0][:20])
        pair.exporter.send(room, src[0][20:], states=[src[1]], aux_row=src[2][0], last=True)
    for room, src, dst in jobs:
        pair.decode.wait(room, "done")
        pair.prefill.wait(room, "done")
        assert_moved(pair, src, dst)
    touched = [set(pages_in), {15 - r for r in range(6)}, {7 - r for r in range(6)}]
    for component, rows in enumerate(ROWS):
        for tensor, size in enumerate(LAYOUT.components[component].row_bytes):
            for row in set(range(rows)) - touched[component]:
                expected = before[component][tensor][row * size : (row + 1) * size]
                assert pair.decode.row(component, tensor, row) == expected
    sent = pair.prefill.telemetry.transfers(2)[0]
    received = pair.decode.telemetry.transfers(2)[0]
    assert (sent.outcome, sent.pages, sent.peer_site) == ("done", 50, "B")
    assert sent.bytes == received.bytes == 50 * 8192 + 50_000 + 72


def test_zero_pages_still_move_state_and_metadata(pair: Pair) -> None:
    """A request whose KV decode already holds still sends its state and metadata."""
    pair.begin(9, [], state=3, aux=2)
    pair.prefill.wait(9, "grant")
    pair.exporter.send(9, [], states=[[5]], aux_row=1, last=True)
    pair.decode.wait(9, "done")
    assert_moved(pair, [[], [5], [1]], [[], [3], [2]])


def test_a_peer_of_another_layout_is_refused_before_any_byte() -> None:
    """The mismatching field is named to the request; nothing was written."""
    other = dataclasses.replace(LAYOUT, page_size=32)
    with closing(Pair(decode_layout=other)) as pair:
        before = [[bytes(b) for b in c] for c in pair.decode.buffers]
        pair.begin(1, [1, 2], state=0, aux=0)
        reason = pair.decode.wait(1, "failed")
        assert "page_size" in reason
        assert before == [[bytes(b) for b in c] for c in pair.decode.buffers]
        assert pair.exporter.grant(1) is None


def test_unreachable_prefill_worker_fails_the_request_with_its_address() -> None:
    """Nobody listens: the room fails, the address is in the reason."""
    with closing(Pair()) as pair:
        pair.exporter.close()
        pair.begin(1, [1], state=0, aux=0)
        assert f"{pair.address[0]}:{pair.address[1]}" in pair.decode.wait(1, "failed")


def test_decode_abort_frees_the_room_and_later_rows_are_dropped(pair: Pair) -> None:
    """After abort() returns no row changes, prefill hears of it, and the channel serves the next room."""
    pair.begin(1, list(range(100)), state=0, aux=0)
    pair.prefill.wait(1, "grant")
    pair.exporter.send(1, list(range(50)))
    pair.decode.wait(1, "progress")
    pair.importer.abort(1, "client left")
    frozen = bytes(pair.decode.buffers[0][0])
    assert "client left" in pair.prefill.wait(1, "failed")
    with pytest.raises(TransferError):
        pair.exporter.send(1, list(range(50, 100)), states=[[0]], aux_row=0, last=True)
    pair.begin(2, [200], state=1, aux=1)
    pair.prefill.wait(2, "grant")
    pair.exporter.send(2, [300], states=[[2]], aux_row=2, last=True)
    pair.decode.wait(2, "done")
    after = bytearray(frozen)
    size = LAYOUT.components[0].row_bytes[0]
    after[200 * size : 201 * size] = pair.prefill.row(0, 0, 300)
    assert bytes(pair.decode.buffers[0][0]) == bytes(after)


def test_prefill_abort_fails_the_decode_side_with_the_reason(pair: Pair) -> None:
    """Prefill gives up: decode fails that room only."""
    pair.begin(1, [1, 2], state=0, aux=0)
    pair.begin(2, [3], state=1, aux=1)
    pair.prefill.wait(1, "grant")
    pair.exporter.abort(1, "out of memory")
    assert "out of memory" in pair.decode.wait(1, "failed")
    pair.prefill.wait(2, "grant")
    pair.exporter.send(2, [9], states=[[2]], aux_row=2, last=True)
    pair.decode.wait(2, "done")


def test_a_room_in_use_is_refused(pair: Pair) -> None:
    """A second grant of a live room fails the newcomer and leaves the first alone."""
    pair.begin(1, [1], state=0, aux=0)
    pair.prefill.wait(1, "grant")
    with closing(
        Importer(
            Identity("decode", "B", "b-1", 0, LAYOUT),
            Side(5).memory,
            Telemetry("B"),
            on_progress=lambda room: None,
            on_done=lambda room: None,
            on_failed=lambda room, reason: pair.decode.hear(room, "second", reason),
        )
    ) as second:
        second.begin(1, pair.address, [1], states=[[0]], aux_row=0, prefix_tokens=0)
        assert "in use" in pair.decode.wait(1, "second")
    pair.exporter.send(1, [1], states=[[0]], aux_row=0, last=True)
    pair.decode.wait(1, "done")


class Middlebox:
    """A TCP relay in front of the exporter that can flip a byte of a frame or cut the connection."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = ("127.0.0.1", self._server.getsockname()[1])
        self.flip_at: int | None = None  # offset in the stream prefill -> decode
        self.cut_at: int | None = None
        self.cuts = 0  # connections still to be cut there
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                upstream = socket.create_connection(self._target)
            except OSError:  # the exporter has ended, decode still tries
                client.close()
                continue
            threading.Thread(target=self._pump, args=(client, upstream, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(upstream, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, watched: bool) -> None:
        offset = 0
        with suppress(OSError):
            while data := bytearray(source.recv(4096)):
                if watched and self.flip_at is not None and offset <= self.flip_at < offset + len(data):
                    data[self.flip_at - offset] ^= 0x40
                if watched and self.cut_at is not None and self.cuts and offset + len(data) > self.cut_at:
                    self.cuts -= 1
                    break
                sink.sendall(data)
                offset += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def box(pair: Pair) -> Iterator[Middlebox]:
    with closing(Middlebox(pair.address)) as value:
        pair.address = value.address
        yield value


def test_a_corrupted_row_byte_fails_only_its_transfer(pair: Pair, box: Middlebox) -> None:
    """A flipped payload byte is an integrity failure; the same connection carries the next room."""
    box.flip_at = 40_000
    pair.begin(1, list(range(40)), state=0, aux=0)
    pair.prefill.wait(1, "grant")
    pair.exporter.send(1, list(range(40)), states=[[0]], aux_row=0, last=True)
    assert "checksum" in pair.decode.wait(1, "failed")
    assert "checksum" in pair.prefill.wait(1, "failed")
    box.flip_at = None
    pair.begin(2, [5], state=1, aux=1)
    pair.prefill.wait(2, "grant")
    pair.exporter.send(2, [6], states=[[2]], aux_row=2, last=True)
    pair.decode.wait(2, "done")
    assert_moved(pair, [[6], [2], [2]], [[5], [1], [1]])


@pytest.mark.parametrize("staged", [True, False])
def test_cut_connections_are_made_good_on_new_ones(staged: bool) -> None:
    """Reset three times in the middle of two transfers: what is missing is sent again, every row is exact."""
    with closing(Pair(staging_bytes=32 << 20 if staged else 0)) as pair:
        with closing(Middlebox(pair.address)) as box:
            pair.address = box.address
            box.cut_at, box.cuts = 150_000, 3
            for room in (1, 2):
                pair.begin(room, list(range(room * 200, room * 200 + 100)), state=room, aux=room)
            for room in (1, 2):
                pair.prefill.wait(room, "grant")
                assert pair.exporter.open(room, 100)
                pair.exporter.send(room, list(range(60 * room, 60 * room + 50)))
                pair.exporter.send(
                    room, list(range(60 * room + 50, 60 * room + 100)), states=[[5]], aux_row=6, last=True
                )
            for room in (1, 2):
                pair.decode.wait(room, "done")
                source = [list(range(60 * room, 60 * room + 100)), [5], [6]]
                assert_moved(pair, source, [list(range(room * 200, room * 200 + 100)), [room], [room]])
                pair.prefill.wait(room, "done")
            assert box.cuts == 0
        resumed = pair.prefill.telemetry.registry.get_sample_value("prfaas_transfer_resumed_total")
        assert resumed is not None
        assert resumed >= 1  # one break may cut several connections


def test_a_path_that_breaks_every_connection_is_given_up(
    pair: Pair, box: Middlebox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing ever arrives: the transfer fails with the reason; a later one over a sound path is served."""
    monkeypatch.setattr(importer, "RESUME_S", 0.5)
    box.cut_at, box.cuts = 10_000, 1000
    pair.begin(1, list(range(40)), state=0, aux=0)
    pair.prefill.wait(1, "grant")
    pair.exporter.send(1, list(range(40)), states=[[0]], aux_row=0, last=True)
    assert "lost" in pair.decode.wait(1, "failed")
    box.cuts = 0
    pair.begin(2, [5], state=1, aux=1)
    pair.prefill.wait(2, "grant")
    pair.exporter.send(2, [6], states=[[2]], aux_row=2, last=True)
    pair.decode.wait(2, "done")
    assert_moved(pair, [[6], [2], [2]], [[5], [1], [1]])


def test_a_worker_that_is_gone_fails_its_transfers_at_once(pair: Pair) -> None:
    """Nobody listens any more: no time is lost waiting for it."""
    pair.begin(1, list(range(40)), state=0, aux=0)
    pair.prefill.wait(1, "grant")
    pair.exporter.close()
    assert "cannot reach prefill worker" in pair.decode.wait(1, "failed")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 64,
        encode_header(Header(FrameType.DATA, 1 << 20, 1, 0)),
        encode_header(Header(FrameType.HELLO, 4, 0, 0)) + b"null",
        b"\x00" * HEADER_BYTES,
    ],
    ids=["http", "data-before-hello", "hello-checksum", "zeros"],
)
def test_garbage_on_the_port_is_refused_and_others_are_served(pair: Pair, garbage: bytes) -> None:
    """A stranger's bytes close that connection, and a real decode worker is served after it."""
    with socket.create_connection(pair.address, timeout=WAIT_S) as stranger:
        stranger.sendall(garbage)
        while stranger.recv(65536):
            pass
    pair.begin(1, [1], state=0, aux=0)
    pair.prefill.wait(1, "grant")
    pair.exporter.send(1, [2], states=[[1]], aux_row=1, last=True)
    pair.decode.wait(1, "done")
    assert (
        "prfaas_transfer_refused_peers_total{"
        in telemetry.generate_latest(pair.prefill.telemetry.registry).decode()
    )


def test_a_listener_answers_only_whom_it_has_admitted(pair: Pair) -> None:
    """A data connection of an unknown bundle is told so before any hello of ours.

    Decode dials its further connections when it has our hello; had we sent it before the bundle was known,
    those could overtake the first and be refused.
    """
    hello = encode_hello(Hello("decode", "B", "b-9", 0, to_json(LAYOUT), "no-such-bundle", 1))
    header = Header(FrameType.HELLO, len(hello), 0, xxhash.xxh3_64_intdigest(hello))
    with socket.create_connection(pair.address, timeout=WAIT_S) as stranger:
        stranger.sendall(encode_header(header) + hello)
        answer = b""
        while data := stranger.recv(65536):
            answer += data
    first = decode_header(answer[:HEADER_BYTES])
    assert first.type is FrameType.ABORT
    assert b"bundle: is not known" in answer


def test_links_are_sampled_while_they_send(pair: Pair) -> None:
    """A transfer of some megabytes leaves round trips, and the bundle is forgotten when it ends."""
    for room in range(20):
        pair.begin(room, list(range(500)), state=0, aux=0)
        pair.prefill.wait(room, "grant")
        pair.exporter.send(room, list(range(500)), states=[[0]], aux_row=0, last=True)
        pair.decode.wait(room, "done")
        if any(int(str(link["sent_bytes"])) > 500 * 8192 for link in pair.prefill.telemetry.links()):
            break
    (link,) = pair.prefill.telemetry.links()
    assert (link["src_site"], link["dst_site"]) == ("X", "B")
    assert 0 < float(str(link["min_rtt_s"])) <= float(str(link["srtt_s"])) < 1
    assert int(str(link["sent_bytes"])) > 500 * 8192
    metrics = telemetry.generate_latest(pair.prefill.telemetry.registry).decode()
    assert 'prfaas_transfer_srtt_seconds{dst_site="B",src_site="X"}' in metrics
    pair.importer.close()
    pair.exporter.close()
    assert pair.prefill.telemetry.links() == []


def test_what_is_not_computed_yet_does_not_wait_for_the_link(pair: Pair) -> None:
    """Between two chunks a transfer is open and nothing of it pending: the link is idle, not dead."""
    pair.begin(1, list(range(500)), state=0, aux=0)
    pair.prefill.wait(1, "grant")
    samples: queue.Queue[LinkSample] = queue.Queue()
    note = pair.prefill.telemetry.sampled

    def sampled(dst_site: str, bundle: str, sample: LinkSample) -> None:
        samples.put(sample)
        note(dst_site, bundle, sample)

    pair.prefill.telemetry.sampled = sampled  # type: ignore[method-assign]
    pair.exporter.send(1, list(range(250)))
    while (found := samples.get(timeout=WAIT_S)).sent_bytes < 250 * 8192 or found.pending_bytes:
        pass
    assert (found.open_transfers, found.pending_bytes) == (1, 0)
    while samples.get(timeout=WAIT_S).busy_ratio > 0.1:  # and its figures say nothing of the link
        pass


def test_telemetry_answers_by_room() -> None:
    """GET /transfers?room=N gives the record, /metrics the counters, anything else a hint."""
    source = Telemetry("A")
    source.record(telemetry.TransferRecord(7, "send", "B", "done", 1000, 2, 0.5, ""))
    source.record(telemetry.TransferRecord(8, "send", "B", "failed", 10, 2, 0.5, "gone"))
    server = telemetry.serve(source, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with urllib.request.urlopen(f"{base}/transfers?room=7", timeout=WAIT_S) as answer:
            (record,) = json.load(answer)["transfers"]
        assert record == {
            "room": 7,
            "role": "send",
            "peer_site": "B",
            "outcome": "done",
            "bytes": 1000,
            "pages": 2,
            "seconds": 0.5,
            "reason": "",
            "wire_bytes": 0,
            "queued_s": 0.0,
            "exposed_s": None,
            "staged": False,
            "ahead_bytes": 0,
            "early_bytes": 0,
        }
        with urllib.request.urlopen(f"{base}/metrics", timeout=WAIT_S) as answer:
            text = answer.read().decode()
        assert 'prfaas_transfer_bytes_total{dst_site="B",role="send",src_site="A"} 1010.0' in text
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{base}/transfers?room=x", timeout=WAIT_S)
    finally:
        server.shutdown()
        server.server_close()
