"""A cache service process against SGLang's own publisher: loss, restart, late start, garbage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.integration.cache_support import CacheProcess, Worker, kv_events, removed, stored, until

Start = Callable[..., Awaitable[CacheProcess]]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[tuple[Start, Callable[..., Worker]]]:
    """Start services and workers that are stopped whatever happens."""
    services: list[CacheProcess] = []
    workers: list[Worker] = []

    async def start(*followed: Worker, **settings: object) -> CacheProcess:
        service = CacheProcess(tmp_path, list(followed), **settings)
        services.append(service)
        await service.start()
        return service

    def worker(*arguments: str, **options: int) -> Worker:
        made = Worker(*arguments, **options)
        workers.append(made)
        made.start()
        return made

    yield start, worker
    for service in services:
        await service.close()
    for made in workers:
        made.stop()


async def test_follows_two_workers(cluster) -> None:
    """Stores, removals, tiers and a clear of two workers are in the answers."""
    start, worker = cluster
    first, second = worker("a-prefill-0", "A"), worker("b-prefill-0", "B")
    service = await start(first, second)
    first.publish(stored([1, 2, 3]))
    second.publish(stored([1, 2]), stored([2], 1, medium="CPU_PINNED"))
    await service.matches([1, 2, 3, 4], {"a-prefill-0": 12, "b-prefill-0": 8})
    first.publish(removed([3]))
    second.publish(removed([2]))
    await service.matches([1, 2, 3, 4], {"a-prefill-0": 8, "b-prefill-0": 8})
    second.publish(removed([2], medium="CPU_PINNED"))
    first.publish(kv_events.AllBlocksCleared())
    await service.matches([1, 2, 3, 4], {"b-prefill-0": 4})


async def test_late_start_catches_up(cluster) -> None:
    """A service that starts after the events gets them all from the worker's ring."""
    start, worker = cluster
    first = worker()
    for block in range(500):
        first.publish(stored([block], block - 1 if block else None))
    service = await start(first)
    await service.matches(list(range(500)), {"a-prefill-0": 2000})
    source = (await service.client.stats()).sources[0]
    assert source.next_seq == 500
    assert not source.truncated


async def test_lost_batches_are_replayed(cluster) -> None:
    """A gap in the live stream is filled from the ring, in order."""
    start, worker = cluster
    first = worker()
    service = await start(first, ingest={"probe_s": 60.0})
    first.publish(stored([1, 2, 3]))
    await service.matches([1, 2, 3], {"a-prefill-0": 12})
    first.lose(stored([4], 3))
    first.lose(removed([4]), stored([5], 3))
    first.publish(stored([6], 5))
    await service.matches([1, 2, 3, 5, 6], {"a-prefill-0": 20})
    assert await service.matched([1, 2, 3, 4]) == {"a-prefill-0": 12}
    assert await service.counted("gap") == 1
    assert await service.counted("lost") == 0


async def test_lost_last_batch_is_found(cluster) -> None:
    """A batch lost before the worker falls silent is found by the probe."""
    start, worker = cluster
    first = worker()
    service = await start(first)
    first.publish(stored([1]))
    await service.matches([1], {"a-prefill-0": 4})
    first.lose(stored([2], 1))
    await service.matches([1, 2], {"a-prefill-0": 8})


async def test_gap_beyond_the_ring(cluster) -> None:
    """Batches that the ring no longer has cost what was known of the worker; what the ring has is taken."""
    start, worker = cluster
    first = worker("a-prefill-0", "A", ring=2)
    service = await start(first, ingest={"probe_s": 60.0})
    first.publish(stored([1, 2, 3]))
    await service.matches([1, 2, 3], {"a-prefill-0": 12})
    first.lose(removed([3]))
    first.lose(stored([7]))
    first.publish(stored([8], 7))
    await service.matches([7, 8], {"a-prefill-0": 8})
    assert await service.matched([1, 2, 3]) == {}
    assert await service.counted("lost") == 1
    assert (await service.client.stats()).sources[0].truncated


async def test_late_start_beyond_the_ring(cluster) -> None:
    """A service that starts too late takes what the ring has and says that the history is incomplete."""
    start, worker = cluster
    first = worker("a-prefill-0", "A", ring=2)
    for block in range(5):
        first.publish(stored([10 + block]))
    service = await start(first)
    await service.matches([14], {"a-prefill-0": 4})
    assert await service.matched([10]) == {}
    assert (await service.client.stats()).sources[0].truncated


