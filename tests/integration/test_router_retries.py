"""What another worker can absorb, the client never sees; what it cannot, the client is told once."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web

from tests.integration.router_support import ANSWER, STREAM, answer, chunk, hang
from tests.integration.test_router_serving import CHAT, LONG, SHORT, Make, lines, make

__all__ = ["make"]


@pytest.mark.parametrize("stream", [False, True])
async def test_unreachable_prefill_is_retried_on_the_other_site(
    make: Make, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Remote prefill is gone: the local one serves with a new room and rid; the first rid is aborted."""
    caplog.set_level(logging.INFO)
    fleet = await make()
    await fleet["a-prefill"].stop()
    response, got = await fleet.post(LONG | {"stream": stream})
    assert (response.status, got) == (200, b"".join(STREAM) if stream else ANSWER)
    assert response.headers["x-prfaas-route"] == "local"
    assert response.headers["x-prfaas-reason"] == "remote_unavailable"
    assert response.headers["x-prfaas-retries"] == "1"
    second = fleet["b-prefill"].bodies[0]
    assert response.headers["x-prfaas-room"] == str(second["bootstrap_room"])
    aborted = await asyncio.wait_for(fleet["b-decode"].aborted.get(), 20)
    assert aborted == response.headers["x-prfaas-request-id"]
    assert second["rid"] != aborted
    [line] = lines(caplog)
    assert (line["outcome"], line["retries"], line["failures"]) == ("ok", 1, ["prefill:connect:503"])
    assert fleet.service.in_flight() == 0


@pytest.mark.parametrize("short", [True, False])
async def test_prefill_error_is_retried(make: Make, short: bool) -> None:
    """A 500 of either site's prefill worker: the other site serves."""
    fleet = await make()
    broken, other = ("b-prefill", "a-prefill") if short else ("a-prefill", "b-prefill")
    fleet[broken].script = answer(500, "out of memory")
    response, got = await fleet.post(SHORT if short else LONG)
    assert (response.status, got) == (200, ANSWER)
    assert response.headers["x-prfaas-prefill-worker"] == other
    assert await fleet.metric('prfaas_router_upstream_failures_total{kind="status",side="prefill"} 1.0')


async def test_error_inside_a_prefill_stream_is_a_failure(make: Make) -> None:
    """SGLang answers 200 and puts the error into the stream: noticed, retried."""
    fleet = await make()

    async def script(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"error": {"message": "KV transfer failed", "code": 500}}\n\n')
        return response

    fleet["b-prefill"].script = script
    response, got = await fleet.post(SHORT | {"stream": True})
    assert (response.headers["x-prfaas-prefill-worker"], got) == ("a-prefill", b"".join(STREAM))


