"""Watches over connections that are cut, held back and lost: no event lost, none twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import Ambiguous, Compacted
from cache_service.etcd.core.model import Changes, KeyRange, Page
from tests.integration.etcd.support import events_of, fill, take_until
from tests.integration.etcd_support import CutProxy, EtcdCluster

T = TypeVar("T")


@pytest.fixture
async def proxy(shared_etcd: EtcdCluster) -> AsyncIterator[CutProxy]:
    """A proxy before the shared etcd."""
    made = await CutProxy(shared_etcd.members[0].client_port).start()
    yield made
    await made.close()


@pytest.fixture
async def cut_client(proxy: CutProxy) -> AsyncIterator[EtcdClient]:
    """A client whose connections go through the proxy."""
    async with EtcdClient(EtcdConfig((proxy.endpoint,))) as made:
        yield made


async def test_cut_while_catching_up(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """A watch cut again and again while it catches up with 5,000 revisions gets each once, in order."""
    start = await client.put(prefix + b"k", b"first") + 1
    for i in range(0, 5000, 100):
        await asyncio.gather(*(client.put(prefix + b"k", b"%d" % j + bytes(100)) for j in range(i, i + 100)))
    watcher = cut_client.watch(KeyRange.prefix(prefix), start)
    seen: list[int] = []
    async with asyncio.timeout(60):
        run = watcher.run()
        proxy.cut_after(50_000)
        async for item in run:
            seen += [e.kv.mod_revision for e in events_of([item])]
            if len(seen) >= 5000:
                break
            # In the middle of the next response, which holds up to 1,000 revisions of some 150 bytes.
            proxy.cut_after(70_000)
        await run.aclose()
    assert seen == list(range(start, start + 5000))
    assert watcher.resumes >= 4


async def test_cut_in_the_middle_of_one_revision(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """A revision of many fragments, cut after the first: it comes again, whole, and is handed on once."""
    long = prefix + b"x" * 200
    lease = await client.grant(600)
    last = await fill(client, long, 20_000, lease=lease.lease)
    await client.revoke(lease.lease)
    watcher = cut_client.watch(KeyRange.prefix(prefix), last + 1)
    proxy.cut_after(4_000_000)
    taken = await take_until(watcher.run(), lambda items: bool(events_of(items)))
    keys = [e.kv.key for e in events_of(taken)]
    assert len(keys) == len(set(keys)) == 20_000
    assert proxy.cuts == 1
    assert watcher.resumes >= 1


async def test_cut_while_live(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """Writes go on while the watch is cut, at arbitrary moments: each arrives once."""
    start = await client.put(prefix + b"k", b"first") + 1
    watcher = cut_client.watch(KeyRange.prefix(prefix), start)

    async def write() -> None:
        for i in range(1000):
            await client.put(prefix + b"k", b"%d" % i)
            if i % 100 == 50:
                proxy.cut()

    writing = asyncio.create_task(write())
    taken = await take_until(watcher.run(), lambda items: len(events_of(items)) >= 1000)
    await writing
    assert [e.kv.mod_revision for e in events_of(taken)] == list(range(start, start + 1000))
    assert watcher.resumes >= 3


async def test_back_pressure(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """A caller that does not take its events holds the server back: they do not pile up here."""
    start = await client.put(prefix + b"k", b"") + 1
    run = cut_client.watch(KeyRange.prefix(prefix), start).run()
    await client.put(prefix + b"k", b"")
    taken = [await anext(run)]
    for i in range(40):
        await client.put(prefix + b"k", b"%d" % i + bytes(1_000_000))
    # What is under way settles: nothing more passes for a while.
    before = -1
    async with asyncio.timeout(30):
        while before != proxy.passed_bytes:
            before = proxy.passed_bytes
            await asyncio.sleep(0.5)
    assert proxy.passed_bytes < 12 << 20
    async with asyncio.timeout(30):
        while len(events_of(taken)) < 41:
            taken.append(await anext(run))
    await run.aclose()
    assert [e.kv.mod_revision for e in events_of(taken)] == list(range(start, start + 41))


async def test_follow_lists_again_after_a_compaction(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """Away while the history went: a new listing, then the changes after it. A copy kept by it is exact."""
    await fill(client, prefix, 1000)
    run = cut_client.follow(KeyRange.prefix(prefix))
    copy: dict[bytes, bytes] = {}
    listings = 0

    async def take_until_has(key: bytes) -> None:
        nonlocal listings
        async with asyncio.timeout(30):
            while key not in copy:
                item = await anext(run)
                if isinstance(item, Page):
                    if item.first:
                        listings += 1
                        copy.clear()
                    copy.update({kv.key: kv.value for kv in item.kvs})
                elif isinstance(item, Changes):
                    for event in item.events:
                        if event.kv.version:
                            copy[event.kv.key] = event.kv.value
                        else:
                            copy.pop(event.kv.key)

    await client.put(prefix + b"one", b"")
    await take_until_has(prefix + b"one")
    proxy.refuses = True
    proxy.cut()
    await client.delete(KeyRange(prefix + b"00000100", prefix + b"00000200"))
    revision = await client.put(prefix + b"two", b"")
    await client.compact(revision, physical=True)
    reading = asyncio.create_task(take_until_has(prefix + b"two"))
    proxy.refuses = False
    await reading
    await client.put(prefix + b"three", b"")
    await take_until_has(prefix + b"three")
    await run.aclose()
    found = await client.range(KeyRange.prefix(prefix))
    assert copy == {kv.key: kv.value for kv in found.kvs}
    assert (listings, len(copy)) == (2, 903)


async def lose_answer(proxy: CutProxy, call: Awaitable[T], done: Callable[[], Awaitable[bool]]) -> T:
    """Let a call be carried out, keep its answer from the client, and cut the connection."""
    proxy.swallows = True
    calling = asyncio.ensure_future(call)
    async with asyncio.timeout(1.0):  # below the deadline of an attempt
        while not await done():
            await asyncio.sleep(0.01)
    proxy.swallows = False
    proxy.cut()
    return await calling


async def test_a_txn_whose_answer_is_lost_is_not_sent_again(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """The txn was carried out, its answer cut off: Ambiguous, and the key was written once."""
    await cut_client.put(prefix, b"0")

    async def done() -> bool:
        found = await client.get(prefix)
        return found is not None and found.value == b"1"

    with pytest.raises(Ambiguous):
        await lose_answer(proxy, cut_client.txn(t.Txn().then(t.Put(prefix, b"1"))), done)
    found = await client.get(prefix)
    assert found is not None
    assert found.version == 2


async def test_calls_that_may_be_repeated_hide_a_lost_answer(
    client: EtcdClient, cut_client: EtcdClient, proxy: CutProxy, prefix: bytes
) -> None:
    """Put, grant, revoke, compact and delete succeed though their first answer was cut off."""
    await cut_client.put(prefix, b"0")

    async def version() -> int:
        found = await client.get(prefix)
        return found.version if found else 0

    async def written() -> bool:
        return await version() == 2

    await lose_answer(proxy, cut_client.put(prefix, b"1"), written)
    assert await version() == 3
    before = set(await client.leases())

    async def granted() -> bool:
        return set(await client.leases()) != before

    lease = await lose_answer(proxy, cut_client.grant(60), granted)
    assert lease.granted_s == 60
    assert set(await client.leases()) - before == {lease.lease}

    async def revoked() -> bool:
        return set(await client.leases()) == before

    await lose_answer(proxy, cut_client.revoke(lease.lease), revoked)
    revision = await client.put(prefix, b"2")

    async def compacted() -> bool:
        try:
            await client.get(prefix, revision=revision - 1)
        except Compacted:
            return True
        return False

    await lose_answer(proxy, cut_client.compact(revision), compacted)

    async def deleted() -> bool:
        return await version() == 0

    assert await lose_answer(proxy, cut_client.delete(KeyRange.one(prefix)), deleted) == 0
    assert proxy.cuts == 5
