"""The two services as processes, with the one question that both answer."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.index_service.events import MODEL, PAGE, Prompt
from benchmarks.transfer.peers import ROOT
from cache_service.client import IndexClient
from cache_service.core.ids import BlockHash, Namespace
from prfaas_sglang.fleet.ports import free_port

_START_S = 30.0
NAMESPACE = Namespace(MODEL, PAGE)


class Service(Protocol):
    """A running service that follows the publishers."""

    pid: int

    async def matched(self, prompt: Prompt) -> int:
        """Return the blocks of the prompt that the deepest holder has."""

    async def stop(self) -> None:
        """End the process."""


class Ours:
    """python -m cache_service, asked with the router's own client."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process, self._client = process, IndexClient(address, timeout_s=5.0)
        self.address = address
        self.pid = process.pid

    @classmethod
    async def start(cls, publishers: list[str]) -> Ours:
        """Start and await health."""
        port = free_port()
        config = {
            "site": "A",
            "listen": f"127.0.0.1:{port}",
            "namespace": {"model": MODEL, "page_size": PAGE},
            "ingest": {"queue_batches": 1_000_000},
            "workers": [
                {"worker_id": f"w{at}", "site": "A", "events": address, "topic": "kv"}
                for at, address in enumerate(publishers)
            ],
        }
        path = Path(tempfile.mkdtemp(prefix="bench-index-")) / "cache.json"
        path.write_text(json.dumps(config))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cache_service", "--config", str(path), "--log-level", "ERROR"),
            cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watching = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=_START_S)
            async for answer in watching:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        return cls(process, f"127.0.0.1:{port}")

    async def matched(self, prompt: Prompt) -> int:
        """Return the blocks of the prompt that the deepest holder has."""
        hashes = [BlockHash(value) for value in prompt.hashes]
        answer = await self._client.match(NAMESPACE, hashes, len(prompt.tokens) + 1)
        assert answer.available, answer
        return answer.holders[0].matched_tokens // PAGE if answer.holders else 0

    async def stop(self) -> None:
        """End the process."""
        await self._client.close()
        self._process.terminate()
        await self._process.wait()


class Dynamo:
    """python -m dynamo.indexer, asked over one HTTP session."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self._process, self._url = process, url
        self._session = aiohttp.ClientSession()
        self.pid = process.pid

    @classmethod
    async def start(cls, command: list[str], publishers: list[str], threads: int) -> Dynamo:
        """Start and await that it answers."""
        port = free_port()
        workers = ",".join(f"{at}={address}" for at, address in enumerate(publishers, 1))
        process = await asyncio.create_subprocess_exec(
            *(*command, "--port", str(port), "--threads", str(threads), "--model-name", MODEL),
            *("--block-size", str(PAGE), "--workers", workers),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        found = cls(process, f"http://127.0.0.1:{port}")
        async with asyncio.timeout(_START_S):
            while True:
                try:
                    async with found._session.get(f"{found._url}/health") as answer:
                        await answer.read()
                    return found
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)

    async def matched(self, prompt: Prompt) -> int:
        """Return the blocks of the prompt that the deepest holder has."""
        body = {"block_hashes": prompt.local, "model_name": MODEL}
        async with self._session.post(f"{self._url}/query_by_hash", json=body) as answer:
            assert answer.status == 200, await answer.text()
            said = await answer.json()
        tokens = max((held for ranks in said["scores"].values() for held in ranks.values()), default=0)
        return int(tokens) // PAGE

    async def stop(self) -> None:
        """End the process."""
        await self._session.close()
        self._process.terminate()
        await self._process.wait()