@pytest.mark.parametrize("status", [500, 503])
async def test_decode_error_is_retried_on_another_decode_worker(make: Make, status: int) -> None:
    """A decode worker that fails after its prefill was done, or has no room, is left out."""
    fleet = await make(second_decode=True)
    prefilled = fleet["b-prefill"].rooms

    async def script(_: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.wait_for(prefilled.of(body["bootstrap_room"]).wait(), 20)
        while fleet.service.in_flight() != 1:  # the router has read the prefill's answer
            await asyncio.sleep(0)
        return web.json_response({"message": "broken"}, status=status)

    fleet["b-decode"].script = script
    response, got = await fleet.post(SHORT)
    assert (response.status, got) == (200, ANSWER)
    assert response.headers["x-prfaas-decode-worker"] == "b-decode2"
    assert response.headers["x-prfaas-prefill-worker"] == "b-prefill", "its cache is warm now"


async def test_unreachable_decode_is_retried(make: Make) -> None:
    """Connection refused at the decode worker."""
    fleet = await make(second_decode=True)
    await fleet["b-decode"].stop()
    response, _ = await fleet.post(SHORT)
    assert (response.status, response.headers["x-prfaas-decode-worker"]) == (200, "b-decode2")


async def test_error_in_the_first_event_is_retried(make: Make) -> None:
    """Nothing of a stream goes out before its first event is known to be no error."""
    fleet = await make()
    calls = []

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        calls.append(body)
        if len(calls) > 1:
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"meta_info": {"finish_reason": {"type": "abort", "status_')
        await response.write(b'code": 500, "message": "transfer failed"}}}\n\n')
        return response

    fleet["b-decode"].script, fleet["a-prefill"].script = script, hang
    response, got = await fleet.post(LONG | {"stream": True})
    assert (response.headers["x-prfaas-prefill-worker"], got) == ("b-prefill", b"".join(STREAM))


async def test_every_worker_fails_once_and_the_client_is_told(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Each prefill worker is tried once; the last failure is the answer, in OpenAI's shape."""
    caplog.set_level(logging.INFO)
    fleet = await make()
    for name in ("a-prefill", "b-prefill"):
        fleet[name].script = answer(500, "out of memory")
    response, got = await fleet.post(LONG)
    assert (response.status, response.headers["x-prfaas-retries"]) == (502, "1")
    assert json.loads(got)["error"] == {
        "message": "out of memory", "type": "server_error", "param": None, "code": "prefill_status",
    }  # fmt: skip
    assert [len(fleet[n].bodies) for n in ("a-prefill", "b-prefill", "b-decode")] == [1, 1, 2]
    assert lines(caplog)[0]["outcome"] == "upstream_error"
    assert fleet.service.in_flight() == 0


@pytest.mark.parametrize(("status", "expected"), [(500, 502), (503, 503), (429, 429), (504, 504)])
async def test_statuses_for_the_client(make: Make, status: int, expected: int) -> None:
    """Overload stays what it is (with Retry-After); other server errors become 502."""
    fleet = await make()
    for name in ("a-prefill", "b-prefill"):
        fleet[name].script = answer(status, "no")
    response, _ = await fleet.post(SHORT)
    assert response.status == expected
    assert ("Retry-After" in response.headers) is (expected in (429, 503))


async def test_silence_is_bounded(make: Make) -> None:
    """Workers that take the request and never answer: 504 at the deadline, both aborted."""
    fleet = await make(timeouts={"total_s": 0.3, "abort_s": 2, "drain_s": 2})
    fleet["b-prefill"].script = fleet["b-decode"].script = hang
    response, got = await fleet.post(SHORT)
    assert response.status == 504
    assert json.loads(got)["error"]["type"] == "server_error"
    for name in ("b-prefill", "b-decode"):
        await asyncio.wait_for(fleet[name].aborted.get(), 20)


async def test_broken_worker_is_left_alone_after_a_few_failures(make: Make) -> None:
    """The breaker opens: later requests go elsewhere at once, /health says degraded, then unavailable."""
    fleet = await make(health={"failures": 2, "cooldown_s": 600, "max_cooldown_s": 600})
    await fleet["a-prefill"].stop()
    tries = [(await fleet.post(LONG))[0].headers["x-prfaas-retries"] for _ in range(3)]
    assert tries == ["1", "1", "0"]
    async with fleet.client.get("/health") as response:
        health = await response.json()
    assert (response.status, health["status"]) == (200, "degraded")
    assert health["workers"]["a-prefill"]["breaker"] == "open"
    assert await fleet.metric('prfaas_router_worker_usable{worker="a-prefill"} 0.0')
    await fleet["b-prefill"].stop()
    for _ in range(2):
        assert (await fleet.post(LONG))[0].status == 503
    response, got = await fleet.post(LONG)
    assert (response.status, json.loads(got)["error"]["code"]) == (503, "no_prefill_worker")
    assert response.headers["Retry-After"] == "1"
    async with fleet.client.get("/health") as response:
        assert (response.status, (await response.json())["status"]) == (503, "unavailable")


async def test_answer_too_long_to_hold_is_refused(make: Make) -> None:
    """A whole answer beyond the limit is an error that tells the way out, not memory."""
    fleet = await make(limits={"answer_bytes": 1024})

    async def script(_: web.Request, __: dict[str, Any]) -> web.Response:
        return web.Response(body=b"x" * 5000, content_type="application/json")

    fleet["b-decode"].script = script
    response, got = await fleet.post(SHORT)
    assert response.status == 502
    assert "ask for a stream" in json.loads(got)["error"]["message"]


async def test_a_request_that_breaks_workers_is_not_sent_to_all_of_them(make: Make) -> None:
    """Two prefill workers break off on it: the third never sees it, and the client is told."""
    fleet = await make(second_prefill=True)

    async def cut(request: web.Request, _: dict[str, Any]) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    prefills = [worker for name, worker in fleet.workers.items() if "prefill" in name]
    assert len(prefills) == 3
    for worker in prefills:
        worker.script = cut
    response, got = await fleet.post(LONG)
    assert response.status == 502
    assert b"broke off" in got
    assert sum(len(worker.bodies) for worker in prefills) == 2


def first_token(text: str) -> tuple[bytes, ...]:
    """A prefill worker's stream of one token."""
    done = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    return (chunk(text), done, b"data: [DONE]\n\n")


async def test_the_first_token_does_not_wait_for_decode(make: Make) -> None:
    """Prefill has it while decode still waits for KV: the client gets it, then decode's rest, once each."""
    fleet = await make()
    fleet["b-prefill"].stream = first_token("caf\u00e9 ")
    go = asyncio.Event()

    async def script(_: web.Request, __: dict[str, Any]) -> None:
        await go.wait()

    fleet["b-decode"].script = script
    async with fleet.client.post(CHAT, json=SHORT | {"stream": True}) as response:
        first = await response.content.readuntil(b"\n\n")
        assert json.loads(first[6:])["choices"][0]["delta"]["content"] == "caf\u00e9 "
        go.set()
        rest = await response.content.read()
    texts = [json.loads(e[6:])["choices"][0]["delta"]["content"] for e in rest.split(b"\n\n")[:-2]]
    assert "".join(texts) == "end"
    assert rest.endswith(b"data: [DONE]\n\n")
    assert await fleet.metric('prfaas_router_first_tokens_total{outcome="prefill"} 1.0')


@pytest.mark.parametrize(("second", "ends"), [("caf\u00e9 ", "ok"), ("other ", "broken")])
async def test_a_route_that_fails_behind_the_first_token_is_replaced(
    make: Make, second: str, ends: str
) -> None:
    """Decode breaks after the token was sent: another goes on behind the same token, or the stream ends."""
    fleet = await make(second_decode=True)
    for name in ("a-prefill", "b-prefill"):
        fleet[name].stream = first_token("caf\u00e9 ")
    sent = asyncio.Event()
    calls = 0

    async def script(_: web.Request, __: dict[str, Any]) -> web.StreamResponse | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await sent.wait()
            return web.json_response({"error": {"message": "broke", "code": 500}}, status=500)
        return None

    for name in ("b-decode", "b-decode2"):
        fleet[name].script = script
        fleet[name].stream = (chunk(second), *STREAM[2:])
    async with fleet.client.post(CHAT, json=SHORT | {"stream": True}) as response:
        first = await response.content.readuntil(b"\n\n")
        assert b"caf" in first
        sent.set()
        rest = await response.content.read()
    assert (b"stream_broken" in rest) == (ends == "broken")
    assert (b'"end"' in rest) == (ends == "ok")


@pytest.mark.parametrize(
    ("side", "told", "reason"),
    [
        ("b-decode", {"reasoning_parser": "qwen3"}, "reasoning_parser"),
        ("b-prefill", {"reasoning_parser": "qwen3"}, "reasoning_parser"),
        ("b-decode", None, "worker_unknown"),
    ],
)
async def test_workers_that_hold_text_back_are_waited_for(
    make: Make, side: str, told: dict[str, Any] | None, reason: str
) -> None:
    """Decode answers after prefill's token was refused: the client gets decode's stream alone."""
    fleet = await make()
    fleet["b-prefill"].stream = first_token("<thi")
    fleet[side].info = {} if told is None else fleet[side].info | told
    response, got = await fleet.post(SHORT | {"stream": True})
    assert response.status == 200
    assert got == b"".join(STREAM)
    counted = [f'prfaas_router_first_tokens_total{{outcome="{r}"}} 1.0' for r in (reason, "decode_was_first")]
    assert any([await fleet.metric(line) for line in counted])


async def test_workers_are_asked_about_themselves_once(make: Make) -> None:
    """Not for each stream; and with the client's credentials."""
    fleet = await make()
    fleet["b-prefill"].stream = first_token("caf\u00e9 ")
    headers = {"Authorization": "Bearer k"}
    for _ in range(5):
        async with fleet.client.post(CHAT, json=SHORT | {"stream": True}, headers=headers) as response:
            assert (await response.read()).count(b"caf") == 1
    for name in ("b-prefill", "b-decode"):
        assert [asked.get("Authorization") for asked in fleet[name].asked] == ["Bearer k"]
