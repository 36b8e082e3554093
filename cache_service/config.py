"""The configuration file of a cache service: JSON or YAML, strict.

Decides what is accepted; an unknown key, a wrong type or a dangling value is refused with its path. Raises
ConfigError only.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import yaml

from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError
from cache_service.core.ids import Namespace, SiteId, SourceId, WorkerId, parse_name

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
    """One event stream: `events` and `replay` are exact addresses (SGLang adds the dp rank to its ports)."""

    worker_id: str
    site: str
    events: str
    dp_rank: int = 0
    replay: str | None = None
    topic: str = ""

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


class CacheConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    site: str
    listen: str
    namespace: NamespaceConfig
    workers: list[WorkerConfig] = []
    metrics_listen: str | None = None
    ingest: IngestConfig = IngestConfig()
    log_flush_s: float = 0.1
    log_level: str = "INFO"

    def key(self) -> Namespace:
        """The namespace as the core names it."""
        n = self.namespace
        return Namespace(n.model, n.page_size, n.revision, n.kv_dtype, n.layout)

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
    split_address(config.listen, field="listen")
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


def _check_worker(worker: WorkerConfig, path: str) -> None:
    parse_name(worker.worker_id, field=f"{path}.worker_id")
    parse_name(worker.site, field=f"{path}.site")
    if not 0 <= worker.dp_rank < 65536:
        raise ConfigError(f"{path}.dp_rank: {worker.dp_rank} is not in 0..65535")
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
