"""The contract of `cache_service/store.py`, which every delta log keeps: subclass it with a fixture `log`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from cache_service.core.errors import LocalProtocolError
from cache_service.core.log import LogEntry, LogPosition, Segment, Snapshot
from cache_service.store import DeltaLog


async def take(entries: AsyncIterator[LogEntry], number: int, *, timeout_s: float = 20.0) -> list[LogEntry]:
    """Return the next entries."""
    async with asyncio.timeout(timeout_s):
        return [await anext(entries) for _ in range(number)]


class DeltaLogConformance:
    """What a writer and its readers may count on."""

    async def test_new_reader_gets_everything(self, log: DeltaLog) -> None:
        """From nothing, a reader gets the snapshot, then each segment in order."""
        start = await log.begin()
        for payload in (b"a", b"b"):
            await log.append(start.epoch, payload)
        async with aclosing(log.watch(None)) as entries:
            first, second, third = await take(entries, 3)
        assert first == Snapshot(start, b"")
        assert (second, third) == (
            Segment(LogPosition(start.epoch, 1), b"a"),
            Segment(LogPosition(start.epoch, 2), b"b"),
        )

    async def test_reader_resumes_after_a_position(self, log: DeltaLog) -> None:
        """A reader that knows its position gets what follows it, and waits for more."""
        start = await log.begin()
        known = await log.append(start.epoch, b"a")
        async with aclosing(log.watch(known)) as entries:
            waiting = asyncio.ensure_future(anext(entries))
            await asyncio.sleep(0)
            assert not waiting.done()
            await log.append(start.epoch, b"b")
            assert (await asyncio.wait_for(waiting, 5)).payload == b"b"

    async def test_reader_that_kept_up_sees_no_snapshot(self, log: DeltaLog) -> None:
        """A snapshot replaces what such a reader has: it goes on with the next segment."""
        start = await log.begin()
        at = await log.append(start.epoch, b"a")
        await log.snapshot(at, b"A")
        await log.append(start.epoch, b"b")
        async with aclosing(log.watch(at)) as entries:
            (entry,) = await take(entries, 1)
        assert entry == Segment(LogPosition(start.epoch, 2), b"b")

    async def test_reader_behind_a_snapshot_starts_over(self, log: DeltaLog) -> None:
        """A reader whose next segment is gone gets the snapshot, then the segments above it."""
        start = await log.begin()
        for payload in (b"a", b"b", b"c"):
            await log.append(start.epoch, payload)
        await log.snapshot(LogPosition(start.epoch, 2), b"AB")
        for after in (None, start, LogPosition(start.epoch, 1)):
            async with aclosing(log.watch(after)) as entries:
                assert [entry.payload for entry in await take(entries, 2)] == [b"AB", b"c"]

    async def test_new_epoch_starts_every_reader_over(self, log: DeltaLog) -> None:
        """After `begin` a reader of the earlier life gets a snapshot, whatever its number was."""
        first = await log.begin()
        known = await log.append(first.epoch, b"a")
        second = await log.begin()
        assert second.epoch > first.epoch
        await log.append(second.epoch, b"b")
        async with aclosing(log.watch(known)) as entries:
            entries_seen = await take(entries, 2)
        assert entries_seen == [Snapshot(second, b""), Segment(LogPosition(second.epoch, 1), b"b")]

    async def test_earlier_writer_is_fenced(self, log: DeltaLog) -> None:
        """A writer of an earlier life can neither append nor snapshot."""
        first = await log.begin()
        known = await log.append(first.epoch, b"a")
        await log.begin()
        for attempt in (log.append(first.epoch, b"x"), log.snapshot(known, b"x")):
            with pytest.raises(LocalProtocolError) as caught:
                await attempt
            assert caught.value.reason == "fenced"

    async def test_snapshot_beyond_the_end_is_refused(self, log: DeltaLog) -> None:
        """A snapshot cannot replace what was not written."""
        start = await log.begin()
        with pytest.raises(LocalProtocolError):
            await log.snapshot(LogPosition(start.epoch, 1), b"x")

    async def test_two_watches_at_once(self, log: DeltaLog) -> None:
        """Readers are told of what is written while they wait, each of everything."""
        start = await log.begin()
        async with aclosing(log.watch(None)) as one, aclosing(log.watch(None)) as other:
            for entries in (one, other):
                assert await take(entries, 1) == [Snapshot(start, b"")]
            for payload in (b"a", b"b", b"c"):
                await log.append(start.epoch, payload)
            for entries in (one, other):
                assert [entry.payload for entry in await take(entries, 3)] == [b"a", b"b", b"c"]

    async def test_begin_reaches_a_waiting_reader(self, log: DeltaLog) -> None:
        """A reader that waits when a new life begins starts over at once."""
        first = await log.begin()
        await log.append(first.epoch, b"a")
        async with aclosing(log.watch(None)) as entries:
            await take(entries, 2)
            second = await log.begin()
            await log.append(second.epoch, b"b")
            assert await take(entries, 2) == [
                Snapshot(second, b""),
                Segment(LogPosition(second.epoch, 1), b"b"),
            ]

    async def test_snapshot_is_invisible_to_a_waiting_reader(self, log: DeltaLog) -> None:
        """A reader that waits while a snapshot is taken sees segments only."""
        start = await log.begin()
        async with aclosing(log.watch(None)) as entries:
            await take(entries, 1)
            at = await log.append(start.epoch, b"a")
            assert await take(entries, 1) == [Segment(at, b"a")]
            await log.snapshot(at, b"A")
            last = await log.append(start.epoch, b"b")
            assert await take(entries, 1) == [Segment(last, b"b")]

    async def test_large_segments_and_snapshots(self, log: DeltaLog) -> None:
        """Payloads of megabytes arrive whole, in a segment and in a snapshot."""
        start = await log.begin()
        large = bytes(range(256)) * 5000
        at = await log.append(start.epoch, large)
        last = await log.append(start.epoch, b"b")
        async with aclosing(log.watch(start)) as entries:
            assert await take(entries, 2) == [Segment(at, large), Segment(last, b"b")]
        await log.snapshot(at, large + large)
        async with aclosing(log.watch(None)) as entries:
            assert await take(entries, 2) == [Snapshot(at, large + large), Segment(last, b"b")]

    async def test_a_second_snapshot_replaces_the_first(self, log: DeltaLog) -> None:
        """Only the newest snapshot is left."""
        start = await log.begin()
        at = await log.append(start.epoch, b"a")
        await log.snapshot(at, b"A")
        at = await log.append(start.epoch, b"b")
        await log.snapshot(at, b"AB")
        async with aclosing(log.watch(None)) as entries:
            assert await take(entries, 1) == [Snapshot(at, b"AB")]
