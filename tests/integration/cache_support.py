"""Real cache_service processes and SGLang's own event publisher, on loopback and free ports."""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import zmq
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache_service.channels import Encryption, open_channel
from cache_service.client import IndexClient
from cache_service.core.ids import Namespace
from cache_service.core.query import MatchResult
from prfaas_sglang.fleet.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGE = 4
NAMESPACE = Namespace(model="tiny", page_size=PAGE)
DEADLINE_S = 20.0


async def until(condition: Callable[[], Any], what: str) -> Any:
    """Await `condition` (a coroutine function) to return something true; its value."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}; last {value!r}"
        await asyncio.sleep(0.02)


def load_sglang_kv_events() -> Any:
    """Load the installed SGLang's kv_events.py itself, without torch.

    Its only imports from the engine are two helpers that the publisher does not call (parallel ranks, address
    parsing); they are stood in for, under their own names, while the file is executed.
    """
    spec = importlib.util.find_spec("sglang")
    assert spec is not None, "SGLang is not installed (make setup)"
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "srt" / "disaggregation" / "kv_events.py"
    context = types.ModuleType("sglang.srt.runtime_context")
    context.get_parallel = None  # type: ignore[attr-defined]
    network = types.ModuleType("sglang.srt.utils.network")
    network.NetworkAddress = None  # type: ignore[attr-defined]
    parents = {name: types.ModuleType(name) for name in ("sglang", "sglang.srt", "sglang.srt.utils")}
    stand_ins = {**parents, context.__name__: context, network.__name__: network}
    saved = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        loaded = importlib.util.spec_from_file_location("sglang_kv_events_under_test", path)
        assert loaded is not None
        assert loaded.loader is not None
        module = importlib.util.module_from_spec(loaded)
        sys.modules[loaded.name] = module
        loaded.loader.exec_module(module)
    finally:
        for name, before in saved.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return module


kv_events = load_sglang_kv_events()


class Worker:
    """One life after the other of a worker's event publisher, on the same ports."""

    def __init__(self, worker_id: str = "a-prefill-0", site: str = "A", *, ring: int = 10_000) -> None:
        self.worker_id, self.site, self.ring = worker_id, site, ring
        self.events_port, self.replay_port = free_port(), free_port()
        self.publisher: Any = None

    def start(self) -> None:
        """Begin a life, in a ZMQ context of its own so that its end gives the ports back at once."""
        self._context = zmq.Context()
        kv_events.zmq = types.SimpleNamespace(
            PUB=zmq.PUB, ROUTER=zmq.ROUTER, Context=types.SimpleNamespace(instance=lambda: self._context)
        )
        self.publisher = kv_events.ZmqEventPublisher(
            0,
            endpoint=f"tcp://*:{self.events_port}",
            replay_endpoint=f"tcp://*:{self.replay_port}",
            buffer_steps=self.ring,
            topic="kv",
        )
        atexit.unregister(self.publisher.shutdown)

    def stop(self) -> None:
        """End this life as a killed process does: no farewell, connections closed."""
        if self.publisher is None:
            return
        self.publisher._running = False
        self.publisher._event_queue.put(None)
        self.publisher._thread.join()
        self._context.destroy(linger=0)
        self.publisher = None

    def publish(self, *events: Any) -> None:
        self.publisher.publish(kv_events.KVEventBatch(ts=time.time(), events=list(events)))

    def lose(self, *events: Any) -> None:
        """Publish a batch that the ring has and the subscriber never gets: PUB at its high-water mark."""
        publisher, real = self.publisher, self.publisher._pub
        publisher._pub = types.SimpleNamespace(send_multipart=lambda frames: None, close=real.close)
        try:
            self.publish(*events)
            self.drain()
        finally:
            publisher._pub = real

    def drain(self) -> None:
        """Wait until every batch is published and in the ring."""
        deadline_s = time.monotonic() + 10
        while self.publisher._event_queue.unfinished_tasks and time.monotonic() < deadline_s:
            time.sleep(0.005)

    def drop_answers(self, *, every: int) -> None:
        """Lose what a replay answer has after `every` messages, end mark and all: a full ROUTER socket."""
        router = self.publisher._replay
        sent = 0

        def receive() -> list[bytes]:
            nonlocal sent
            sent = 0
            return router.recv_multipart()  # type: ignore[no-any-return]

        def send(frames: tuple[bytes, ...]) -> None:
            nonlocal sent
            sent += 1
            if sent <= every:
                router.send_multipart(frames)

        self.publisher._replay = types.SimpleNamespace(
            poll=router.poll, recv_multipart=receive, send_multipart=send, close=router.close
        )

    def config(self) -> dict[str, object]:
        return {
            "worker_id": self.worker_id,
            "site": self.site,
            "events": f"tcp://127.0.0.1:{self.events_port}",
            "replay": f"tcp://127.0.0.1:{self.replay_port}",
            "topic": "kv",
        }


