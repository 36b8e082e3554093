"""Three members, and what happens when they die, hang or lose their majority."""

from __future__ import annotations

import asyncio

import pytest

from cache_service.core.errors import DeadlineExceeded, Unavailable
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.etcd.core.model import KeyRange, Page
from tests.integration.etcd.conftest import MakeCluster
from tests.integration.etcd.support import events_of, take_until

EVERY = KeyRange.prefix(b"/w/")


class Writer:
    """Puts a new key after the other, and counts what was acknowledged and what failed."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        self.acknowledged: list[bytes] = []
        self.failed = 0
        self.longest_s = 0.0
        self.ended = False
        self._wrote = asyncio.Event()

    async def run(self) -> None:
        now_s = asyncio.get_running_loop().time
        number = 0
        while not self.ended:
            key = b"/w/%07d" % number
            number += 1
            started_s = now_s()
            try:
                await self._client.put(key, b"")
            except (Unavailable, DeadlineExceeded):
                self.failed += 1
                continue
            self.acknowledged.append(key)
            self.longest_s = max(self.longest_s, now_s() - started_s)
            self._wrote.set()

    async def wrote(self, more: int) -> None:
        """Wait for this many more acknowledged writes."""
        until = len(self.acknowledged) + more
        while len(self.acknowledged) < until:
            self._wrote.clear()
            await self._wrote.wait()


@pytest.mark.slow
async def test_every_leader_is_killed_under_writes_and_a_watch(make_cluster: MakeCluster) -> None:
    """SIGKILL of one leader after the other: no acknowledged write is lost, every event comes once."""
    cluster = make_cluster(members=3)
    async with (
        EtcdClient(EtcdConfig(cluster.endpoints)) as client,
        EtcdClient(EtcdConfig(cluster.endpoints)) as other,
    ):
        writer = Writer(client)
        watcher = other.watch(EVERY, 1)
        last = b""
        watching = asyncio.create_task(
            take_until(
                watcher.run(),
                lambda items: bool(last) and any(e.kv.key == last for e in events_of(items[-1:])),
                timeout_s=120,
            )
        )
        writing = asyncio.create_task(writer.run())
        async with asyncio.timeout(100):
            await writer.wrote(100)
            for _ in range(3):
                leader = cluster.leader()
                await asyncio.to_thread(cluster.kill, leader)
                await writer.wrote(100)
                await asyncio.to_thread(cluster.restart, leader)
            # Every member once more, so that the watch has lost its own for certain.
            for member in range(3):
                await asyncio.to_thread(cluster.kill, member)
                await writer.wrote(20)
                await asyncio.to_thread(cluster.restart, member)
        writer.ended = True
        await writing
        last = b"/w/last"
        await client.put(last, b"")
        events = events_of(await watching)
        found = await client.range(EVERY)
        revisions = [e.kv.mod_revision for e in events]
        # A repeated put is two events; the versions of the keys say how many there were.
        assert len(events) == sum(kv.version for kv in found.kvs)
        assert revisions == sorted(set(revisions))
        assert {e.kv.key for e in events} == {kv.key for kv in found.kvs}
        assert set(writer.acknowledged) <= {kv.key for kv in found.kvs}
        assert watcher.resumes >= 1
        print(
            f"events {len(events)}, acknowledged {len(writer.acknowledged)}, failed {writer.failed}, "
            f"longest put {writer.longest_s:.2f} s, watch resumed {watcher.resumes} times"
        )


@pytest.mark.slow
async def test_a_member_that_hangs(make_cluster: MakeCluster) -> None:
    """SIGSTOP of a follower: calls move on after one attempt, a watch on it after one unanswered question."""
    cluster = make_cluster(members=3)
    hung = next(i for i in range(3) if i != cluster.leader())
    # The hung member first, so that the watch is on it; the client tries its endpoints in turn.
    order = (cluster.endpoints[hung], *(e for i, e in enumerate(cluster.endpoints) if i != hung))
    async with EtcdClient(EtcdConfig(order, attempt_s=0.5)) as client, EtcdClient(EtcdConfig(order)) as other:
        watcher = other.watch(EVERY, 1, progress_s=0.5)
        run = watcher.run()
        await client.put(b"/w/0", b"")
        async with asyncio.timeout(10):
            while not events_of([await anext(run)]):
                pass
        cluster.stop(hung)
        started_s = asyncio.get_running_loop().time()
        for i in range(1, 20):
            await client.put(b"/w/%d" % i, b"")
        assert asyncio.get_running_loop().time() - started_s < 5
        taken = await take_until(run, lambda items: len(events_of(items)) >= 19, timeout_s=20)
        assert watcher.resumes >= 1
        assert len({e.kv.key for e in events_of(taken)}) == 19
        cluster.go_on(hung)


@pytest.mark.slow
async def test_no_majority(make_cluster: MakeCluster) -> None:
    """Without a leader: calls fail in time, one member's view is still served, a watch resumes later."""
    cluster = make_cluster(members=3)
    alive = cluster.endpoints[0]
    async with (
        EtcdClient(EtcdConfig(cluster.endpoints, timeout_s=2)) as client,
        EtcdClient(EtcdConfig((alive,))) as other,
    ):
        await client.put(b"/w/0", b"old")
        watcher = other.watch(EVERY, 1, progress_s=0.5)
        run = watcher.run()
        async with asyncio.timeout(10):
            while not events_of([await anext(run)]):
                pass
        for index in (1, 2):
            cluster.kill(index)
        waiting = asyncio.create_task(take_until(run, lambda items: bool(events_of(items)), timeout_s=60))
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await client.put(b"/w/0", b"new")
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await client.get(b"/w/0")
        kept = await client.get(b"/w/0", serializable=True)
        assert kept is not None
        assert kept.value == b"old"
        assert (await client.status(alive)).leader == 0
        assert watcher.resumes >= 1, "a watch without a leader must not stay open in silence"
        await asyncio.gather(*(asyncio.to_thread(cluster.restart, index) for index in (1, 2)))
        revision = await client.put(b"/w/0", b"newer")
        events = events_of(await waiting)
        # The put that failed may have been carried out later: that is what its error says.
        if events[-1].kv.mod_revision < revision:
            assert events[-1].kv.value == b"new"
        assert events[0].kv.mod_revision > kept.mod_revision


