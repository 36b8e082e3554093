"""Questions at a fixed rate, and how long their answers took."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.index_service.events import Prompt
from benchmarks.index_service.services import Service


@dataclass(frozen=True, slots=True)
class Latency:
    """One run: microseconds, and the service's processor time a call."""

    p50: float
    p90: float
    p99: float
    worst: float
    cpu: float
    achieved: float


async def open_loop(service: Service, prompts: list[Prompt], seconds: float, rate: float) -> Latency:
    """Ask `rate` times a second whatever the answers do.

    A thread keeps time, since a loop's timers count milliseconds.
    """
    loop = asyncio.get_running_loop()
    number = int(rate * seconds)
    took: list[float] = []
    tasks: list[asyncio.Task[None]] = []
    started = loop.create_future()

    async def ask(planned_s: float, what: Prompt) -> None:
        assert await service.matched(what) == len(what.hashes)
        took.append(time.perf_counter() - planned_s)

    def tick() -> None:
        first_s = time.perf_counter() + 0.05
        for at in range(number):
            planned_s = first_s + at / rate
            wait_s = planned_s - time.perf_counter()
            if wait_s > 0:
                time.sleep(wait_s)
            loop.call_soon_threadsafe(begin, planned_s, prompts[at % len(prompts)])
        loop.call_soon_threadsafe(started.set_result, None)

    def begin(planned_s: float, what: Prompt) -> None:
        tasks.append(loop.create_task(ask(planned_s, what)))

    cpu_before, wall = _cpu_s(service.pid), time.perf_counter()
    ticker = threading.Thread(target=tick)
    ticker.start()
    await started
    await asyncio.gather(*tasks)
    wall = time.perf_counter() - wall
    ticker.join()
    took.sort()
    return Latency(
        *(1e6 * took[int(share * (number - 1))] for share in (0.5, 0.9, 0.99, 1.0)),
        cpu=1e6 * (_cpu_s(service.pid) - cpu_before) / number,
        achieved=number / wall,
    )


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process, in steps of 10 ms; 0 when it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100
    return 0.0
