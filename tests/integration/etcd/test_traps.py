"""Limits and surprises of etcd that a client must know, each against a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cache_service.core.errors import ConfigError, LocalProtocolError
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import Compacted, FarBehind, LeaseNotFound, NoSpace, TooLarge
from cache_service.etcd.core.model import AlarmKind, Changes, EventKind, KeyRange, Progress
from cache_service.etcd.core.retry import parse_version, progress_is_sound
from tests.integration.etcd.conftest import MakeCluster
from tests.integration.etcd.support import events_of, fill, take_until
from tests.integration.etcd_support import EtcdCluster


async def test_largest_value(client: EtcdClient, prefix: bytes) -> None:
    """A value just below the limit is taken, one above is refused here, before it is sent."""
    limit = EtcdConfig(("127.0.0.1:1",)).max_request_bytes
    value = bytes(limit - len(prefix) - 64)
    await client.put(prefix, value)
    with pytest.raises(TooLarge, match="etcd takes"):
        await client.put(prefix, value + b"x")
    with pytest.raises(TooLarge, match="use split"):
        await client.txn(t.Txn().then(t.Put(prefix + b"a", value[:-9]), t.Put(prefix + b"b", value[:-9])))


async def test_server_refuses_what_we_would_not_send(shared_etcd: EtcdCluster, prefix: bytes) -> None:
    """A server with a lower limit than we were told answers TooLarge."""
    async with EtcdClient(EtcdConfig(shared_etcd.endpoints, max_request_bytes=4 << 20)) as client:
        with pytest.raises(TooLarge, match="request is too large"):
            await client.put(prefix, bytes(1536 * 1024))


async def test_128_operations(client: EtcdClient, prefix: bytes) -> None:
    """128 operations are taken, 129 are refused here; `apply` cuts, also where a key is put twice."""
    ops = [t.Put(prefix + b"%d" % i, b"") for i in range(129)]
    with pytest.raises(TooLarge, match="129 operations"):
        await client.txn(t.Txn().then(*ops))
    assert (await client.txn(t.Txn().then(*ops[:128]))).succeeded
    with pytest.raises(LocalProtocolError, match="duplicate key"):
        await client.txn(t.Txn().then(ops[0], ops[0]))
    done = await client.apply([*ops, ops[0], t.Delete(KeyRange.one(ops[1].key))])
    assert len(done) == 2
    assert (await client.range(KeyRange.prefix(prefix), count_only=True)).count == 128


async def test_apply_of_megabytes(client: EtcdClient, prefix: bytes) -> None:
    """More bytes than a request takes go in several transactions, and come back in pages."""
    value = bytes(200_000)
    done = await client.apply([t.Put(prefix + b"%02d" % i, value) for i in range(40)])
    assert len(done) == 6
    pages = [page async for page in client.pages(KeyRange.prefix(prefix))]
    kvs = [kv for page in pages for kv in page.kvs]
    assert [kv.key for kv in kvs] == [prefix + b"%02d" % i for i in range(40)]
    assert all(kv.value == value for kv in kvs)


async def test_guard_stops_the_rest(client: EtcdClient, prefix: bytes) -> None:
    """Each part is under the guard: when it no longer holds, nothing more is written."""
    await client.put(prefix + b"epoch", b"2")
    guard = [t.value_of(prefix + b"epoch", "=", b"1")]
    ops = [t.Put(prefix + b"log/%03d" % i, b"") for i in range(200)]
    done = await client.apply(ops, guard=guard)
    assert [r.succeeded for r in done] == [False]
    assert (await client.range(KeyRange.prefix(prefix + b"log/"), count_only=True)).count == 0


async def test_large_range_in_pages_of_one_revision(shared_etcd: EtcdCluster, prefix: bytes) -> None:
    """30,000 keys: too large for one message, in pages all there, though others write meanwhile."""
    config = EtcdConfig(shared_etcd.endpoints, max_message_bytes=4 << 20, page_bytes=1 << 20)
    async with EtcdClient(config) as client:
        await fill(client, prefix, 30_000, value=bytes(150))
        with pytest.raises(TooLarge):
            await client.range(KeyRange.prefix(prefix))
        pages = []
        async for page in client.pages(KeyRange.prefix(prefix)):
            pages.append(page)
            # Behind the reader and ahead of it: neither may show.
            await client.put(prefix + b"00000000", b"changed")
            await client.delete(KeyRange.one(prefix + b"00029999"))
        assert len({page.revision for page in pages}) == 1
        assert [page.first for page in pages] == [True] + [False] * (len(pages) - 1)
        assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
        keys = [kv.key for page in pages for kv in page.kvs]
        assert keys == [prefix + b"%08d" % i for i in range(30_000)]
        assert all(sum(len(kv.key) + len(kv.value) for kv in page.kvs) < 2 << 20 for page in pages)


async def test_pages_halve_when_values_grow(shared_etcd: EtcdCluster, prefix: bytes) -> None:
    """Small keys first, then megabytes: the page that does not fit is asked for again, smaller."""
    config = EtcdConfig(shared_etcd.endpoints, max_message_bytes=4 << 20, page_bytes=1 << 20)
    async with EtcdClient(config) as client:
        await fill(client, prefix + b"a", 300)
        for i in range(12):
            await client.put(prefix + b"b%02d" % i, bytes(1_000_000))
        kvs = [kv async for page in client.pages(KeyRange.prefix(prefix)) for kv in page.kvs]
        assert len(kvs) == 312
        assert len({kv.key for kv in kvs}) == 312


async def test_catch_up_header_is_no_place_to_resume(client: EtcdClient, prefix: bytes) -> None:
    """A watch far in the past gets every revision, though every header carries the newest one."""
    start = await client.put(prefix + b"first", b"") + 1
    for i in range(3000):
        await client.put(prefix + b"k", b"%d" % i)
    watcher = client.watch(KeyRange.prefix(prefix), start)
    taken = await take_until(watcher.run(), lambda items: len(events_of(items)) >= 3000)
    assert [e.kv.value for e in events_of(taken)] == [b"%d" % i for i in range(3000)]
    assert len([item for item in taken if isinstance(item, Changes)]) > 1
    assert watcher.next_revision == start + 3000


async def test_compacted_watch_says_so(client: EtcdClient, prefix: bytes) -> None:
    """A watch from a compacted revision ends with Compacted, where etcd itself falls silent."""
    old = await client.put(prefix, b"1")
    new = await client.put(prefix, b"2")
    await client.compact(new, physical=True)
    with pytest.raises(Compacted) as caught:
        await take_until(client.watch(KeyRange.one(prefix), old).run(), lambda items: False)
    assert caught.value.compact_revision == new
    with pytest.raises(Compacted):
        await client.get(prefix, revision=old)
    with pytest.raises(Compacted):
        await client.compact(old)


async def test_compaction_behind_a_live_watch_is_no_loss(client: EtcdClient, prefix: bytes) -> None:
    """A watch that has kept up does not notice a compaction."""
    start = await client.put(prefix, b"0") + 1
    watcher = client.watch(KeyRange.one(prefix), start)
    run = watcher.run()
    revision = await client.put(prefix, b"1")
    assert [e.kv.value for e in events_of([await anext(run)])] == [b"1"]
    await client.compact(revision, physical=True)
    await client.put(prefix, b"2")
    assert [e.kv.value for e in events_of([await anext(run)])] == [b"2"]
    assert watcher.resumes == 0
    await run.aclose()


async def test_far_behind(client: EtcdClient, prefix: bytes) -> None:
    """A watch that would have to catch up with too much says so, instead of burdening the server."""
    start = await client.put(prefix, b"")
    for _ in range(30):
        await client.put(prefix, b"")
    with pytest.raises(FarBehind, match="more than 20"):
        await take_until(client.watch(KeyRange.one(prefix), start, max_behind=20).run(), lambda items: False)


async def test_one_revision_of_20000_deletes_in_fragments(shared_etcd: EtcdCluster, prefix: bytes) -> None:
    """Revoking a lease of 20,000 long keys is one revision of megabytes: it arrives whole, in one piece."""
    long = prefix + b"x" * 200
    async with EtcdClient(
        EtcdConfig(shared_etcd.endpoints, max_message_bytes=4 << 20, page_bytes=1 << 20)
    ) as client:
        lease = await client.grant(600)
        last = await fill(client, long, 20_000, lease=lease.lease)
        watcher = client.watch(KeyRange.prefix(prefix), last + 1)
        run = watcher.run()
        first = asyncio.ensure_future(anext(run))
        await client.revoke(lease.lease)
        async with asyncio.timeout(30):
            changes = await first
        await run.aclose()
        assert isinstance(changes, Changes)
        assert {e.kind for e in changes.events} == {EventKind.DELETE}
        assert {e.kv.mod_revision for e in changes.events} == {last + 1}
        assert len({e.kv.key for e in changes.events}) == len(changes.events) == 20_000


async def test_progress(client: EtcdClient, shared_etcd: EtcdCluster, prefix: bytes) -> None:
    """A quiet watch moves its place on with the store, so that a compaction elsewhere does not end it."""
    release = (await client.status(shared_etcd.endpoints[0])).version
    if not progress_is_sound(parse_version(release)):
        pytest.skip(f"etcd {release} answers progress requests too early")
    start = await client.put(prefix + b"quiet", b"") + 1
    watcher = client.watch(KeyRange.one(prefix + b"quiet"), start, progress_s=0.1)
    revision = await fill(client, prefix + b"other/", 500)
    taken = await take_until(
        watcher.run(), lambda items: isinstance(items[-1], Progress) and items[-1].revision >= revision
    )
    assert all(isinstance(item, Progress) for item in taken)
    assert watcher.next_revision == revision + 1


async def fill_up(client: EtcdClient) -> None:
    """Put some 50 MB, one after the other: etcd notices its size when it commits, every 100 ms."""
    for i in range(100):
        await client.put(b"big%d" % (i % 3), bytes(500_000))


async def test_quota(make_cluster: MakeCluster) -> None:
    """Out of space: puts and grants fail with NoSpace, reads and deletes work, and there is a way back."""
    cluster = make_cluster(quota_bytes=16 << 20)
    async with EtcdClient(EtcdConfig(cluster.endpoints)) as client:
        kept = await client.lease(60)
        await client.put(b"keep", b"1", lease=kept.id)
        with pytest.raises(NoSpace):
            await fill_up(client)
        with pytest.raises(NoSpace):
            await client.grant(60)
        with pytest.raises(NoSpace):
            await client.txn(t.Txn().then(t.Put(b"a", b"")))
        alarm = (await client.alarms())[0]
        assert alarm.kind is AlarmKind.NO_SPACE
        assert await client.get(b"keep") is not None
        assert (await client.txn(t.Txn().then(t.Delete(KeyRange.prefix(b"big"))))).succeeded
        revision = (await client.range(KeyRange.one(b"keep"))).revision
        before = (await client.status(cluster.endpoints[0])).db_bytes
        await client.compact(revision, physical=True)
        await client.defragment(cluster.endpoints[0])
        await client.disarm(alarm)
        assert (await client.status(cluster.endpoints[0])).db_bytes < before / 4
        await client.put(b"a", b"")
        assert kept.loss is None


async def test_shortest_lease(make_cluster: MakeCluster) -> None:
    """etcd raises a TTL below its minimum, and says so."""
    cluster = make_cluster(arguments=["--election-timeout=1000"])  # etcd's default
    async with EtcdClient(EtcdConfig(cluster.endpoints)) as client:
        granted = await client.grant(1)
        assert granted.granted_s == 2
        await client.revoke(granted.lease)
        with pytest.raises(LocalProtocolError, match="not above 0"):
            await client.grant(0)
        with pytest.raises(LeaseNotFound):
            await client.time_to_live(granted.lease)


def test_what_is_wrong_in_a_config_is_named(tmp_path: Path) -> None:
    """Endpoints, times, files and logins are checked before anything is opened."""
    for arguments, words in [
        ({"endpoints": ()}, "etcd.endpoints: empty"),
        ({"endpoints": ("nohost",)}, r"etcd.endpoints\[0\]"),
        ({"endpoints": ("a:1", "a:1")}, "named twice"),
        ({"endpoints": ("a:1",), "timeout_s": 0}, "etcd.timeout_s"),
        ({"endpoints": ("a:1",), "keepalive_s": 1}, "etcd.keepalive_s"),
        ({"endpoints": ("a:1",), "user": "root"}, "go together"),
        ({"endpoints": ("10.0.0.1:1",), "user": "root", "password": "secret"}, "not sent without etcd.tls"),
        ({"endpoints": ("a:1",), "max_message_bytes": 1 << 20}, "etcd.max_message_bytes"),
    ]:
        with pytest.raises(ConfigError, match=words):
            EtcdConfig(**arguments)  # type: ignore[arg-type]
    assert "secret" not in repr(EtcdConfig(("localhost:1",), user="root", password="secret"))
