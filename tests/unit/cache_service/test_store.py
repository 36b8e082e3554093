"""Every delta log keeps the contract of `store.py`; a replica rebuilt from one equals the index behind it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core import delta
from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from cache_service.core.events import (
    BlocksStored,
)
from cache_service.core.ids import BlockHash
from cache_service.core.index import PrefixIndex
from cache_service.core.log import LogEntry, LogPosition
from cache_service.store import (
    DeltaLog,
    InProcessLog,
    LogWriter,
    apply_entry,
)
from tests.integration.delta_log_conformance import (
    SOURCES,
    DeltaLogConformance,
    answers,
    random_change,
    state,
    take,
    take_change,
)


class TestInProcessLog(DeltaLogConformance):
    """The log in memory."""

    @pytest.fixture
    def log(self) -> DeltaLog:
        return InProcessLog()


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
        change = random_change(rng)
        take_change(index, change)
        writer.add(change)
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
        assert answers(replica) == answers(index)
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
