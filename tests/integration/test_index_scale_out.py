"""Several cache services of one site: each follows every worker itself, any of them can answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from cache_service.client import IndexClient
from cache_service.core.errors import ConfigError
from tests.integration.cache_support import DEADLINE_S, NAMESPACE, PAGE, CacheProcess, Worker, stored, until

RATE = 500
SECONDS = 4.0
CHAIN = list(range(1, 65))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[list[CacheProcess], Worker]]:
    """Two services that follow one worker."""
    worker = Worker()
    worker.start()
    processes = [CacheProcess(tmp_path, [worker]) for _ in range(2)]
    await asyncio.gather(*(process.start() for process in processes))
    worker.publish(stored(CHAIN))
    for process in processes:
        await process.matches(CHAIN, {"a-prefill-0": 64 * PAGE})
    yield processes, worker
    await asyncio.gather(*(process.close() for process in processes))
    worker.stop()


async def load(client: IndexClient, seconds: float) -> tuple[int, list[str], float]:
    """Ask RATE times a second; how many, why those without the right answer, and the worst wait."""
    reasons: list[str] = []
    worst_s = 0.0

    async def one() -> None:
        nonlocal worst_s
        started_s = time.perf_counter()
        answer = await client.match(NAMESPACE, CHAIN, 64 * PAGE + 1)
        worst_s = max(worst_s, time.perf_counter() - started_s)
        if [holder.matched_tokens for holder in answer.holders] != [64 * PAGE]:
            reasons.append(answer.reason or f"{answer.holders}")

    loop = asyncio.get_running_loop()
    first_s = loop.time()
    number = int(RATE * seconds)
    async with asyncio.TaskGroup() as group:
        for at in range(number):
            await asyncio.sleep(max(0.0, first_s + at / RATE - loop.time()))
            group.create_task(one())
    return number, reasons, worst_s


@pytest.mark.parametrize("restart", [False, True], ids=["killed", "killed-and-back"])
async def test_kill_one_of_two_under_load(pair, restart: bool) -> None:
    """SIGKILL of the service being asked loses no request; with a restart, the other one may go as well."""
    processes, _ = pair
    client = IndexClient([process.address for process in processes], timeout_s=2.0)
    loading = asyncio.create_task(load(client, SECONDS))
    await asyncio.sleep(SECONDS / 4)  # the load's own time, not a wait for an event
    first = await asked(processes)
    await first.kill()
    if restart:
        await first.start()
        await first.matches(CHAIN, {"a-prefill-0": 64 * PAGE})
        (second,) = (process for process in processes if process is not first)
        await until(lambda: healthy(client, 2), "the client to see both")
        await second.kill()
    number, reasons, worst_s = await loading
    print(
        f"{number} requests, {len(reasons)} failed, worst {1e3 * worst_s:.0f} ms, "
        f"{client.failovers} failovers"
    )
    assert reasons == []
    assert client.failovers >= 1
    await client.close()


async def asked(processes: list[CacheProcess]) -> CacheProcess:
    """Return the service that has answered most: the one that the client asks."""

    async def answered(process: CacheProcess) -> float:
        url = f"http://127.0.0.1:{process.metrics_port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            found = re.search(
                r'^prfaas_index_match_requests_total{outcome="ok"} (.+)$', await answer.text(), re.M
            )
        return float(found[1]) if found else 0.0

    counts = [await answered(process) for process in processes]
    return processes[counts.index(max(counts))]


async def healthy(client: IndexClient, number: int) -> bool:
    return client.healthy == number


async def test_all_dead_costs_nothing(pair) -> None:
    """With every circuit open an answer takes no time, and the service is found again when it is back."""
    processes, _ = pair
    client = IndexClient([process.address for process in processes], timeout_s=2.0)
    assert (await client.match(NAMESPACE, CHAIN, 64 * PAGE)).available
    await asyncio.gather(*(process.kill() for process in processes))
    assert (await client.match(NAMESPACE, CHAIN, 64 * PAGE)).reason == "unreachable"
    started_s = time.perf_counter()
    for _ in range(1000):
        assert not (await client.match(NAMESPACE, CHAIN, 64 * PAGE)).available
    each_us = 1e6 * (time.perf_counter() - started_s) / 1000
    print(f"{each_us:.0f} us a request with every service dead")
    assert each_us < 1000
    assert client.unavailable["unreachable"] == 1001
    await processes[0].start()

    async def back() -> bool:
        return (await client.match(NAMESPACE, CHAIN, 64 * PAGE)).available

    await until(back, "the client to find the service again")
    await client.close()


async def test_silent_service_leaves_time(pair) -> None:
    """A service that accepts and says nothing costs half of one deadline, once."""
    processes, _ = pair
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    for _ in range(4):  # which one is asked first is random
        client = IndexClient([f"127.0.0.1:{port}", processes[0].address], timeout_s=3.0)
        for _ in range(3):
            answer = await client.match(NAMESPACE, CHAIN, 64 * PAGE)
            assert answer.available, answer
        await client.close()
    silent.close()


async def test_one_name_for_several(pair) -> None:
    """A name that resolves is asked; one that does not is no answer, in time."""
    processes, _ = pair
    named = IndexClient(f"localhost:{processes[0].listen_port}", timeout_s=2.0)
    assert (await named.match(NAMESPACE, CHAIN, 64 * PAGE)).available
    await named.close()
    unknown = IndexClient("no-such-name.invalid:7001", timeout_s=0.3)
    started_s = time.perf_counter()
    answer = await unknown.match(NAMESPACE, CHAIN, 64 * PAGE)
    assert answer.reason in ("unreachable", "deadline")
    assert time.perf_counter() - started_s < DEADLINE_S / 4
    await unknown.close()
    with pytest.raises(ConfigError, match="0 addresses"):
        IndexClient([])
