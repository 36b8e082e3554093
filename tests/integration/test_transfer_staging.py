"""Store and forward over real sockets: the engine gets its pages back before decode has asked."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from cache_service.core.errors import LocalProtocolError, TransferError
from tests.integration.transfer_support import LAYOUT, WAIT_S, Pair, assert_moved

STAGING = 4 << 20
PAGE_BYTES = LAYOUT.components[0].bytes_per_row


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair(staging_bytes=STAGING)) as value:
        yield value


def used(pair: Pair) -> float:
    """Return the staging memory in use, as the metrics say."""
    value = pair.prefill.telemetry.registry.get_sample_value("prfaas_transfer_staging_used_bytes")
    assert value is not None
    return value


def given_back(pair: Pair) -> bool:
    """Say whether all of it is free in time: whoever reads or fills it when a room ends leaves first."""
    deadline_s = time.monotonic() + WAIT_S
    while used(pair) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return used(pair) == 0


def test_a_room_is_staged_before_its_grant_and_survives_the_reuse_of_its_pages(pair: Pair) -> None:
    """All of it is sent and the engine is told; then its pages are overwritten; then decode asks."""
    rng = random.Random(1)
    source, target = rng.sample(range(512), 60), rng.sample(range(512), 60)
    assert pair.exporter.open(1, 60)
    pair.exporter.send_ahead(1, source[:10], [1])
    pair.exporter.send(1, source[:25])
    pair.exporter.send(1, source[25:], states=[[3]], aux_row=2, last=True)
    pair.prefill.wait(1, "done")
    pair.exporter.release(1)
    assert used(pair) >= 60 * PAGE_BYTES
    before = [[bytes(b) for b in c] for c in pair.prefill.buffers]
    for buffer in (b for c in pair.prefill.buffers for b in c):
        buffer[:] = bytes(len(buffer))
    pair.begin(1, target, state=5, aux=1)
    pair.decode.wait(1, "done")
    record = pair.prefill.ended(1)
    assert (record.outcome, record.staged, record.pages) == ("done", True, 60)
    assert record.exposed_s is not None
    assert record.exposed_s > 0
    assert given_back(pair)
    for component, saved in zip(pair.prefill.buffers, before, strict=True):
        for buffer, value in zip(component, saved, strict=True):
            buffer[:] = value
    assert_moved(pair, [source, [3], [2]], [target, [5], [1]])


@pytest.mark.parametrize("grant_first", [True, False])
@pytest.mark.parametrize("staged", [True, False])
def test_only_pages_that_decode_lacks_travel(grant_first: bool, staged: bool) -> None:
    """Decode holds 13 pages: the rest arrives, and no byte of those 13 was sent."""
    with closing(Pair(staging_bytes=STAGING if staged else 0)) as pair:
        source, target = list(range(100, 140)), list(range(27))
        if grant_first:
            pair.begin(1, target, state=0, aux=0, prefix_pages=13)
            pair.prefill.wait(1, "grant")
        assert pair.exporter.open(1, 40) == (grant_first or staged)
        if not grant_first:
            pair.begin(1, target, state=0, aux=0, prefix_pages=13)
            pair.prefill.wait(1, "grant")
        pair.exporter.send(1, source[:8])
        pair.exporter.send(1, source[8:20])
        pair.exporter.send(1, source[20:], states=[[1]], aux_row=1, last=True)
        pair.decode.wait(1, "done")
        pair.prefill.wait(1, "done")
        assert_moved(pair, [source[13:], [1], [1]], [target, [0], [0]])
        record = pair.prefill.ended(1)
        assert record.bytes == 27 * PAGE_BYTES + 50_000 + 72
        assert record.staged == staged


def test_without_room_a_transfer_goes_straight_from_the_pool() -> None:
    """More rooms than staging memory: those without wait for their grant, and all arrive bit-exact."""
    with closing(Pair(staging_bytes=100 * PAGE_BYTES)) as pair:
        rooms = range(8)
        may_begin = [pair.exporter.open(room, 30) for room in rooms]
        assert sum(may_begin) == 3
        sources = [list(range(500 - room * 30, 470 - room * 30, -1)) for room in rooms]
        targets = [list(range(room * 30, room * 30 + 30)) for room in rooms]
        for room in rooms:
            pair.begin(room, targets[room], state=room, aux=room)
        for room in rooms:
            pair.prefill.wait(room, "grant")
            assert pair.exporter.open(room, 30)
            pair.exporter.send(room, sources[room])
            pair.exporter.send(room, [], states=[[15 - room]], aux_row=7 - room, last=True)
        for room in rooms:
            pair.decode.wait(room, "done")
            pair.prefill.wait(room, "done")
            pair.prefill.ended(room)
            assert_moved(pair, [sources[room], [15 - room], [7 - room]], [targets[room], [room], [room]])
        assert given_back(pair)


def test_staging_memory_that_becomes_free_lets_the_next_room_begin() -> None:
    """A room that found none asks again and begins when an earlier one is delivered."""
    with closing(Pair(staging_bytes=40 * PAGE_BYTES + 80_000)) as pair:
        assert pair.exporter.open(1, 40)
        assert not pair.exporter.open(2, 40)
        pair.exporter.send(1, list(range(40)), states=[[0]], aux_row=0, last=True)
        pair.prefill.wait(1, "done")
        assert not pair.exporter.open(2, 40)
        pair.begin(1, list(range(40)), state=0, aux=0)
        pair.decode.wait(1, "done")
        pair.prefill.ended(1)
        assert pair.exporter.open(2, 40)


def test_a_prompt_larger_than_staging_memory_is_sent_from_the_pool() -> None:
    """It never gets room there, and arrives all the same."""
    with closing(Pair(staging_bytes=10 * PAGE_BYTES)) as pair:
        assert not pair.exporter.open(1, 400)
        pair.begin(1, list(range(400)), state=0, aux=0)
        pair.prefill.wait(1, "grant")
        assert pair.exporter.open(1, 400)
        pair.exporter.send(1, list(range(400)), states=[[0]], aux_row=0, last=True)
        pair.decode.wait(1, "done")
        pair.prefill.wait(1, "done")
        assert_moved(pair, [list(range(400)), [0], [0]], [list(range(400)), [0], [0]])


def test_decode_cancels_a_staged_room(pair: Pair) -> None:
    """Decode gives up before it granted anything: the staged bytes go, and a later request is told."""
    pair.exporter.open(1, 10)
    pair.exporter.send(1, list(range(10)), states=[[0]], aux_row=0, last=True)
    pair.prefill.wait(1, "done")
    pair.importer.cancel(1, pair.address)
    assert "gave up" in pair.prefill.ended(1).reason
    assert given_back(pair)
    pair.importer.cancel(2, pair.address)
    pair.begin(3, [1], state=0, aux=0)
    pair.prefill.wait(3, "grant")  # so the cancellation has been read
    with pytest.raises(TransferError, match="gave up"):
        pair.exporter.open(2, 10)


def test_a_cancelled_room_that_is_still_computed_fails_its_request(pair: Pair) -> None:
    """Prefill has begun on staging memory alone: it hears that nobody wants the result."""
    pair.exporter.open(1, 10)
    pair.exporter.send(1, list(range(5)))
    pair.importer.cancel(1, pair.address)
    assert "gave up" in pair.prefill.wait(1, "failed")
    with pytest.raises(TransferError):
        pair.exporter.send(1, list(range(5, 10)), states=[[0]], aux_row=0, last=True)
    pair.prefill.ended(1)
    assert given_back(pair)


def test_a_staged_room_that_nobody_asks_for_is_dropped() -> None:
    """After hold_s its memory is free again; the engine, which was told long ago, is not bothered."""
    with closing(Pair(staging_bytes=STAGING, hold_s=0.1)) as pair:
        pair.exporter.open(1, 10)
        pair.exporter.send(1, list(range(10)), states=[[0]], aux_row=0, last=True)
        pair.prefill.wait(1, "done")
        assert "no decode worker asked" in pair.prefill.ended(1).reason
        assert given_back(pair)
        assert (1, "failed") not in pair.prefill.heard


def test_a_lost_decode_worker_frees_staging_memory() -> None:
    """Delivered in part when the worker goes for good: the request fails, the memory is free again."""
    with closing(Pair(staging_bytes=STAGING, park_s=0.1)) as pair:
        pair.exporter.open(1, 20)
        pair.begin(1, list(range(20)), state=0, aux=0)
        pair.prefill.wait(1, "grant")
        pair.exporter.send(1, list(range(10)))
        pair.decode.wait(1, "progress")
        pair.importer.close()
        assert "not resumed" in pair.prefill.wait(1, "failed")
        assert pair.prefill.ended(1).outcome == "failed"
        assert given_back(pair)


def test_prompt_and_grant_that_disagree_fail_the_request_on_both_sides(pair: Pair) -> None:
    """Two engines that count pages differently: both hear why; the connection serves the next room."""
    pair.exporter.open(1, 20)
    pair.begin(1, list(range(19)), state=0, aux=0)
    assert "19 pages, the prompt has 20" in pair.decode.wait(1, "failed")
    assert "19 pages" in pair.prefill.wait(1, "failed")
    pair.exporter.open(2, 1)
    pair.begin(2, [4], state=0, aux=0)
    pair.prefill.wait(2, "grant")
    pair.exporter.send(2, [9], states=[[1]], aux_row=1, last=True)
    pair.decode.wait(2, "done")
    assert_moved(pair, [[9], [1], [1]], [[4], [0], [0]])


def test_many_rooms_at_once_with_aborts_leave_nothing_behind(pair: Pair) -> None:
    """Rooms opened, sent, granted and aborted by several threads: survivors are exact, memory is free."""
    rng = random.Random(7)
    pages = rng.sample(range(512), 320)
    rooms = list(range(32))
    doomed = set(rng.sample(rooms, 10))
    never_began = set()

    def prefill(room: int) -> None:
        part = pages[room * 10 : room * 10 + 10]
        try:
            pair.exporter.open(room, 10)
        except TransferError:  # decode's word that it gave up was here first
            never_began.add(room)
            return
        try:
            while not pair.exporter.open(room, 10):
                pair.prefill.wait(room, "grant")
            pair.exporter.send(room, part[:4])
            if room in doomed and room % 2:
                pair.exporter.abort(room, "changed my mind")
            pair.exporter.send(room, part[4:], states=[[room % 16]], aux_row=room % 8, last=True)
        except (TransferError, LocalProtocolError):  # the latter where a late grant opened the room anew
            assert room in doomed

    def decode(room: int) -> None:
        pair.begin(room, pages[room * 10 : room * 10 + 10], state=room % 16, aux=room % 8)
        if room in doomed and not room % 2:
            pair.importer.abort(room, "client left")

    threads = [threading.Thread(target=side, args=(room,)) for room in rooms for side in (prefill, decode)]
    rng.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    for room in set(rooms) - doomed:
        assert pair.prefill.ended(room).outcome == "done"
        part = pages[room * 10 : room * 10 + 10]
        assert_moved(pair, [part, [], []], [part, [], []])
    assert never_began <= doomed
    for room in doomed - never_began:  # whatever is still held is waiting for the other side
        pair.exporter.abort(room, "test is over")
        pair.prefill.wait(room, "ended")
    assert given_back(pair)
