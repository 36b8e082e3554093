"""The RPCs about the whole index, on a real service that follows a real publisher."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest

from cache_service.admin import IndexAdmin, rebuild, verify
from cache_service.core.errors import ConfigError, IndexUnavailable
from cache_service.core.events import AllCleared, Tier
from cache_service.core.history import FellBehind
from cache_service.core.ids import Namespace
from cache_service.wire import cache_pb2, cache_pb2_grpc
from cache_service.wire.codec import SourceState
from tests.integration.cache_support import (
    DEADLINE_S,
    NAMESPACE,
    PAGE,
    CacheProcess,
    Worker,
    kv_events,
    removed,
    stored,
    until,
)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[CacheProcess, Worker, IndexAdmin]]:
    """One service that follows one worker."""
    worker = Worker()
    worker.start()
    process = CacheProcess(tmp_path, [worker])
    await process.start()
    admin = IndexAdmin(process.address, timeout_s=10)
    yield process, worker, admin
    await admin.close()
    await process.close()
    worker.stop()


async def test_match_many(service) -> None:
    """Several questions get their answers in order; one wrong question is named and refuses all."""
    process, worker, _ = service
    worker.publish(stored([1, 2, 3]))
    await process.matches([1, 2, 3], {"a-prefill-0": 12})
    answers = await process.client.match_many(
        [(NAMESPACE, [1, 2], 9), (NAMESPACE, [7], 5), (NAMESPACE, [1, 2, 3], 13)]
    )
    assert [[holder.matched_tokens for holder in answer.holders] for answer in answers] == [[8], [], [12]]
    assert len({answer.revision for answer in answers}) == 1
    one = cache_pb2.MatchRequest(
        namespace=cache_pb2.Namespace(model="tiny", page_size=PAGE), hashes=[1], total_tokens=5
    )
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub = cache_pb2_grpc.PrefixIndexStub(channel)
        for queries, named in (
            ([one, cache_pb2.MatchRequest(total_tokens=1)], "queries[1].namespace"),
            ([one] * 257, "queries: 257"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.MatchBatch(cache_pb2.MatchBatchRequest(queries=queries), timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert named in caught.value.details()
    other = await process.client.match_many([(Namespace("other", PAGE), [1], 5)])
    assert [answer.reason for answer in other] == ["unknown_namespace"]
    assert process.client.unavailable["unknown_namespace"] == 1


async def test_explain(service) -> None:
    """Tiers, what is missing, and a holder that is held back since its worker is gone."""
    process, worker, admin = service
    worker.publish(stored([1, 2, 3]), stored([1, 2], medium="CPU_PINNED"), stored([5], 4))
    await process.matches([1, 2, 3], {"a-prefill-0": 12})
    explanation = await admin.explain(NAMESPACE, [1, 2, 3, 4, 5], 21)
    (one,) = explanation.holders
    assert (one.report.matched, one.report.usable, one.offered, one.state) == (3, 3, True, SourceState.LIVE)
    (full,) = one.report.groups
    assert (full.present, full.deepest, full.tiers) == (4, 3, {Tier.GPU: 4, Tier.HOST: 2})
    assert "block 3 of 5 is not held, though 1 blocks behind it are" in one.report.missing
    assert 0 <= one.age_s < DEADLINE_S
    worker.stop()

    async def held_back() -> bool:
        found = (await admin.explain(NAMESPACE, [1], 5)).holders
        return bool(found) and not found[0].offered and found[0].state is SourceState.STALE

    await until(held_back, "the holder to be held back")


async def test_hot_prefixes(service) -> None:
    """The prefix that prompts share is the hottest, with its holder."""
    process, worker, admin = service
    worker.publish(stored([1, 2]), stored([3], 2), stored([4], 2))
    await process.matches([1, 2, 3], {"a-prefill-0": 12})
    for last in (3, 4) * 10:
        await process.matched([1, 2, last])
    prefixes, observed = await admin.hot(NAMESPACE, 3)
    assert observed >= 20
    assert prefixes[0].hot.last == 2
    assert prefixes[0].tokens == 2 * PAGE
    assert prefixes[0].holders[0].worker_id == "a-prefill-0"
    with pytest.raises(ConfigError, match=r"top: 1001"):
        await admin.hot(NAMESPACE, 1001)


async def test_dump_then_watch(service) -> None:
    """A dump in small pages and the watch behind it rebuild the index, whatever happens in between."""
    process, worker, admin = service
    worker.publish(stored(list(range(1, 201))), stored([1000], 100))
    await process.matches(list(range(1, 201)), {"a-prefill-0": 800})
    pages = []

    async def dump():
        async for page in admin.dump(NAMESPACE, page_blocks=64):
            pages.append(page)
            yield page

    index, last = await rebuild(dump())
    assert len(pages) > 3
    assert all(sum(len(event.hashes) for _, event in page.changes) <= 64 for page in pages)
    worker.publish(stored([201, 202], 200), removed([1000]))
    await process.matches(list(range(1, 203)), {"a-prefill-0": 808})
    watching = admin.watch(NAMESPACE, life=last.life, revision=last.revision)
    async with aclosing(watching) as events, asyncio.timeout(DEADLINE_S):
        async for event in events:
            for source, change in event.changes:
                index.apply(source, change)
            if event.revision == (await admin.stats()).revision and event.changes:
                break
        worker.publish(kv_events.AllBlocksCleared())
        async for event in events:
            if any(isinstance(change, AllCleared) for _, change in event.changes):
                break
    index.check()
    assert [match.matched for match in index.match(list(range(1, 203)))] == [202]
    assert index.match([1, 1000])[0].matched == 1


async def test_watch_from_now(service) -> None:
    """Without a revision a watch says where it starts and tells what comes."""
    _, worker, admin = service
    async with aclosing(admin.watch(NAMESPACE)) as events, asyncio.timeout(DEADLINE_S):
        first = await anext(events)
        assert first.changes == ()
        assert first.life == (await admin.stats()).life
        assert (await admin.stats()).watchers == 1
        worker.publish(stored([1]))
        event = await anext(events)
        assert event.revision > first.revision
        assert [change.hashes for _, change in event.changes] == [(1,)]

    async def nobody() -> bool:
        return (await admin.stats()).watchers == 0

    await until(nobody, "the watch to end")


async def test_watch_refusals(service) -> None:
    """A revision of another life, of the future, or without a life is told so."""
    _, _, admin = service
    life = (await admin.stats()).life
    for wrong, revision, error, text in (
        (life + 2, 1, FellBehind, "another life"),
        (life, 1 << 40, FellBehind, "to come"),
        (0, 7, ConfigError, "life: is missing"),
    ):
        with pytest.raises(error, match=text):
            async for _ in admin.watch(NAMESPACE, life=wrong, revision=revision):
                pass


async def test_slow_watcher_is_told(service) -> None:
    """A client that does not read is cut off once the changes it lacks are no longer remembered."""
    process, worker, admin = service
    async with aclosing(admin.watch(NAMESPACE)) as events, asyncio.timeout(60):
        await anext(events)
        for round_ in range(40):
            first = 1 + round_ * 20_000
            worker.publish(stored(list(range(first, first + 20_000)), first - 1 or None))
        await process.matches([1], {"a-prefill-0": 4})

        async def taken() -> bool:
            return (await admin.stats()).counts.blocks == 800_000

        await until(taken, "the blocks")
        with pytest.raises(FellBehind, match="too slowly"):
            async for _ in events:
                pass


async def test_check(service) -> None:
    """A sound index passes: its own invariants, and the dump against the answers."""
    process, worker, admin = service
    worker.publish(stored([1, 2, 3]), stored([4], 2))
    await process.matches([1, 2, 3], {"a-prefill-0": 12})
    violations, report, compared = await verify(admin, NAMESPACE)
    assert violations == []
    assert (report.blocks, report.entries) == (4, 4)
    assert compared == 2
    with pytest.raises(ConfigError, match="this service indexes"):
        await admin.check(Namespace("other", PAGE))


async def test_nobody_there() -> None:
    """The error of a service that is not there says what to look at."""
    admin = IndexAdmin("127.0.0.1:9", timeout_s=5)
    with pytest.raises(IndexUnavailable, match="is it running"):
        await admin.stats()
    await admin.close()
