"""The writing end of replication: a site's changes, filtered, into its log.

Decides what an index of the published entries holds; LogWriter keeps the log equal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cache_service.core.delta import Change, Declared
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.index_types import Needs
from cache_service.core.publish import PublishFilter, PublishPolicy
from cache_service.native import make_index
from cache_service.store import DeltaLog, LogWriter

#: How often the budget is looked at.
_ADAPT_S = 5.0


class Publisher:
    """Takes a site's changes; `flush` by a timer while `may_write` says that this process is the writer."""

    def __init__(
        self, log: DeltaLog, policy: PublishPolicy, *, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self.filter = PublishFilter(policy)
        self.index = make_index()
        self.writer = LogWriter(log, self.index)
        self._may_write = may_write
        self._adapted_at_s: float | None = None
        self._bytes_then = 0

    def add(self, change: Change) -> None:
        """Take a change that the service's index has taken."""
        source, event = change
        if isinstance(event, Declared):
            self.declare(source, event)
        else:
            self._add(self.filter.take(source, event))

    def declare(self, source: SourceId, declared: Declared) -> None:
        """Take note of what a source's model needs."""
        self._add(self.filter.declare(source, Needs(declared.needs_state, declared.swa_window_blocks)))

    def saw(self, hashes: Sequence[BlockHash]) -> None:
        """Take note that a request asked for this chain."""
        self._add(self.filter.saw(hashes))

    async def flush(self, now_s: float) -> None:
        """Append what waits. Raises what the log raises."""
        self._adapt(now_s)
        if self._may_write():
            await self.writer.flush()

    def _add(self, changes: Iterable[Change]) -> None:
        for source, event in changes:
            if isinstance(event, Declared):
                self.writer.add((source, event))
                continue
            self.index.add(source)
            applied = self.index.apply(source, event)
            if applied.stored or applied.removed:
                self.writer.add((source, event))

    def _adapt(self, now_s: float) -> None:
        if self._adapted_at_s is None:
            self._adapted_at_s = now_s
        elif (passed_s := now_s - self._adapted_at_s) >= _ADAPT_S:
            self.filter.adapt((self.writer.written_bytes - self._bytes_then) / passed_s)
            self._adapted_at_s, self._bytes_then = now_s, self.writer.written_bytes
