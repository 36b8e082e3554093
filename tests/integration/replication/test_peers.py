"""The delta log from service to service: the common contract, then cuts, a death and another stride."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import pytest

from cache_service.core.events import BlocksStored, Group, GroupStored
from cache_service.core.ids import BlockHash
from cache_service.core.log import LogEntry, LogPosition
from cache_service.replication.core.stream import Hello
from cache_service.replication.over_peers import PeerReplication
from cache_service.replication.peer_stream import DeltaStreamService, PeerReader
from cache_service.store import DeltaLog, InProcessLog
from tests.integration.cache_support import free_port
from tests.integration.delta_log_conformance import DeltaLogConformance
from tests.integration.etcd_support import CutProxy
from tests.integration.replication.support import Site, converged, until


class Remote(InProcessLog):
    """Written here, read through gRPC."""

    reader: PeerReader

    def watch(self, after: LogPosition | None) -> AsyncGenerator[LogEntry, None]:  # type: ignore[override]
        return self.reader.watch(after)


class TestPeerStream(DeltaLogConformance):
    """The same tests as of the log in memory, through a gRPC server."""

    @pytest.fixture
    async def log(self) -> AsyncIterator[DeltaLog]:
        written, remote = InProcessLog(), Remote()
        remote.begin, remote.append, remote.snapshot = written.begin, written.append, written.snapshot  # type: ignore[method-assign]
        server = grpc.aio.server()
        DeltaStreamService(written, "ns", Hello("A", 1)).add_to(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        remote.reader = PeerReader(f"127.0.0.1:{port}", "ns")
        yield remote
        await remote.reader.close()
        await server.stop(0)


async def test_refusals() -> None:
    """Another namespace, and what is no request, are refused; the server goes on."""
    server = grpc.aio.server()
    DeltaStreamService(InProcessLog(), "ns", Hello("A", 1)).add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream("/prfaas.cache.v1.DeltaStream/Follow")
        for request, code in (
            (b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (b'{"namespace": "ns", "after": [1]}', grpc.StatusCode.INVALID_ARGUMENT),
            (b'{"namespace": "other"}', grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request).read()
            assert caught.value.code() is code
    await server.stop(0)


def pair(proxy_of_a: CutProxy, port_a: int, port_b: int, **options: object) -> tuple[Site, Site]:
    a = Site("a", (), listen=f"127.0.0.1:{port_a}", peers={"b": f"127.0.0.1:{port_b}"}, **options)
    b = Site("b", (), listen=f"127.0.0.1:{port_b}", peers={"a": proxy_of_a.endpoint}, **options)
    return a, b


async def test_a_restart_that_wrote_as_much() -> None:
    """A peer's new log that has grown past where the follower was in the old one is read from its start."""
    port_a, port_b = free_port(), free_port()
    proxy = await CutProxy(port_a).start()
    a, b = pair(proxy, port_a, port_b)
    again = Site("a", (), 1, f"127.0.0.1:{port_a}", peers={"b": f"127.0.0.1:{port_b}"})
    async with b:
        async with a:
            a.work(20)
            await until(lambda: b.knows(a), "the first life")
            reached = log_of(a).end.seq
            proxy.refuses = True
            proxy.cut()
        async with again:
            while log_of(again).end.seq <= reached:
                before = log_of(again).end
                again.work(5)
                await until(lambda at=before: log_of(again).end > at, "another segment")  # type: ignore[misc]
            proxy.refuses = False
            await until(lambda: b.knows(again), "the second life")
    await proxy.close()


def log_of(site: Site) -> InProcessLog:
    replication = site.server.replication
    assert isinstance(replication, PeerReplication)
    return replication.log


@pytest.mark.parametrize("stride", [1, 4])
async def test_ready_when_the_peer_was_read(stride: int) -> None:
    """A service that starts is ready once it has what its peer's log had, of whatever stride."""
    port_a, port_b = free_port(), free_port()
    proxy = await CutProxy(port_a).start()
    a, first = pair(proxy, port_a, port_b)
    publish = {"stride": stride, "min_tokens": 1, "min_seen": 1, "bytes_per_s": 0}
    _, second = pair(proxy, port_a, port_b, publish=publish)
    async with a:
        a.work(500)
        async with first:
            await until(lambda: first.knows(a), "the peer's log")
        async with second:
            assert not second.server.readiness.ready
            await until(lambda: second.server.readiness.ready, "the service to be ready")
            assert second.server.health()["behind"] == []
            assert second.knows(a)
    await proxy.close()


@pytest.mark.slow
async def test_cuts_and_a_long_silence() -> None:
    """Cuts lose nothing and rebuild nothing; silence beyond the lease withholds, its end offers again."""
    port_a, port_b = free_port(), free_port()
    proxy = await CutProxy(port_a).start()
    a, b = pair(proxy, port_a, port_b)
    async with a, b:
        a.work(50)
        b.work(50)
        await converged(a, b)
        rebuilds = b.about(a)["rebuilds"]
        for _ in range(5):
            proxy.cut()
            a.work(30)
            await until(lambda: b.knows(a), "the segments after the cut")
        proxy.swallows = True
        a.work(30)
        gone_s = await until(lambda: b.about(a)["withheld"] == ["dead"], "the silence to be noticed")
        proxy.swallows = False
        proxy.cut()
        back_s = await converged(a, b)
        assert b.about(a)["rebuilds"] == rebuilds
        print(f"withheld {gone_s:.2f} s after the silence began, offered {back_s:.2f} s after its end")
    await proxy.close()


async def test_a_new_life_and_another_stride() -> None:
    """A peer that comes back with segments of another stride is started over from nothing."""
    port_a, port_b = free_port(), free_port()
    proxy = await CutProxy(port_a).start()
    a, b = pair(proxy, port_a, port_b)
    async with b:
        async with a:
            a.work(50)
            await converged(a, b)
        again, _ = pair(proxy, port_a, port_b, publish={"stride": 4, "min_tokens": 1, "min_seen": 1})
        async with again:
            again.work(50)
            chain = [BlockHash(10**9 + i) for i in range(42)]
            again.server.state.apply(again.sources[0], [BlocksStored(tuple(chain), None)])
            again.server.state.apply(again.sources[0], [GroupStored(Group.STATE, (chain[29],))])
            again.server.state.apply(again.sources[0], [GroupStored(Group.SWA, tuple(chain[20:]))])

            def agreed() -> bool:
                return b.answers(again, chain) == {again.sources[0]: (40, 30)}

            await until(agreed, "matches at the new stride")
            assert not [source for source in b.index.sources() if source in again.sources]
    await asyncio.sleep(0)
    await proxy.close()