def stored(hashes: list[int], parent: int | None = None, medium: str = "GPU", block_size: int = PAGE) -> Any:
    """SGLang's event, token ids and all."""
    return kv_events.BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=[1] * (block_size * len(hashes)),
        block_size=block_size,
        lora_id=None,
        medium=medium,
    )


def _tokens(result: MatchResult) -> dict[str, int]:
    return {holder.worker_id: holder.matched_tokens for holder in result.holders}


def removed(hashes: list[int], medium: str = "GPU") -> Any:
    return kv_events.BlockRemoved(block_hashes=hashes, medium=medium)


async def health_of(channel: grpc.aio.Channel) -> AsyncIterator[int]:
    """Yield what a service's health is, and whenever it changes; ends when `channel` is closed."""
    request = health_pb2.HealthCheckRequest(service="prfaas.cache.v1.PrefixIndex")
    stub = health_pb2_grpc.HealthStub(channel)
    async for answer in stub.Watch(request, wait_for_ready=True, timeout=DEADLINE_S):
        yield answer.status


class CacheProcess:
    """`python -m cache_service` as an operator runs it."""

    def __init__(
        self,
        folder: Path,
        workers: list[Worker],
        *,
        encryption: Encryption | None = None,
        port: int | None = None,
        **settings: object,
    ) -> None:
        self.listen_port, self.metrics_port = port or free_port(), free_port()
        self.path = folder / f"cache-{self.listen_port}.json"
        self.address = f"127.0.0.1:{self.listen_port}"
        self.path.write_text(
            json.dumps(
                {
                    "site": "B",
                    "listen": self.address,
                    "metrics_listen": f"127.0.0.1:{self.metrics_port}",
                    "namespace": {"model": NAMESPACE.model, "page_size": PAGE},
                    "workers": [worker.config() for worker in workers],
                    "ingest": {"probe_s": 0.3, "replay_timeout_s": 1.0, "lease_s": 1.0},
                    **settings,
                }
            )
        )
        self.process: asyncio.subprocess.Process | None = None
        self._encryption = encryption
        self.client = IndexClient(self.address, timeout_s=5.0, encryption=encryption)

    async def launch(self) -> None:
        """Start the process."""
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cache_service", "--config", str(self.path)),
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"},
        )

    async def start(self) -> None:
        """Start the process and await that it serves; it does not outlive a failure."""
        await self.launch()
        try:
            await self._healthy()
        except BaseException:
            await self.kill()
            raise

    async def _healthy(self) -> None:
        async with open_channel(self.address, self._encryption) as channel:
            async for status in health_of(channel):
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return

    async def stop(self) -> int:
        """SIGTERM; the exit status. Killed when that is not enough: TimeoutError."""
        if self.process is None:
            return 0
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(DEADLINE_S):
                status = await self.process.wait()
        except BaseException:
            await self.kill()
            raise
        self.process = None
        return status

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self.process = None

    async def close(self) -> None:
        await self.client.close()
        await self.stop()

    async def matched(self, hashes: list[int]) -> dict[str, int]:
        """Matched tokens by worker."""
        result = await self._asked(hashes)
        assert result.available, result
        return _tokens(result)

    async def _asked(self, hashes: list[int]) -> MatchResult:
        return await self.client.match(NAMESPACE, hashes, len(hashes) * PAGE)  # type: ignore[arg-type]

    async def matches(self, hashes: list[int], expected: dict[str, int]) -> None:
        """Await that exactly `expected` is matched; after a restart the client reconnects in its own time."""

        async def same() -> bool:
            result = await self._asked(hashes)
            return result.available and _tokens(result) == expected

        await until(same, f"{hashes} to match {expected}")

    async def counted(self, kind: str, worker: int = 0) -> int:
        """How often something befell a worker's stream."""
        return (await self.client.stats()).sources[worker].counts.get(kind, 0)

    async def counts(self, kind: str, at_least: int = 1) -> None:
        """Await that something befell the first worker's stream."""

        async def enough() -> bool:
            return await self.counted(kind) >= at_least

        await until(enough, f"{at_least} of {kind}")
