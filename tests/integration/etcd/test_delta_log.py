"""The delta log in etcd keeps the contract of every delta log."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from cache_service.core.errors import LocalProtocolError
from cache_service.core.ids import Namespace, SiteId
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core.model import KeyRange
from cache_service.replication.etcd_log import EtcdLog
from cache_service.store import DeltaLog
from tests.integration.delta_log_conformance import DeltaLogConformance, take


class TestEtcdLog(DeltaLogConformance):
    """The same tests as of the log in memory, against a real member."""

    @pytest.fixture
    def log(self, client: EtcdClient, request: pytest.FixtureRequest) -> DeltaLog:
        return EtcdLog(client, Namespace(request.node.name, 64), SiteId("A"))


async def test_two_writers_of_one_epoch(client: EtcdClient) -> None:
    """A writer and its clone, of the same name and epoch: one of each pair of segments counts, no mix."""
    namespace = Namespace("two-writers", 64)
    one, clone = (EtcdLog(client, namespace, SiteId("A"), writer="w") for _ in range(2))
    start = await one.begin()
    clone._lease, clone._end, clone._base, clone._head = one._lease, one._end, one._base, one._head
    outcomes = await asyncio.gather(
        one.append(start.epoch, b"one"), clone.append(start.epoch, b"clone"), return_exceptions=True
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, LocalProtocolError)]
    assert [error.reason for error in refused] == ["fenced"]
    won = b"one" if isinstance(outcomes[1], LocalProtocolError) else b"clone"
    async with aclosing(one.watch(start)) as entries:
        assert [entry.payload for entry in await take(entries, 1)] == [won]
    winner = one if won == b"one" else clone
    at = await winner.append(start.epoch, b"more")
    await winner.snapshot(at, b"all")
    loser = clone if winner is one else one
    loser._end = at
    with pytest.raises(LocalProtocolError):
        await loser.snapshot(at, b"others")
    async with aclosing(one.watch(None)) as entries:
        assert [entry.payload for entry in await take(entries, 1)] == [b"all"]


async def test_a_revoked_data_lease(client: EtcdClient) -> None:
    """When its data lease is gone a writer is told, and begins anew; so is a reader."""
    log = EtcdLog(client, Namespace("lease", 64), SiteId("A"))
    start = await log.begin()
    await log.append(start.epoch, b"a")
    async with aclosing(log.watch(None)) as entries:
        await take(entries, 2)
        await client.revoke(log._lease.id)
        (gone,) = await take(entries, 1)
        assert gone.payload == b""
        assert not await log.intact()
        with pytest.raises(LocalProtocolError) as caught:
            await log.append(start.epoch, b"b")
        assert caught.value.reason == "lease_lost"
        again = await log.begin()
        await log.append(again.epoch, b"c")
        assert [entry.payload for entry in await take(entries, 2)] == [b"", b"c"]


async def test_another_store_with_the_same_numbers(client: EtcdClient) -> None:
    """A log that was deleted with its epoch does not begin at an epoch that readers may know."""
    log = EtcdLog(client, Namespace("wiped", 64), SiteId("A"))
    first = await log.begin()
    await client.delete(KeyRange.prefix(log.keys.prefix))
    second = await log.begin()
    assert second.epoch not in (first.epoch, first.epoch + 1)
