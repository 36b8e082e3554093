"""A cache service process against the plugin's publisher: dumps, gaps beyond the ring, new lives."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from cache_service.core.events import BlocksRemoved, BlocksStored, Event, Group
from cache_service.core.ids import BlockHash
from cache_service.core.index_types import Needs
from cache_service.wire import worker_events
from prfaas_sglang.core.worker_view import Change, Filled, Freed
from prfaas_sglang.engine.state_publisher import StatePublisher
from prfaas_sglang.fleet.ports import free_port
from tests.integration.cache_support import NAMESPACE, PAGE, CacheProcess, until

STATE = Needs(state=True)


class PluginWorker:
    """The plugin's publisher in this process, on ports that outlive it."""

    def __init__(self, worker_id: str = "a-prefill-0", *, ring: int = 10_000, needs: Needs = STATE) -> None:
        self.worker_id, self.ring, self.needs = worker_id, ring, needs
        self.events_port, self.replay_port = free_port(), free_port()
        self.publisher: StatePublisher | None = None

    def start(self) -> None:
        self.publisher = StatePublisher(
            f"tcp://127.0.0.1:{self.events_port}",
            f"tcp://127.0.0.1:{self.replay_port}",
            PAGE,
            self.needs,
            ring_batches=self.ring,
        )

    def stop(self) -> None:
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = None

    def happen(self, *blocks: Event, changes: tuple[Change, ...] = ()) -> None:
        assert self.publisher is not None
        self.publisher.submit(lambda: (blocks, changes))

    def config(self) -> dict[str, object]:
        return {
            "worker_id": self.worker_id,
            "site": "A",
            "events": f"tcp://127.0.0.1:{self.events_port}",
            "replay": f"tcp://127.0.0.1:{self.replay_port}",
            "format": "prfaas",
        }


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[object]:
    """(worker factory, service starter); everything is stopped at the end."""
    workers: list[PluginWorker] = []
    services: list[CacheProcess] = []

    def worker(**options: object) -> PluginWorker:
        made = PluginWorker(**options)  # type: ignore[arg-type]
        workers.append(made)
        made.start()
        return made

    async def start(*followed: PluginWorker, **settings: object) -> CacheProcess:
        service = CacheProcess(tmp_path, list(followed), **settings)  # type: ignore[arg-type]
        services.append(service)
        await service.start()
        return service

    yield worker, start
    for service in services:
        await service.close()
    for made in workers:
        made.stop()


def run(first: int, last: int) -> BlocksStored:
    """Blocks first..last of the chain 1, 2, 3, ..."""
    return BlocksStored(
        tuple(BlockHash(n) for n in range(first, last + 1)), BlockHash(first - 1) if first > 1 else None
    )


def state(block: int) -> Filled:
    return Filled(Group.STATE, [BlockHash(block)], [block])


