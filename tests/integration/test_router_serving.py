"""The router between real sockets: what workers are sent, what clients get, and when either leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cache_service.core.errors import IndexUnavailable
from cache_service.core.ids import BlockHash, Namespace
from router.config import parse
from router.service import Service
from router.tokenize import PromptTokenizer
from tests.integration.router_support import (
    ANSWER,
    STREAM,
    Rooms,
    Worker,
    answer,
    chunk,
    hang,
    write_model,
)

CHAT = "/v1/chat/completions"
SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
LONG = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 600}]}


@dataclass
class Claim:
    worker_id: str
    site: str
    matched_tokens: int
    usable_tokens: int


@dataclass
class FakeIndex:
    """Answers with fixed claims, or fails."""

    holders: list[Claim] = field(default_factory=list)
    available: bool = True
    reason: str = ""
    error: Exception | None = None
    asked: list[tuple[Namespace, list[BlockHash], int]] = field(default_factory=list)

    async def match(self, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int) -> FakeIndex:
        self.asked.append((namespace, list(hashes), total_tokens))
        if self.error is not None:
            raise self.error
        return self

    async def close(self) -> None:
        """Nothing to close."""


@dataclass
class Fleet:
    """Three or more workers, one router, one client."""

    workers: dict[str, Worker]
    service: Service
    client: aiohttp.ClientSession
    index: FakeIndex

    def __getitem__(self, name: str) -> Worker:
        return self.workers[name]

    async def post(self, body: object, path: str = CHAT) -> tuple[aiohttp.ClientResponse, bytes]:
        async with self.client.post(path, json=body) as response:
            return response, await response.read()

    async def metric(self, line: str) -> bool:
        async with self.client.get("/metrics") as response:
            return line in (await response.text()).splitlines()


Make = Callable[..., Any]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Return a function that starts a fleet; everything is stopped at the end."""
    started: list[Fleet] = []

    async def start(
        *,
        second_decode: bool = False,
        second_prefill: bool = False,
        per_worker: dict[str, dict[str, Any]] | None = None,
        **config: Any,
    ) -> Fleet:
        rooms, index = Rooms(), FakeIndex()
        names = ["a-prefill", "b-prefill", "b-decode"]
        names += (["b-decode2"] if second_decode else []) + (["a-prefill2"] if second_prefill else [])
        workers = {name: Worker(name.split("-")[1].rstrip("2"), rooms) for name in names}
        for worker in workers.values():
            await worker.start()
        data: dict[str, Any] = {
            "listen": "127.0.0.1:0",
            "site": "B",
            "model": {
                "name": "tiny",
                "path": str(write_model(tmp_path / "model")),
                "context_length": 2000,
                "page_size": 16,
            },
            "policy": {"name": "prfaas", "threshold_tokens": 100},
            "workers": [
                {
                    "worker_id": name,
                    "site": name[0].upper(),
                    "role": worker.role,
                    "url": worker.url,
                    "bootstrap_host": f"{name}.example" if worker.role == "prefill" else "",
                    "bootstrap_port": 8998,
                    **(per_worker or {}).get(name, {}),
                }
                for name, worker in workers.items()
            ],
            "links": [{"src": "A", "dst": "B", "gbps": 10}],
            "timeouts": {"abort_s": 2, "drain_s": 2},
        }
        for key, value in config.items():
            data[key] = data[key] | value if isinstance(data.get(key), dict) else value
        checked = parse(data)
        service = Service(
            checked,
            PromptTokenizer(Path(checked.model.path)),
            index,
        )
        address = await service.start()
        fleet = Fleet(workers, service, aiohttp.ClientSession(f"http://{address}"), index)
        started.append(fleet)
        return fleet

    yield start
    for fleet in started:
        await fleet.client.close()
        await fleet.service.stop()
        for worker in fleet.workers.values():
            await worker.stop()


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [r.fields for r in caplog.records if r.getMessage() == "request"]  # type: ignore[attr-defined]


