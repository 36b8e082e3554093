"""What prefill keeps of a room that decode can never fetch: given back as soon as somebody who may says so.

A room is not named in a hello. A decode worker that is refused, or refuses, names its rooms on that
connection before it ends; one that prefill would not talk to at all is not heard.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from cache_service.core.errors import TransferError
from prfaas_sglang.core.framing import FrameType, encode_room
from prfaas_sglang.core.layout import Hello, Layout, encode_hello, to_json
from prfaas_sglang.transfer import listener
from tests.fuzzing import raw_frame
from tests.integration.test_transfer_staging import STAGING, given_back, used
from tests.integration.transfer_support import LAYOUT, NO_ROOM, WAIT_S, Pair, assert_moved

OTHER = dataclasses.replace(LAYOUT, page_size=32)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair(staging_bytes=STAGING, prefill_peers=("B",))) as value:
        yield value


def stage(pair: Pair, room: int) -> None:
    """Compute a room before decode asks."""
    assert pair.exporter.open(room, 10)
    pair.exporter.send(room, list(range(10)), states=[[0]], aux_row=0, last=True)
    pair.prefill.wait(room, "done")
    pair.exporter.release(room)


@pytest.mark.parametrize("who", ["prefill refuses", "decode refuses"])
def test_a_staged_room_goes_when_the_two_sides_refuse_each_other(who: str) -> None:
    """Layouts differ, or decode does not want prefill's site: the memory is free at once."""
    how = {"decode_layout": OTHER} if who == "prefill refuses" else {"decode_peers": ("X",)}
    with closing(Pair(staging_bytes=STAGING, **how)) as pair:  # type: ignore[arg-type]
        stage(pair, 1)
        pair.begin(1, list(range(10)), state=0, aux=0)
        pair.decode.wait(1, "failed")
        assert "gave up" in pair.prefill.ended(1).reason
        assert given_back(pair)


def test_a_room_that_decode_gave_up_unreached_goes() -> None:
    """Decode's request ends while it waits for pages, and its worker turns out to be refused."""
    with closing(Pair(staging_bytes=STAGING, decode_layout=OTHER)) as pair:
        stage(pair, 1)
        pair.importer.cancel(1, pair.address)
        assert "gave up" in pair.prefill.ended(1).reason
        assert given_back(pair)


def test_a_refused_room_is_not_computed_for_nothing() -> None:
    """Decode was refused before the request reached prefill: opening it says so."""
    with closing(Pair(staging_bytes=STAGING, decode_layout=OTHER)) as pair:
        pair.begin(1, list(range(10)), state=0, aux=0)
        pair.decode.wait(1, "failed")
        pair.prefill.wait(NO_ROOM, "refused layout")
        with pytest.raises(TransferError, match="gave up"):
            pair.exporter.open(1, 10)


def stranger(pair: Pair, hello: bytes, rooms: list[int]) -> bytes:
    """Say hello, then cancel rooms; return what prefill answers until it ends the connection."""
    cancels = b"".join(raw_frame(FrameType.CANCEL, 0, encode_room(room)) for room in rooms)
    with socket.create_connection(pair.address, timeout=WAIT_S) as sock:
        sock.sendall(hello + cancels)
        answer = b""
        with suppress(OSError):  # closed before all of it was read
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                answer += data
    return answer


def hello(site: str, worker: str = "b-9", layout: Layout = LAYOUT, rank: int = 0) -> bytes:
    payload = encode_hello(Hello("decode", site, worker, rank, to_json(layout), "a-bundle", 0))
    return raw_frame(FrameType.HELLO, 0, payload)


@pytest.mark.parametrize(
    "introduction",
    [b"", hello("C"), hello("C", layout=OTHER), hello("B", rank=1, layout=OTHER)],
    ids=["none", "site", "site and layout", "rank and layout"],
)
def test_whom_prefill_would_not_talk_to_cancels_nothing(pair: Pair, introduction: bytes) -> None:
    """Without the right names (and, with TLS, the certificate for them) even a known room stays."""
    stage(pair, 1)
    stranger(pair, introduction, [1])
    pair.begin(1, list(range(20, 30)), state=1, aux=1)
    pair.decode.wait(1, "done")
    assert_moved(pair, [list(range(10)), [0], [0]], [list(range(20, 30)), [1], [1]])


def test_a_refused_worker_cannot_end_what_another_was_granted(pair: Pair) -> None:
    """Another worker of a good site, of another layout, that knows the room: the transfer goes on."""
    assert pair.exporter.open(1, 10)
    pair.begin(1, list(range(10)), state=1, aux=1)
    pair.prefill.wait(1, "grant")
    assert b"layouts differ" in stranger(pair, hello("B", layout=OTHER), [1])
    pair.exporter.send(1, list(range(10)), states=[[0]], aux_row=0, last=True)
    pair.decode.wait(1, "done")


def test_a_refused_worker_is_heard_for_a_bounded_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing and stays: its connection ends all the same."""
    monkeypatch.setattr(listener, "PARTING_S", 0.2)
    with socket.create_connection(pair.address, timeout=WAIT_S) as sock:
        sock.sendall(hello("B", layout=OTHER))
        while sock.recv(65536):
            pass
    pair.prefill.wait(NO_ROOM, "refused layout")


def test_a_refused_worker_takes_back_a_bounded_number(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rooms than it may name: the rest is not read, the connection ends."""
    monkeypatch.setattr(listener, "MAX_PARTING", 3)
    for room in range(1, 6):
        stage(pair, room)
    held = used(pair)
    stranger(pair, hello("B", layout=OTHER), [1, 2, 3, 4, 5])
    for room in (1, 2, 3):
        assert "gave up" in pair.prefill.ended(room).reason
    pair.begin(5, list(range(10)), state=0, aux=0)
    pair.decode.wait(5, "done")
    pair.prefill.ended(5)
    assert 0 < used(pair) < held


def test_a_request_that_ends_while_its_connection_is_broken_is_not_parked(pair: Pair) -> None:
    """Decode gives it up before it could resume: prefill hears it on the new connection."""
    assert pair.exporter.open(1, 20)
    pair.begin(1, list(range(20)), state=0, aux=0)
    pair.prefill.wait(1, "grant")
    pair.exporter.send(1, list(range(10)))
    pair.decode.wait(1, "progress")
    (peer,) = pair.importer._peers.values()
    peer.breaks = 3  # the next dial waits a second
    for channel in list(peer.channels):
        channel.close()
    pair.importer.abort(1, "client left")
    assert "gave up" in pair.prefill.wait(1, "failed")
    assert given_back(pair)
