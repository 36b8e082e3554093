"""Replication through a real 3-member etcd on this machine: delivery, latency, CPU, restart, the filter.

load: four sites each offer 40,000 blocks per second as 50 ms segments; a fifth site's reader, in a process of
its own, follows all four into an index. Latency is from the moment a block is offered (it waits for its
segment) until the index has it. restart: `python -m cache_service`, from its start. trace: what the publish
filter costs; PRFAAS_TRACE names a request trace in JSON lines with hash_ids. Bars are upper bounds, given as
peer values.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import psutil

from benchmarks.harness import Measure, Row, run
from cache_service.core import delta
from cache_service.core.coarse import CoarseIndex
from cache_service.core.events import BlocksRemoved, BlocksStored, Event, Group, GroupRemoved, GroupStored
from cache_service.core.ids import BlockHash, Namespace, SiteId, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.index_types import Needs
from cache_service.core.publish import PublishFilter, PublishPolicy
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.replication.etcd_log import EtcdLog
from cache_service.replication.presence import Live, live_prefix
from cache_service.replication.replica import Claims, Indexes, RemoteSite
from cache_service.store import LogWriter
from prfaas_sglang.fleet.ports import free_port
from tests.integration.etcd_support import EtcdCluster, find_etcd, running

NAMESPACE = Namespace("bench", 64)
SITES = [SiteId(name) for name in "abcd"]
LARGE = SiteId("large")
BLOCKS_PER_S = 40_000
FLUSH_S = 0.05
RUN_BLOCKS = 250


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


async def read(endpoints: tuple[str, ...], seconds: float) -> dict[str, float]:
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


async def fill(endpoints: tuple[str, ...], blocks: int) -> None:
    """Publish a large index as one snapshot, of a site that says that it is alive."""
    index = PrefixIndex()
    source = SourceId(WorkerId("large-0"))
    index.add(source)
    for number in range(blocks // RUN_BLOCKS):
        index.apply(source, BlocksStored(chain(number, RUN_BLOCKS), None))
    async with EtcdClient(EtcdConfig(endpoints)) as etcd:
        log = EtcdLog(etcd, NAMESPACE, LARGE)
        start = await log.begin()
        await log.snapshot(start, await asyncio.to_thread(lambda: delta.encode(list(index.dump()))))
        live = Live(LARGE, LARGE, "bench", PublishPolicy().stride)
        await etcd.put(live_prefix(NAMESPACE) + LARGE.encode(), msgspec.json.encode(live))


def restart(folder: Path, endpoints: tuple[str, ...], blocks: int) -> tuple[float, float, float]:
    """Start a cache service; return the seconds until it serves and until it has all, and its bytes."""
    metrics = free_port()
    settings = {
        "site": "reader",
        "listen": f"127.0.0.1:{free_port()}",
        "metrics_listen": f"127.0.0.1:{metrics}",
        "namespace": {"model": NAMESPACE.model, "page_size": NAMESPACE.page_size},
        "replication": {"etcd": {"endpoints": list(endpoints)}},
    }
    path = folder / "cache.json"
    path.write_text(json.dumps(settings))
    started_s, serves_s = time.monotonic(), 0.0
    with (folder / "cache.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cache_service", "--config", str(path)], stdout=log, stderr=log
        )
    try:
        while time.monotonic() - started_s < 120:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/health", timeout=30) as answer:
                    health = json.load(answer)
            except OSError:
                time.sleep(0.01)
                continue
            now_s = time.monotonic() - started_s
            serves_s = serves_s or now_s
            if any(site["entries"] == blocks for site in health["replication"]["sites"]):
                return serves_s, now_s, psutil.Process(process.pid).memory_info().rss
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    raise RuntimeError(f"the service did not have {blocks} blocks in time; see {folder}/cache.log")


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


def load_rows(cluster: EtcdCluster, seconds: float) -> list[Row]:
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


def trace_rows(path: Path, policy: PublishPolicy, name: str, needs: Needs) -> list[Row]:
    """Replay a trace at a site whose one worker keeps the last 200,000 blocks; what could another site use?

    Every 512-token block of the trace stands for eight pages of 64; the last is cut to the prompt's whole
    pages. A hybrid's states are at the ends of chunks of 8,192 tokens and of the prompt. Hits are what of a
    prompt is usable by what is published just before its own blocks are stored.
    """
    pages, capacity, chunk = 8, 200_000, 128
    source = SourceId(WorkerId("trace-0"))
    filter_ = PublishFilter(policy)
    exact = PrefixIndex()
    published = CoarseIndex(policy.stride, PrefixIndex())
    for index in (exact, published):
        index.add(source)
    exact.declare(source, needs.state, needs.window_blocks)
    size, exact_hit, published_hit, asked, first_s, last_s = 0, 0, 0, 0, None, 0.0
    lru: dict[int, tuple[BlockHash, ...]] = {}

    def publish(changes: list[delta.Change]) -> None:
        nonlocal size
        if changes:
            size += len(delta.encode(changes))
        for _, event in changes:
            if isinstance(event, delta.Declared):
                published.declare(source, event)
            else:
                published.apply(source, event)

    publish(filter_.declare(source, needs))
    for line in path.read_text().splitlines():
        request = json.loads(line)
        first_s = request["timestamp"] / 1e3 if first_s is None else first_s
        last_s = request["timestamp"] / 1e3
        full = request["input_length"] // NAMESPACE.page_size
        ids = request["hash_ids"][: -(-full // pages)]
        hashes = [BlockHash(((i + 1) << 8) + page) for i in ids for page in range(pages)][:full]
        asked += len(hashes)
        exact_hit += sum(match.usable for match in exact.match(hashes))
        published_hit += sum(match.usable for match in published.match(hashes))
        publish(filter_.saw(hashes))
        for block in ids:
            lru[block] = lru.pop(block, ())
        if hashes:
            events: list[Event] = [BlocksStored(tuple(hashes), None)]
            if needs.state:
                states = dict.fromkeys([*hashes[chunk - 1 :: chunk], hashes[-1]])
                events.append(GroupStored(Group.STATE, tuple(states)))
            for event in events:
                if exact.apply(source, event).stored:
                    publish(filter_.take(source, event))
        while len(lru) * pages > capacity:
            oldest = next(iter(lru))
            del lru[oldest]
            gone = tuple(BlockHash(((oldest + 1) << 8) + page) for page in range(pages))
            for event in (BlocksRemoved(gone), *([GroupRemoved(Group.STATE, gone)] if needs.state else [])):
                exact.apply(source, event)
                publish(filter_.take(source, event))
    seconds = max(last_s - (first_s or 0.0), 1.0)
    hits = published_hit / asked, exact_hit / asked
    return [
        Row(f"trace, {name}: published", "B/s", size / seconds, None, "-"),
        Row(f"trace, {name}: hit rate elsewhere", "share", *hits, "exact"),
    ]


def measure_trace(smoke: bool) -> list[Row]:
    """Return the filter's rows, where there is a trace."""
    path = os.environ.get("PRFAAS_TRACE")
    if not path:
        return [Row("trace: published", "B/s", None, None, "PRFAAS_TRACE names no trace")]
    rows: list[Row] = []
    for name, policy, needs in (
        ("everything", PublishPolicy(1, 1, 1), Needs()),
        ("every 8th", PublishPolicy(8, 1, 1), Needs()),
        ("default", PublishPolicy(), Needs()),
        ("hybrid, everything", PublishPolicy(1, 1, 1), Needs(True, 0)),
        ("hybrid, every 8th", PublishPolicy(8, 1, 1), Needs(True, 0)),
        ("hybrid, default", PublishPolicy(), Needs(True, 0)),
    ):
        rows += trace_rows(Path(path), policy, name, needs)
    return rows


