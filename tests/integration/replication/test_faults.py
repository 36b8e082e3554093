"""Faults of etcd, with real members: no entry is lost, none is left over, a blip rebuilds nothing."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from cache_service.core.errors import PrfaasError
from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd import rpc
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.etcd.core.errors import NoSpace
from cache_service.etcd.core.model import KeyRange
from tests.integration.etcd.conftest import MakeCluster
from tests.integration.etcd_support import CutProxy, EtcdCluster, Partition
from tests.integration.replication.support import Site, converged, until

#: Longer than any replica's age while all is well (conftest.py).
OUTAGE_S = 2.0


async def under_load(*sites: Site) -> tuple[asyncio.Event, list[asyncio.Task[None]]]:
    """Start loads; set the event and await the tasks to end them."""
    ending = asyncio.Event()
    return ending, [asyncio.create_task(site.load(ending)) for site in sites]


async def ended(ending: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    ending.set()
    await asyncio.gather(*tasks)


async def fill_up(etcd: EtcdClient) -> None:
    """Write one key over and over: its history fills the quota, which etcd notices some commits later."""
    for _ in range(1000):
        await etcd.put(b"/junk", b"x" * (1 << 20))


@pytest.mark.parametrize("members", [1, 3])
async def test_sites_converge(make_cluster: MakeCluster, members: int) -> None:
    """Three sites under load: each knows the others; one that joins late too."""
    cluster = make_cluster(members=members)
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(Site(name, cluster.endpoints)) for name in "abc"]
        ending, tasks = await under_load(a, b, c)
        await until(lambda: min(site.changes for site in (a, b, c)) > 1000, "some load")
        d = await stack.enter_async_context(Site("d", cluster.endpoints))
        d.work(50)
        await ended(ending, tasks)
        took_s = await converged(a, b, c, d)
        assert len(d.truth) > 0
        print(f"{members} members: converged {took_s:.2f} s after the load ended")


@pytest.mark.slow
async def test_leader_killed(make_cluster: MakeCluster) -> None:
    """kill -9 of the leader under load, twice: nothing is rebuilt."""
    cluster = make_cluster(members=3)
    async with Site("a", cluster.endpoints) as a, Site("b", cluster.endpoints) as b:
        ending, tasks = await under_load(a, b)
        await until(lambda: b.about(a)["segments"] > 3, "replication")
        rebuilds = b.about(a)["rebuilds"]
        slowest_s = 0.0
        for _ in range(2):
            leader = cluster.leader()
            await asyncio.to_thread(cluster.kill, leader)
            segments = b.about(a)["segments"]
            slowest_s = max(
                slowest_s, await until(lambda s=segments: b.about(a)["segments"] > s + 3, "progress")
            )
            await asyncio.to_thread(cluster.restart, leader)
        await ended(ending, tasks)
        took_s = await converged(a, b)
        assert b.about(a)["rebuilds"] == rebuilds
        print(
            f"first segments {slowest_s:.2f} s after the kill; converged {took_s:.2f} s after the load ended"
        )


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 3])
async def test_all_members_killed(make_cluster: MakeCluster, members: int) -> None:
    """Without etcd: matches go on, the age grows, nothing is dropped; then it goes on where it was."""
    cluster = make_cluster(members=members)
    async with Site("a", cluster.endpoints) as a, Site("b", cluster.endpoints) as b:
        a.work(200)
        await converged(a, b)
        rebuilds, entries = b.about(a)["rebuilds"], b.about(a)["entries"]
        chain = next(chain for chain in a._chains if b.answers(a, chain))
        answered = b.answers(a, chain)
        for index in range(members):
            await asyncio.to_thread(cluster.kill, index)
        started_s = time.monotonic()
        ending, tasks = await under_load(a, b)
        await until(lambda: b.about(a)["age_s"] > OUTAGE_S, "the age to show the outage")
        assert b.about(a)["entries"] == entries
        assert b.answers(a, chain) == answered, "what is known is answered with, outage or not"
        assert a.server.replication is not None
        await until(lambda: a.server.replication.trouble, "the writer to say so")
        for index in range(members):
            cluster._launch(index)
        await asyncio.to_thread(cluster.wait_healthy)
        outage_s = time.monotonic() - started_s
        await ended(ending, tasks)
        took_s = await converged(a, b)
        assert b.about(a)["rebuilds"] == rebuilds, "an outage is no reason to start over"
        print(f"{members} members away {outage_s:.1f} s; converged {took_s:.2f} s after the load ended")


async def test_store_wiped(make_cluster: MakeCluster) -> None:
    """etcd comes back empty: writers publish all they have again."""
    cluster = make_cluster()
    async with Site("a", cluster.endpoints) as a, Site("b", cluster.endpoints) as b:
        a.work(200)
        b.work(100)
        await converged(a, b)
        cluster.kill(0)
        cluster.wipe(0)
        await asyncio.to_thread(cluster.restart, 0)
        started_s = time.monotonic()
        a.work(20)
        await converged(a, b)
        print(f"converged {time.monotonic() - started_s:.2f} s after the wipe")


@pytest.mark.parametrize("members", [1, 3])
async def test_quota_alarm(make_cluster: MakeCluster, members: int) -> None:
    """The quota fills up: maintenance compacts, defragments, disarms; what waited is delivered."""
    cluster = make_cluster(members=members, quota_bytes=16 << 20)
    async with (
        EtcdClient(EtcdConfig(cluster.endpoints)) as etcd,
        Site("a", cluster.endpoints, maintenance_s=600.0) as a,
        Site("b", cluster.endpoints, maintenance_s=600.0) as b,
    ):
        a.work(100)
        await converged(a, b)
        with pytest.raises(NoSpace):
            await fill_up(etcd)
        a.work(100)
        assert a.server.replication is not None
        await until(lambda: a.server.replication.trouble == "etcd_no_space", "the writer to notice")
        started_s = time.monotonic()

        async def rounds() -> None:
            while True:  # a member may raise its alarm after the round that cleared the others'
                for site in (a, b):
                    with suppress(PrfaasError):
                        await site.server.replication.maintenance.round()
                await asyncio.sleep(1)

        maintained = asyncio.create_task(rounds())
        await converged(a, b)
        maintained.cancel()
        with suppress(asyncio.CancelledError):
            await maintained
        assert sum(site.server.replication.maintenance.cleared for site in (a, b)) >= 1
        print(f"converged {time.monotonic() - started_s:.2f} s after the round that cleared the quota")


async def test_an_alarm_that_is_raised_late(make_cluster: MakeCluster) -> None:
    """It comes when the round that cleared the quota is over, and does not stand until the next."""
    cluster = make_cluster()
    async with EtcdClient(EtcdConfig(cluster.endpoints)) as etcd:
        member = (await etcd.status(cluster.endpoints[0])).member
        alarm = pb.AlarmRequest(action=pb.AlarmRequest.ACTIVATE, memberID=member, alarm=pb.NOSPACE)
        await etcd._connections.call(rpc.ALARM, alarm)
        async with Site("a", cluster.endpoints, maintenance_s=600.0) as a:
            maintenance = a.server.replication.maintenance
            await until(lambda: maintenance.cleared == 1, "the first alarm to be cleared")
            await etcd._connections.call(rpc.ALARM, alarm)
            await until(lambda: maintenance.cleared == 2, "the late one to be cleared")


@pytest.mark.parametrize("members", [1, 3])
async def test_compaction_behind_a_reader(make_cluster: MakeCluster, members: int) -> None:
    """A reader cut off while history is compacted lists again, and goes on without starting over."""
    cluster = make_cluster(members=members)
    proxy = await CutProxy(cluster.members[0].client_port).start()
    async with (
        EtcdClient(EtcdConfig(cluster.endpoints)) as etcd,
        Site("a", cluster.endpoints) as a,
        Site("b", (proxy.endpoint,), live_lease_s=30) as b,
    ):
        a.work(100)
        await converged(a, b)
        rebuilds = b.about(a)["rebuilds"]
        proxy.refuses = True
        proxy.cut()
        for _ in range(10):
            a.work(20)
            await asyncio.sleep(0.1)
        newest = await etcd.put(b"/x", b"")
        await etcd.compact(newest, physical=True)
        proxy.refuses = False
        took_s = await until(lambda: b.knows(a), "the reader to catch up")
        assert b.about(a)["rebuilds"] == rebuilds
        print(f"caught up {took_s:.2f} s after the cut was over")
    await proxy.close()


@pytest.mark.slow
async def test_member_alone(make_cluster: MakeCluster) -> None:
    """A reader's only member loses its peers: the age grows, and all is well when they are back."""
    cluster = make_cluster(members=3)
    async with Site("a", cluster.endpoints) as a, Site("b", cluster.endpoints[:1], live_lease_s=30) as b:
        a.work(100)
        await converged(a, b)
        rebuilds = b.about(a)["rebuilds"]
        for index in (1, 2):
            cluster.stop(index)
        ending, tasks = await under_load(a)
        try:
            await until(lambda: b.about(a)["age_s"] > OUTAGE_S, "the silence to show")
        finally:
            for index in (1, 2):
                cluster.go_on(index)
        took_s = await until(lambda: b.about(a)["age_s"] < 1, "the reader to hear again")
        await ended(ending, tasks)
        await converged(a, b)
        assert b.about(a)["rebuilds"] == rebuilds
        print(f"heard again {took_s:.2f} s after the peers were back")


