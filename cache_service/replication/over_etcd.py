"""Replication over etcd, put together: this site's presence and log, the other sites' replicas, maintenance.

Decides who is alive, by the live keys; the rest is decided where it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from cache_service import logs
from cache_service.config import EtcdSettings, ReplicationConfig
from cache_service.core.errors import PrfaasError, RemoteProtocolError
from cache_service.core.ids import Namespace, SiteId
from cache_service.core.log import LogEntry, LogPosition
from cache_service.core.readiness import Behind, Kind
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core.model import Changes, EventKind, KeyRange, KeyValue, Page
from cache_service.etcd.core.retry import backoff_s
from cache_service.replication.etcd_log import EtcdLog
from cache_service.replication.maintenance import Maintenance
from cache_service.replication.presence import Presence, live_prefix, read_live
from cache_service.replication.replica import Claims, Indexes
from cache_service.replication.replicas import Call, Replicas

log = logging.getLogger(__name__)

#: How often a quiet watch is asked whether it is up to date: the resolution of a replica's age.
_PROGRESS_S = 2.0
_LEAVE_S = 2.0


class EtcdReplication:
    """Everything of a service that talks to etcd; make it inside the event loop."""

    def __init__(
        self, settings: EtcdSettings, config: ReplicationConfig, namespace: Namespace, site: SiteId
    ) -> None:
        self._site = site
        self._namespace = namespace
        self._prefix = live_prefix(namespace)
        client = settings.client_config()
        self.etcd = EtcdClient(client)
        self.presence = Presence(
            self.etcd,
            namespace,
            site,
            name=config.name or site,
            stride=config.publish.stride,
            lease_s=config.live_lease_s,
        )
        self.log = EtcdLog(
            self.etcd,
            namespace,
            site,
            writer=self.presence.instance,
            data_lease_s=config.data_lease_s,
            guard=self.presence.guard,
        )
        self.maintenance = Maintenance(
            self.etcd, client.endpoints, self.presence.instance, round_s=config.maintenance_s
        )
        self.presence.on_acquired = self._check_log
        #: Called when this site's log is not in etcd any more.
        self.on_log_lost: Callable[[], None] = lambda: None
        self.replicas: Replicas | None = None
        #: Sites that were alive when live keys were first listed; None before.
        self._found: frozenset[SiteId] | None = None
        #: Live keys that were none.
        self.malformed = 0

    @property
    def trouble(self) -> str:
        """Why this site's changes wait, "" when they do not."""
        return self.log.trouble

    def may_write(self) -> bool:
        """Say whether this process writes the site's log."""
        return self.presence.held

    def work(self, indexes: Indexes, claims: Claims) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what is to run for as long as the service does, by name."""
        self.replicas = Replicas(self._site, indexes, claims, self._open_log)
        return {
            "presence": self.presence.run(),
            "discovery": self._discover(self.replicas),
            "maintenance": self.maintenance.run(),
        }

    def behind(self) -> list[Behind]:
        """Return what of the other sites' logs, as they were at the start, is still to be taken."""
        if self._found is None or self.replicas is None:
            return [Behind(Kind.DISCOVERY)]
        return [Behind(Kind.SITE, site) for site in sorted(self._found) if self.replicas.behind(site)]

    def report(self) -> dict[str, Any]:
        """Return how replication is doing: for GET /health and for tests."""
        return {
            "writer": self.presence.held,
            "keys": [self.log.keys.prefix.decode(), self.presence.key.decode()],
            "trouble": self.trouble,
            "malformed": self.malformed,
            "maintenance_rounds": self.maintenance.rounds,
            "sites": self.replicas.report() if self.replicas is not None else [],
        }

    async def close(self) -> None:
        """Leave, if etcd is there, and close every connection. After the work has been cancelled."""
        if self.replicas is not None:
            await self.replicas.close()
        with contextlib.suppress(PrfaasError, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self.presence.leave()
        await self.etcd.close()

    async def _open_log(
        self, site: SiteId, after: LogPosition | None, heard: Call, caught_up: Call
    ) -> AsyncGenerator[LogEntry, None]:
        reader = EtcdLog(self.etcd, self._namespace, site, progress_s=_PROGRESS_S)
        reader.on_heard, reader.on_caught_up = heard, caught_up
        async with aclosing(reader.watch(after)) as entries:
            async for entry in entries:
                yield entry

    async def _check_log(self) -> None:
        if not await self.log.intact():
            self.on_log_lost()

    async def _discover(self, replicas: Replicas) -> None:
        """Follow the live keys."""
        failures = 0
        while True:
            listed: set[SiteId] = set()
            try:
                async with aclosing(self.etcd.follow(KeyRange.prefix(self._prefix))) as items:
                    async for item in items:
                        failures = 0
                        if isinstance(item, Page):
                            listed = (set() if item.first else listed) | set(self._take(item.kvs, replicas))
                            for gone in set(replicas.sites) - listed if item.last else ():
                                replicas.dead(gone)
                            if item.last and self._found is None:
                                self._found = frozenset(listed & replicas.sites.keys())
                        elif isinstance(item, Changes):
                            for event in item.events:
                                if event.kind is EventKind.PUT:
                                    self._take((event.kv,), replicas)
                                else:
                                    name = event.kv.key[len(self._prefix) :]
                                    replicas.dead(SiteId(name.decode(errors="replace")))
            except PrfaasError as error:
                failures += 1
                logs.event(log, "discovery_failed", logging.WARNING, reason=error.reason, error=str(error))
                await asyncio.sleep(backoff_s(failures))

    def _take(self, kvs: tuple[KeyValue, ...], replicas: Replicas) -> list[SiteId]:
        """Note that sites are alive; a value that does not parse changes nothing for its site."""
        named = []
        for kv in kvs:
            try:
                live = read_live(kv.key, kv.value, self._prefix)
            except RemoteProtocolError as error:
                self.malformed += 1
                logs.event(log, "live_key_malformed", logging.WARNING, error=str(error)[:300])
                named.append(SiteId(kv.key[len(self._prefix) :].decode(errors="replace")))
                continue
            named.append(SiteId(live.site))
            replicas.alive(SiteId(live.site), live.stride)
        return named
