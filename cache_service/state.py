"""One service's index with what belongs to every change: the delta log's writer and the metrics.

Decides what a query is answered with. Runs on one event loop; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from cache_service.core.blocks import usable_tokens
from cache_service.core.errors import PrfaasError
from cache_service.core.events import AllCleared, Event
from cache_service.core.ids import Namespace, SiteId, SourceId
from cache_service.core.index import PrefixIndex
from cache_service.core.query import Holder, Query
from cache_service.metrics import IndexMetrics
from cache_service.store import DeltaLog, LogWriter


class UnknownNamespace(PrfaasError):
    """The query is about KV that this service does not index."""

    reason = "unknown_namespace"


class IndexState:
    """The index of one namespace, fed by the event streams of the configured workers."""

    def __init__(
        self, namespace: Namespace, sites: Mapping[SourceId, SiteId], log: DeltaLog, metrics: IndexMetrics
    ) -> None:
        self.namespace = namespace
        self.index = PrefixIndex()
        self.writer = LogWriter(log, self.index)
        self.metrics = metrics
        self._sites = dict(sites)
        for source in self._sites:
            self.index.add(source)
        metrics.observe_index(self.index.counts, lambda: self.index.revision)
        metrics.observe_log(lambda: self.writer.log_bytes, lambda: self.writer.log_segments)

    def site_of(self, source: SourceId) -> SiteId:
        """Return the site of a configured source."""
        return self._sites[source]

    def apply(self, source: SourceId, events: Iterable[Event]) -> None:
        """Take a batch of events of one source."""
        site = self._sites[source]
        for event in events:
            applied = self.index.apply(source, event)
            self.metrics.applied(site, applied)
            if applied.stored or applied.removed:
                self.writer.add((source, event))

    def clear(self, source: SourceId) -> int:
        """Drop all that a source holds; return how many entries went."""
        entries = self.index.held_blocks(source)
        self.apply(source, [AllCleared()])
        return entries

    def answer(self, query: Query) -> list[Holder]:
        """Return the holders of a prefix of the query, deepest first.

        The salt is not compared: it has seeded the query's hashes, so they match blocks of that salt only.
        Raises UnknownNamespace.
        """
        if replace(query.namespace, salt="") != self.namespace:
            raise UnknownNamespace(f"namespace: this service indexes {self.namespace}, not {query.namespace}")
        page_size = self.namespace.page_size
        holders = []
        limit = usable_tokens(len(query.hashes) * page_size, query.total_tokens, page_size)
        for match in self.index.match(query.hashes, limit // page_size):
            matched = match.matched * page_size
            holders.append(
                Holder(
                    worker_id=match.source.worker_id,
                    site=self._sites[match.source],
                    dp_rank=match.source.dp_rank,
                    matched_tokens=matched,
                    usable_tokens=match.usable * page_size,
                )
            )
        return holders
