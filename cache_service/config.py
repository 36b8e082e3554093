"""The configuration file of a cache service: JSON or YAML, strict.

Decides what is accepted; an unknown key, a wrong type or a dangling value is refused with its path. Raises
ConfigError only.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import yaml

from cache_service.channels import Encryption
from cache_service.core.addresses import check_plain, is_loopback, split_address
from cache_service.core.errors import ConfigError
from cache_service.core.ids import Namespace, SiteId, SourceId, WorkerId, parse_name
from cache_service.core.publish import PublishPolicy
from cache_service.etcd.config import EtcdConfig, TlsPaths
from cache_service.wire.formats import Format

MAX_WORKERS = 4096
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_IPC = re.compile(r"ipc://.+")


class NamespaceConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which KV this service indexes."""

    model: str
    page_size: int
    revision: str = ""
    kv_dtype: str = ""
    layout: str = ""


class WorkerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One event stream.

    Attributes:
        events, replay: exact addresses (SGLang adds the dp rank to its ports).
        topic: subscribe to this one, "" for all.
        format: who writes it: "prfaas" (our plugin, with states and windows), "sglang", "vllm".
        needs_state: the model has linear layers. A "prfaas" worker says so itself; of another, whose events
            tell of no states, nothing is then said to be usable.
        swa_window_blocks: likewise the blocks that a sliding window spans, 0 for none.
    """

    worker_id: str
    site: str
    events: str
    dp_rank: int = 0
    replay: str | None = None
    topic: str = ""
    format: Format = "sglang"
    needs_state: bool = False
    swa_window_blocks: int = 0

    @property
    def source(self) -> SourceId:
        """The stream's name."""
        return SourceId(WorkerId(self.worker_id), self.dp_rank)


class IngestConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Times and bounds of the event streams; the defaults suit both a LAN and a WAN.

    Attributes:
        probe_s: how long a stream may be silent before the last batch is checked against the worker's ring.
        replay_timeout_s: longest wait for the next batch of a replay.
        lease_s: how long a lost worker's blocks are kept, unoffered.
        queue_batches: live batches that may wait per stream; beyond, ZMQ drops and a replay follows.
    """

    probe_s: float = 2.0
    replay_timeout_s: float = 2.0
    lease_s: float = 10.0
    queue_batches: int = 10_000


class TlsFiles(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """PEM files: the authority, and our certificate with its key."""

    ca: str
    cert: str = ""
    key: str = ""
    server_name: str = ""


class EtcdSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How to reach etcd; the password is in a file of its own."""

    endpoints: list[str]
    tls: TlsFiles | None = None
    user: str = ""
    password_file: str | None = None

    def client_config(self) -> EtcdConfig:
        """Return the client's own settings. Raises ConfigError."""
        password = ""
        if self.password_file is not None:
            try:
                password = Path(self.password_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"replication.etcd.password_file: {self.password_file}: cannot be read: {error}"
                ) from error
        tls = None
        if self.tls:
            tls = TlsPaths(self.tls.ca, self.tls.cert, self.tls.key, self.tls.server_name)
        try:
            return EtcdConfig(tuple(self.endpoints), tls, self.user, password)
        except ConfigError as error:
            raise ConfigError(f"replication.{error}") from error


class PublishConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What other sites are told of this one's blocks; see core/publish.py. A budget of 0 means none."""

    stride: int = 8
    min_tokens: int = 2048
    min_seen: int = 2
    bytes_per_s: float = 262_144

    def policy(self, page_size: int) -> PublishPolicy:
        """Return the core's policy. Raises ConfigError."""
        return PublishPolicy(
            self.stride, max(1, self.min_tokens // page_size), self.min_seen, self.bytes_per_s
        )


class ReplicationConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How this service and those of other sites learn of each other's blocks: over etcd, or peer to peer.

    Attributes:
        etcd: members that every site can reach.
        peers: site -> host:port of the cache service there; encrypted as `listen` is.
        name: of this service in its site; of several services in a site, one publishes.
        live_lease_s: a site that is silent for so long is not offered.
        data_lease_s: a site that is silent for so long is forgotten.
        maintenance_s: between two compactions of etcd.
    """

    etcd: EtcdSettings | None = None
    peers: dict[str, str] | None = None
    name: str = ""
    live_lease_s: int = 10
    data_lease_s: int = 1200
    maintenance_s: float = 60.0
    publish: PublishConfig = PublishConfig()


class CacheConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file.

    Attributes:
        tls: mutual TLS on `listen` and to `replication.peers`, both ways with a certificate of the same
            authority; a peer's must have the name of its site.
        insecure: plain TCP on `listen`, and to peers, although they are not loopback.
        direct_listen: Match without gRPC, plain TCP, on the host of `listen`; "" for any port of loopback,
            nothing elsewhere or with `tls`; "off" for nothing.
        ready_wait_s: how long a start may take to catch up; then the service calls itself ready all the same.
        index_budget_bytes: about how much the index of the followed workers may take, and as much again each
            index of other sites' blocks (one per publishing stride); above it the prefixes used longest ago
            are forgotten. 0 for no bound.
    """

    site: str
    listen: str
    namespace: NamespaceConfig
    workers: list[WorkerConfig] = []
    tls: TlsFiles | None = None
    insecure: bool = False
    direct_listen: str = ""
    metrics_listen: str | None = None
    ingest: IngestConfig = IngestConfig()
    replication: ReplicationConfig | None = None
    ready_wait_s: float = 10.0
    index_budget_bytes: int = 4 << 30
    log_flush_s: float = 0.1
    log_level: str = "INFO"

    def key(self) -> Namespace:
        """The namespace as the core names it."""
        n = self.namespace
        return Namespace(n.model, n.page_size, n.revision, n.kv_dtype, n.layout)

    def direct_address(self) -> tuple[str, int] | None:
        """Where Match is answered without gRPC, None for nowhere."""
        if self.direct_listen == "off" or self.tls is not None:
            return None
        if self.direct_listen:
            return split_address(self.direct_listen, field="direct_listen")
        host, _ = split_address(self.listen, field="listen")
        return (host, 0) if is_loopback(host) else None

    def encryption(self) -> Encryption | None:
        """What `listen` is encrypted with."""
        return Encryption(self.tls.ca, self.tls.cert, self.tls.key) if self.tls else None

    def sites(self) -> dict[SourceId, SiteId]:
        """The site of every event stream."""
        return {worker.source: SiteId(worker.site) for worker in self.workers}


def load(path: Path) -> CacheConfig:
    """Read and check a configuration file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(text: str) -> CacheConfig:
    """Check a configuration given as JSON or YAML text (JSON is YAML)."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"is neither JSON nor YAML: {error}") from error
    try:
        config = msgspec.convert(data, CacheConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error
    _check(config)
    return config


def _check(config: CacheConfig) -> None:
    parse_name(config.site, field="site")
    check_plain("listen", config.listen, tls=config.tls is not None, insecure=config.insecure)
    if config.direct_listen not in ("", "off"):
        if config.tls is not None:
            raise ConfigError("direct_listen: is plain TCP; leave it out, or give it without tls")
        check_plain("direct_listen", config.direct_listen, tls=False, insecure=config.insecure)
    if config.tls is not None and config.tls.server_name:
        raise ConfigError(
            "tls.server_name: means nothing here; leave it out: who is in replication.peers must have a "
            "certificate with the name of its site"
        )
    if (encryption := config.encryption()) is not None:
        encryption.server()
    if config.metrics_listen is not None:
        split_address(config.metrics_listen, field="metrics_listen")
        if config.metrics_listen == config.listen and not config.listen.endswith(":0"):
            raise ConfigError(
                f"metrics_listen: {config.metrics_listen!r} is also `listen`; give another port"
            )
    config.key()
    if len(config.workers) > MAX_WORKERS:
        raise ConfigError(f"workers: {len(config.workers)} event streams, at most {MAX_WORKERS}")
    seen: dict[SourceId, int] = {}
    for position, worker in enumerate(config.workers):
        path = f"workers[{position}]"
        _check_worker(worker, path)
        first = seen.setdefault(worker.source, position)
        if first != position:
            raise ConfigError(
                f"{path}: worker_id {worker.worker_id!r} dp_rank {worker.dp_rank} is workers[{first}] too"
            )
    for name in ("probe_s", "replay_timeout_s", "lease_s"):
        _positive(getattr(config.ingest, name), f"ingest.{name}", 3600)
    _positive(config.ingest.queue_batches, "ingest.queue_batches", 1_000_000)
    _positive(config.log_flush_s, "log_flush_s", 60)
    if not 0 <= config.ready_wait_s <= 3600:
        raise ConfigError(f"ready_wait_s: {config.ready_wait_s} is not in 0..3600; 0 waits for nothing")
    if config.index_budget_bytes < 0:
        raise ConfigError(
            f"index_budget_bytes: {config.index_budget_bytes} is negative; give bytes, 0 for no bound"
        )
    if config.replication is not None:
        _check_replication(config.replication, config)


def _check_replication(config: ReplicationConfig, service: CacheConfig) -> None:
    if (config.etcd is None) == (config.peers is None):
        raise ConfigError("replication: give either etcd or peers")
    if config.etcd is not None:
        config.etcd.client_config()
    for name, address in (config.peers or {}).items():
        parse_name(name, field=f"replication.peers.{name}")
        if name == service.site:
            raise ConfigError(f"replication.peers.{name}: is this service's own site")
        check_plain(
            f"replication.peers.{name}", address, tls=service.tls is not None, insecure=service.insecure
        )
    if config.name:
        parse_name(config.name, field="replication.name")
    if not 2 <= config.live_lease_s < config.data_lease_s <= 86400:
        raise ConfigError(
            f"replication.live_lease_s: {config.live_lease_s} is not in 2..{config.data_lease_s} "
            "(data_lease_s, which is at most 86400)"
        )
    _positive(config.maintenance_s, "replication.maintenance_s", 3600)
    try:
        config.publish.policy(service.namespace.page_size)
    except ConfigError as error:
        raise ConfigError(f"replication.{error}") from error


def _check_worker(worker: WorkerConfig, path: str) -> None:
    parse_name(worker.worker_id, field=f"{path}.worker_id")
    parse_name(worker.site, field=f"{path}.site")
    if not 0 <= worker.dp_rank < 65536:
        raise ConfigError(f"{path}.dp_rank: {worker.dp_rank} is not in 0..65535")
    if worker.format == "prfaas":
        if worker.replay is None:
            raise ConfigError(f"{path}.replay: is missing; a prfaas stream begins with a dump from there")
        if worker.needs_state or worker.swa_window_blocks:
            raise ConfigError(f"{path}.needs_state: a prfaas worker says itself what its model needs")
    if not 0 <= worker.swa_window_blocks <= 1 << 20:
        raise ConfigError(f"{path}.swa_window_blocks: {worker.swa_window_blocks} is not in 0..{1 << 20}")
    for field, endpoint in (("events", worker.events), ("replay", worker.replay)):
        if endpoint is None or _IPC.fullmatch(endpoint):
            continue
        found = _TCP.fullmatch(endpoint)
        if not found or not 0 < int(found[2]) <= 65535:
            raise ConfigError(
                f"{path}.{field}: {endpoint!r} is not an address to connect to, such as tcp://127.0.0.1:5557 "
                "(a wildcard like tcp://*:5557 is for the worker's side)"
            )


def _positive(value: float, field: str, most: float) -> None:
    if not 0 < value <= most:
        raise ConfigError(f"{field}: {value} is not above 0 and at most {most:g}")
