"""Users, passwords, tokens that run out, certificates."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from cache_service.core.errors import ConfigError, LocalProtocolError, Unavailable
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.config import EtcdConfig, TlsPaths
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import AuthFailed, PermissionDenied
from cache_service.etcd.core.model import Changes, KeyRange
from tests.integration.authority import Authority
from tests.integration.etcd.conftest import MakeCluster
from tests.integration.etcd.support import events_of, take_until
from tests.integration.etcd_support import EtcdCluster, ServerTls

PASSWORD = "pass-a word"


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def add_users(cluster: EtcdCluster, *, site_user: str) -> None:
    """Make root, and a user that may read /s/ and write /s/a/; then demand logins."""
    cluster.admin("auth/user/add", {"name": "root", "password": "root"})
    cluster.admin("auth/role/add", {"name": "root"})
    cluster.admin("auth/user/grant", {"user": "root", "role": "root"})
    cluster.admin("auth/user/add", {"name": site_user, "password": PASSWORD})
    cluster.admin("auth/role/add", {"name": "site-a"})
    for kind, prefix in (("READ", b"/s/"), ("READWRITE", b"/s/a/")):
        keys = KeyRange.prefix(prefix)
        permission = {"permType": kind, "key": base64_text(keys.start), "range_end": base64_text(keys.end)}
        cluster.admin("auth/role/grant", {"name": "site-a", "perm": permission})
    cluster.admin("auth/user/grant", {"user": site_user, "role": "site-a"})
    cluster.admin("auth/enable", {})


def root_token(cluster: EtcdCluster) -> str:
    answer: dict[str, Any] = cluster.admin("auth/authenticate", {"name": "root", "password": "root"})
    return str(answer["token"])


@pytest.fixture
def guarded(make_cluster: MakeCluster) -> EtcdCluster:
    """An etcd that demands logins, whose tokens run out after a second without use."""
    cluster = make_cluster(arguments=["--bcrypt-cost=4", "--auth-token-ttl=1"])
    add_users(cluster, site_user="a")
    return cluster


def login(cluster: EtcdCluster, **options: object) -> EtcdConfig:
    return EtcdConfig(cluster.endpoints, user="a", password=PASSWORD, **options)  # type: ignore[arg-type]


async def test_what_a_user_may_do(guarded: EtcdCluster) -> None:
    """Its own range is written, the others' read, everything else refused: keys, txns, watches, leases."""
    async with EtcdClient(login(guarded)) as client:
        await client.put(b"/s/a/k", b"")
        assert await client.get(b"/s/b/k") is None
        for refused in (
            client.put(b"/s/b/k", b""),
            client.get(b"/other"),
            client.delete(KeyRange.prefix(b"/s/")),
            client.txn(t.Txn().then(t.Put(b"/s/b/k", b""))),
            take_until(client.watch(KeyRange.prefix(b"/"), 1).run(), lambda items: False),
        ):
            with pytest.raises(PermissionDenied):
                await refused
        run = client.watch(KeyRange.prefix(b"/s/"), 1).run()
        assert isinstance(await anext(run), Changes)
        await run.aclose()
        lease = await client.lease(30)
        await client.put(b"/s/a/leased", b"", lease=lease.id)
        await client.revoke(lease)


async def test_wrong_or_missing_login(guarded: EtcdCluster) -> None:
    """A wrong password, an unknown user and no user at all are AuthFailed; the password is in no message."""
    for user, password in (("a", "wrong-secret"), ("nobody", "wrong-secret"), ("", "")):
        async with EtcdClient(EtcdConfig(guarded.endpoints, user=user, password=password)) as client:
            with pytest.raises(AuthFailed) as caught:
                await client.put(b"/s/a/k", b"")
            assert "wrong-secret" not in str(caught.value)
            with pytest.raises(AuthFailed):
                await take_until(client.watch(KeyRange.prefix(b"/s/"), 1).run(), lambda items: False)


@pytest.mark.slow
async def test_tokens_that_ran_out_are_renewed(guarded: EtcdCluster) -> None:
    """Calls, txns, watches and leases go on after the token has died of idleness, many at once too."""
    async with EtcdClient(login(guarded)) as client:
        start = await client.put(b"/s/a/k", b"0") + 1
        lease = await client.lease(3)
        for round_ in range(2):
            # etcd drops idle tokens once a second: wait until this one is gone, asking without it.
            await until_dead(guarded, client)
            if round_ == 0:
                assert (await client.txn(t.Txn().then(t.Put(b"/s/a/k", b"1")))).succeeded
            else:
                await asyncio.gather(*(client.put(b"/s/a/k", b"%d" % i) for i in range(20)))
        await until_dead(guarded, client)
        taken = await take_until(
            client.watch(KeyRange.prefix(b"/s/"), start).run(), lambda items: len(events_of(items)) >= 21
        )
        assert len(events_of(taken)) == 21
        assert lease.loss is None


