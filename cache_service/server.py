"""The process around the index: listening, event streams, replication, the delta log.

Decides in which order things start and stop; the RPCs are service.py's.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import zmq.asyncio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from cache_service import logs
from cache_service.config import CacheConfig
from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError, PrfaasError
from cache_service.core.ids import SiteId
from cache_service.core.readiness import Behind, Kind, Readiness
from cache_service.direct import DirectServer
from cache_service.etcd.core.retry import backoff_s
from cache_service.http import HttpSide
from cache_service.ingest import SourceStream
from cache_service.metrics import IndexMetrics
from cache_service.replication.over_etcd import EtcdReplication
from cache_service.replication.over_peers import PeerReplication
from cache_service.replication.publisher import Publisher
from cache_service.service import PrefixIndexService
from cache_service.state import IndexState
from cache_service.store import DeltaLog
from cache_service.wire import cache_pb2_grpc, codec

log = logging.getLogger(__name__)

SERVICE = "prfaas.cache.v1.PrefixIndex"
_GRACE_S = 1.0
#: How often a service that starts, or that is ready and behind, looks whether it has caught up.
_LOOK_STARTING_S = 0.02
_LOOK_BEHIND_S = 0.25
#: so_reuseport off: a second service on the same port fails instead of sharing its connections.
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    # A client that vanished without closing does not watch for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The client's own keepalive (client.py) is every 10 s.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class CacheServer:
    """Everything of one cache service process; `start`, then `stop`."""

    def __init__(self, config: CacheConfig, log_store: DeltaLog | None = None) -> None:
        self._config = config
        self._registry = CollectorRegistry()
        self.state = IndexState(
            config.key(),
            config.sites(),
            log_store,
            IndexMetrics(self._registry),
            budget_bytes=config.index_budget_bytes,
        )
        self._service = PrefixIndexService(self.state, self.stats)
        self.state.metrics.observe_following(lambda: self._service.watchers, lambda: len(self.state.hot))
        self.replication: EtcdReplication | PeerReplication | None = None
        self._publisher: Publisher | None = None
        self._streams: list[SourceStream] = []
        #: When the first catch-up has ended; set by `start`.
        self.readiness = Readiness(0.0, 0.0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._context: zmq.asyncio.Context | None = None
        self._http: HttpSide | None = None
        self._direct: DirectServer | None = None
        #: Whether a task of ours ended by itself.
        self.failed = False
        self._on_failure: Callable[[], None] = lambda: None
        self.port = 0
        self.metrics_port: int | None = None

    async def start(self) -> None:
        """Listen, then follow the workers; ready comes later.

        Raises ConfigError when an address cannot be had; then `stop`.
        """
        clock = asyncio.get_running_loop().time
        self.readiness = Readiness(clock(), self._config.ready_wait_s)
        self.state.metrics.observe_readiness(self.readiness, clock)
        self._replicate()
        self._server = self._grpc_server()
        if self._config.metrics_listen is not None:
            host, port = split_address(self._config.metrics_listen, field="metrics_listen")
            self._http = await HttpSide.listen(host, port, self._registry, self.health)
            self.metrics_port = self._http.port
        if (direct := self._config.direct_address()) is not None:
            self._direct = DirectServer(self._service.match_bytes)
            await self._direct.listen(*direct)
        self._context = zmq.asyncio.Context()
        for worker in self._config.workers:
            stream = SourceStream(self._context, worker, self._config.ingest, self.state)
            self._streams.append(stream)
            self._spawn(stream.run(), f"stream {worker.worker_id}/{worker.dp_rank}")
        if self.replication is not None:
            for name, work in self.replication.work(self.state.indexes, self.state.claims).items():
                self._spawn(work, name)
        self._spawn(self._flush_log(), "delta log")
        await self._look()
        await self._server.start()
        self._spawn(self._catch_up(), "first catch-up", ends=True)

    async def stop(self) -> None:
        """Say not serving, let calls finish, stop following; also after a `start` that failed half-way."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(_GRACE_S)
        if self._direct is not None:
            await self._direct.stop()
        if self._http is not None:
            await self._http.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.state.writer.close()
        if self.replication is not None:
            await self.replication.close()
        if self._context is not None:
            self._context.destroy(linger=0)

    async def _catch_up(self) -> None:
        """Say ready when the first catch-up has ended or takes too long; follow it to its end."""
        while self.readiness.behind:
            await asyncio.sleep(_LOOK_BEHIND_S if self.readiness.ready else _LOOK_STARTING_S)
            await self._look()

    async def _look(self) -> None:
        before = self.readiness.ready
        self.readiness.look(asyncio.get_running_loop().time(), self._behind())
        self.state.starting = not self.readiness.ready
        if not self.readiness.ready:
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            return
        behind = [str(one) for one in self.readiness.behind]
        if not before:
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            logs.event(log, "ready", logging.WARNING if behind else logging.INFO, behind=behind)
        elif not behind:
            logs.event(log, "caught_up")

    def _behind(self) -> list[Behind]:
        found = self.replication.behind() if self.replication is not None else []
        for stream in self._streams:
            if stream.behind:
                found.append(Behind(Kind.WORKER, stream.name))
        return found

    def _replicate(self) -> None:
        """Publish this site's changes and follow the other sites, if configured."""
        config, site = self._config.replication, SiteId(self._config.site)
        if config is None:
            return
        if config.etcd is not None:
            self.replication = EtcdReplication(config.etcd, config, self.state.namespace, site)
        else:
            peers, encryption = config.peers or {}, self._config.encryption()
            self.replication = PeerReplication(peers, config, self.state.namespace, site, encryption)
        policy = config.publish.policy(self.state.namespace.page_size)
        self._publisher = Publisher(self.replication.log, policy, may_write=self.replication.may_write)
        self.replication.on_log_lost = self._publisher.writer.start_over
        self.state.attach(self._publisher, site)
        self.state.metrics.observe_replication(self.replication.report)

    def _grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=_OPTIONS)
        cache_pb2_grpc.add_PrefixIndexServicer_to_server(self._service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if isinstance(self.replication, PeerReplication):
            self.replication.stream.add_to(server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        host, port = split_address(self._config.listen, field="listen")
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        encryption = self._config.encryption()
        try:
            if encryption is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, encryption.server())
        except RuntimeError as error:
            raise ConfigError(
                f"listen: cannot listen on {self._config.listen}: the port is in use, or no address of ours"
            ) from error
        return server

    def on_failure(self, call: Callable[[], None]) -> None:
        """Call when a task of ours has ended by itself."""
        self._on_failure = call

    def stats(self) -> codec.Stats:
        """Return the sizes and the state of every stream."""
        return codec.Stats(
            site=SiteId(self._config.site),
            namespace=self.state.namespace,
            counts=self.state.index.counts(),
            revision=self.state.index.revision,
            log_bytes=self.state.writer.log_bytes,
            log_segments=self.state.writer.log_segments,
            sources=tuple(stream.stats() for stream in self._streams),
            life=self._service.life,
            evicted_blocks=self.state.index.evicted_blocks,
            bytes_estimate=self.state.index.bytes_estimate,
            watchers=self._service.watchers,
            direct_port=self._direct.port if self._direct else 0,
            starting=not self.readiness.ready,
            behind=tuple(map(str, self.readiness.behind)),
        )

    def health(self) -> dict[str, object]:
        """Return the body of GET /health and /ready: readiness, and the stream states by worker."""
        return {
            "status": "ok" if self.readiness.ready else "starting",
            "ready": self.readiness.ready,
            "behind": [str(one) for one in self.readiness.behind],
            **({"replication": self.replication.report()} if self.replication else {}),
            "site": self._config.site,
            "revision": self.state.index.revision,
            "sources": [
                {
                    "worker_id": stats.source.worker_id,
                    "dp_rank": stats.source.dp_rank,
                    "site": stats.site,
                    "state": stats.state.name.lower(),
                }
                for stats in (stream.stats() for stream in self._streams)
            ],
        }

    async def _flush_log(self) -> None:
        failed, failures = "", 0
        while True:
            try:
                if self._publisher is not None:
                    await self._publisher.flush(asyncio.get_running_loop().time())
                else:
                    await self.state.writer.flush()
                failed, failures = "", 0
            except PrfaasError as error:
                failures += 1
                if error.reason != failed:  # one line per change, not per flush
                    failed = error.reason
                    logs.event(log, "delta_log_failed", logging.WARNING, reason=failed, error=str(error))
            await asyncio.sleep(self._config.log_flush_s if not failures else backoff_s(failures))

    async def _set_health(self, status: int) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, *, ends: bool = False) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._ended, ends=ends))

    def _ended(self, task: asyncio.Task[None], *, ends: bool) -> None:
        """A task that ends by itself is our bug: end the process loudly, do not serve a frozen index."""
        if task.cancelled() or self.failed or (ends and task.exception() is None):
            return
        self.failed = True
        logs.event(log, "task_failed", logging.CRITICAL, task=task.get_name(), problem=repr(task.exception()))
        self._on_failure()
