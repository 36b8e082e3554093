"""A service that starts: not ready before it has caught up, and not unready for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from cache_service.client import IndexClient
from tests.integration.cache_support import (
    NAMESPACE,
    PAGE,
    CacheProcess,
    Worker,
    health_of,
    stored,
)
from tests.integration.cache_support import until as until_async
from tests.integration.etcd_support import CutProxy, EtcdCluster
from tests.integration.replication.support import DEADLINE_S, EVERYTHING

pytestmark = pytest.mark.slow

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
CHAINS, LENGTH = 2000, 100


def blocks(chain: int) -> list[int]:
    return list(range(1 + 1000 * chain, 1 + 1000 * chain + LENGTH))


def replication(endpoint: str, **settings: Any) -> dict[str, Any]:
    return {
        "log_flush_s": 0.05,
        "replication": {"etcd": {"endpoints": [endpoint]}, "live_lease_s": 5, "publish": EVERYTHING},
        **settings,
    }


@pytest.fixture
async def site_a(shared_etcd: EtcdCluster, tmp_path: Path) -> AsyncIterator[Worker]:
    """Site A's service and worker, with 200,000 blocks in etcd."""
    worker = Worker()
    worker.start()
    a = CacheProcess(tmp_path, [worker], site="A", **replication(shared_etcd.endpoints[0]))
    await a.start()
    for chain in range(CHAINS):
        worker.publish(stored(blocks(chain)))
    await a.matches(blocks(CHAINS - 1), {worker.worker_id: LENGTH * PAGE})

    async def written() -> bool:
        stats = await a.client.stats()
        return stats.counts.blocks == CHAINS * LENGTH

    await until_async(written, "everything to be indexed")
    probe = CacheProcess(tmp_path, [], site="P", **replication(shared_etcd.endpoints[0]))
    await probe.start()
    for chain in (0, CHAINS - 1):  # it is in etcd
        await probe.matches(blocks(chain), {worker.worker_id: LENGTH * PAGE})
    await probe.close()
    yield worker
    await a.close()
    worker.stop()


