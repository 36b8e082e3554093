"""A cache service process from the outside: its API, its limits, its start, its end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aiohttp
import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cache_service import config
from cache_service.client import IndexClient
from cache_service.core.errors import IndexUnavailable
from cache_service.core.ids import Namespace
from cache_service.core.index import PrefixIndex
from cache_service.core.query import MAX_HASHES
from cache_service.server import SERVICE, CacheServer
from cache_service.store import InProcessLog, apply_entry
from cache_service.wire import cache_pb2, cache_pb2_grpc
from prfaas_sglang.fleet.ports import free_port
from tests.integration.cache_support import (
    NAMESPACE,
    PAGE,
    ROOT,
    CacheProcess,
    Worker,
    removed,
    stored,
    until,
)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[CacheProcess, Worker]]:
    """One service that follows one worker."""
    worker = Worker()
    worker.start()
    process = CacheProcess(tmp_path, [worker])
    await process.start()
    yield process, worker
    await process.close()
    worker.stop()


async def test_usable_leaves_a_token(service) -> None:
    """Usable tokens are whole pages and at most the prompt less one; the holder is named in full."""
    process, worker = service
    worker.publish(stored([1, 2, 3]))
    await process.matches([1, 2, 3], {"a-prefill-0": 12})
    for total, usable in ((12, 8), (13, 12), (40, 12)):
        result = await process.client.match(NAMESPACE, [1, 2, 3], total)
        (holder,) = result.holders
        assert (holder.worker_id, holder.site, holder.dp_rank) == ("a-prefill-0", "A", 0)
        assert (holder.matched_tokens, holder.usable_tokens) == (12, usable)
        assert result.revision > 0


async def test_other_namespace(service) -> None:
    """Another model is an answer to route without an index; another salt only asks for other hashes."""
    process, worker = service
    worker.publish(stored([1]))
    await process.matches([1], {"a-prefill-0": 4})
    result = await process.client.match(Namespace("other", PAGE), [1], 4)
    assert (result.available, result.reason, result.holders) == (False, "unknown_namespace", ())
    salted = await process.client.match(Namespace("tiny", PAGE, salt="tenant"), [99], 4)
    assert (salted.available, salted.holders) == (True, ())


@pytest.mark.parametrize(
    ("request_message", "named"),
    [
        (cache_pb2.MatchRequest(total_tokens=4), "namespace"),
        (cache_pb2.MatchRequest(namespace=cache_pb2.Namespace(model="tiny", page_size=PAGE)), "total_tokens"),
        (
            cache_pb2.MatchRequest(
                namespace=cache_pb2.Namespace(model="tiny", page_size=PAGE), hashes=[1, 2], total_tokens=4
            ),
            "hashes",
        ),
        (
            cache_pb2.MatchRequest(
                namespace=cache_pb2.Namespace(model="tiny", page_size=PAGE),
                hashes=[0] * (MAX_HASHES + 1),
                total_tokens=2**31,
            ),
            "hashes",
        ),
    ],
)
async def test_invalid_argument(service, request_message, named: str) -> None:
    """A query that cannot be meant is INVALID_ARGUMENT with its field."""
    process, _ = service
    async with grpc.aio.insecure_channel(process.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cache_pb2_grpc.PrefixIndexStub(channel).Match(request_message, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in caught.value.details()


async def test_too_large_a_message(service) -> None:
    """A message beyond the bound is refused and the service goes on."""
    process, _ = service
    async with grpc.aio.insecure_channel(process.address) as channel:
        big = cache_pb2.MatchRequest(
            namespace=cache_pb2.Namespace(model="tiny", page_size=PAGE), hashes=[0] * 300_000
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cache_pb2_grpc.PrefixIndexStub(channel).Match(big, timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await process.matched([1]) == {}


async def test_reflection(service) -> None:
    """The service describes itself."""
    process, _ = service
    async with grpc.aio.insecure_channel(process.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        answer = await anext(aiter(call))
    assert SERVICE in [service.name for service in answer.list_services_response.service]


async def test_metrics_and_health(service) -> None:
    """GET /metrics has what the index did; GET /health has the streams."""
    process, worker = service
    worker.publish(stored([1, 2]))
    await process.matches([1, 2], {"a-prefill-0": 8})
    base = f"http://127.0.0.1:{process.metrics_port}"
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{base}/metrics") as answer:
            text = await answer.text()
        async with session.get(f"{base}/health") as answer:
            health = await answer.json()
    assert "prfaas_index_blocks_count 2.0" in text
    assert 'prfaas_index_block_changes_total{kind="stored",site="A"} 2.0' in text
    assert 'prfaas_index_sources_count{site="A",state="live"} 1.0' in text
    assert 'prfaas_index_match_requests_total{outcome="ok"}' in text
    assert "a-prefill-0" not in text, "ids are no labels"
    assert health["status"] == "ok"
    assert health["sources"] == [{"worker_id": "a-prefill-0", "dp_rank": 0, "site": "A", "state": "live"}]


async def test_client_survives_the_service(service) -> None:
    """Killed: unavailable at once. Back: available again, the index caught up. Silent: a deadline."""
    process, worker = service
    worker.publish(stored([1]))
    await process.matches([1], {"a-prefill-0": 4})
    await process.kill()
    result = await process.client.match(NAMESPACE, [1], 8)
    assert (result.available, result.reason, result.holders) == (False, "unreachable", ())
    with pytest.raises(IndexUnavailable):
        await process.client.stats()
    await process.start()

    async def back() -> bool:
        found = await process.client.match(NAMESPACE, [1], 8)
        return found.available and bool(found.holders)

    await until(back, "the client to reconnect")
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    client = IndexClient(f"127.0.0.1:{port}", timeout_s=0.2)
    started_s = asyncio.get_running_loop().time()
    result = await client.match(NAMESPACE, [1], 8)
    assert not result.available
    assert asyncio.get_running_loop().time() - started_s < 2
    await client.close()
    silent.close()


async def test_sigterm_is_a_clean_end(service) -> None:
    """SIGTERM ends the process with status 0, streams connected or not."""
    process, _ = service
    assert await process.stop() == 0


async def test_stops_amid_replays() -> None:
    """Streams end when they are told to, also while answers pour in: nothing is left that stop waits for."""
    workers = [Worker(f"w{number}") for number in range(12)]
    for worker in workers:
        worker.start()
        for block in range(1, 300):
            worker.publish(stored([block]))
        worker.drain()
    text = {
        "site": "B",
        "listen": "127.0.0.1:0",
        "namespace": {"model": NAMESPACE.model, "page_size": PAGE},
        "workers": [worker.config() for worker in workers],
        "ingest": {"probe_s": 0.005, "replay_timeout_s": 5.0},
    }
    try:
        for number in range(10):
            server = CacheServer(config.parse(json.dumps(text)))
            await server.start()
            async with asyncio.timeout(60):
                while sum(stream.stats().next_seq for stream in server._streams) < 350 * number:
                    await asyncio.sleep(0)
            async with asyncio.timeout(15):
                await server.stop()
    finally:
        for worker in workers:
            worker.stop()


def run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cache_service", "--config", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("taken", ["listen_port", "metrics_port"])
async def test_port_in_use(service, tmp_path: Path, taken: str) -> None:
    """A second service on the same port ends with status 2 and says which setting it is."""
    process, _ = service
    second = CacheProcess(tmp_path, [])
    data = json.loads(second.path.read_text())
    field = {"listen_port": "listen", "metrics_port": "metrics_listen"}[taken]
    data[field] = f"127.0.0.1:{getattr(process, taken)}"
    second.path.write_text(json.dumps(data))
    done = await asyncio.to_thread(run, second.path)
    assert done.returncode == 2
    assert f"cache_service: {field}: cannot listen on 127.0.0.1:" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    await second.client.close()


def test_wrong_configuration(tmp_path: Path) -> None:
    """A wrong file ends with status 2 and one line naming the field."""
    path = tmp_path / "cache.yaml"
    path.write_text("site: B\nlisten: 127.0.0.1:0\nnamespace: {model: m, page_size: many}\n")
    done = run(path)
    assert done.returncode == 2
    assert "$.namespace.page_size" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_replica_from_the_service_log() -> None:
    """What the service learns is in its delta log: a replica built from it answers the same."""
    worker, log = Worker(), InProcessLog()
    worker.start()
    text = {
        "site": "B",
        "listen": f"127.0.0.1:{free_port()}",
        "namespace": {"model": NAMESPACE.model, "page_size": PAGE},
        "workers": [worker.config()],
        "log_flush_s": 0.01,
    }
    server = CacheServer(config.parse(json.dumps(text)), log)
    replica = PrefixIndex()
    await server.start()
    try:
        worker.publish(stored([1, 2, 3]), stored([3], 2, medium="CPU_PINNED"))
        worker.publish(removed([3]), stored([7], 2))
        async with aclosing(log.watch(None)) as entries, asyncio.timeout(20):
            async for entry in entries:
                apply_entry(replica, entry)
                if [match.matched for match in replica.match([1, 2, 7])] == [3]:
                    break
    finally:
        await server.stop()
        worker.stop()
    replica.check()
    for query in ([1, 2, 3], [1, 2, 7], [7]):
        assert replica.match(query) == server.state.index.match(query)
    assert replica.counts() == server.state.index.counts()