async def test_a_store_that_was_wiped(make_cluster: MakeCluster) -> None:
    """etcd comes back empty, its revisions starting over: a follower lists again, it does not wait."""
    cluster = make_cluster()
    async with EtcdClient(EtcdConfig(cluster.endpoints)) as client:
        for i in range(50):
            await client.put(b"/w/%d" % i, b"")
        run = client.follow(EVERY, progress_s=0.5)
        first = await anext(run)
        assert isinstance(first, Page)
        assert len(first.kvs) == 50
        following = asyncio.create_task(
            take_until(run, lambda items: isinstance(items[-1], Page) and items[-1].first)
        )
        cluster.kill(0)
        cluster.wipe(0)
        await asyncio.to_thread(cluster.restart, 0)
        page = (await following)[-1]
        assert isinstance(page, Page)
        assert page.revision < first.revision
        await client.put(b"/w/new", b"")
        keys = {kv.key for kv in page.kvs}
        again = client.follow(EVERY)
        listed = await anext(again)
        assert isinstance(listed, Page)
        assert keys <= {kv.key for kv in listed.kvs} == {b"/w/new"}
        await again.aclose()


async def test_nobody_is_there() -> None:
    """Endpoints that refuse connections: EtcdUnavailable within the call's time, for a txn too."""
    async with EtcdClient(EtcdConfig(("127.0.0.1:1", "127.0.0.1:2"), timeout_s=0.6)) as client:
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            await client.get(b"k")
        assert asyncio.get_running_loop().time() - started_s < 2
