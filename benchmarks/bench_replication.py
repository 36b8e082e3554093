"""Replication through a real 3-member etcd on this machine: delivery, latency, CPU, restart, the filter.

Four sites each offer 40,000 blocks per second as 50 ms segments; a service of a fifth site, in a process of
its own, follows all four into an index. Latency is from the moment a block is offered (it waits for its
segment) until the index has it. The bars are upper bounds, given as peer values. PRFAAS_TRACE
names a request trace in JSON lines with hash_ids; without one the filter's rows are left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import psutil

from benchmarks.harness import Row, run
from cache_service.core import delta
from cache_service.core.events import BlocksRemoved, BlocksStored
from cache_service.core.ids import BlockHash, Namespace, SiteId, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.publish import PublishFilter, PublishPolicy
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.replication.etcd_log import EtcdLog
from cache_service.replication.replica import Claims, Indexes, RemoteSite
from cache_service.store import LogWriter
from tests.integration.etcd_support import EtcdCluster, running

NAMESPACE = Namespace("bench", 64)
SITES = [SiteId(name) for name in "abcd"]
BLOCKS_PER_S = 40_000
FLUSH_S = 0.05
RUN_BLOCKS = 250
TRACE_PAGE_TOKENS = 512


def chain(number: int, blocks: int) -> tuple[BlockHash, ...]:
    """Return the names of a chain; the position in the load is the number, the time is told by it."""
    return tuple(BlockHash((number << 16) + i) for i in range(blocks))


async def write(endpoints: tuple[str, ...], seconds: float) -> dict[str, float]:
    """Offer the load of all four sites; return what was offered, and the clock at which it began."""
    async with EtcdClient(EtcdConfig(endpoints)) as etcd:
        indexes = [PrefixIndex() for _ in SITES]
        logs = [EtcdLog(etcd, NAMESPACE, site) for site in SITES]
        writers = [LogWriter(log, index) for log, index in zip(logs, indexes, strict=True)]
        for writer in writers:
            await writer.flush()
        await asyncio.sleep(3.0)  # the reader is there
        ending = time.monotonic() + seconds
        offered = [0] * len(SITES)

        async def offer(site: int) -> None:
            source = SourceId(WorkerId(f"{SITES[site]}-0"))
            indexes[site].add(source)
            started = time.monotonic()
            number = 0
            while (now := time.monotonic()) < ending:
                due = int((now - started) * BLOCKS_PER_S) // RUN_BLOCKS
                while number < due:
                    number += 1
                    # The chain's number carries the microsecond at which it was offered.
                    event = BlocksStored(chain(int(time.monotonic() * 1e6) * 4 + site, RUN_BLOCKS), None)
                    if indexes[site].apply(source, event).stored:
                        writers[site].add((source, event))
                        offered[site] += RUN_BLOCKS
                    await asyncio.sleep(0)
                await asyncio.sleep(0.002)

        async def flush(site: int) -> None:
            while time.monotonic() < ending + 1:
                began = time.monotonic()
                await writers[site].flush()
                await asyncio.sleep(max(0.0, FLUSH_S - (time.monotonic() - began)))

        await asyncio.gather(*(offer(i) for i in range(len(SITES))), *(flush(i) for i in range(len(SITES))))
        for writer in writers:
            await writer.settled()
        segments = sum(log.end.seq for log in logs)
        return {
            "offered": sum(offered),
            "bytes": sum(writer.written_bytes for writer in writers),
            "segments": segments,
        }


async def read(endpoints: tuple[str, ...], seconds: float) -> dict[str, object]:
    """Follow all four sites into one index for a while; return how many blocks came, and how late."""
    latencies: list[float] = []
    index = PrefixIndex()
    indexes, claims = Indexes(index), Claims({})

    async def follow(etcd: EtcdClient, name: SiteId) -> None:
        site = RemoteSite(name, 1, indexes, claims)
        async with aclosing(EtcdLog(etcd, NAMESPACE, name).watch(None)) as entries:
            async for entry in entries:
                await site.apply(entry)
                now = time.monotonic()
                if entry.payload:
                    for _, event in delta.decode(entry.payload):
                        offered = (event.hashes[0] >> 16) // 4 / 1e6  # type: ignore[union-attr]
                        latencies.append(now - offered)

    async with EtcdClient(EtcdConfig(endpoints)) as etcd:
        tasks = [asyncio.create_task(follow(etcd, site)) for site in SITES]
        await asyncio.wait(tasks, timeout=seconds)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
    quantiles = statistics.quantiles(latencies, n=100)
    return {"delivered": index.counts().entries, "p50": quantiles[49], "p99": quantiles[98]}


async def restart(endpoints: tuple[str, ...]) -> dict[str, float]:
    """Read one site's log from nothing into an index; return the time and the blocks."""
    started = time.monotonic()
    index = PrefixIndex()
    site = RemoteSite(SiteId("large"), 1, Indexes(index), Claims({}))
    async with (
        EtcdClient(EtcdConfig(endpoints)) as etcd,
        asyncio.timeout(120),
        aclosing(EtcdLog(etcd, NAMESPACE, SiteId("large")).watch(None)) as entries,
    ):
        async for entry in entries:
            await site.apply(entry)
            if index.counts().entries:
                break
    return {"seconds": time.monotonic() - started, "blocks": index.counts().entries}


