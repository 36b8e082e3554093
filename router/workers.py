"""The router's own picture of its workers and links: configuration, breakers, and what it has given to each.

Decides nothing about routes; it keeps the fleet and the links that the policy reads up to date, and is told
how requests went. One event loop only: no locks.
"""

from __future__ import annotations

from cache_service.core.ids import SiteId, WorkerId
from router.config import RouterConfig, WorkerConfig, profiles_of
from router.core.decision import Decision, LinkState
from router.core.health import BreakerLimits, BreakerTable
from router.core.link_estimator import LinkEstimator, Sample
from router.core.profile import KvShape
from router.core.workers import Fleet, Role, WorkerState
from router.links import Link

_GB = 1e9 / 8


class Booking:
    """A dispatched request on its two workers and its link; each is given back once, however often."""

    def __init__(self, table: WorkerTable, decision: Decision, tokens: int) -> None:
        self._table = table
        self._decision = decision
        self._tokens = tokens
        self._open = {"prefill", "decode", "link"}

    def _close(self, part: str) -> bool:
        found = part in self._open
        self._open.discard(part)
        return found

    def release_prefill(self) -> None:
        """The prefill worker is free of it."""
        if self._close("prefill"):
            self._table.end_prefill(self._decision)

    def delivered(self) -> None:
        """Its KV is over the link."""
        if self._close("link"):
            self._table.end_link(self._decision)

    def release(self) -> None:
        """Release what is still held. Idempotent."""
        self.release_prefill()
        self.delivered()
        if self._close("decode"):
            self._table.end_decode(self._decision, self._tokens)


class WorkerTable:
    """Configuration and state of every worker and link."""

    def __init__(self, config: RouterConfig) -> None:
        self.site = SiteId(config.site)
        self._config = {WorkerId(w.worker_id): w for w in config.workers}
        self._in_flight = dict.fromkeys(self._config, 0)
        self._now_s = 0.0
        self._away: set[WorkerId] = set()
        profiles = profiles_of(config)
        page = config.model.page_size
        self.fleet = Fleet(
            WorkerState(
                worker_id,
                SiteId(w.site),
                Role(w.role),
                profiles.get(w.profile),
                total_pages=w.kv_tokens // page,
                page_tokens=page,
            )
            for worker_id, w in self._config.items()
        )
        self.breakers = BreakerTable(
            BreakerLimits(config.health.failures, config.health.cooldown_s, config.health.max_cooldown_s)
        )
        self.links = {
            (SiteId(x.src), SiteId(x.dst)): LinkState(
                SiteId(x.src),
                SiteId(x.dst),
                x.gbps * _GB,
                ceiling_bytes_per_s=float("inf") if x.ceiling_gbps is None else x.ceiling_gbps * _GB,
                price_per_gb=x.price_per_gb,
            )
            for x in config.links
        }
        self.estimators = {key: LinkEstimator(link) for key, link in self.links.items()}

    def config(self, worker_id: WorkerId) -> WorkerConfig:
        """Return the configuration of a known worker."""
        return self._config[worker_id]

    def in_flight(self) -> dict[WorkerId, int]:
        """Return the number of requests in flight for each worker."""
        return dict(self._in_flight)

    def view(self, now_s: float) -> Fleet:
        """Return all workers as they are now. O(workers that have failed)."""
        self._now_s = now_s
        troubled = set(self.breakers.troubled())
        for worker_id in troubled | self._away:
            healthy = worker_id not in troubled or self.breakers.usable(worker_id, now_s)
            self.fleet.set_healthy(self.fleet.workers[worker_id], healthy)
            (self._away.discard if healthy else self._away.add)(worker_id)
        return self.fleet

    def set_kv(self, worker_id: str, kv: KvShape) -> None:
        """Take what a worker says of its pools; a profile, where there is one, goes before it."""
        self.fleet.workers[WorkerId(worker_id)].kv = kv

    def observe(self, links: list[Link], now_s: float) -> None:
        """Take what the senders say of the links; call once a second, with nothing when nobody spoke."""
        for told in links:
            estimator = self.estimators.get((SiteId(told.src_site), SiteId(told.dst_site)))
            if estimator is not None:
                estimator.observe(
                    Sample(
                        told.goodput_bytes_per_s,
                        told.sent_bytes,
                        told.retransmitted_bytes,
                        told.srtt_s,
                        told.min_rtt_s,
                        told.pending_bytes,
                        told.busy_ratio,
                    ),
                    now_s,
                )
        for estimator in self.estimators.values():
            estimator.tick(now_s)

    def book(self, decision: Decision, total_tokens: int, now_s: float) -> Booking:
        """Count a request on its workers and its link until the booking is released."""
        self._now_s = now_s
        self.fleet.give_prefill(
            decision.prefill, decision.uncached_tokens, decision.predicted.prefill_s, now_s
        )
        self.fleet.give_decode(decision.decode, total_tokens)
        for worker_id in (decision.prefill.worker_id, decision.decode.worker_id):
            self._in_flight[worker_id] += 1
            self.breakers.started(worker_id, now_s)
        if (link := self._link(decision)) is not None:
            link.committed_bytes += decision.wire_bytes
        return Booking(self, decision, total_tokens)

    def _link(self, decision: Decision) -> LinkState | None:
        return self.links.get((decision.prefill.site, decision.decode.site))

    def end_prefill(self, decision: Decision) -> None:
        """Part of Booking."""
        worker = decision.prefill
        self._in_flight[worker.worker_id] -= 1
        self.fleet.end_prefill(worker, decision.uncached_tokens, decision.predicted.prefill_s, self._now_s)

    def end_decode(self, decision: Decision, tokens: int) -> None:
        """Part of Booking."""
        self._in_flight[decision.decode.worker_id] -= 1
        self.fleet.end_decode(decision.decode, tokens)

    def end_link(self, decision: Decision) -> None:
        """Part of Booking."""
        if (link := self._link(decision)) is not None:
            link.committed_bytes = max(0.0, link.committed_bytes - decision.wire_bytes)
