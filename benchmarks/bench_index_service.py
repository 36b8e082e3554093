"""The index as a service against Dynamo's standalone indexer: Match latency, and ingest of KV events.

Both follow the same publishers (SGLang's msgpack batches over ZMQ) and answer the same prompts. Match: open
loop at a fixed rate, one asynchronous client as a router has it (uvloop), latency from the planned time.
Ingest: from the first batch sent until the last prompt is found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop
import zmq

from benchmarks.harness import Row, run
from benchmarks.index_service import peers
from benchmarks.index_service.events import Publisher, batch, prompt
from benchmarks.index_service.load import Latency, open_loop
from benchmarks.index_service.services import Dynamo, Ours, Service
from benchmarks.transfer.peers import Missing
from prfaas_sglang.fleet.ports import free_port

RATE = 500.0
BLOCKS = 64
PROMPTS = 500
WORKERS = 4
ROUNDS = 3
PEER = "dynamo.indexer"

Start = Callable[[list[str]], Coroutine[Any, Any, Service]]


def match(smoke: bool) -> list[Row]:
    """Match at RATE."""
    return uvloop.run(_match(1.0 if smoke else 6.0, 1 if smoke else ROUNDS))


def ingest(smoke: bool) -> list[Row]:
    """Blocks of events a second."""
    return uvloop.run(_ingest(200 if smoke else 4000, 1 if smoke else ROUNDS))


async def _match(seconds: float, rounds: int) -> list[Row]:
    prompts = [prompt(number, BLOCKS) for number in range(PROMPTS)]

    async def measure(service: Service, publishers: list[Publisher]) -> Latency:
        for what in prompts:
            publishers[0].publish(batch(what))
        await _found(service, prompts[-1])
        await open_loop(service, prompts, 0.5, RATE)
        return await open_loop(service, prompts, seconds, RATE)

    ours, theirs, why = await _alternate(measure, rounds)
    rows = []
    for name in ("p50", "p99"):
        mine = _median(getattr(one, name) for one in ours)
        peer = _median(getattr(one, name) for one in theirs) if theirs else None
        rows.append(
            Row(
                f"Match {name}, {BLOCKS} blocks, {RATE:g}/s open loop",
                "us",
                mine,
                peer,
                why or f"{PEER} /query_by_hash",
                bar=1.0,
                lower_is_better=True,
                note=_said(ours, theirs),
            )
        )
    return rows


async def _ingest(prompts: int, rounds: int) -> list[Row]:
    batches = [prompt(number, BLOCKS) for number in range(prompts)]
    payloads = [batch(one) for one in batches]

    async def measure(service: Service, publishers: list[Publisher]) -> float:
        first = prompt(1 << 20, 1)
        for publisher in publishers:
            publisher.publish(batch(first))
        await _found(service, first)
        started_s = time.perf_counter()

        def send() -> None:
            for at, payload in enumerate(payloads):
                publishers[at % len(publishers)].publish(payload)

        await asyncio.to_thread(send)
        for last in batches[-len(publishers) :]:
            await _found(service, last)
        took_s = time.perf_counter() - started_s
        for one in batches[:: max(1, prompts // 100)]:
            assert await service.matched(one) == BLOCKS, "a batch was lost"
        return prompts * BLOCKS / took_s

    ours, theirs, why = await _alternate(measure, rounds, workers=WORKERS)
    return [
        Row(
            f"ingest, {WORKERS} workers, batches of {BLOCKS} blocks",
            "blocks/s",
            _median(ours),
            _median(theirs) if theirs else None,
            why or PEER,
            bar=1.0,
            note=f"ours {min(ours):.0f}..{max(ours):.0f}",
        )
    ]


async def _alternate(
    measure: Callable[[Service, list[Publisher]], Coroutine[Any, Any, Any]], rounds: int, workers: int = 1
) -> tuple[list[Any], list[Any], str]:
    """Run ours, theirs, ours, ...; return both results, and why the peer could not run."""
    why, command = "", []
    try:
        command = await asyncio.to_thread(peers.dynamo)
    except Missing as error:
        why = str(error)
    ours: list[Any] = []
    theirs: list[Any] = []
    for _ in range(rounds):
        ours.append(await _with(lambda where: Ours.start(where), measure, workers))
        if command:
            theirs.append(await _with(lambda where: Dynamo.start(command, where, 2), measure, workers))
    return ours, theirs, why


async def _with(
    start: Start, measure: Callable[[Service, list[Publisher]], Coroutine[Any, Any, Any]], workers: int
) -> Any:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publishers = [Publisher(context, free_port()) for _ in range(workers)]
    try:
        service = await start([publisher.address for publisher in publishers])
        try:
            await _subscribed(service, publishers)
            return await measure(service, publishers)
        finally:
            await service.stop()
    finally:
        for publisher in publishers:
            publisher.close()
        context.term()


async def _subscribed(service: Service, publishers: list[Publisher]) -> None:
    """Publish until something arrives: PUB drops what it sends before a subscription is there."""
    for number, publisher in enumerate(publishers):
        probe = prompt((1 << 21) + number, 1)
        async with asyncio.timeout(30):
            while not await service.matched(probe):
                publisher.publish(batch(probe))
                await asyncio.sleep(0.05)


async def _found(service: Service, what: Any) -> None:
    async with asyncio.timeout(120):
        while await service.matched(what) < len(what.hashes):
            await asyncio.sleep(0.005)


def _median(values: Any) -> float:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2])


def _said(ours: list[Latency], theirs: list[Latency]) -> str:
    def one(name: str, runs: list[Latency]) -> str:
        p90, cpu = _median(r.p90 for r in runs), _median(r.cpu for r in runs)
        return f"{name} p90 {p90:.0f} max {max(r.worst for r in runs):.0f} us, {cpu:.0f} us of processor"

    said = f"{one('ours', ours)}, {_median(r.achieved for r in ours):.0f}/s achieved"
    return f"{said}; {one('theirs', theirs)}" if theirs else said


if __name__ == "__main__":
    run("index_service", {"match": match, "ingest": ingest}, __doc__.partition("\n")[0])
