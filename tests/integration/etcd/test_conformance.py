"""What our client writes another reads, and the other way round: the PyPI package etcd3."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import LeaseNotFound
from cache_service.etcd.core.model import EventKind, KeyRange
from tests.integration.etcd import oracle as oracle_module
from tests.integration.etcd.support import events_of, take_until
from tests.integration.etcd_support import EtcdCluster

# The oracle's watch thread dies of an exception when its channel is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def oracle(shared_etcd: EtcdCluster) -> Iterator[Any]:
    """An etcd3 client of the shared etcd."""
    etcd3 = oracle_module.load()
    with etcd3.client(host="127.0.0.1", port=shared_etcd.members[0].client_port, timeout=10) as made:
        yield made


async def test_put_and_get(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """A key's value and all its revisions agree, whoever wrote it; bytes of every kind survive."""
    binary = bytes(range(256)) * 3
    await client.put(prefix + b"ours\xff\x00", binary)
    await client.put(prefix + b"ours\xff\x00", binary)
    value, meta = oracle.get(prefix + b"ours\xff\x00")
    ours = await client.get(prefix + b"ours\xff\x00")
    assert ours is not None
    assert (value, meta.key) == (binary, prefix + b"ours\xff\x00")
    assert (meta.create_revision, meta.mod_revision, meta.version) == (
        ours.create_revision,
        ours.mod_revision,
        ours.version,
    )
    assert ours.version == 2
    oracle.put(prefix + b"theirs", binary)
    theirs = await client.get(prefix + b"theirs")
    assert theirs is not None
    assert (theirs.value, theirs.version) == (binary, 1)
    assert await client.get(prefix + b"none") is None


