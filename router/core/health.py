"""Breaker table: which workers may be given requests, learned from how earlier requests went.

Decides availability only; it makes no probe of its own (the next request is the probe) and reads no clock.

    state    event                          next      note
    CLOSED   failure, fewer than `failures` CLOSED    failures in a row are counted
    CLOSED   failure number `failures`      OPEN      closed to requests for the cool-down
    CLOSED   success                        CLOSED    the count starts again
    OPEN     cool-down over, a request      PROBING   that request is the probe
    OPEN     success (an older request)     CLOSED
    OPEN     failure (an older request)     OPEN      the cool-down is not prolonged
    PROBING  success                        CLOSED    cool-down back to its first value
    PROBING  failure                        OPEN      cool-down doubled, up to the maximum
    PROBING  abandoned                      OPEN      the probe told nothing: another may go at once
    PROBING  no outcome for `max_cooldown`  PROBING   another request may probe
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cache_service.core.ids import WorkerId


class State(StrEnum):
    """State of one worker's breaker."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When a breaker opens and for how long (seconds)."""

    failures: int = 3
    cooldown_s: float = 2.0
    max_cooldown_s: float = 30.0


@dataclass(slots=True)
class _Breaker:
    state: State = State.CLOSED
    failures: int = 0
    cooldown_s: float = 0.0
    #: OPEN: when a probe may start. PROBING: when the running probe is given up for lost.
    until_s: float = 0.0


class BreakerTable:
    """One breaker for each worker; unknown workers are closed (usable)."""

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._breakers: dict[WorkerId, _Breaker] = {}

    def state(self, worker_id: WorkerId) -> State:
        """Return the state as last recorded."""
        breaker = self._breakers.get(worker_id)
        return State.CLOSED if breaker is None else breaker.state

    def troubled(self) -> list[WorkerId]:
        """Return the workers that have failed since their last success: all others are usable."""
        return list(self._breakers)

    def usable(self, worker_id: WorkerId, now_s: float) -> bool:
        """Say whether a request may be given to the worker now."""
        breaker = self._breakers.get(worker_id)
        return breaker is None or breaker.state is State.CLOSED or now_s >= breaker.until_s

    def started(self, worker_id: WorkerId, now_s: float) -> None:
        """Record that a request was given to the worker; makes it the probe of an open breaker."""
        breaker = self._breakers.get(worker_id)
        if breaker is not None and breaker.state is not State.CLOSED and now_s >= breaker.until_s:
            breaker.state = State.PROBING
            breaker.until_s = now_s + self._limits.max_cooldown_s

    def succeeded(self, worker_id: WorkerId) -> None:
        """Record an answer: the breaker closes."""
        self._breakers.pop(worker_id, None)

    def abandoned(self, worker_id: WorkerId, now_s: float) -> None:
        """Record that a request ended without telling anything about the worker (the client left)."""
        breaker = self._breakers.get(worker_id)
        if breaker is not None and breaker.state is State.PROBING:
            breaker.state = State.OPEN
            breaker.until_s = now_s

    def failed(self, worker_id: WorkerId, now_s: float) -> None:
        """Record a failure that was the worker's own."""
        breaker = self._breakers.setdefault(worker_id, _Breaker(cooldown_s=self._limits.cooldown_s))
        if breaker.state is State.OPEN:
            return
        if breaker.state is State.PROBING:
            breaker.cooldown_s = min(breaker.cooldown_s * 2, self._limits.max_cooldown_s)
        else:
            breaker.failures += 1
            if breaker.failures < self._limits.failures:
                return
        breaker.state = State.OPEN
        breaker.until_s = now_s + breaker.cooldown_s
