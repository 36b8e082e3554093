"""One service's index with what belongs to every change: the delta log's writer and the metrics.

Decides what a query is answered with. Runs on one event loop; nothing here waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from cache_service.core.blocks import usable_tokens
from cache_service.core.delta import Declared
from cache_service.core.errors import PrfaasError
from cache_service.core.events import AllCleared, BlocksStored, Event
from cache_service.core.history import History
from cache_service.core.hot import HotPrefixes
from cache_service.core.ids import Namespace, SiteId, SourceId
from cache_service.core.index_types import Applied, Needs
from cache_service.core.query import Holder, Query
from cache_service.metrics import IndexMetrics
from cache_service.native import (
    AnyBatch,
    NativeFormat,
    apply_batch,
    core_name,
    decode_batch,
    decode_page,
    make_index,
)
from cache_service.replication.publisher import Publisher
from cache_service.replication.replica import Claims, Indexes
from cache_service.store import DeltaLog, InProcessLog, LogWriter
from cache_service.wire.worker_events import DumpPage


class UnknownNamespace(PrfaasError):
    """The query is about KV that this service does not index."""

    reason = "unknown_namespace"


class IndexState:
    """The index of one namespace: the configured workers' event streams, and what other sites publish.

    `attach` says where changes go: by default to `log` as they are, all of them; None for nowhere.
    """

    def __init__(
        self,
        namespace: Namespace,
        sites: Mapping[SourceId, SiteId],
        log: DeltaLog | None,
        metrics: IndexMetrics,
        *,
        budget_bytes: int = 0,
    ) -> None:
        self.namespace = namespace
        self.index = make_index(budget_bytes=budget_bytes)
        self.indexes = Indexes(self.index, budget_bytes=budget_bytes)
        self.claims = Claims(dict(sites))
        self.writer = LogWriter(log or InProcessLog(), self.index)
        #: Whether anybody reads what goes into the log.
        self._logged = log is not None
        self.metrics = metrics
        self._publisher: Publisher | None = None
        self._published_site: SiteId | None = None
        self.hot = HotPrefixes()
        #: Whether answers are given before the first catch-up has ended.
        self.starting = False
        #: Changes of the sources followed, while somebody follows us, and what to set when there are more.
        self.history = History()
        self.followers: set[asyncio.Event] = set()
        #: When a source last spoke (monotonic).
        self.heard_s: dict[SourceId, float] = {}
        self._sites = dict(sites)
        for source in self._sites:
            self.index.add(source)
        metrics.index_core(core_name())
        metrics.observe_index(self.index.counts, lambda: self.index.revision)
        metrics.observe_memory(lambda: self.index.bytes_estimate, lambda: self.index.evicted_blocks)
        metrics.observe_log(lambda: self.writer.log_bytes, lambda: self.writer.log_segments)

    def attach(self, publisher: Publisher, site: SiteId) -> None:
        """Publish the changes of this site's own workers, and only those."""
        self._publisher, self._published_site = publisher, site
        self.writer = publisher.writer

    def site_of(self, source: SourceId) -> SiteId:
        """Return the site of a configured source."""
        return self._sites[source]

    def decode(self, source: SourceId, payload: bytes, format: NativeFormat) -> AnyBatch:
        """Decode a batch of one source. Raises RemoteProtocolError when the payload is no batch of it."""
        page_size = self.namespace.page_size
        return decode_batch(self.index, payload, page_size=page_size, dp_rank=source.dp_rank, format=format)

    def decode_page(self, payload: bytes) -> DumpPage[AnyBatch]:
        """Decode a page of a worker's dump. Raises RemoteProtocolError when the payload is none."""
        return decode_page(self.index, payload, page_size=self.namespace.page_size)

    def apply_batch(self, source: SourceId, batch: AnyBatch) -> None:
        """Take what `decode` or `decode_page` made of a batch of one source."""
        self.heard_s[source] = time.monotonic()
        if batch.needs is not None:
            self.declare(source, batch.needs)
        for applied, event in apply_batch(self.index, source, batch):
            self._applied(source, applied, event)

    def apply(self, source: SourceId, events: Iterable[Event]) -> None:
        """Take some events of one source."""
        self.heard_s[source] = time.monotonic()
        for event in events:
            self._applied(source, self.index.apply(source, event), lambda event=event: event)  # type: ignore[misc]

    def _applied(self, source: SourceId, applied: Applied, make_event: Callable[[], Event]) -> None:
        """Count and pass on what one event changed."""
        site = self._sites[source]
        self.metrics.applied(site, applied)
        if not (applied.stored or applied.removed):
            return
        if not (self._told(source) or self.history.wanted):
            return
        event = make_event()
        if applied.conflicts and isinstance(event, BlocksStored):
            event = replace(event, hashes=event.hashes[: -applied.conflicts] or event.hashes)
        if self.history.wanted:
            self._remember(source, event)
        self._tell(source, event)

    def _told(self, source: SourceId) -> bool:
        """Say whether anybody beyond this service is told what happens to a source."""
        if self._publisher is None:
            return self._logged
        return self._sites[source] == self._published_site

    def _tell(self, source: SourceId, event: Event | Declared) -> None:
        if not self._told(source):
            return
        if self._publisher is None:
            self.writer.add((source, event))
        else:
            self._publisher.add((source, event))

    def declare(self, source: SourceId, needs: Needs) -> None:
        """Say what a source's model needs beside full-attention blocks, here and to other sites."""
        self.index.declare(source, needs.state, needs.window_blocks)
        self._tell(source, Declared(needs.state, needs.window_blocks))

    def _remember(self, source: SourceId, event: Event) -> None:
        self.history.add(self.index.revision, (source, event))
        for follower in self.followers:
            follower.set()

    def follows(self, source: SourceId) -> bool:
        """Say whether this service follows the source itself; others are replicated."""
        return source in self._sites

    def clear(self, source: SourceId) -> int:
        """Drop all that a source holds; return how many entries went."""
        entries = self.index.held_blocks(source)
        self.apply(source, [AllCleared()])
        return entries

    def check_namespace(self, namespace: Namespace) -> None:
        """Raise UnknownNamespace unless this is the index of `namespace`, whatever the salt."""
        if replace(namespace, salt="") != self.namespace:
            raise UnknownNamespace(f"namespace: this service indexes {self.namespace}, not {namespace}")

    def answer(self, query: Query) -> list[Holder]:
        """Return the holders of a prefix of the query, deepest first.

        The salt is not compared: it has seeded the query's hashes, so they match blocks of that salt only.
        Raises UnknownNamespace.
        """
        self.check_namespace(query.namespace)
        page_size = self.namespace.page_size
        holders = []
        limit = usable_tokens(len(query.hashes) * page_size, query.total_tokens, page_size) // page_size
        for match in self.indexes.match(query.hashes, limit):
            holders.append(
                Holder(
                    worker_id=match.source.worker_id,
                    site=self.claims.site_of(match.source),
                    dp_rank=match.source.dp_rank,
                    matched_tokens=match.matched * page_size,
                    usable_tokens=match.usable * page_size,
                )
            )
        if self._publisher is not None:
            self._publisher.saw(query.hashes)
        if holders:
            self.hot.saw(query.hashes, holders[0].matched_tokens // page_size)
        return holders