@pytest.mark.slow
async def test_member_parted(tmp_path: Path) -> None:
    """A reader's only member is parted from its peers, which go on: what they took arrives afterwards."""
    partition = Partition()
    try:
        cluster = await partition.open(tmp_path, 3)
        reached = await asyncio.to_thread(cluster.leader)  # whose place another one takes
        others = tuple(e for i, e in enumerate(cluster.endpoints) if i != reached)
        async with (
            Site("a", others) as a,
            Site("b", (cluster.endpoints[reached],), live_lease_s=30) as b,
        ):
            a.work(100)
            await converged(a, b)
            rebuilds, log = b.about(a)["rebuilds"], a.server.replication.log
            partition.part(reached)
            ending, tasks = await under_load(a)
            before = log.end.seq
            elected_s = await until(lambda: log.end.seq > before + 10, "the others to go on")
            await until(lambda: b.about(a)["age_s"] > OUTAGE_S, "the silence to show")
            await ended(ending, tasks)
            assert not b.about(a)["withheld"]
            partition.part(None)
            took_s = await converged(a, b)
            assert b.about(a)["rebuilds"] == rebuilds
            print(f"written on after {elected_s:.2f} s; converged {took_s:.2f} s after the parting's end")
    finally:
        await partition.close()


async def test_two_writers_of_one_epoch(make_cluster: MakeCluster) -> None:
    """Two services take each other's epoch for their own: segments do not mix, the holder's truth wins."""
    cluster = make_cluster()
    async with (
        Site("a", cluster.endpoints, name="one") as one,
        Site("a", cluster.endpoints, name="two") as two,
        Site("b", cluster.endpoints) as b,
    ):
        one.work(50)
        two.work(50)  # one seed: both see the same events
        await converged(one, b)
        holds, stands_by = (one, two) if one.server.replication.presence.held else (two, one)
        mine, other = holds.server.replication, stands_by.server.replication
        other.log._writer, other.log._lease = mine.log._writer, mine.log._lease
        other.log._end, other.log._base, other.log._head = mine.log._end, mine.log._base, mine.log._head
        stands_by.server._publisher.writer._epoch = mine.log.end.epoch
        other.may_write = lambda: True
        stands_by.server._publisher._may_write = lambda: True
        started_s = time.monotonic()
        for _ in range(20):
            holds.work(10)
            stands_by.work(5)  # behind, so that no two segments are equal
            await asyncio.sleep(0.02)
        # It lost a place in the epoch, or the epoch; a new one it may not begin.
        await until(lambda: stands_by.server._publisher.writer._epoch is None, "the other to be fenced")
        await converged(holds, b)
        print(f"converged {time.monotonic() - started_s:.2f} s after the second began to write")


