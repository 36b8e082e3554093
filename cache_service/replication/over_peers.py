"""Replication from service to service: this site's log served, the peers' logs followed.

Decides when a peer is dead: nothing heard of it for its live lease. Everything else is as over etcd. With
`encryption` a peer must have a certificate of the same authority with the name of its site.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from cache_service.channels import Encryption
from cache_service.config import ReplicationConfig
from cache_service.core.ids import Namespace, SiteId
from cache_service.core.log import LogEntry, LogPosition
from cache_service.core.readiness import Behind, Kind
from cache_service.replication.core.layout import namespace_id
from cache_service.replication.core.stream import Hello
from cache_service.replication.peer_stream import DeltaStreamService, PeerReader
from cache_service.replication.replica import Claims, Indexes
from cache_service.replication.replicas import Call, Replicas
from cache_service.store import InProcessLog

_LOOK_S = 0.25


class PeerReplication:
    """Everything of a service that talks to its peers; make it inside the event loop."""

    def __init__(
        self,
        peers: Mapping[str, str],
        config: ReplicationConfig,
        namespace: Namespace,
        site: SiteId,
        encryption: Encryption | None = None,
    ) -> None:
        self._site = site
        self._lease_s = config.live_lease_s
        self._stride = config.publish.stride
        identity = namespace_id(namespace)
        # Not 0: a follower must not take this life's log for the one before, and go on in the middle of it.
        self.log = InProcessLog(epoch=secrets.randbits(40))
        self.stream = DeltaStreamService(self.log, identity, Hello(site, self._stride))
        self._readers = {
            SiteId(name): PeerReader(address, identity, site=name, encryption=encryption)
            for name, address in peers.items()
        }
        self._strides = dict.fromkeys(self._readers, self._stride)
        self.replicas: Replicas | None = None
        self.on_log_lost: Callable[[], None] = lambda: None

    def may_write(self) -> bool:
        """Say whether this process writes the site's log: always."""
        return True

    def work(self, indexes: Indexes, claims: Claims) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what is to run for as long as the service does, by name."""
        self.replicas = Replicas(self._site, indexes, claims, self._open_log)
        return {"peers": self._watch_peers(self.replicas)}

    def behind(self) -> list[Behind]:
        """Return the peers whose logs, as they were at the start, are still to be taken."""
        return [
            Behind(Kind.SITE, site)
            for site in self._readers
            if self.replicas is None or self.replicas.behind(site)
        ]

    def report(self) -> dict[str, Any]:
        """Return how replication is doing: for GET /health and for tests."""
        return {
            "writer": True,
            "trouble": "",
            "followers": self.stream.followers,
            "sites": self.replicas.report() if self.replicas is not None else [],
        }

    async def close(self) -> None:
        """Close every connection. After the work has been cancelled."""
        if self.replicas is not None:
            await self.replicas.close()
        for reader in self._readers.values():
            await reader.close()

    async def _open_log(
        self, site: SiteId, after: LogPosition | None, heard: Call, caught_up: Call
    ) -> AsyncGenerator[LogEntry, None]:
        def hello(found: Hello) -> None:
            if found.stride != self._strides[site]:
                self._strides[site] = found.stride
            heard()

        def quiet() -> None:
            # Entries of another stride than thought are dropped soon, and asked for again.
            if self.replicas is not None and self.replicas.sites[site].stride == self._strides[site]:
                caught_up()

        reader = self._readers[site]
        async with aclosing(
            reader.watch(after, on_hello=hello, on_heard=heard, on_caught_up=quiet)
        ) as entries:
            async for entry in entries:
                yield entry

    async def _watch_peers(self, replicas: Replicas) -> None:
        for site in self._readers:
            replicas.alive(site, self._strides[site])
        while True:
            await asyncio.sleep(_LOOK_S)
            for site, stride in self._strides.items():
                if replicas.age_s(site) > self._lease_s:
                    replicas.dead(site)
                else:
                    replicas.alive(site, stride)
