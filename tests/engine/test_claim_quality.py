"""What the index claims of a real engine is what the engine then reuses, evictions and tenants included."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import zmq

from cache_service.core import blocks
from cache_service.core.ids import Namespace
from prfaas_sglang.fleet.ports import free_port
from tests.engine.conftest import Answer, References, Serve, Server
from tests.integration.cache_support import CacheProcess, until

pytestmark = pytest.mark.engine

#: Family -> page size and flags: pools so small that most of what was computed is evicted again.
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 16, "max_total_tokens": 3072},
    "gdn": {
        "page_size": 64,
        "max_total_tokens": 6144,
        "mamba_radix_cache_strategy": "extra_buffer",
        "chunked_prefill_size": 256,
        "max_mamba_cache_size": 28,
    },
    "swa": {"page_size": 16, "max_total_tokens": 4096, "swa_full_tokens_ratio": 0.2},
}
#: The family whose usable prefix is not that of its blocks is asked more often.
REQUESTS = {"dense": 30, "gdn": 70, "swa": 30}
MAX_PROMPT = 1200


@dataclass
class EngineWorker:
    """A server's streams as `CacheProcess` wants them."""

    events: int = field(default_factory=free_port)
    replay: int = field(default_factory=free_port)
    stock: int = field(default_factory=free_port)
    stock_replay: int = field(default_factory=free_port)
    format: str = "prfaas"

    def environment(self) -> dict[str, str]:
        streams = {
            "endpoint": f"tcp://127.0.0.1:{self.events}",
            "replay_endpoint": f"tcp://127.0.0.1:{self.replay}",
        }
        config = {"worker_id": "a-p", "site": "A", "insecure": True, "state_events": streams}
        return {"PRFAAS_CONFIG": json.dumps(config)}

    def flag(self) -> str:
        stock = {
            "publisher": "zmq",
            "endpoint": f"tcp://*:{self.stock}",
            "replay_endpoint": f"tcp://*:{self.stock_replay}",
            "topic": "kv",
        }
        return json.dumps(stock)

    def nothing_since(self, seq: int) -> bool:
        """Whether the worker has published nothing from a sequence number on."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(str(self.config()["replay"]))
            dealer.send_multipart([b"", seq.to_bytes(8, "big")])
            assert dealer.poll(20_000), "no answer to a replay request"
            return dealer.recv_multipart()[-1] == b""

    def config(self) -> dict[str, object]:
        ours = self.format == "prfaas"
        return {
            "worker_id": "a-p",
            "site": "A",
            "events": f"tcp://127.0.0.1:{self.events if ours else self.stock}",
            "replay": f"tcp://127.0.0.1:{self.replay if ours else self.stock_replay}",
            "format": self.format,
            "needs_state": not ours,
        }


@dataclass
class Watched:
    """A server and a cache service that follows it."""

    server: Server
    cache: CacheProcess
    worker: EngineWorker
    page_size: int

    async def claim(self, prompt: list[int], salt: str | None = None) -> tuple[int, int]:
        """Matched and usable tokens of a prompt."""
        hashes = blocks.block_hashes(prompt, self.page_size, seed=blocks.event_namespace_seed(salt))
        namespace = Namespace("tiny", self.page_size, salt=salt or "")
        result = await self.cache.client.match(namespace, hashes, len(prompt))
        assert result.available, result
        holder = next(iter(result.holders), None)
        return (holder.matched_tokens, holder.usable_tokens) if holder else (0, 0)

    async def settled(self) -> None:
        """Await that the service knows what the engine did."""
        # The engine publishes when it idles: the second answer comes from a later turn of its loop than that.
        for _ in range(2):
            await asyncio.to_thread(self.ask_engine)

        async def caught_up() -> bool:
            next_seq = (await self.cache.client.stats()).sources[0].next_seq
            return await asyncio.to_thread(self.worker.nothing_since, next_seq)

        await until(caught_up, "the service to catch up")

    def ask_engine(self) -> None:
        requests.get(f"{self.server.url}/server_info", timeout=30).raise_for_status()

    async def generate(self, prompt: list[int], new_tokens: int = 8, **body: Any) -> Answer:
        answer = await asyncio.to_thread(self.server.generate, prompt, new_tokens, **body)
        await self.settled()
        return answer


@asynccontextmanager
async def watched(
    serve: Serve, model: Path, folder: Path, worker: EngineWorker | None = None, **flags: Any
) -> AsyncIterator[Watched]:
    worker = worker or EngineWorker()
    page_size = flags["page_size"]
    namespace = {"model": "tiny", "page_size": page_size}
    flags = {"enable_cache_report": True, "kv_events_config": worker.flag(), **flags}
    with serve(model, worker.environment(), **flags) as server:
        cache = CacheProcess(folder, [worker], namespace=namespace)  # type: ignore[list-item]
        await cache.start()
        try:

            async def live() -> bool:
                return (await cache.client.stats()).sources[0].state.name == "LIVE"

            await until(live, "the stream to be live")
            yield Watched(server, cache, worker, page_size)
        finally:
            await cache.close()


class Conversations:
    """Random multi-turn prompts: turns added, branches taken, sessions begun on few system prompts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._systems = [self.words(self._random.randrange(60, 400)) for _ in range(3)]
        self._sessions: list[list[int]] = []

    def words(self, number: int) -> list[int]:
        return [self._random.randrange(10, 200) for _ in range(number)]

    def prompt(self) -> list[int]:
        chance = self._random.random()
        if not self._sessions or chance < 0.25:
            return self._random.choice(self._systems) + self.words(self._random.randrange(5, 200))
        history = self._random.choice(self._sessions[-6:])
        if chance < 0.4:
            history = history[: self._random.randrange(len(history) // 2, len(history))]
        return history + self.words(self._random.randrange(1, 150))

    def answered(self, prompt: list[int], output: list[int]) -> None:
        if len(prompt) < MAX_PROMPT:
            self._sessions.append(prompt + output)


@pytest.mark.parametrize("family", FAMILIES)
async def test_claims_are_hits(
    family: str, serve: Serve, references: References, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One request at a time: claimed more than reused in at most 1 %, exactly in at least 95 %."""
    model, _ = references.get(family)
    talk = Conversations(seed=11)
    claimed = reused = over = exact = matched_more = 0
    async with watched(serve, model, tmp_path, **FAMILIES[family]) as pair:
        for _ in range(REQUESTS[family]):
            prompt = talk.prompt()
            matched, usable = await pair.claim(prompt)
            answer = await pair.generate(prompt)
            talk.answered(prompt, answer.output)
            claimed, reused = claimed + usable, reused + answer.cached_tokens
            over += usable > answer.cached_tokens
            exact += usable == answer.cached_tokens
            matched_more += matched > answer.cached_tokens
        stats = (await pair.cache.client.stats()).sources[0]
    with capsys.disabled():
        print(
            f"\n{family}: {REQUESTS[family]} requests, claimed {claimed} reused {reused} tokens, "
            f"over {over}, exact {exact}, blocks alone would have over-claimed {matched_more}; {stats.counts}"
        )
    assert reused > 20 * 64, "nothing was reused: this proves nothing"
    assert not over
    assert exact >= REQUESTS[family] * 95 // 100


async def test_tenants_do_not_meet(serve: Serve, references: References, tmp_path: Path) -> None:
    """A salt keeps tenants apart; requests with an extra_key (LoRA too) leave no trace in the index."""
    model, _ = references.get("gdn")
    words = Conversations(seed=5).words
    plain, salted, keyed = words(300), words(300), words(300)
    async with watched(serve, model, tmp_path, **FAMILIES["gdn"]) as pair:
        await pair.generate(salted, cache_salt="red")
        assert await pair.claim(salted) == (0, 0)
        assert await pair.claim(salted, "blue") == (0, 0)
        assert await pair.claim(salted, "red") == (256, 256)
        assert (await pair.generate(salted, cache_salt="blue")).cached_tokens == 0
        assert (await pair.generate(salted, cache_salt="red")).cached_tokens == 256

        await pair.generate(keyed, extra_key="adapter-7")
        assert (await pair.generate(keyed, extra_key="adapter-7")).cached_tokens == 256
        assert await pair.claim(keyed) == (0, 0)
        await pair.generate(plain)
        assert await pair.claim(plain) == (256, 256)

        both = words(300)
        await pair.generate(both)
        await pair.generate(both, extra_key="adapter-7")
        assert await pair.claim(both) == (256, 256)
        pair.server.flush()
        await pair.settled()
        for prompt, salt in ((plain, None), (salted, "red"), (both, None)):
            assert await pair.claim(prompt, salt) == (0, 0)


async def test_stock_events_of_a_hybrid_model_claim_nothing(
    serve: Serve, references: References, tmp_path: Path
) -> None:
    """SGLang's own stream does not tell of states; with the model's needs configured nothing is usable."""
    model, _ = references.get("gdn")
    prompt = Conversations(seed=6).words(300)
    worker = EngineWorker(format="sglang")
    async with watched(serve, model, tmp_path, worker, **FAMILIES["gdn"]) as pair:
        await pair.generate(prompt)

        async def known() -> bool:
            return await pair.claim(prompt) != (0, 0)

        await until(known, "the prompt to be known")
        assert await pair.claim(prompt) == (256, 0)