@pytest.mark.slow
async def test_connections_cut(make_cluster: MakeCluster) -> None:
    """The reader's connection is cut at odd places under load: every segment arrives once, in order."""
    cluster = make_cluster()
    proxy = await CutProxy(cluster.members[0].client_port).start()
    async with Site("a", cluster.endpoints) as a, Site("b", (proxy.endpoint,)) as b:
        await until(lambda: not b.about(a)["withheld"], "the reader")
        await until(lambda: b.about(a)["rebuilds"] == 1, "the reader to have the empty log")
        rebuilds, from_seq = 1, 0
        ending, tasks = await under_load(a)
        for number in range(8):
            proxy.cut_after(1500 * number + 1)
            cuts = proxy.cuts
            await until(lambda c=cuts: proxy.cuts > c, "the cut")
        await ended(ending, tasks)
        took_s = await converged(a, b)
        about = b.about(a)
        assert a.server.replication is not None
        end = a.server.replication.log.end
        assert b.server.replication.replicas.sites["a"].position == end
        assert about["segments"] == end.seq - from_seq
        assert about["rebuilds"] == rebuilds
        print(f"{proxy.cuts} cuts, {about['segments']} segments; converged {took_s:.2f} s after the load")
    await proxy.close()


@pytest.mark.slow
async def test_lease_expiry(make_cluster: MakeCluster) -> None:
    """A site is cut off for longer than its live lease: withheld, kept, offered again, not rebuilt."""
    cluster = make_cluster()
    proxy = await CutProxy(cluster.members[0].client_port).start()
    async with Site("a", (proxy.endpoint,)) as a, Site("b", cluster.endpoints) as b:
        a.work(100)
        await converged(a, b)
        before = b.about(a)
        chain = max(a._chains, key=len)[:1]
        proxy.refuses = True
        proxy.cut()
        gone_s = await until(lambda: b.about(a)["withheld"] == ["dead"], "the lease to expire")
        assert all(match.source not in a.sources for match in b.index.match(chain))
        assert b.about(a)["entries"] == before["entries"]
        assert b.knows(a)
        a.work(50)
        proxy.refuses = False
        back_s = await converged(a, b)
        assert b.about(a)["rebuilds"] == before["rebuilds"]
        print(
            f"withheld {gone_s:.2f} s after the cut (lease 3 s), offered again {back_s:.2f} s after its end"
        )
    await proxy.close()


