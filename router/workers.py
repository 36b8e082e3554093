"""The router's own picture of its workers: configuration, breakers, and what it has in flight on each.

Decides nothing about routes; it hands the policy a frozen view and is told how requests went. One event loop
only: no locks.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_service.core.ids import SiteId, WorkerId
from router.config import RouterConfig, WorkerConfig
from router.core.health import BreakerLimits, BreakerTable
from router.core.model import Decision, DecodeWorker, LinkView, PrefillWorker, Workers


@dataclass(slots=True)
class _Load:
    requests: int = 0
    tokens: int = 0
    assigned: int = 0


class _Share:
    """One request's part of one worker's load; released once, however often it is asked."""

    def __init__(self, load: _Load, tokens: int) -> None:
        self._load: _Load | None = load
        self._tokens = tokens
        load.requests += 1
        load.tokens += tokens
        load.assigned += 1

    def release(self) -> None:
        if self._load is not None:
            self._load.requests -= 1
            self._load.tokens -= self._tokens
            self._load = None


class Booking:
    """A dispatched request on its two workers: the prefill worker is free before the decode worker."""

    def __init__(self, prefill: _Share, decode: _Share) -> None:
        self.release_prefill = prefill.release
        self._release_decode = decode.release

    def release(self) -> None:
        """Release what is still held. Idempotent."""
        self.release_prefill()
        self._release_decode()


class WorkerTable:
    """Configuration and state of every worker."""

    def __init__(self, config: RouterConfig) -> None:
        self._site = SiteId(config.site)
        self._config = {WorkerId(w.worker_id): w for w in config.workers}
        self._load = {worker_id: _Load() for worker_id in self._config}
        self.breakers = BreakerTable(
            BreakerLimits(config.health.failures, config.health.cooldown_s, config.health.max_cooldown_s)
        )
        self.links = tuple(LinkView(SiteId(x.src), SiteId(x.dst), x.gbps * 1e9 / 8) for x in config.links)

    def config(self, worker_id: WorkerId) -> WorkerConfig:
        """Return the configuration of a known worker."""
        return self._config[worker_id]

    def in_flight(self) -> dict[WorkerId, int]:
        """Return the number of requests in flight for each worker."""
        return {worker_id: load.requests for worker_id, load in self._load.items()}

    def view(self, now_s: float) -> Workers:
        """Return all workers as they are now. O(workers)."""
        prefill: list[PrefillWorker] = []
        decode: list[DecodeWorker] = []
        for worker_id, worker in self._config.items():
            load = self._load[worker_id]
            view = PrefillWorker if worker.role == "prefill" else DecodeWorker
            entry = view(
                worker_id=worker_id,
                site=SiteId(worker.site),
                healthy=self.breakers.usable(worker_id, now_s),
                in_flight_tokens=load.tokens,
                assigned=load.assigned,
            )
            if isinstance(entry, PrefillWorker):
                prefill.append(entry)
            else:
                decode.append(entry)
        return Workers(self._site, tuple(prefill), tuple(decode))

    def book(self, decision: Decision, total_tokens: int, now_s: float) -> Booking:
        """Count a request on both of its workers until the booking is released."""
        booking = Booking(
            _Share(self._load[decision.prefill.worker_id], decision.uncached_tokens),
            _Share(self._load[decision.decode.worker_id], total_tokens),
        )
        for worker_id in (decision.prefill.worker_id, decision.decode.worker_id):
            self.breakers.started(worker_id, now_s)
        return booking
