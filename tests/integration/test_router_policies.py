"""The router's policies, admission and decision log between real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from tests.integration.test_router_serving import CHAT, LONG, SHORT, Fleet, Make, make

__all__ = ["make"]
#: 1 kB and 1 ms a token at home, a tenth of the time in the other site.
PROFILES = {
    name: {
        "format": 1,
        "name": name,
        "kv": {"bytes_per_token": 1000.0},
        "prefill": {"fixed_s": 0.0, "per_token_s": per_token_s},
        "decode": {"max_batch": 10, "step_s": 0.025},
    }
    for name, per_token_s in (("home", 1e-3), ("away", 1e-4))
}
PER_WORKER: dict[str, dict[str, Any]] = {
    "a-prefill": {"profile": "away"},
    "b-prefill": {"profile": "home"},
    "b-decode": {"profile": "home", "kv_tokens": 2000},
}


async def decisions(fleet: Fleet, n: int = 100) -> list[dict[str, Any]]:
    async with fleet.client.get(f"/decisions?n={n}") as response:
        return (await response.json())["decisions"]


async def test_ttft_weighs_the_link_and_says_what_it_predicted(make: Make) -> None:
    """A long prompt crosses a fast link and stays off a slow one; terms, bytes and price are told."""
    for gbps, site in ((10, "A"), (1e-5, "B")):
        fleet = await make(
            policy={"name": "ttft"},
            profiles=PROFILES,
            per_worker=PER_WORKER,
            links=[{"src": "A", "dst": "B", "gbps": gbps, "price_per_gb": 2.0}],
        )
        response, _ = await fleet.post(LONG)
        assert (response.status, response.headers["x-prfaas-prefill-site"]) == (200, site)
        (entry,) = await decisions(fleet)
        tokens = entry["prompt_tokens"]
        assert entry["reason"] == "least_ttft"
        if site == "A":
            assert entry["wire_bytes"] == 1000 * tokens
            assert entry["cost"] == 2.0e-6 * tokens
            assert abs(entry["predicted"]["prefill_s"] - 1e-4 * tokens) < 1e-9
            line = f'prfaas_router_wire_bytes_total{{dst_site="B",src_site="A"}} {1000.0 * tokens}'
            assert await fleet.metric(line)


async def test_decisions_are_bounded_and_their_count_is_checked(make: Make) -> None:
    """The last two of three, or one; not a number is refused; no prompt in it."""
    fleet = await make(decisions=2)
    for _ in range(3):
        await fleet.post(SHORT)
    assert len(await decisions(fleet)) == 2
    assert len(await decisions(fleet, 1)) == 1
    async with fleet.client.get("/decisions?n=-1") as response:
        assert response.status == 400
        assert "n: accepted" in await response.text()


async def _hold(fleet: Fleet) -> asyncio.Task[Any]:
    """Start a request that decode does not answer, and wait until it is there."""
    task = asyncio.ensure_future(fleet.post(LONG | {"max_tokens": 1000}))
    await asyncio.wait_for(fleet["b-decode"].arrived.wait(), 10)
    return task


class Stuck:
    """Script: the first request is answered when `go` is set, the others at once."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.first = True

    async def __call__(self, _: web.Request, __: dict[str, Any]) -> web.StreamResponse | None:
        if self.first:
            self.first = False
            await self.go.wait()
        return None


async def test_a_full_decode_worker_makes_requests_wait_their_turn(make: Make) -> None:
    """No pages for the second until the first has ended; then it is served."""
    fleet = await make(profiles=PROFILES, per_worker=PER_WORKER)
    stuck = fleet["b-decode"].script = Stuck()
    first = await _hold(fleet)
    second = asyncio.ensure_future(fleet.post(LONG | {"max_tokens": 1000}))
    async with asyncio.timeout(10):
        while not await fleet.metric('prfaas_router_waiting_requests{class="standard"} 1.0'):
            await asyncio.sleep(0.01)
    assert len(fleet["b-decode"].bodies) == 1
    stuck.go.set()
    assert (await first)[0].status == (await second)[0].status == 200
    assert await fleet.metric('prfaas_router_admissions_total{class="standard",outcome="admit"} 2.0')


async def test_a_client_that_leaves_the_queue_frees_its_place(make: Make) -> None:
    """The waiting client goes away: nobody waits, its request never reaches a worker."""
    fleet = await make(profiles=PROFILES, per_worker=PER_WORKER)
    stuck = fleet["b-decode"].script = Stuck()
    first = await _hold(fleet)
    second = asyncio.ensure_future(fleet.post(LONG | {"max_tokens": 1000}))
    async with asyncio.timeout(10):
        while not await fleet.metric('prfaas_router_waiting_requests{class="standard"} 1.0'):
            await asyncio.sleep(0.01)
        second.cancel()
        while not await fleet.metric('prfaas_router_waiting_requests{class="standard"} 0.0'):
            await asyncio.sleep(0.01)
    stuck.go.set()
    assert (await first)[0].status == 200
    assert len(fleet["b-decode"].bodies) == 1


async def test_a_full_queue_is_429_with_a_retry_after(make: Make) -> None:
    """One may wait: the next is told when to come back, in OpenAI's shape."""
    fleet = await make(profiles=PROFILES, per_worker=PER_WORKER, admission={"waiting": 1})
    stuck = fleet["b-decode"].script = Stuck()
    first = await _hold(fleet)
    second = asyncio.ensure_future(fleet.post(LONG | {"max_tokens": 1000}))
    async with asyncio.timeout(10):
        while not await fleet.metric('prfaas_router_waiting_requests{class="standard"} 1.0'):
            await asyncio.sleep(0.01)
    async with fleet.client.post(CHAT, json=LONG) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == "not_admitted"
    stuck.go.set()
    await asyncio.gather(first, second)


async def test_a_class_that_is_none_is_refused(make: Make) -> None:
    """400 with the accepted values."""
    fleet = await make()
    async with fleet.client.post(CHAT, json=SHORT, headers={"x-prfaas-class": "gold"}) as response:
        assert response.status == 400
        assert "interactive, standard, batch" in await response.text()
    async with fleet.client.post(CHAT, json=SHORT, headers={"x-prfaas-class": "batch"}) as response:
        assert response.status == 200


async def test_the_long_loop_changes_the_threshold(make: Make) -> None:
    """Prompts of one length, a far too high threshold: it comes down, and /decisions says why."""
    fleet = await make(
        policy={"threshold_tokens": 100_000},
        profiles=PROFILES,
        per_worker=PER_WORKER | {"b-decode": {"profile": "home"}},
        tune={"enabled": True, "period_s": 0.6, "min_requests": 5, "damping": 1.0},
    )
    for n in range(8):
        await fleet.post(LONG if n % 2 else SHORT)
    async with asyncio.timeout(20):
        while True:
            async with fleet.client.get("/decisions") as response:
                body = await response.json()
            if body["proposal"] is not None:
                break
            await asyncio.sleep(0.05)
    assert body["threshold_tokens"] == body["proposal"]["threshold_tokens"] < 100_000
    assert body["proposal"]["gain_ratio"] > 0