async def test_both_workers_get_the_same_body(make: Make) -> None:
    """The client's fields untouched, ours appended, one room and one rid on both sides, tokens forwarded."""
    fleet = await make()
    body = LONG | {"temperature": 0.1, "unknown": {"deep": [1, None]}, "rid": "mine", "bootstrap_room": 3}
    response, _ = await fleet.post(body)
    prefill, decode = fleet["a-prefill"], fleet["b-decode"]
    assert prefill.raw == decode.raw
    sent = decode.bodies[0]
    assert {k: v for k, v in sent.items() if k in body} | {"rid": "mine", "bootstrap_room": 3} == body
    assert decode.raw[0].startswith(json.dumps(body).encode()[:-1])
    assert (sent["bootstrap_host"], sent["bootstrap_port"]) == ("a-prefill.example", 8998)
    assert 0 <= sent["bootstrap_room"] < 1 << 63
    assert response.headers["x-prfaas-room"] == str(sent["bootstrap_room"])
    assert response.headers["x-prfaas-request-id"] == sent["rid"]
    assert not fleet["b-prefill"].bodies
    async with fleet.client.post(CHAT, json=SHORT, headers={"Authorization": "Bearer k", "Cookie": "c"}):
        pass
    for side in (fleet["b-prefill"], decode):
        assert side.headers[-1]["Authorization"] == "Bearer k"
        assert "Cookie" not in side.headers[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_answer_is_decodes_byte_for_byte(make: Make, stream: bool) -> None:
    """JSON and event stream alike, with the decision in the headers."""
    fleet = await make()
    response, got = await fleet.post(LONG | {"stream": stream})
    assert got == (b"".join(STREAM) if stream else ANSWER)
    assert response.content_type == ("text/event-stream" if stream else "application/json")
    expected = {
        "route": "remote",
        "reason": "above_threshold",
        "prefill-site": "A",
        "prefill-worker": "a-prefill",
        "decode-worker": "b-decode",
        "prompt-tokens": "620",
        "matched-tokens": "0",
        "uncached-tokens": "620",
        "threshold-tokens": "100",
    }
    assert {k: response.headers[f"x-prfaas-{k}"] for k in expected} == expected
    assert fleet.service.in_flight() == 0


async def test_short_prompts_stay_local(make: Make) -> None:
    """And say so."""
    fleet = await make()
    response, _ = await fleet.post(SHORT)
    assert response.headers["x-prfaas-route"] == "local"
    assert response.headers["x-prfaas-prefill-worker"] == "b-prefill"
    assert fleet["b-decode"].bodies[0]["bootstrap_host"] == "b-prefill.example"


async def test_cached_prefix_decides(make: Make) -> None:
    """A long prompt that the local site has mostly cached stays local; the index is asked once."""
    fleet = await make()
    fleet.index.holders = [Claim("b-prefill", "B", 560, 544)]
    response, _ = await fleet.post(LONG)
    assert response.headers["x-prfaas-route"] == "local"
    assert response.headers["x-prfaas-matched-tokens"] == "544"
    assert response.headers["x-prfaas-uncached-tokens"] == "76"
    [(namespace, hashes, total)] = fleet.index.asked
    assert (namespace, len(hashes), total) == (Namespace("tiny", 16), 620 // 16, 620)
    await fleet.post(LONG | {"lora_path": "ada"})
    assert len(fleet.index.asked) == 1, "an adapter's blocks are not told apart by the index"


@pytest.mark.parametrize("raises", [False, True])
async def test_index_that_does_not_answer_costs_only_the_match(
    make: Make, raises: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Still served, said in the log and in the metrics."""
    caplog.set_level(logging.INFO)
    fleet = await make()
    fleet.index.available, fleet.index.reason = False, "timeout"
    fleet.index.error = IndexUnavailable("gone", reason="timeout") if raises else None
    response, got = await fleet.post(LONG)
    assert (response.status, got, response.headers["x-prfaas-matched-tokens"]) == (200, ANSWER, "0")
    assert lines(caplog)[0]["index"] == "timeout"
    assert await fleet.metric('prfaas_router_index_seconds_count{outcome="unavailable"} 1.0')


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "model": "tiny"}),
        ("/v1/completions", {"prompt": ["hello"]}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 1}}),
        ("/generate", {"input_ids": [[1, 2, 3]]}),
    ],
)
async def test_other_apis(make: Make, path: str, body: dict[str, Any]) -> None:
    """Same path on the worker; a list of one gets a list of rids, as the engine wants it."""
    fleet = await make()
    response, got = await fleet.post(body, path)
    assert (response.status, got) == (200, ANSWER)
    rid = response.headers["x-prfaas-request-id"]
    prompt = body.get("prompt", body.get("text", body.get("input_ids")))
    listed = isinstance(prompt, list) and not isinstance(prompt[0], int)
    assert fleet["b-decode"].bodies[0]["rid"] == ([rid] if listed else rid)


async def test_one_log_line_and_the_metrics(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """One line with ids, decision and the hit that the engine reported; no prompt in it."""
    caplog.set_level(logging.INFO)
    fleet = await make()
    secret = "my very secret prompt"
    response, _ = await fleet.post({"messages": [{"role": "user", "content": secret}], "stream": True})
    [line] = lines(caplog)
    assert line["request_id"] == response.headers["x-prfaas-request-id"]
    assert (line["outcome"], line["status"], line["route"], line["reason"]) == (
        "ok",
        200,
        "local",
        "within_threshold",
    )
    assert (line["hit_tokens"], line["matched_tokens"], line["retries"]) == (64, 0, 0)
    assert 0 < line["ttft_s"] <= line["total_s"]
    assert line["engine_prompt_tokens"] == 23, (
        "the scripted worker's count differs from ours and that is told"
    )
    assert secret not in caplog.text
    assert await fleet.metric('prfaas_router_requests_total{api="chat",outcome="ok"} 1.0')
    assert await fleet.metric('prfaas_router_decisions_total{reason="within_threshold",route="local"} 1.0')
    assert await fleet.metric('prfaas_router_ttft_seconds_count{route="local"} 1.0')
    assert await fleet.metric('prfaas_router_hit_tokens_total{route="local"} 64.0')
    assert await fleet.metric('prfaas_router_in_flight_requests{worker="b-decode"} 0.0')
    assert await fleet.metric("prfaas_router_prompt_length_mismatches_total 1.0")


async def test_first_bytes_arrive_before_the_last_are_made(make: Make) -> None:
    """A stream is passed on as it comes: the worker waits for the client to have read the first event."""
    fleet = await make()
    read = asyncio.Event()

    async def script(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("one"))
        await asyncio.wait_for(read.wait(), 20)
        await response.write(chunk("two"))
        return response

    fleet["b-decode"].script = script
    async with fleet.client.post(CHAT, json=SHORT | {"stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == chunk("one")
        read.set()
        assert await response.content.read() == chunk("two")


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_aborts_both_sides(
    make: Make, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first byte or in the middle of the stream: abort calls with the rid, connections closed."""
    caplog.set_level(logging.INFO)
    fleet = await make()

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if stream:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(chunk("one"))
        await asyncio.Event().wait()
        raise AssertionError("never")

    prefill, decode = fleet["a-prefill"], fleet["b-decode"]
    prefill.script, decode.script = hang, script
    task = asyncio.create_task(fleet.client.post(CHAT, json=LONG | {"stream": stream}))
    await asyncio.wait_for(asyncio.gather(prefill.arrived.wait(), decode.arrived.wait()), 20)
    if stream:
        response = await task
        await response.content.readuntil(b"\n\n")
        response.close()
    else:
        task.cancel()
    for worker in (prefill, decode):
        assert await asyncio.wait_for(worker.aborted.get(), 20) == decode.bodies[0]["rid"]
        await asyncio.wait_for(worker.closed.wait(), 20)
    assert fleet.service.in_flight() == 0
    [line] = lines(caplog)
    assert (line["outcome"], line["status"]) == ("client_left", 499)
    prefill.script = decode.script = None
    response, _ = await fleet.post(LONG)
    assert (response.status, response.headers["x-prfaas-retries"]) == (200, "0"), "no breaker was touched"


async def test_stream_cut_by_the_worker_ends_with_an_error_event(make: Make) -> None:
    """Bytes are out: the client is told inside the stream; half an event is closed off first."""
    fleet = await make()

    async def script(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("one") + b'data: {"ha')
        assert request.transport is not None
        request.transport.close()
        await asyncio.Event().wait()
        raise AssertionError("never")

    fleet["b-decode"].script = script
    response, got = await fleet.post(SHORT | {"stream": True})
    assert response.status == 200
    assert got.startswith(chunk("one"))
    *_, last = got.rstrip().split(b"\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stream_broken"
    assert await fleet.metric('prfaas_router_requests_total{api="chat",outcome="stream_broken"} 1.0')
    assert await asyncio.wait_for(fleet["b-decode"].aborted.get(), 20)


async def test_total_time_is_bounded_inside_a_stream(make: Make) -> None:
    """A stream that stops moving ends with an error event and aborts."""
    fleet = await make(timeouts={"total_s": 0.5, "abort_s": 2, "drain_s": 2})

    async def script(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(chunk("one"))
        await asyncio.Event().wait()
        raise AssertionError("never")

    fleet["b-decode"].script = script
    _, got = await fleet.post(SHORT | {"stream": True})
    assert b'"code":"timeout"' in got
    assert await asyncio.wait_for(fleet["b-decode"].aborted.get(), 20)


async def test_models_health_and_unknown_paths(make: Make) -> None:
    """The small routes, and HTTP-level errors in OpenAI's shape."""
    fleet = await make()
    async with fleet.client.get("/v1/models") as response:
        [model] = (await response.json())["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 2000)
    async with fleet.client.get("/health") as response:
        assert (response.status, (await response.json())["status"]) == (200, "ok")
    for method, path, status in (("GET", CHAT, 405), ("POST", "/v1/nothing", 404)):
        async with fleet.client.request(method, path) as response:
            assert response.status == status
            assert (await response.json())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b'{"messages": [', 400, "invalid_json"),
        (json.dumps(SHORT | {"model": "gpt-9"}).encode(), 404, "model_not_found"),
        (
            json.dumps({"messages": [{"role": "user", "content": "x" * 1990}]}).encode(),
            400,
            "context_length_exceeded",
        ),
        (json.dumps(SHORT | {"n": 2}).encode(), 400, None),
        (b"x" * 5000, 413, "body_too_large"),
    ],
)
async def test_bad_requests_never_reach_a_worker(
    make: Make, raw: bytes, status: int, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Each with its status, its code, a request id, and one log line."""
    caplog.set_level(logging.INFO)
    fleet = await make(limits={"body_bytes": 4096})
    async with fleet.client.post(CHAT, data=raw) as response:
        assert response.status == status
        assert "x-prfaas-request-id" in response.headers
        error = (await response.json())["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    if code == "context_length_exceeded":
        assert "2000 tokens" in error["message"]
        assert "2010 tokens" in error["message"]
    assert not any(worker.bodies for worker in fleet.workers.values())
    assert [line["outcome"] for line in lines(caplog)] == ["client_error"]


async def test_worker_refusal_is_passed_on(make: Make) -> None:
    """A 400 of the engine is the client's: its status and its words, no second try."""
    fleet = await make()
    fleet["b-decode"].script = answer(400, "top_k is odd")
    response, got = await fleet.post(SHORT)
    assert response.status == 400
    assert json.loads(got)["error"]["message"] == "top_k is odd"
    assert len(fleet["b-decode"].bodies) == 1
    assert not fleet["a-prefill"].bodies