async def test_site_leaves_and_returns(make_cluster: MakeCluster) -> None:
    """An orderly end is known at once; the next life replaces the one before."""
    cluster = make_cluster()
    async with Site("b", cluster.endpoints) as b:
        async with Site("a", cluster.endpoints) as a:
            a.work(100)
            await converged(a, b)
        gone_s = await until(lambda: b.about(a)["withheld"] == ["dead"], "the site to be gone", timeout_s=2)
        async with Site("a", cluster.endpoints, seed=1) as again:
            again.work(50)
            took_s = await converged(again, b)
        print(f"withheld after {gone_s:.2f} s, the new life known after {took_s:.2f} s")


async def test_standby_takes_over(make_cluster: MakeCluster) -> None:
    """Two services of one site: one writes; when it is gone, the other does, with what it knows."""
    cluster = make_cluster()
    async with Site("b", cluster.endpoints) as b:
        one = Site("a", cluster.endpoints, name="one")
        await one.__aenter__()
        await until(lambda: one.server.replication.presence.held, "the first to be the writer")
        async with Site("a", cluster.endpoints, name="two") as two:
            for site in (one, two):
                site.work(50)  # one seed: both see the same events
            assert one.truth == two.truth
            await converged(one, b)
            assert not two.server.replication.presence.held
            await one.__aexit__(None, None, None)
            two.work(20)
            took_s = await converged(two, b)
            assert two.server.replication.presence.held
            print(f"taken over after {took_s:.2f} s")