@pytest.mark.parametrize("batches", [0, 1, 3, 5])
async def test_restart_under_the_same_name(cluster, batches: int) -> None:
    """A worker that comes back has none of its old blocks, however many batches its new life has sent."""
    start, worker = cluster
    first = worker()
    service = await start(first, ingest={"probe_s": 0.3, "lease_s": 60.0})
    for block in (1, 2, 3):
        first.publish(stored([block], block - 1 or None))
    await service.matches([1, 2, 3], {"a-prefill-0": 12})
    first.stop()
    first.start()
    for block in range(batches):
        first.publish(stored([101 + block], 100 + block if block else None))
    await service.counts("epoch")
    await service.matches(list(range(101, 106)), {"a-prefill-0": 4 * batches} if batches else {})
    assert await service.matched([1, 2, 3]) == {}


async def test_dead_worker(cluster) -> None:
    """A worker that is gone is not offered, and its blocks are dropped when the lease is over."""
    start, worker = cluster
    first = worker()
    service = await start(first)
    first.publish(stored([1, 2]))
    await service.matches([1, 2], {"a-prefill-0": 8})
    first.stop()
    await service.matches([1, 2], {})
    await service.counts("lease")
    stats = await service.client.stats()
    assert stats.counts.blocks == 0
    assert stats.sources[0].state.name == "GONE"
    first.start()
    first.publish(stored([9]))
    await service.matches([9], {"a-prefill-0": 4})


async def test_garbage_is_counted_and_dropped(cluster) -> None:
    """Frames and payloads of any kind leave the service serving and the good events applied."""
    start, worker = cluster
    first = worker()
    service = await start(first)
    first.publish(stored([1]))
    await service.matches([1], {"a-prefill-0": 4})
    pub = first.publisher._pub
    for frames in (
        [b"kv"],
        [b"kv", b"short", b"x"],
        [b"kv", (7).to_bytes(8, "big"), b"\xc1\xff\x00", b"extra"],
        [b"kv", (2**63).to_bytes(8, "big"), b"\x93\xff"],
        [b"kv", (0).to_bytes(8, "big"), b"late"],
    ):
        pub.send_multipart(frames)
    await service.counts("garbage", 5)
    await service.counts("unexplained")
    first.publish(
        stored([2], 1), stored([3], 2, medium="TAPE"), stored([5, 5]), stored([6], 5, block_size=16)
    )
    first.publish({"type": "BlockBlessed", "block_hashes": [4]}, stored([7], 2))
    await service.matches([1, 2, 7], {"a-prefill-0": 12})
    assert await service.counted("refused_event") == 4
    assert (await service.client.stats()).counts.blocks == 3


async def test_silent_replay_does_not_stop_a_stream(cluster) -> None:
    """When the replay address answers nothing, the present is followed without the past."""
    start, worker = cluster
    first = worker()
    first.publish(stored([1]))
    real, first.replay_port = first.replay_port, Worker().replay_port
    service = await start(first, ingest={"probe_s": 0.3, "replay_timeout_s": 0.1})
    first.replay_port = real
    await service.counts("replay_failed", 3)

    async def live() -> bool:
        return (await service.client.stats()).sources[0].state.name == "LIVE"

    await until(live, "the stream to be live")
    first.publish(stored([2]))
    await service.matches([2], {"a-prefill-0": 4})
    assert await service.matched([1]) == {}
    first.lose(stored([3]))
    first.publish(stored([4]))
    await service.matches([4], {"a-prefill-0": 4})
    assert await service.matched([2]) == {}, "a gap without replay drops what was known"


async def test_whole_ring_with_a_lossy_answer(cluster) -> None:
    """A long answer overflows SGLang's ROUTER socket, which drops its end; asking again gets the rest."""
    start, worker = cluster
    first = worker("a-prefill-0", "A", ring=4000)
    for batch in range(4000):
        first.publish(stored([batch * 10 + block for block in range(10)], batch * 10 - 1 if batch else None))
    first.drain()
    first.drop_answers(every=700)
    service = await start(first)
    await service.matches(list(range(40_000)), {"a-prefill-0": 160_000})
    assert await service.counted("replayed") == 4000
    assert await service.counted("replay_failed") == 0
    assert not (await service.client.stats()).sources[0].truncated
