"""Every delta log keeps the contract of `store.py`; a replica rebuilt from one equals the index behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core import delta
from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
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
from cache_service.core.index import PrefixIndex
from cache_service.store import (
    DeltaLog,
    InProcessLog,
    LogEntry,
    LogPosition,
    LogWriter,
    Segment,
    Snapshot,
    apply_entry,
)

MakeLog = Callable[[], DeltaLog]
#: Implementations under the one conformance suite.
LOGS: dict[str, MakeLog] = {"in-process": InProcessLog}
SOURCES = [SourceId(WorkerId(f"w{i}"), i) for i in range(3)]


@pytest.fixture(params=LOGS)
def log(request: pytest.FixtureRequest) -> DeltaLog:
    return LOGS[request.param]()


async def take(entries: AsyncIterator[LogEntry], number: int) -> list[LogEntry]:
    async with asyncio.timeout(5):
        return [await anext(entries) for _ in range(number)]


async def test_new_reader_gets_everything(log: DeltaLog) -> None:
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


async def test_reader_resumes_after_a_position(log: DeltaLog) -> None:
    """A reader that knows its position gets what follows it, and waits for more."""
    start = await log.begin()
    known = await log.append(start.epoch, b"a")
    async with aclosing(log.watch(known)) as entries:
        waiting = asyncio.ensure_future(anext(entries))
        await asyncio.sleep(0)
        assert not waiting.done()
        await log.append(start.epoch, b"b")
        assert (await asyncio.wait_for(waiting, 5)).payload == b"b"


async def test_reader_that_kept_up_sees_no_snapshot(log: DeltaLog) -> None:
    """A snapshot replaces what such a reader has: it goes on with the next segment."""
    start = await log.begin()
    at = await log.append(start.epoch, b"a")
    await log.snapshot(at, b"A")
    await log.append(start.epoch, b"b")
    async with aclosing(log.watch(at)) as entries:
        (entry,) = await take(entries, 1)
    assert entry == Segment(LogPosition(start.epoch, 2), b"b")


async def test_reader_behind_a_snapshot_starts_over(log: DeltaLog) -> None:
    """A reader whose next segment is gone gets the snapshot, then the segments above it."""
    start = await log.begin()
    for payload in (b"a", b"b", b"c"):
        await log.append(start.epoch, payload)
    await log.snapshot(LogPosition(start.epoch, 2), b"AB")
    for after in (None, start, LogPosition(start.epoch, 1)):
        async with aclosing(log.watch(after)) as entries:
            assert [entry.payload for entry in await take(entries, 2)] == [b"AB", b"c"]


async def test_new_epoch_starts_every_reader_over(log: DeltaLog) -> None:
    """After `begin` a reader of the earlier life gets a snapshot, whatever its number was."""
    first = await log.begin()
    known = await log.append(first.epoch, b"a")
    second = await log.begin()
    assert second.epoch > first.epoch
    await log.append(second.epoch, b"b")
    async with aclosing(log.watch(known)) as entries:
        entries_seen = await take(entries, 2)
    assert entries_seen == [Snapshot(second, b""), Segment(LogPosition(second.epoch, 1), b"b")]


async def test_earlier_writer_is_fenced(log: DeltaLog) -> None:
    """A writer of an earlier life can neither append nor snapshot."""
    first = await log.begin()
    known = await log.append(first.epoch, b"a")
    await log.begin()
    for attempt in (log.append(first.epoch, b"x"), log.snapshot(known, b"x")):
        with pytest.raises(LocalProtocolError) as caught:
            await attempt
        assert caught.value.reason == "fenced"


async def test_snapshot_beyond_the_end_is_refused(log: DeltaLog) -> None:
    """A snapshot cannot replace what was not written."""
    start = await log.begin()
    with pytest.raises(LocalProtocolError):
        await log.snapshot(LogPosition(start.epoch, 1), b"x")


async def test_in_process_log_is_bounded() -> None:
    """A log that nobody snapshots refuses to grow."""
    log = InProcessLog(max_segments=2)
    start = await log.begin()
    await log.append(start.epoch, b"a")
    at = await log.append(start.epoch, b"b")
    with pytest.raises(LocalProtocolError, match="snapshot"):
        await log.append(start.epoch, b"c")
    await log.snapshot(at, b"AB")
    await log.append(start.epoch, b"c")


def random_change(rng: random.Random) -> delta.Change:
    source = rng.choice(SOURCES)
    kind = rng.random()
    first = rng.randrange(40)
    run = tuple(BlockHash(block) for block in range(first, first + rng.randint(1, 5)))
    tier = rng.choice([Tier.GPU, Tier.HOST])
    if kind < 0.6:
        return source, BlocksStored(run, BlockHash(first - 1) if first else None, tier)
    if kind < 0.8:
        return source, BlocksRemoved(run, tier)
    group = rng.choice(list(Group))
    if kind < 0.95:
        return source, (GroupStored if kind < 0.9 else GroupRemoved)(group, run, tier)
    return source, AllCleared()


def state(index: PrefixIndex) -> set[tuple[SourceId, Tier, BlockHash, BlockHash | Group | None]]:
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


class Flaky(InProcessLog):
    """An in-process log whose appends fail at times."""

    def __init__(self, rng: random.Random, fails: float) -> None:
        super().__init__()
        self._rng = rng
        self.fails = fails

    async def append(self, epoch: int, payload: bytes) -> LogPosition:
        if self._rng.random() < self.fails:
            raise OSError("no store")
        return await super().append(epoch, payload)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fails", [0.0, 0.2])
@pytest.mark.parametrize("limits", [{}, {"snapshot_bytes": 200}, {"max_pending_blocks": 8}])
async def test_replica_equals_the_index(seed: int, limits: dict[str, int], fails: float) -> None:
    """Readers that join at any time, through snapshots, overflow and failing appends, end up equal."""
    rng = random.Random(seed)
    index, log = PrefixIndex(), Flaky(rng, fails)
    writer = LogWriter(log, index, **limits)
    for source in SOURCES:
        index.add(source)
    followers: list[tuple[PrefixIndex, AsyncIterator[LogEntry]]] = []
    for step in range(120):
        if step in (0, 60):
            followers.append((PrefixIndex(), log.watch(None)))
        source, event = random_change(rng)
        index.apply(source, event)
        writer.add((source, event))
        if rng.random() < 0.3:
            try:
                await writer.flush()
            except OSError:
                continue
    followers.append((PrefixIndex(), log.watch(None)))
    log.fails = 0.0
    await writer.flush()
    for replica, entries in followers:
        position = None
        while position != log.end:
            (entry,) = await take(entries, 1)
            apply_entry(replica, entry)
            position = entry.position
        replica.check()
        assert state(replica) == state(index)
        await entries.aclose()  # type: ignore[attr-defined]


CHANGES = st.integers(0, 2**32).map(lambda seed: [random_change(random.Random(seed + i)) for i in range(8)])


@given(CHANGES)
def test_segments_round_trip(changes: list[delta.Change]) -> None:
    """Decoding an encoded segment gives the changes."""
    assert delta.decode(delta.encode(changes)) == changes


@given(CHANGES, st.data())
def test_damaged_segments_are_refused_or_valid(changes: list[delta.Change], data: st.DataObject) -> None:
    """Cut or altered bytes raise RemoteProtocolError or decode to valid changes: never anything else."""
    segment = bytearray(delta.encode(changes))
    cut = data.draw(st.integers(0, len(segment) - 1))
    with pytest.raises(RemoteProtocolError):
        delta.decode(bytes(segment[:cut]))
    segment[data.draw(st.integers(0, len(segment) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(RemoteProtocolError):
        assert len(delta.decode(bytes(segment))) == len(changes)


def test_a_block_costs_8_bytes() -> None:
    """A run of blocks is packed."""
    run = BlocksStored(tuple(BlockHash(block) for block in range(1000)), None)
    assert len(delta.encode([(SOURCES[0], run)])) < 8 * 1000 + 64