async def usable(service: CacheProcess, blocks: int) -> tuple[int, int]:
    """Matched and usable blocks of the first holder of the chain 1..blocks."""
    hashes = [BlockHash(n) for n in range(1, blocks + 1)]
    result = await service.client.match(NAMESPACE, hashes, blocks * PAGE + 1)
    assert result.available, result
    holder = next(iter(result.holders), None)
    return (holder.matched_tokens // PAGE, holder.usable_tokens // PAGE) if holder else (0, 0)


async def becomes(service: CacheProcess, blocks: int, expected: tuple[int, int]) -> None:
    async def same() -> bool:
        return await usable(service, blocks) == expected

    await until(same, f"1..{blocks} to be {expected}")


async def test_states_bound_what_is_usable(stage) -> None:
    """Usable ends at the deepest state; a freed slot takes its state away, a moved one does not."""
    worker, start = stage
    first = worker()
    service = await start(first)
    first.happen(run(1, 8), changes=(state(3), state(6)))
    await becomes(service, 8, (8, 6))
    first.happen(changes=(Filled(Group.STATE, [BlockHash(6)], [60]), Freed(Group.STATE, [6])))
    first.happen(changes=(Freed(Group.STATE, [3, 99]),))
    await becomes(service, 5, (5, 0))
    assert await usable(service, 8) == (8, 6)
    first.happen(changes=(Freed(Group.STATE, [60]),))
    await becomes(service, 8, (8, 0))


async def test_late_start_takes_a_dump(stage) -> None:
    """All that happened before the service began is there, although the ring has forgotten it."""
    worker, start = stage
    first = worker(ring=2)
    for block in range(1, 31):
        first.happen(run(block, block), changes=(state(block),))
    first.happen(BlocksRemoved((BlockHash(30),)), changes=(Freed(Group.STATE, [29, 30]),))
    service = await start(first)
    await becomes(service, 30, (29, 28))
    source = (await service.client.stats()).sources[0]
    assert (source.truncated, source.counts["dump"]) == (False, 1)
    first.happen(run(30, 30), changes=(state(30),))
    await becomes(service, 30, (30, 30))


async def test_gap_beyond_the_ring(stage) -> None:
    """A service that slept through more batches than the ring keeps is exact again, and says how."""
    worker, start = stage
    first = worker(ring=10)
    service = await start(first, ingest={"probe_s": 0.3, "queue_batches": 4})
    first.happen(run(1, 4), changes=(state(2),))
    await becomes(service, 4, (4, 2))
    assert service.process is not None
    service.process.send_signal(19)  # SIGSTOP
    # Far more than every queue and socket buffer between the two can hold.
    for n in range(3000):
        filler = tuple(BlockHash(10**6 + n * 500 + k) for k in range(500))
        first.happen(BlocksStored(filler, None), BlocksRemoved(filler))
    first.happen(BlocksRemoved((BlockHash(4),)), changes=(Freed(Group.STATE, [2]), state(3)))
    await asyncio.to_thread(drain, first)
    service.process.send_signal(18)  # SIGCONT
    await service.counts("lost")
    await becomes(service, 4, (3, 3))
    await until_counted(service, "dump", 2)
    counts = (await service.client.stats()).counts
    assert (counts.blocks, counts.entries) == (3, 3)


async def until_counted(service: CacheProcess, kind: str, number: int) -> None:
    async def enough() -> bool:
        return await service.counted(kind) >= number

    await until(enough, f"{number} of {kind}")


def drain(worker: PluginWorker) -> None:
    """Wait until every step is published: a request is answered after them."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"tcp://127.0.0.1:{worker.replay_port}")
        dealer.send_multipart([b"", *worker_events.dump_request(0, 0)])
        assert dealer.poll(20_000)


@pytest.mark.parametrize("needs", [Needs(), STATE, Needs(window_blocks=2)])
async def test_new_life_declares_anew(stage, needs: Needs) -> None:
    """A restarted worker has nothing of its old life, and another model's needs."""
    worker, start = stage
    first = worker()
    service = await start(first, ingest={"probe_s": 0.3, "lease_s": 60.0})
    first.happen(run(1, 6), changes=(state(6),))
    await becomes(service, 6, (6, 6))
    first.stop()
    first.needs = needs
    first.start()
    changes = (Filled(Group.SWA, [BlockHash(3), BlockHash(4)], [3, 4]), state(3))
    first.happen(run(1, 5), changes=changes)
    await becomes(service, 6, {Needs(): (5, 5), STATE: (5, 3)}.get(needs, (5, 4)))


async def test_two_services_share_a_dump(stage) -> None:
    """Services that start together are both exact."""
    worker, start = stage
    first = worker()
    first.happen(run(1, 50), changes=(state(50),))
    services = await asyncio.gather(start(first), start(first))
    for service in services:
        await becomes(service, 50, (50, 50))


async def test_hostile_requests_do_no_harm(stage) -> None:
    """Requests of any shape are ignored or answered; the stream goes on."""
    worker, start = stage
    first = worker()
    service = await start(first)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"tcp://127.0.0.1:{first.replay_port}")
        eight = struct.pack(">Q", 7)
        for frames in ([b""], [b"", b"x"], [b"", eight, b"dump"], [b"", eight, b"other", eight], [b"x"] * 9):
            dealer.send_multipart(frames)
        dealer.send_multipart([b"", eight, b"dump", eight])
        assert await asyncio.to_thread(dealer.poll, 5000)
        page = worker_events.decode_page(dealer.recv_multipart()[-1], page_size=PAGE)
        assert page.pages == 0
    first.happen(run(1, 2), changes=(state(2),))
    await becomes(service, 2, (2, 2))


async def test_a_failed_step_claims_nothing(stage) -> None:
    """When what is held is not known any more, the worker says that it holds nothing."""
    worker, start = stage
    first = worker()
    service = await start(first)
    first.happen(run(1, 3), changes=(state(3),))
    await becomes(service, 3, (3, 3))
    first.publisher.submit(lambda: 1 / 0)
    await becomes(service, 3, (0, 0))
    first.happen(run(1, 2), changes=(state(2),))
    await becomes(service, 2, (2, 2))


async def test_other_page_size_is_refused(stage) -> None:
    """A worker with pages of another size is not indexed, and the reason is counted."""
    worker, start = stage
    first = worker()
    service = await start(first, namespace={"model": "tiny", "page_size": PAGE * 2})
    first.happen(run(1, 3), changes=(state(3),))
    await service.counts("garbage")
    assert (await service.client.stats()).counts.blocks == 0
