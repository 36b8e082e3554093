"""The metrics of a cache service, declared once on an injected registry.

Names are `prfaas_index_<what>_<unit>[_total]`; labels come from closed sets (site, outcome, kind), never ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cache_service.core.index import Applied, IndexCounts
from cache_service.core.readiness import Kind, Readiness

#: A match takes microseconds in the core and some hundreds through gRPC.
_MATCH_BUCKETS_S = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)

_CALL_BUCKETS_S = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class Happening(Enum):
    """What can become of a batch, and what can befall an event stream: the closed set of label `kind`."""

    APPLIED = "applied"  # batch applied, live or replayed
    REPLAYED = "replayed"  # of those, from a replay
    DUPLICATE = "duplicate"  # batch seen before
    DEFERRED = "deferred"  # live batch left to the replay that is owed
    GARBAGE = "garbage"  # frames or payload that are no batch
    UNEXPLAINED = "unexplained"  # a batch out of order that a replay does not have
    REFUSED_EVENT = "refused_event"  # an event that cannot be true, inside a usable batch
    GAP = "gap"  # batches missed, replay asked
    DUMP = "dump"  # a full dump taken: what is known begins anew from it
    LOST = "lost"  # batches beyond the replay ring: the worker's blocks dropped
    EPOCH = "epoch"  # the worker began a new life: its blocks dropped
    REPLAY_FAILED = "replay_failed"  # no usable answer to a replay request in time
    DISCONNECTED = "disconnected"  # connection lost: blocks kept, not offered
    LEASE = "lease"  # connection lost for too long: its blocks dropped


class IndexMetrics:
    """Counters and gauges of one service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._matches = Counter(
            "prfaas_index_match_requests_total", "Match calls", ["outcome"], registry=registry
        )
        self._match_seconds = Histogram(
            "prfaas_index_match_seconds",
            "Time inside the service per Match call",
            buckets=_MATCH_BUCKETS_S,
            registry=registry,
        )
        self._queried = Counter("prfaas_index_queried_blocks_total", "Blocks asked about", registry=registry)
        self._matched = Counter(
            "prfaas_index_matched_blocks_total",
            "Blocks of the deepest holder in each answer",
            registry=registry,
        )
        self._calls = Counter(
            "prfaas_index_calls_total",
            "Calls other than Match and Stats",
            ["method", "outcome"],
            registry=registry,
        )
        self._call_seconds = Histogram(
            "prfaas_index_call_seconds",
            "Time inside the service per call other than Match and Stats",
            ["method"],
            buckets=_CALL_BUCKETS_S,
            registry=registry,
        )
        self._ingest = Counter(
            "prfaas_index_ingest_total",
            "Batches and incidents of the workers' event streams",
            ["site", "kind"],
            registry=registry,
        )
        self._changes = Counter(
            "prfaas_index_block_changes_total",
            "Block entries that events stored, removed or left unchanged; blocks refused for their parent",
            ["site", "kind"],
            registry=registry,
        )
        self._sources = Gauge(
            "prfaas_index_sources_count", "Event streams by state", ["site", "state"], registry=registry
        )

    def match(self, outcome: str, seconds: float, queried_blocks: int, matched_blocks: int) -> None:
        """Count one Match call; `outcome` is ok, invalid or unknown_namespace."""
        self._matches.labels(outcome).inc()
        self._match_seconds.observe(seconds)
        self._queried.inc(queried_blocks)
        self._matched.inc(matched_blocks)

    def called(self, method: str, outcome: str, seconds: float) -> None:
        """Count one other call; `outcome` is ok, invalid, unknown_namespace, busy or fell_behind."""
        self._calls.labels(method, outcome).inc()
        self._call_seconds.labels(method).observe(seconds)

    def happened(self, site: str, kind: Happening) -> None:
        """Count one batch or incident."""
        self._ingest.labels(site, kind.value).inc()

    def applied(self, site: str, applied: Applied) -> None:
        """Count what one event changed."""
        for kind in ("stored", "removed", "unchanged", "conflicts"):
            if number := getattr(applied, kind):
                self._changes.labels(site, kind).inc(number)

    def source_state(self, site: str, before: str | None, after: str | None) -> None:
        """Move one event stream from a state to another; None is outside."""
        if before is not None:
            self._sources.labels(site, before).dec()
        if after is not None:
            self._sources.labels(site, after).inc()

    def index_core(self, core: str) -> None:
        """Say which core keeps the index: native or python."""
        Info("prfaas_cache_index", "What keeps the index", registry=self.registry).info({"core": core})

    def observe_index(self, counts: Callable[[], IndexCounts], revision: Callable[[], int]) -> None:
        """Publish the sizes of the index, read when scraped."""
        for name, text, read in (
            ("blocks_count", "Distinct blocks", lambda: counts().blocks),
            ("entries_count", "(block, holder, tier) entries", lambda: counts().entries),
            ("orphans_count", "Blocks held without their parent", lambda: counts().orphans),
            ("revision_count", "Changes of the index in this life of the service", revision),
        ):
            Gauge(f"prfaas_index_{name}", text, registry=self.registry).set_function(read)

    def observe_memory(self, estimate: Callable[[], int], evicted: Callable[[], int]) -> None:
        """Publish what the index takes and what it forgot to keep its budget, read when scraped."""
        for name, text, read in (
            ("memory_bytes", "Estimate of what the index of the followed workers takes", estimate),
            ("evicted_blocks_count", "Blocks forgotten to keep index_budget_bytes, in this life", evicted),
        ):
            Gauge(f"prfaas_index_{name}", text, registry=self.registry).set_function(read)

    def observe_following(self, watchers: Callable[[], int], hot: Callable[[], int]) -> None:
        """Publish who follows the index and how many prefixes are counted, read when scraped."""
        for name, text, read in (
            ("watchers_count", "Clients that watch the index", watchers),
            ("hot_tracked_count", "Prefixes whose uses are counted", hot),
        ):
            Gauge(f"prfaas_index_{name}", text, registry=self.registry).set_function(read)

    def observe_replication(self, report: Callable[[], dict[str, Any]]) -> None:
        """Publish how replication is doing, read when scraped."""
        self.registry.register(_ReplicationCollector(report))

    def observe_readiness(self, readiness: Readiness, now_s: Callable[[], float]) -> None:
        """Publish whether the service is ready, and what it has not caught up with, read when scraped."""
        Gauge(
            "prfaas_index_ready_count", "Whether the service has called itself ready", registry=self.registry
        ).set_function(lambda: float(readiness.ready))
        behind = Gauge(
            "prfaas_index_behind_seconds",
            "Since the start, while something of this kind has not been caught up with; 0 when all has",
            ["kind"],
            registry=self.registry,
        )
        for kind in Kind:
            behind.labels(kind.value).set_function(lambda kind=kind: readiness.behind_s(kind, now_s()))

    def observe_log(self, log_bytes: Callable[[], int], segments: Callable[[], int]) -> None:
        """Publish the size of the delta log above its snapshot, read when scraped."""
        for name, text, read in (
            ("log_bytes", "Delta log above its last snapshot", log_bytes),
            ("log_segments_count", "Segments of the delta log above its last snapshot", segments),
        ):
            Gauge(f"prfaas_index_{name}", text, registry=self.registry).set_function(read)


class _ReplicationCollector(Collector):
    """The other sites, which come and go."""

    def __init__(self, report: Callable[[], dict[str, Any]]) -> None:
        self._report = report

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges of this moment."""
        report = self._report()
        stalled = GaugeMetricFamily(
            "prfaas_index_replication_stalled_count", "Whether this site's changes wait for the store"
        )
        stalled.add_metric([], float(bool(report["trouble"])))
        yield stalled
        for name, text, read in (
            ("entries_count", "Entries of another site", lambda site: site["entries"]),
            ("withheld_count", "Whether they are not offered", lambda site: bool(site["withheld"])),
            ("age_seconds", "Since the store last spoke of the site", lambda site: site["age_s"]),
        ):
            gauge = GaugeMetricFamily(f"prfaas_index_replica_{name}", text, labels=["site"])
            for site in report["sites"]:
                gauge.add_metric([site["site"]], float(read(site)))
            yield gauge
