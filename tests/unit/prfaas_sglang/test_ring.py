"""The pinned ring: room comes back when the device is through, nobody starves, nothing is lost."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import TransferError
from prfaas_sglang.core.staging import ALIGN
from prfaas_sglang.transfer.ring import Ring, Slot

WAIT_S = 20


class Flag:
    """An event of a device that the test sets."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.set = self._event.set
        self.waited = threading.Event()

    def wait(self) -> None:
        self.waited.set()
        assert self._event.wait(WAIT_S)

    def passed(self) -> bool:
        return self._event.is_set()


def ring(pages: int, wait_s: float = WAIT_S) -> Ring:
    return Ring(memoryview(bytearray(pages * ALIGN)), wait_s)


def test_a_full_ring_waits_for_room() -> None:
    """The next frame goes on when a slot is given back."""
    full = ring(2)
    slots = [full.take(ALIGN), full.take(1)]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(full.take, ALIGN)
        assert not waiting.done()
        full.give(slots[1])
        assert waiting.result(WAIT_S).offset == slots[1].offset


def test_a_slot_comes_back_after_its_event_and_not_before() -> None:
    """The one who needs it waits for the device."""
    full, event = ring(1), Flag()
    full.give_after(full.take(1), event)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(full.take, 1)
        assert event.waited.wait(WAIT_S)
        assert not waiting.done()
        assert full.used_bytes == ALIGN
        event.set()
        waiting.result(WAIT_S)


def test_settle_waits_for_every_event_that_was_there() -> None:
    """In whatever order they pass."""
    some, events = ring(3), [Flag() for _ in range(3)]
    for event in events:
        some.give_after(some.take(1), event)
    with ThreadPoolExecutor() as pool:
        settled = pool.submit(some.settle)
        for event in reversed(events):
            assert not settled.done()
            event.set()
        settled.result(WAIT_S)
    assert some.used_bytes == 0


def test_a_large_frame_is_not_overtaken() -> None:
    """Small frames that come later wait behind it, though there were room for them."""
    some = ring(4)
    first, second = some.take(2 * ALIGN), some.take(ALIGN)
    got: list[str] = []

    def take(name: str, size: int) -> Slot:
        slot = some.take(size)
        got.append(name)
        return slot

    with ThreadPoolExecutor() as pool:
        large = pool.submit(take, "large", 3 * ALIGN)
        while not some._waiting:  # until it stands in the queue
            threading.Event().wait(0.001)
        small = pool.submit(take, "small", ALIGN)
        some.give(second)
        assert not small.done()
        some.give(first)
        some.give(large.result(WAIT_S))
        small.result(WAIT_S)
    assert got == ["large", "small"]


def test_no_room_in_time_is_an_error() -> None:
    """And leaves nobody in the queue."""
    full = ring(1, wait_s=0.01)
    slot = full.take(1)
    with pytest.raises(TransferError, match="no room") as caught:
        full.take(1)
    assert caught.value.reason == "ring"
    full.give(slot)
    full.take(1)


def test_a_frame_larger_than_the_ring_is_an_error() -> None:
    """At once, with both sizes."""
    with pytest.raises(TransferError, match="a frame of 8192 bytes in a ring of 4096"):
        ring(1).take(2 * ALIGN)


def test_an_abandoned_slot_comes_back() -> None:
    """Even to somebody who waits already."""
    full = ring(1)
    slot = full.take(1)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(full.take, 1)
        full.abandon(slot)
        waiting.result(WAIT_S)


@given(st.data())
def test_slots_never_overlap_and_nothing_is_lost(data: st.DataObject) -> None:
    """Whatever is taken, given back, given after an event or abandoned."""
    some, taken, pending = ring(8), [], []
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["take", "give", "after", "abandon", "pass"]))
        if step == "take":
            size = data.draw(st.integers(1, 3 * ALIGN))
            if sum(-(-len(s.host) // ALIGN) for s in [*taken, *(s for s, _ in pending)]) <= 2:
                taken.append(some.take(size))  # any two slots leave three pages free in a row
        elif step == "pass" and pending:
            pending.pop(data.draw(st.integers(0, len(pending) - 1)))[1].set()
        elif taken and step != "pass":
            slot = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            if step == "give":
                some.give(slot)
            elif step == "abandon":
                some.abandon(slot)
            else:
                event = Flag()
                some.give_after(slot, event)
                pending.append((slot, event))
        spans = sorted((s.offset, s.offset + len(s.host)) for s in [*taken, *(s for s, _ in pending)])
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    for _, event in pending:
        event.set()
    for slot in taken:
        some.give(slot)
    some.settle()
    assert some.used_bytes == 0