async def test_maintenance_keeps_etcd_small(make_cluster: MakeCluster) -> None:
    """One of the services is elected, and compacts; readers do not notice."""
    cluster = make_cluster()
    async with (
        EtcdClient(EtcdConfig(cluster.endpoints)) as etcd,
        Site("a", cluster.endpoints, maintenance_s=0.3) as a,
        Site("b", cluster.endpoints, maintenance_s=0.3) as b,
    ):
        for i in range(1500):
            await etcd.put(b"/x", b"%d" % i)
        rounds = [site.server.replication.maintenance for site in (a, b)]
        await until(lambda: sum(m.compactions for m in rounds) > 0, "a compaction")
        assert sorted(m.rounds > 0 for m in rounds) == [False, True]
        a.work(50)
        await converged(a, b)


async def test_stride(make_cluster: MakeCluster) -> None:
    """With a stride a match is rounded down to it, never up; a hybrid model's boundary is exact."""
    cluster = make_cluster()
    publish = {"stride": 8, "min_tokens": 1, "min_seen": 1}
    async with (
        Site("a", cluster.endpoints, publish=publish) as a,
        Site("b", cluster.endpoints, publish=publish) as b,
    ):
        a.work(300)

        def agreed() -> bool:
            for chain in a._chains:
                answers = b.answers(a, chain)
                for source in a.sources:
                    matched, usable = answers.get(source, (0, 0))
                    held = next((i for i, x in enumerate(chain) if (source, x) not in a.truth), len(chain))
                    exact = a.usable(source, chain)
                    if not held - 8 < matched <= held:
                        return False
                    if not (usable == exact if source == a.sources[0] else exact - 8 < usable <= exact):
                        return False
            return True

        took_s = await until(agreed, "matches elsewhere to be as near to the truth as the stride allows")
        print(f"agreed after {took_s:.2f} s")


async def test_malformed_values(shared_etcd: EtcdCluster, client: EtcdClient) -> None:
    """Garbage in our key space: the site's entries are withheld until its log starts anew; others are not."""
    async with (
        Site("a", shared_etcd.endpoints) as a,
        Site("b", shared_etcd.endpoints) as b,
        Site("c", shared_etcd.endpoints) as c,
    ):
        a.work(50)
        c.work(50)
        await converged(a, b, c)
        log = a.server.replication.log
        position = log.end
        keys = log.keys
        await client.put(keys.prefix + b"log/not-a-number", b"x")
        await client.put(a.server.replication.presence.key + b"x", b"{}")
        await client.put(keys.segment(position.epoch, position.seq + 1), b"garbage")
        await until(lambda: b.about(a)["withheld"] == ["broken"], "the damage to be seen")
        assert not b.about(c)["withheld"]
        started_s = time.monotonic()
        a.work(50)  # the writer finds its place taken, and begins a new epoch
        await converged(a, b, c)
        await client.put(keys.head, b"garbage")
        await until(lambda: b.about(a)["withheld"] == ["broken"], "the damaged head to be seen")
        await client.put(keys.epoch, b"garbage")
        a.work(50)
        await converged(a, b, c)
        print(f"healed within {time.monotonic() - started_s:.2f} s")
    await client.delete(KeyRange.prefix(b"/prfaas/"))
