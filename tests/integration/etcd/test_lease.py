"""Leases that are kept, lost, revoked and released."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.etcd.core.errors import LeaseNotFound
from cache_service.etcd.core.model import KeyRange
from cache_service.etcd.lease import Lease, Loss
from tests.integration.etcd.conftest import MakeCluster
from tests.integration.etcd.support import events_of, take_until
from tests.integration.etcd_support import EtcdCluster


@pytest.fixture
async def other(shared_etcd: EtcdCluster) -> AsyncIterator[EtcdClient]:
    """A second client."""
    async with EtcdClient(EtcdConfig(shared_etcd.endpoints)) as made:
        yield made


@pytest.mark.slow
async def test_kept_beyond_its_ttl_and_gone_after_release(client: EtcdClient, prefix: bytes) -> None:
    """A lease outlives its TTL while it is kept, and its key goes within the TTL after its release."""
    now_s = asyncio.get_running_loop().time
    lost: list[Loss] = []
    lease = await client.lease(2, lambda lease, loss: lost.append(loss))
    start = await client.put(prefix, b"", lease=lease.id) + 1
    until = now_s() + 3
    async with asyncio.timeout(20):
        while lease.clock.valid_until_s < until + 1:  # renewed at least twice
            await asyncio.sleep(0.05)
    assert now_s() > until - 2
    assert await client.get(prefix) is not None
    assert (lost, lease.loss) == ([], None)
    lease.release()
    taken = await take_until(
        client.watch(KeyRange.one(prefix), start).run(), lambda items: bool(events_of(items))
    )
    assert now_s() < until + 5
    assert events_of(taken)[0].kv.version == 0
    assert lost == []


async def test_told_when_it_is_revoked_by_another(client: EtcdClient, other: EtcdClient) -> None:
    """A lease that the server no longer knows is lost as "expired"; the holder is told once."""
    lost: list[tuple[Lease, Loss]] = []
    lease = await client.lease(3, lambda lease, loss: lost.append((lease, loss)))
    await other.revoke(lease.id)
    async with asyncio.timeout(5):
        assert await lease.lost() is Loss.EXPIRED
    assert lost == [(lease, Loss.EXPIRED)]
    with pytest.raises(LeaseNotFound):
        await client.revoke(lease)


async def test_many_leases_on_one_stream(client: EtcdClient, other: EtcdClient) -> None:
    """One stream keeps 500 leases; one that is lost leaves the others alone, as does a faulty callback."""

    def faulty(lease: Lease, loss: Loss) -> None:
        raise RuntimeError("the holder's mistake")

    leases = await asyncio.gather(*(client.lease(4, faulty) for _ in range(500)))
    await other.revoke(leases[7].id)
    async with asyncio.timeout(8):
        await leases[7].lost()
    held_until = {lease.id: lease.clock.valid_until_s for lease in leases}
    fresh = await client.lease(2)
    await other.revoke(fresh.id)
    async with asyncio.timeout(8):
        await fresh.lost()
    # A round later every other lease was confirmed again.
    async with asyncio.timeout(8):
        while any(held_until[le.id] == le.clock.valid_until_s for le in leases if le is not leases[7]):
            await asyncio.sleep(0.05)
    assert [le.loss for le in leases].count(None) == 499
    await asyncio.gather(*(client.revoke(le) for le in leases if le.loss is None))


async def test_told_when_nothing_confirms_it(make_cluster: MakeCluster) -> None:
    """A member that hangs confirms nothing: the holder is told by its own clock, no later than the TTL."""
    cluster = make_cluster()
    async with EtcdClient(EtcdConfig(cluster.endpoints)) as client:
        lease = await client.lease(3)
        valid_until_s = lease.clock.valid_until_s
        cluster.stop(0)
        async with asyncio.timeout(10):
            assert await lease.lost() is Loss.UNCONFIRMED
        assert asyncio.get_running_loop().time() < max(valid_until_s, lease.clock.valid_until_s) + 0.5
        cluster.go_on(0)


@pytest.mark.slow
async def test_outlives_its_leader(make_cluster: MakeCluster) -> None:
    """The death of the leader, and of the member that renewed it, costs no lease."""
    cluster = make_cluster(members=3)
    async with EtcdClient(EtcdConfig(cluster.endpoints)) as client:
        leases = [await client.lease(4) for _ in range(5)]
        for _ in range(2):
            leader = cluster.leader()
            killed_at_s = asyncio.get_running_loop().time()
            cluster.kill(leader)
            async with asyncio.timeout(10):
                while any(le.clock.valid_until_s < killed_at_s + 5.5 for le in leases if le.loss is None):
                    await asyncio.sleep(0.05)
            cluster.restart(leader)
        assert [lease.loss for lease in leases] == [None] * 5
        assert set(await client.leases()) == {lease.id for lease in leases}