async def until_dead(cluster: EtcdCluster, client: EtcdClient) -> None:
    """Wait until the client's token is no longer accepted."""
    token = client._connections.token
    assert token
    # Using a token prolongs it, so it must be left alone for its whole life of a second and a sweep.
    await asyncio.sleep(2.5)
    with pytest.raises(OSError, match="401"):
        await asyncio.to_thread(cluster.admin, "kv/range", {"key": base64_text(b"/s/a/k")}, token=token)


async def test_a_change_of_roles_costs_a_watch_nothing(guarded: EtcdCluster) -> None:
    """After any change of users every old token is refused once: calls and watches renew theirs and go on."""
    async with EtcdClient(login(guarded)) as client:
        start = await client.put(b"/s/a/k", b"0") + 1
        run = client.watch(KeyRange.prefix(b"/s/a/"), start - 1, progress_s=0.2).run()
        assert [e.kv.value for e in events_of([await anext(run)])] == [b"0"]
        guarded.admin("auth/user/add", {"name": "z", "password": "z"}, token=root_token(guarded))
        await client.put(b"/s/a/k", b"1")
        taken = await take_until(run, lambda items: bool(events_of(items)))
        assert [e.kv.value for e in events_of(taken)] == [b"1"]


async def test_a_restart_forgets_every_token(guarded: EtcdCluster) -> None:
    """Tokens live in a member's memory: after an outage of any length watches and leases log in again."""
    async with EtcdClient(login(guarded)) as client:
        start = await client.put(b"/s/a/k", b"0")
        lease = await client.lease(6)
        watcher = client.watch(KeyRange.prefix(b"/s/a/"), start, progress_s=0.2)
        run = watcher.run()
        assert [e.kv.value for e in events_of([await anext(run)])] == [b"0"]
        waiting = asyncio.create_task(take_until(run, lambda items: bool(events_of(items))))
        guarded.kill(0)
        async with asyncio.timeout(20):
            while watcher.resumes < 4:
                await asyncio.sleep(0.05)
        await asyncio.to_thread(guarded.restart, 0)
        back_s = asyncio.get_running_loop().time()
        await client.put(b"/s/a/k", b"1")
        assert [e.kv.value for e in events_of(await waiting)] == [b"1"]
        async with asyncio.timeout(20):
            while lease.clock.valid_until_s < back_s + 6:
                await asyncio.sleep(0.05)
        assert lease.loss is None


async def test_certificates(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """With client certificates the certificate's name is the user; others are not let in."""
    authority = Authority(tmp_path, "ca")
    server, ours = authority.files("etcd"), authority.files("a")
    cluster = make_cluster(arguments=["--bcrypt-cost=4"])
    add_users(cluster, site_user="worker-a")
    cluster.kill(0)
    cluster.secure(ServerTls(server.ca, server.cert, server.key, client_auth=True))
    cluster.restart(0)
    tls = TlsPaths(ours.ca, ours.cert, ours.key, server_name="etcd")
    async with EtcdClient(EtcdConfig(cluster.endpoints, tls=tls)) as client:
        start = await client.put(b"/s/a/k", b"") + 1
        with pytest.raises(PermissionDenied):
            await client.put(b"/s/b/k", b"")
        run = client.watch(KeyRange.prefix(b"/s/a/"), start).run()
        await client.put(b"/s/a/k", b"1")
        assert [e.kv.value for e in events_of([await anext(run)])] == [b"1"]
        await run.aclose()
    stranger = Authority(tmp_path, "other").files("a")
    for refused in (
        TlsPaths(ours.ca, server_name="etcd"),  # no certificate
        TlsPaths(ours.ca, stranger.cert, stranger.key, server_name="etcd"),  # another authority's
        TlsPaths(stranger.ca, ours.cert, ours.key, server_name="etcd"),  # we do not trust the member
        TlsPaths(ours.ca, ours.cert, ours.key, server_name="else"),  # the member is somebody else
        None,  # no TLS
    ):
        async with EtcdClient(EtcdConfig(cluster.endpoints, tls=refused, timeout_s=0.5)) as client:
            with pytest.raises(Unavailable):
                await client.get(b"/s/a/k")


async def test_login_over_tls(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """A password goes over a connection whose server alone shows a certificate."""
    server = Authority(tmp_path, "ca").files("etcd")
    cluster = make_cluster(arguments=["--bcrypt-cost=4"])
    add_users(cluster, site_user="a")
    cluster.kill(0)
    cluster.secure(ServerTls(server.ca, server.cert, server.key))
    cluster.restart(0)
    async with EtcdClient(login(cluster, tls=TlsPaths(server.ca, server_name="etcd"))) as client:
        await client.put(b"/s/a/k", b"")
        with pytest.raises(PermissionDenied):
            await client.put(b"/s/b/k", b"")


def test_half_a_certificate(tmp_path: Path) -> None:
    """Files that are not there, and a certificate without its key, are named."""
    with pytest.raises(ConfigError, match=r"etcd\.tls\.ca: .* is not a file"):
        TlsPaths(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="go together"):
        TlsPaths(str(tmp_path), cert="a")


async def test_after_close(guarded: EtcdCluster) -> None:
    """A closed client says so."""
    client = EtcdClient(login(guarded))
    await client.close()
    with pytest.raises(LocalProtocolError, match="after close"):
        await client.get(b"k")
