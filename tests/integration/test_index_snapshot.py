"""Work on a snapshot: what it sees, what it costs the service, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from cache_service.admin import IndexAdmin, rebuild
from cache_service.snapshot import SnapshotFailed, on_snapshot
from tests.integration.cache_support import NAMESPACE, PAGE, CacheProcess, Worker, kv_events, stored, until

BLOCKS, CHAIN = 1_000_000, 1000


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


async def only(before: set[int]) -> None:
    """Await that there are no more processes of this one than before."""

    async def same() -> bool:
        return children() == before

    await until(same, "the processes to be reaped")


async def test_sees_one_instant() -> None:
    """What is changed here afterwards, and there, stays on its side."""
    before = children()
    values = [1, 2, 3]

    def work() -> Iterator[bytes]:
        for _ in range(3):
            values.append(0)
            yield repr(values).encode()
            yield b"x" * 300_000  # more than a pipe and a reader hold

    async with aclosing(on_snapshot(work, timeout_s=20)) as pieces:
        first = await anext(pieces)
        values.clear()
        rest = [piece async for piece in pieces]
    assert first == b"[1, 2, 3, 0]"
    assert rest[-2:] == [b"[1, 2, 3, 0, 0, 0]", b"x" * 300_000]
    assert values == []
    await only(before)


async def test_failures() -> None:
    """An exception, a death and a hang of the work are errors here; no process is left."""
    before = children()

    def raises() -> Iterator[bytes]:
        yield b"one"
        raise ValueError("wrong")

    def dies() -> Iterator[bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield b""

    def hangs() -> Iterator[bytes]:
        time.sleep(3600)
        yield b""

    async def all_of(work: Callable[[], Iterator[bytes]], timeout_s: float) -> list[bytes]:
        async with aclosing(on_snapshot(work, timeout_s=timeout_s)) as pieces:
            return [piece async for piece in pieces]

    with pytest.raises(SnapshotFailed, match="wrong"):
        await all_of(raises, 20.0)
    with pytest.raises(SnapshotFailed, match="before its work"):
        await all_of(dies, 20.0)
    with pytest.raises(TimeoutError):
        await all_of(hangs, 0.2)

    def long() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    async with aclosing(on_snapshot(long, timeout_s=0.5)) as pieces:
        await anext(pieces)
        (pid,) = children() - before

        async def ended() -> bool:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

        await until(ended, "the process that nobody reads from to be killed")
        with pytest.raises(TimeoutError):
            [piece async for piece in pieces]
    await only(before)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[CacheProcess, Worker, IndexAdmin]]:
    """A service with a million blocks of one worker."""
    worker = Worker()
    worker.start()
    process = CacheProcess(tmp_path, [worker])
    await process.start()
    for first in range(1, BLOCKS, CHAIN):
        hashes = list(range(first, first + CHAIN))
        worker.publish(
            kv_events.BlockStored(
                block_hashes=hashes,
                parent_block_hash=None,
                token_ids=[],
                block_size=PAGE,
                lora_id=None,
                medium="GPU",
            )
        )

    async def there() -> bool:
        return (await process.client.stats()).counts.blocks == BLOCKS

    await until(there, "every block to be indexed")
    admin = IndexAdmin(process.address, timeout_s=60)
    yield process, worker, admin
    await admin.close()
    await process.close()
    worker.stop()


def its_children(process: CacheProcess) -> list[psutil.Process]:
    assert process.process is not None
    return psutil.Process(process.process.pid).children()


async def test_match_goes_on_beside_them(service) -> None:
    """While the whole index is explained, checked and dumped, Match is answered, and changes are taken."""
    process, worker, admin = service

    async def dump() -> int:
        index, last = await rebuild(admin.dump(NAMESPACE))
        assert index.counts().blocks == last.entries
        return last.entries

    done = []
    for added, what in enumerate(
        (admin.explain(NAMESPACE, list(range(1, 65)), 64 * PAGE + 1), admin.check(NAMESPACE), dump()), 1
    ):
        call = asyncio.create_task(what)
        worst_s, answers = 0.0, 0
        worker.publish(stored([10**12 + added]))
        while not call.done():
            started_s = time.perf_counter()
            assert await process.matched(list(range(1, 65))) == {worker.worker_id: 64 * PAGE}
            worst_s, answers = max(worst_s, time.perf_counter() - started_s), answers + 1
        done.append(call.result())
        assert answers > 10
        print(f"{answers} answers, worst {1e3 * worst_s:.1f} ms")
    explained, checked, entries = done
    assert explained.holders[0].report.matched == 64
    assert checked.violations == ()
    assert BLOCKS <= entries <= BLOCKS + 3
    await process.matches([10**12 + 3], {worker.worker_id: PAGE})


async def test_a_reader_that_stops(service) -> None:
    """A dump that is not read on is one process with one open file; it goes when the client does."""
    process, worker, admin = service
    before = (await process.client.stats()).revision
    async with aclosing(admin.dump(NAMESPACE, page_blocks=64)) as pages:
        page = await anext(pages)
        (child,) = its_children(process)
        assert child.num_fds() == 1
        worker.publish(stored([10**12]))
        await process.matches([10**12], {worker.worker_id: PAGE})
        assert (await anext(pages)).revision == page.revision == before

    async def gone() -> bool:
        return not its_children(process)

    await until(gone, "the process of the dump to go")


async def test_service_is_killed(service) -> None:
    """The process of a dump does not outlive its service, and keeps no port."""
    process, _, admin = service
    async with aclosing(admin.dump(NAMESPACE, page_blocks=64)) as pages:
        await anext(pages)
        (child,) = its_children(process)
        await process.kill()
        with socket.socket() as port:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(("127.0.0.1", process.listen_port))

        async def gone() -> bool:
            return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

        await until(gone, "the process of the dump to go")