async def fill(endpoints: tuple[str, ...], blocks: int) -> None:
    """Publish a large index as one snapshot."""
    index = PrefixIndex()
    source = SourceId(WorkerId("large-0"))
    index.add(source)
    for number in range(blocks // RUN_BLOCKS):
        index.apply(source, BlocksStored(chain(number, RUN_BLOCKS), None))
    async with EtcdClient(EtcdConfig(endpoints)) as etcd:
        log = EtcdLog(etcd, NAMESPACE, SiteId("large"))
        start = await log.begin()
        await log.snapshot(start, await asyncio.to_thread(lambda: delta.encode(list(index.dump()))))


def spawn(what: str, endpoints: tuple[str, ...], seconds: float) -> subprocess.Popen[str]:
    """Run a part of the benchmark in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_replication", f"--part={what}", ",".join(endpoints)]
    return subprocess.Popen([*command, str(seconds)], stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str], timeout_s: float) -> dict[str, float]:
    """Return what a part printed last."""
    output, _ = process.communicate(timeout=timeout_s)
    if process.returncode:
        raise RuntimeError(f"a part of the benchmark ended with {process.returncode}")
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def cpu_s(cluster: EtcdCluster) -> float:
    """Return the CPU seconds of all members."""
    times = [psutil.Process(m.process.pid).cpu_times() for m in cluster.members if m.process]
    return sum(t.user + t.system for t in times)


def measure_load(cluster: EtcdCluster, seconds: float) -> list[Row]:
    """Run the load once."""
    writer = spawn("write", cluster.endpoints, seconds)
    reader = spawn("read", cluster.endpoints, seconds + 8)
    before = cpu_s(cluster)
    written = result(writer, seconds + 60)
    cores = (cpu_s(cluster) - before) / seconds  # of the load alone: what comes before and after is idle
    seen = result(reader, seconds + 60)
    rate = written["offered"] / seconds
    delivered, peer = seen["delivered"] / written["offered"], "bar"
    return [
        Row("blocks offered, 4 sites", "1/s", rate, 4 * BLOCKS_PER_S, "asked", 0.95),
        Row("blocks delivered of those offered", "share", delivered, 1, peer, 1.0),
        Row("offered to applied, p50", "ms", seen["p50"] * 1e3, 50, peer, 1.0, True),
        Row("offered to applied, p99", "ms", seen["p99"] * 1e3, 500, peer, 1.0, True),
        Row("etcd, all 3 members", "cores", cores, 0.5, peer, 1.0, True),
        Row("segments", "1/s", written["segments"] / seconds, None, "-"),
        Row("segment bytes", "MB/s", written["bytes"] / seconds / 1e6, None, "-"),
    ]


def trace_rows(path: Path, policy: PublishPolicy, name: str) -> list[Row]:
    """Replay a trace at a site whose one worker keeps the last 200,000 blocks; what would another site hit?

    Every 512-token block of the trace stands for eight pages of 64. Hits are those of a query for the prompt
    against what is published just before its own blocks are stored.
    """
    pages, capacity = 8, 200_000
    source = SourceId(WorkerId("trace-0"))
    filter_ = PublishFilter(policy)
    exact, published = PrefixIndex(), PrefixIndex()
    exact.add(source)
    published.add(source)
    size, exact_hit, published_hit, asked, first_s, last_s = 0, 0, 0, 0, None, 0.0
    lru: dict[int, tuple[BlockHash, ...]] = {}

    def publish(changes: list[delta.Change]) -> None:
        nonlocal size
        if changes:
            size += len(delta.encode(changes))
        for _, event in changes:
            published.apply(source, event)

    for line in path.read_text().splitlines():
        request = json.loads(line)
        first_s = request["timestamp"] / 1e3 if first_s is None else first_s
        last_s = request["timestamp"] / 1e3
        ids = request["hash_ids"][: request["input_length"] // TRACE_PAGE_TOKENS]
        hashes = [BlockHash(((i + 1) << 8) + page) for i in ids for page in range(pages)]
        asked += len(hashes)
        exact_hit += sum(match.matched for match in exact.match(hashes))
        stride = policy.stride
        coarse = published.match(hashes[stride - 1 :: stride])
        published_hit += sum(match.matched * stride for match in coarse)
        publish(filter_.saw(hashes))
        for block in ids:
            lru[block] = lru.pop(block, ())
        if hashes:
            event = BlocksStored(tuple(hashes), None)
            if exact.apply(source, event).stored:
                publish(filter_.take(source, event))
        while len(lru) * pages > capacity:
            oldest = next(iter(lru))
            del lru[oldest]
            gone = BlocksRemoved(tuple(BlockHash(((oldest + 1) << 8) + page) for page in range(pages)))
            exact.apply(source, gone)
            publish(filter_.take(source, gone))
    seconds = max(last_s - (first_s or 0.0), 1.0)
    return [
        Row(f"trace, {name}: published", "B/s", size / seconds, None, "-"),
        Row(
            f"trace, {name}: hit rate elsewhere",
            "share",
            published_hit / asked,
            exact_hit / asked,
            "exact",
        ),
    ]


def measure(smoke: bool) -> list[Row]:
    """Return every row."""
    rows: list[Row] = []
    blocks = 100_000 if smoke else 2_000_000
    shm = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder,
        running(EtcdCluster(Path(folder), members=3)) as cluster,
    ):
        rows += measure_load(cluster, 3 if smoke else 30)
        asyncio.run(fill(cluster.endpoints, blocks))
        found = result(spawn("restart", cluster.endpoints, 0), 180)
        name = f"restart with {found['blocks'] / 1e6:.1f} M blocks in etcd"
        rows.append(Row(name, "s", found["seconds"], 30, "bar", 1.0, True))
    if trace := os.environ.get("PRFAAS_TRACE"):
        for name, policy in (
            ("everything", PublishPolicy(1, 1, 1)),
            ("every 8th", PublishPolicy(8, 1, 1)),
            ("default", PublishPolicy()),
        ):
            rows += trace_rows(Path(trace), policy, name)
    return rows


def part(name: str, endpoints: tuple[str, ...], seconds: float) -> None:
    """Run one part and print its result."""
    parts = {"write": lambda: write(endpoints, seconds), "read": lambda: read(endpoints, seconds)}
    work = parts.get(name, lambda: restart(endpoints))  # type: ignore[arg-type]
    print(json.dumps(asyncio.run(work())))  # type: ignore[arg-type]


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].startswith("--part="):
        part(sys.argv[1].partition("=")[2], tuple(sys.argv[2].split(",")), float(sys.argv[3]))
    else:
        run("replication", measure, __doc__ or "")