def measure_restart(smoke: bool) -> list[Row]:
    """Return how long a service with much in etcd takes to start."""
    blocks = 100_000 if smoke else 2_000_000
    with in_memory() as folder, running(EtcdCluster(folder, members=3)) as etcd:
        asyncio.run(fill(etcd.endpoints, blocks))
        serves_s, all_s, rss = restart(folder, etcd.endpoints, blocks)
    what = f"restart with {blocks / 1e6:.1f} M blocks in etcd"
    return [
        Row(f"{what}: all of them offered", "s", all_s, 30, "bar", 1.0, True),
        Row(f"{what}: serving its own", "s", serves_s, None, "-"),
        Row(f"{what}: memory", "MB", rss / 1e6, None, "-"),
    ]


def measure_load(smoke: bool) -> list[Row]:
    """Return how the load of four sites fares."""
    with in_memory() as folder, running(EtcdCluster(folder, members=3)) as etcd:
        return load_rows(etcd, 3 if smoke else 30)


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """Make a folder, in memory where there is such a place: it is etcd that is measured, not the disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        yield Path(name)


def with_etcd(measure: Measure) -> Measure:
    """Return a measurement that says why where there is no etcd."""

    def measured(smoke: bool) -> list[Row]:
        if find_etcd() is None:
            return [Row(measure.__name__, "", None, None, "no etcd: scripts/etcd.sh gets one")]
        return measure(smoke)

    return measured


def part(name: str, endpoints: tuple[str, ...], seconds: float) -> None:
    """Run one part and print its result."""
    found = asyncio.run(write(endpoints, seconds) if name == "write" else read(endpoints, seconds))
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1].startswith("--part="):
        part(sys.argv[1].partition("=")[2], tuple(sys.argv[2].split(",")), float(sys.argv[3]))
    else:
        cases = {
            "load": with_etcd(measure_load),
            "restart": with_etcd(measure_restart),
            "trace": measure_trace,
        }
        run("replication", cases, __doc__ or "")
