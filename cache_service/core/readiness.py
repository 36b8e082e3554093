"""When a cache service that has started may call itself ready; pure, time is given.

Decides: as soon as it has caught up with what was there before it (the other sites' logs, what its workers
hold), or after a bounded time without. What has once been caught up with is not looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a service catches up with."""

    DISCOVERY = "discovery"  # which sites there are
    SITE = "site"  # another site's log
    WORKER = "worker"  # what a worker held before its stream was followed


@dataclass(frozen=True, slots=True)
class Behind:
    """Something that the service has not caught up with yet."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name}".rstrip()


class Readiness:
    """Whether a service that started at `started_s` is ready; it stays so."""

    def __init__(self, started_s: float, wait_s: float) -> None:
        self._started_s = started_s
        self._wait_s = wait_s
        self.ready = False
        #: What is missing of the first catch-up. Ready and not empty: what is answered may be stale.
        self.behind: tuple[Behind, ...] = ()

    def look(self, now_s: float, behind: Iterable[Behind]) -> None:
        """Take note of what has not been caught up with."""
        self.behind = tuple(behind)
        self.ready = self.ready or not self.behind or now_s - self._started_s >= self._wait_s

    def behind_s(self, kind: Kind, now_s: float) -> float:
        """Return for how long this has not been caught up with since the start, 0 when it has been."""
        return now_s - self._started_s if any(one.kind is kind for one in self.behind) else 0.0
