"""Match at a fixed rate beside each of the calls that read the whole index: Explain, Dump, Check.

One service with 2 M blocks of four workers; Match over the client's own path, open loop, latency from the
planned time; the calls from a process of their own, without a pause between them.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

import msgspec
import uvloop
import zmq

from benchmarks.harness import Row, run
from benchmarks.index_service.caller import METHODS
from benchmarks.index_service.events import PAGE, Prompt, Publisher
from benchmarks.index_service.load import Latency, open_loop
from benchmarks.index_service.services import ROOT, Ours
from prfaas_sglang.fleet.ports import free_port

RATE = 200.0
WORKERS = 4
CHAIN = 256
ASKED = 64


def admin(smoke: bool) -> list[Row]:
    """Match alone, and beside each call."""
    return uvloop.run(_admin(20_000 if smoke else 2_000_000, 1.0 if smoke else 12.0))


async def _admin(blocks: int, seconds: float) -> list[Row]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publishers = [Publisher(context, free_port()) for _ in range(WORKERS)]
    service = await Ours.start([publisher.address for publisher in publishers])
    try:
        prompts = await _fill(service, publishers, blocks)
        await open_loop(service, prompts, 0.5, RATE)
        rows = []
        for method in (None, *METHODS):
            latency, calls = await _beside(service, prompts, method, seconds)
            note = f"max of {int(RATE * seconds)}"
            if calls:
                note += f", {len(calls)} calls, median {sorted(calls)[len(calls) // 2]:.2f} s"
            for name, value in (("p50", latency.p50), ("p99", latency.p99), ("max", latency.worst)):
                label = f"Match {name} beside {method or 'nothing'}, {blocks} blocks, {RATE:g}/s"
                rows.append(Row(label, "us", value, None, "nobody", lower_is_better=True, note=note))
        return rows
    finally:
        await service.stop()
        for publisher in publishers:
            publisher.close()
        context.term()


async def _fill(service: Ours, publishers: list[Publisher], blocks: int) -> list[Prompt]:
    """Let the workers publish chains that none shares; return the first part of some of them."""
    rng = random.Random(1)
    chains = [[rng.getrandbits(63) for _ in range(CHAIN)] for _ in range(blocks // CHAIN)]
    prompts = [Prompt([0] * (ASKED * PAGE), chain[:ASKED], []) for chain in chains]
    async with asyncio.timeout(120):
        for number, publisher in enumerate(publishers):
            publisher.publish(_batch([number]))  # until something arrives: see bench_index_service
            probe = Prompt([0] * PAGE, [number], [])
            while not await service.matched(probe):
                publisher.publish(_batch([number]))
                await asyncio.sleep(0.05)
        for number, chain in enumerate(chains):
            publishers[number % WORKERS].publish(_batch(chain))
        for last in prompts[-WORKERS:]:
            while await service.matched(last) < ASKED:
                await asyncio.sleep(0.05)
    return prompts[:: max(1, len(prompts) // 500)]


def _batch(chain: list[int]) -> bytes:
    event = {
        "type": "BlockStored",
        "block_hashes": chain,
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": PAGE,
        "lora_id": None,
        "medium": "GPU",
    }
    return msgspec.msgpack.encode([time.time(), [event], 0])


async def _beside(
    service: Ours, prompts: list[Prompt], method: str | None, seconds: float
) -> tuple[Latency, list[float]]:
    """Measure Match while `method` is called; return also the seconds of each of its calls."""
    if method is None:
        return await open_loop(service, prompts, seconds, RATE), []
    caller = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.index_service.caller", service.address, method),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert caller.stdout is not None
    try:
        await caller.stdout.readline()  # it is under way
        latency = await open_loop(service, prompts, seconds, RATE)
    finally:
        caller.kill()
        rest = await caller.stdout.read()
        await caller.wait()
    return latency, [float(line) for line in rest.split()]


if __name__ == "__main__":
    run("index_admin", {"admin": admin}, __doc__.partition("\n")[0])
