"""The contract of `cache_service/store.py`, which every delta log keeps: subclass it with a fixture `log`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from cache_service.core.delta import Change, Declared
from cache_service.core.errors import LocalProtocolError
from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import Match, PrefixIndex
from cache_service.core.log import LogEntry, LogPosition, Segment, Snapshot
from cache_service.store import DeltaLog, LogWriter, apply_entry

SOURCES = [SourceId(WorkerId(f"w{i}"), i) for i in range(3)]
_BLOCKS = 45


def random_change(rng: random.Random) -> Change:
    """An event of some source, or what its model needs; the blocks are one chain, 0, 1, 2, ..."""
    source = rng.choice(SOURCES)
    kind = rng.random()
    first = rng.randrange(_BLOCKS - 5)
    run = tuple(BlockHash(block) for block in range(first, first + rng.randint(1, 5)))
    tier = rng.choice([Tier.GPU, Tier.HOST])
    if kind < 0.5:
        return source, BlocksStored(run, BlockHash(first - 1) if first else None, tier)
    if kind < 0.65:
        return source, BlocksRemoved(run, tier)
    group = rng.choice(list(Group))
    if kind < 0.93:
        return source, (GroupStored if kind < 0.85 else GroupRemoved)(group, run, tier)
    if kind < 0.98:
        return source, Declared(rng.random() < 0.5, rng.choice([0, 1, 3]))
    return source, AllCleared()


def take_change(index: PrefixIndex, change: Change) -> None:
    """Apply a change, of either kind."""
    source, event = change
    if isinstance(event, Declared):
        index.declare(source, event.needs_state, event.swa_window_blocks)
    else:
        index.apply(source, event)


def state(index: PrefixIndex) -> set[tuple[SourceId, Tier, BlockHash, BlockHash | Group | None]]:
    """What an index holds."""
    found: set[tuple[SourceId, Tier, BlockHash, BlockHash | Group | None]] = set()
    for source, event in index.dump():
        if isinstance(event, GroupStored):
            found.update((source, event.tier, block, event.group) for block in event.hashes)
            continue
        parent = event.parent
        for block in event.hashes:
            found.add((source, event.tier, block, parent))
            parent = block
    return found


def answers(index: PrefixIndex) -> list[list[Match]]:
    """What an index says of every prefix of the chain: matched, and usable by what each model needs."""
    chain = [BlockHash(block) for block in range(_BLOCKS)]
    return [index.match(chain, limit) for limit in range(_BLOCKS)]


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

    @pytest.mark.parametrize("seed", range(3))
    async def test_replicas_equal_the_index(self, log: DeltaLog, seed: int) -> None:
        """Blocks, states, windows, needs: readers from the start and later answer as the index does."""
        rng = random.Random(seed)
        index = PrefixIndex()
        writer = LogWriter(log, index, snapshot_bytes=2000)
        for source in SOURCES:
            index.add(source)
        await writer.flush()
        async with aclosing(log.watch(None)) as early:
            entries = await take(early, 1)  # it is there
            for _ in range(40):
                for _ in range(5):
                    change = random_change(rng)
                    take_change(index, change)
                    writer.add(change)
                await writer.flush()
            await writer.settled()
            async with aclosing(log.watch(None)) as late:
                for reader, got in ((early, entries), (late, [])):
                    replica = PrefixIndex()
                    for entry in got:
                        apply_entry(replica, entry)
                    while state(replica) != state(index) or answers(replica) != answers(index):
                        (entry,) = await take(reader, 1)
                        apply_entry(replica, entry)
                    replica.check()
        assert any(match.usable < match.matched for match in answers(index)[-1])