async def test_ranges(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """Prefixes, half-open ranges, limits, counts and old revisions agree."""
    for i in range(20):
        oracle.put(prefix + b"%02d" % i, str(i))
    # A key just past the prefix, and the prefix as a key.
    await client.put(prefix[:-1] + b"0", b"outside")
    revision = await client.put(prefix, b"root")
    every = await client.range(KeyRange.prefix(prefix))
    assert [(kv.value, kv.key) for kv in every.kvs] == [(v, m.key) for v, m in oracle.get_prefix(prefix)]
    assert (every.count, every.more, len(every.kvs)) == (21, False, 21)
    some = await client.range(KeyRange(prefix + b"03", prefix + b"07"))
    assert [kv.value for kv in some.kvs] == [v for v, _ in oracle.get_range(prefix + b"03", prefix + b"07")]
    first = await client.range(KeyRange.prefix(prefix), limit=5, keys_only=True)
    assert (len(first.kvs), first.more, first.count, first.kvs[1].value) == (5, True, 21, b"")
    counted = await client.range(KeyRange.prefix(prefix), count_only=True)
    assert (counted.kvs, counted.count) == ((), 21)
    await client.delete(KeyRange.prefix(prefix))
    assert (await client.range(KeyRange.prefix(prefix), revision=revision)).count == 21
    assert list(oracle.get_prefix(prefix)) == []


async def test_delete(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """Deletions are seen by the other side, and counted."""
    for i in range(5):
        await client.put(prefix + b"%d" % i, b"")
    assert await client.delete(KeyRange.one(prefix + b"0")) == 1
    assert oracle.get(prefix + b"0") == (None, None)
    assert oracle.delete(prefix + b"1") is True
    assert await client.get(prefix + b"1") is None
    assert await client.delete(KeyRange.prefix(prefix)) == 3
    assert await client.delete(KeyRange.prefix(prefix)) == 0


async def test_txns_of_theirs_and_ours(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """The same comparisons give the same verdict in both clients, and the branches do what they say."""
    key = prefix + b"k"
    revision = await client.put(key, b"m")
    await client.put(key, b"n")
    ours_theirs = [
        (t.version(key, "=", 2), oracle.transactions.version(key) == 2),
        (t.version(key, ">", 2), oracle.transactions.version(key) > 2),
        (t.create_revision(key, "=", revision), oracle.transactions.create(key) == revision),
        (t.create_revision(key, "!=", revision), oracle.transactions.create(key) != revision),
        (t.mod_revision(key, ">", revision), oracle.transactions.mod(key) > revision),
        (t.mod_revision(key, "<", revision), oracle.transactions.mod(key) < revision),
        (t.value_of(key, "=", b"n"), oracle.transactions.value(key) == b"n"),
        (t.value_of(key, "<", b"n"), oracle.transactions.value(key) < b"n"),
        (t.absent(key), oracle.transactions.create(key) == 0),
        (t.exists(key), oracle.transactions.create(key) > 0),
        (t.value_of(prefix + b"none", "=", b""), oracle.transactions.value(prefix + b"none") == b""),
    ]
    for ours, theirs in ours_theirs:
        result = await client.txn(t.Txn().when(ours))
        verdict, _ = oracle.transaction(compare=[theirs], success=[], failure=[])
        assert result.succeeded == verdict, ours
    done = await client.txn(
        t.Txn()
        .when(t.version(key, "=", 99))
        .then(t.Put(key, b"wrong"))
        .otherwise(
            t.Put(prefix + b"p", b"q"), t.Delete(KeyRange.one(key)), t.Get(KeyRange.prefix(prefix), limit=9)
        )
    )
    assert not done.succeeded
    assert done.results[0:2] == (t.Done(), t.Deleted(1))
    read = done.results[2]
    assert not isinstance(read, t.Done | t.Deleted)
    assert [(kv.key, kv.value) for kv in read.kvs] == [(prefix + b"p", b"q")]
    assert oracle.get(prefix + b"p")[0] == b"q"
    verdict, answers = oracle.transaction(
        compare=[oracle.transactions.value(prefix + b"p") == b"q"],
        success=[oracle.transactions.put(prefix + b"r", b"s"), oracle.transactions.get(prefix + b"p")],
        failure=[],
    )
    assert verdict
    assert answers[1][0][0] == b"q"
    written = await client.get(prefix + b"r")
    assert written is not None
    assert (written.value, written.mod_revision) == (b"s", done.revision + 1)


async def test_compare_of_a_range_and_a_lease(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """A comparison may span a range, and may look at the lease."""
    lease = oracle.lease(60)
    oracle.put(prefix + b"a", b"", lease=lease)
    await client.put(prefix + b"b", b"")
    every = KeyRange.prefix(prefix)
    assert (await client.txn(t.Txn().when(t.lease_of(prefix + b"a", "=", lease.id)))).succeeded
    assert not (await client.txn(t.Txn().when(t.lease_of(every, "=", lease.id)))).succeeded
    assert (await client.txn(t.Txn().when(t.version(every, "=", 1)))).succeeded
    lease.revoke()
    assert (await client.txn(t.Txn().when(t.absent(prefix + b"a")))).succeeded


async def test_leases(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """Leases and the keys on them are seen by both sides, and revoked by either."""
    ours = await client.grant(60)
    await client.put(prefix + b"a", b"", lease=ours.lease)
    seen = oracle.get_lease_info(ours.lease)
    assert seen.grantedTTL == ours.granted_s == 60
    assert list(seen.keys) == [prefix + b"a"]
    theirs = oracle.lease(30)
    oracle.put(prefix + b"b", b"", lease=theirs)
    info = await client.time_to_live(theirs.id, keys=True)
    assert (info.granted_s, info.keys) == (30, (prefix + b"b",))
    assert 28 <= info.remaining_s <= 30
    assert {ours.lease, theirs.id} <= set(await client.leases())
    oracle.revoke_lease(ours.lease)
    assert await client.get(prefix + b"a") is None
    await client.revoke(theirs.id)
    assert oracle.get(prefix + b"b") == (None, None)
    with pytest.raises(LeaseNotFound):
        await client.time_to_live(theirs.id)
    with pytest.raises(LeaseNotFound):
        await client.revoke(theirs.id)
    with pytest.raises(LeaseNotFound):
        await client.put(prefix + b"c", b"", lease=theirs.id)


async def test_our_watch_of_their_writes(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """Every change they make arrives once, in order, with its revisions and the value before."""
    start = await client.put(prefix + b"a", b"0") + 1
    watcher = client.watch(KeyRange.prefix(prefix), start, previous=True)
    for i in range(1, 50):
        oracle.put(prefix + b"a", str(i))
    oracle.delete(prefix + b"a")
    taken = await take_until(watcher.run(), lambda items: len(events_of(items)) >= 50)
    events = events_of(taken)
    assert [e.kv.mod_revision for e in events] == list(range(start, start + 50))
    assert [e.kv.value for e in events[:-1]] == [b"%d" % i for i in range(1, 50)]
    assert [e.kind for e in events] == [EventKind.PUT] * 49 + [EventKind.DELETE]
    assert [e.previous.value for e in events if e.previous] == [b"%d" % i for i in range(50)]


async def test_their_watch_of_our_writes(client: EtcdClient, oracle: Any, prefix: bytes) -> None:
    """Every change we make arrives with them."""
    start = await client.put(prefix + b"a", b"0") + 1
    events, cancel = oracle.watch_prefix(prefix, start_revision=start)
    await client.put(prefix + b"b", b"1")
    await client.txn(t.Txn().then(t.Put(prefix + b"c", b"2"), t.Delete(KeyRange.one(prefix + b"b"))))

    def take() -> list[Any]:
        return [next(events) for _ in range(3)]

    async with asyncio.timeout(20):
        seen = await asyncio.to_thread(take)
    cancel()
    # Events of one revision come in no order that etcd promises.
    assert (seen[0].key, seen[0].value) == (prefix + b"b", b"1")
    rest = {(type(e).__name__, e.key, e.value) for e in seen[1:]}
    assert rest == {("PutEvent", prefix + b"c", b"2"), ("DeleteEvent", prefix + b"b", b"")}


async def test_members_status_and_alarms(client: EtcdClient, oracle: Any, shared_etcd: EtcdCluster) -> None:
    """Both sides see the same members and the same state."""
    theirs = list(oracle.members)
    ours = await client.members()
    assert [(m.member, m.name, m.client_urls) for m in ours] == [
        (m.id, m.name, tuple(m.client_urls)) for m in theirs
    ]
    status, seen = await client.status(shared_etcd.endpoints[0]), oracle.status()
    assert (status.version, status.raft_term, status.leader) == (seen.version, seen.raft_term, seen.leader.id)
    assert status.db_bytes == seen.db_size
    oracle.create_alarm(member_id=theirs[0].id)
    active = await client.alarms()
    assert [(a.member, a.kind.value) for a in active] == [(theirs[0].id, "NOSPACE")]
    await client.disarm(active[0])
    assert list(oracle.list_alarms()) == []
    assert await client.alarms() == ()
    await client.defragment(shared_etcd.endpoints[0])
    assert (await client.check_versions()).keys() == set(shared_etcd.endpoints)
