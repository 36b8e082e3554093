"""Two sites' cache services as processes, fed by SGLang's own publisher: what a worker or a kill may do."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cache_support import PAGE, CacheProcess, Worker, removed, stored
from tests.integration.etcd_support import EtcdCluster
from tests.integration.replication.support import EVERYTHING

CHAINS = 40


class Sites:
    """Site A's service follows a worker; site B's has none and learns all over etcd."""

    def __init__(self, folder: Path, endpoints: tuple[str, ...], worker: Worker) -> None:
        settings: dict[str, Any] = {
            "log_flush_s": 0.05,
            "replication": {
                "etcd": {"endpoints": list(endpoints)},
                "live_lease_s": 2,
                "publish": EVERYTHING,
            },
        }
        self.worker = worker
        self.a = CacheProcess(folder, [worker], site="A", **settings)
        self.b = CacheProcess(folder, [], site="B", **settings)
        self.truth: dict[int, int] = dict.fromkeys(range(CHAINS), 0)
        self._rng = random.Random(7)

    def work(self) -> None:
        """Publish some batches; `truth` has the length of every chain."""
        for _ in range(10):
            chain = self._rng.randrange(CHAINS)
            held = self.truth[chain]
            if held and self._rng.random() < 0.3:
                keep = self._rng.randrange(held)
                self.worker.publish(removed(self.blocks(chain)[keep:held]))
                self.truth[chain] = keep
            elif held < 40:
                more = min(40, held + self._rng.randint(1, 5))
                blocks = self.blocks(chain)
                self.worker.publish(stored(blocks[held:more], blocks[held - 1] if held else None))
                self.truth[chain] = more

    @staticmethod
    def blocks(chain: int) -> list[int]:
        return [1 + 1000 * chain + i for i in range(40)]

    async def converged(self, timeout_s: float = 30.0) -> float:
        """Wait until both services answer with the truth; return the seconds it took."""
        started_s = time.monotonic()
        for process in (self.a, self.b):
            for chain, held in self.truth.items():
                expected = {self.worker.worker_id: held * PAGE} if held else {}
                async with asyncio.timeout(timeout_s):
                    await process.matches(self.blocks(chain), expected)
        return time.monotonic() - started_s


@pytest.fixture
async def sites(
    shared_etcd: EtcdCluster, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Sites]:
    worker = Worker(ring=getattr(request, "param", 10_000))
    worker.start()
    made = Sites(tmp_path, shared_etcd.endpoints, worker)
    await asyncio.gather(made.a.start(), made.b.start())
    yield made
    await asyncio.gather(made.a.close(), made.b.close())
    worker.stop()


async def test_service_killed_under_load(sites: Sites) -> None:
    """kill -9 of the writing service, then of the reading one, while events flow: both end at the truth."""
    sites.work()
    await sites.converged()
    for process in (sites.a, sites.b, sites.a):
        sites.work()
        await process.kill()
        sites.work()
        started_s = time.monotonic()
        await process.start()
        sites.work()
        await sites.converged()
        print(f"converged {time.monotonic() - started_s:.2f} s after the kill, process start included")


@pytest.mark.parametrize("sites", [50], indirect=True, ids=["ring-50"])
async def test_gap_longer_than_the_ring(sites: Sites) -> None:
    """The service misses more than the worker's ring has: what it cannot know goes, here and elsewhere."""
    sites.work()
    await sites.converged()
    await sites.a.kill()
    for _ in range(12):
        sites.work()  # 120 batches, a ring of 50
    await sites.a.start()
    blocks = [900_001, 900_002]
    sites.worker.publish(stored(blocks))
    for process in (sites.a, sites.b):
        await process.matches(blocks, {sites.worker.worker_id: 2 * PAGE})
    for chain in range(CHAINS):
        query = sites.blocks(chain)
        expected = await sites.a.matched(query)
        assert expected.get(sites.worker.worker_id, 0) <= sites.truth[chain] * PAGE
        await sites.b.matches(query, expected)


async def test_worker_publishes_garbage(sites: Sites) -> None:
    """Frames that are no batch, impossible events, contradicting parents: both services agree on the rest."""
    sites.work()
    publisher = sites.worker.publisher
    publisher._pub.send_multipart((b"kv", b"short", b"\xff" * 100))
    sites.worker.publish(stored([1_000_001, 1_000_002, 1_000_001]))  # a block twice
    sites.worker.publish(stored([2_000_001, 2_000_002]))
    sites.worker.publish(stored([2_000_002], 5))  # another parent than before
    sites.worker.publish(stored([3_000_001], 3_000_002), stored([3_000_002], 3_000_001))  # a cycle
    sites.work()
    took_s = await sites.converged()
    for process in (sites.a, sites.b):
        await process.matches([2_000_001, 2_000_002], {sites.worker.worker_id: 2 * PAGE})
        assert await process.matched([1_000_001, 1_000_002]) == {}
    print(f"converged after {took_s:.2f} s")