async def get(process: CacheProcess, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{process.metrics_port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


async def test_not_serving_until_caught_up(shared_etcd: EtcdCluster, tmp_path: Path, site_a: Worker) -> None:
    """NOT_SERVING, with the reason everywhere, while etcd's answers wait; right from the first SERVING."""
    proxy = await CutProxy(shared_etcd.members[0].client_port).start()
    proxy.open.clear()
    b = CacheProcess(tmp_path, [], site="B", **replication(proxy.endpoint, ready_wait_s=3600))
    await b.launch()
    try:
        async with grpc.aio.insecure_channel(b.address) as channel:
            health = health_of(channel)
            assert await anext(health) == NOT_SERVING
            answer = await b.client.match(NAMESPACE, blocks(0), LENGTH * PAGE)  # type: ignore[arg-type]
            assert (answer.available, answer.starting, answer.holders) == (True, True, ())
            stats = await b.client.stats()
            assert (stats.starting, stats.behind) == (True, ("discovery",))
            status, body = await get(b, "/ready")
            assert (status, '"behind": ["discovery"]' in body) == (503, True)
            assert (await get(b, "/health"))[0] == 200
            metrics = (await get(b, "/metrics"))[1]
            assert "prfaas_index_ready_count 0.0" in metrics
            assert 'prfaas_index_behind_seconds{kind="discovery"} 0.0' not in metrics
            assert 'prfaas_index_behind_seconds{kind="worker"} 0.0' in metrics
            proxy.open.set()
            assert await anext(health) == SERVING
            for chain in (0, CHAINS // 2, CHAINS - 1):
                answer = await b.client.match(NAMESPACE, blocks(chain), LENGTH * PAGE)  # type: ignore[arg-type]
                assert [holder.matched_tokens for holder in answer.holders] == [LENGTH * PAGE]
                assert not answer.starting
            stats = await b.client.stats()
            assert (stats.starting, stats.behind) == (False, ())
            assert (await get(b, "/ready"))[0] == 200
            assert "prfaas_index_ready_count 1.0" in (await get(b, "/metrics"))[1]
    finally:
        await b.close()
        await proxy.close()


async def test_etcd_down_at_start(shared_etcd: EtcdCluster, tmp_path: Path, site_a: Worker) -> None:
    """Ready after ready_wait_s, and said to be behind; caught up once etcd is there."""
    proxy = await CutProxy(shared_etcd.members[0].client_port).start()
    proxy.refuses = True
    b = CacheProcess(tmp_path, [], site="B", **replication(proxy.endpoint, ready_wait_s=6.0))
    await b.launch()
    try:
        async with grpc.aio.insecure_channel(b.address) as channel:
            health = health_of(channel)
            assert await anext(health) == NOT_SERVING
            async with asyncio.timeout(DEADLINE_S):
                assert await anext(health) == SERVING
        stats = await b.client.stats()
        assert (stats.starting, stats.behind) == (False, ("discovery",))
        status, body = await get(b, "/ready")
        assert (status, '"behind": ["discovery"]' in body) == (200, True)
        metrics = (await get(b, "/metrics"))[1]
        assert 'prfaas_index_behind_seconds{kind="discovery"} 0.0' not in metrics
        assert "prfaas_index_ready_count 1.0" in metrics
        proxy.refuses = False

        async def caught_up() -> bool:
            return not (await b.client.stats()).behind

        await until_async(caught_up, "the catch-up after the outage")
        assert await b.matched(blocks(CHAINS - 1)) == {site_a.worker_id: LENGTH * PAGE}
    finally:
        await b.close()
        await proxy.close()


async def test_clients_prefer_who_is_ready(shared_etcd: EtcdCluster, tmp_path: Path, site_a: Worker) -> None:
    """Of two services the one that has caught up is asked; the other one only when there is no other."""
    proxy = await CutProxy(shared_etcd.members[0].client_port).start()
    proxy.open.clear()
    settings = {"ready_wait_s": 3600}
    starting = CacheProcess(tmp_path, [], site="B", **replication(proxy.endpoint, **settings))
    ready = CacheProcess(tmp_path, [], site="B", **replication(shared_etcd.endpoints[0], **settings))
    await asyncio.gather(starting.launch(), ready.start())
    expected = [LENGTH * PAGE]
    try:
        async with grpc.aio.insecure_channel(starting.address) as channel:
            health = health_of(channel)
            assert await anext(health) == NOT_SERVING
            clients = [IndexClient([starting.address, ready.address], timeout_s=5.0) for _ in range(4)]
            for client in clients:  # which one is asked first is random
                for _ in range(5):
                    answer = await client.match(NAMESPACE, blocks(7), LENGTH * PAGE)  # type: ignore[arg-type]
                    assert [holder.matched_tokens for holder in answer.holders] == expected
                many = await client.match_many([(NAMESPACE, blocks(7), LENGTH * PAGE)])  # type: ignore[list-item]
                assert [holder.matched_tokens for holder in many[0].holders] == expected
            await ready.kill()
            answer = await client.match(NAMESPACE, blocks(7), LENGTH * PAGE)  # type: ignore[arg-type]
            assert (answer.available, answer.starting, answer.holders) == (True, True, ())
            asked = client.failovers
            answer = await client.match(NAMESPACE, blocks(7), LENGTH * PAGE)  # type: ignore[arg-type]
            assert (answer.starting, client.failovers) == (True, asked)
            proxy.open.set()
            assert await anext(health) == SERVING
            answer = await client.match(NAMESPACE, blocks(7), LENGTH * PAGE)  # type: ignore[arg-type]
            assert [holder.matched_tokens for holder in answer.holders] == expected
            await asyncio.gather(*(client.close() for client in clients))
    finally:
        await asyncio.gather(starting.close(), ready.close())
        await proxy.close()


async def test_workers(tmp_path: Path) -> None:
    """What a worker held is there at the first SERVING; workers that do not answer are not waited for."""
    worker = Worker()
    worker.start()
    for chain in range(CHAINS):
        worker.publish(stored(blocks(chain)))
    worker.drain()
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    mute, dead = Worker("mute"), Worker("dead")
    mute.events_port = mute.replay_port = silent.sockets[0].getsockname()[1]
    b = CacheProcess(tmp_path, [worker, mute, dead], ready_wait_s=3600)
    await b.launch()
    try:
        async with grpc.aio.insecure_channel(b.address) as channel:
            health = health_of(channel)
            async with asyncio.timeout(DEADLINE_S):
                while await anext(health) != SERVING:  # it may be ready before it is asked
                    pass
            for chain in (0, CHAINS - 1):
                assert await b.matched(blocks(chain)) == {worker.worker_id: LENGTH * PAGE}
            assert (await b.client.stats()).behind == ()
    finally:
        await b.close()
        worker.stop()
        silent.close()
