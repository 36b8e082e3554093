"""A simulated WAN link: transfers share what it carries by weight, capacity changes, outages come and go.

Fluid model in virtual service time: a transfer of n bytes and weight w is over when the link has given n / w
to every unit of weight, so that adding and ending one costs O(log transfers), whatever the rate does.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from cache_service.core.ids import SiteId
from router.core.decision import LinkState
from router.core.link_estimator import LinkEstimator, Sample
from router.simulate.clock import Clock
from router.simulate.spec import LinkSpec

#: Seconds between two samples of the estimator, and how many more it gets when a link falls idle.
SAMPLE_S = 1.0
AFTERGLOW = 5


class Flow:
    """One transfer: `over(argument)` is called when its last byte has crossed."""

    __slots__ = ("alive", "argument", "call", "size", "target", "weight")

    def __init__(self, call: Callable[[object], None], argument: object, weight: float) -> None:
        self.call = call
        self.argument = argument
        self.weight = weight
        self.size = 0.0
        self.target = 0.0
        self.alive = True


class Link:
    """The link itself, its estimator, and the LinkState that the router reads."""

    def __init__(self, clock: Clock, spec: LinkSpec, rng: random.Random) -> None:
        self.clock = clock
        self.spec = spec
        self.state = LinkState(
            SiteId(spec.src), SiteId(spec.dst), spec.gbps * 1.25e8, rtt_s=spec.rtt_s,
            price_per_gb=spec.price_per_gb,
        )  # fmt: skip
        self.estimator = LinkEstimator(self.state)
        self.delivered_bytes = 0.0
        self.added_bytes = 0.0
        self.busy_s = 0.0
        self._rng = rng
        self._flows: list[tuple[float, int, Flow]] = []
        self._weights = 0.0
        self._service = 0.0  # bytes given to each unit of weight since the start
        self._last_s = 0.0
        self._number = 0
        self._version = 0
        self._step = 0
        self._level = 0.5
        self._varies = spec.high_gbps > 0
        self._rate = self._rate_now(0.0)
        self._sampled_bytes = 0.0
        self._sampled_s = 0.0
        self._sampled_busy_s = 0.0
        self._quiet = AFTERGLOW  # samples since the link fell idle; that many: none is planned

    def delay_s(self) -> float:
        """Return the round trip of one transfer, jitter included."""
        spec = self.spec
        return spec.rtt_s + (self._rng.expovariate(1.0 / spec.jitter_s) if spec.jitter_s else 0.0)

    def send(self, size: float, weight: float, call: Callable[[object], None], argument: object) -> Flow:
        """Start a transfer of `size` bytes."""
        flow = Flow(call, argument, weight)
        self._advance()
        if not self._flows:
            self._rate = self._rate_now(self.clock.now_s)
        flow.size = size
        flow.target = self._service + size / weight
        self._number += 1
        heapq.heappush(self._flows, (flow.target, self._number, flow))
        self._weights += weight
        self.added_bytes += size
        self._plan()
        if self._quiet >= AFTERGLOW:
            self._mark()
            self.clock.at(self.clock.now_s + SAMPLE_S, self._sample)
        self._quiet = 0
        return flow

    def left(self, flow: Flow) -> float:
        """Return the bytes of a transfer that have not crossed yet."""
        self._advance()
        return max(0.0, (flow.target - self._service) * flow.weight)

    def cancel(self, flow: Flow) -> None:
        """Give a transfer up."""
        if flow.alive:
            self._advance()
            flow.alive = False
            self._weights -= flow.weight
            self.added_bytes -= self.left(flow)
            self._plan()

    # --- service ---------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Serve everybody up to now at the rate since the last change."""
        now_s = self.clock.now_s
        if self._weights > 0:
            elapsed_s = now_s - self._last_s
            served = elapsed_s * self._rate
            self._service += served / self._weights
            self.delivered_bytes += served
            self.busy_s += elapsed_s
        self._last_s = now_s

    def _plan(self) -> None:
        """Ask for the next event: a transfer's end or a change of the rate."""
        self._version += 1
        while self._flows and not self._flows[0][2].alive:
            heapq.heappop(self._flows)
        if not self._flows:
            self._weights = 0.0
            return
        now_s = self.clock.now_s
        change_s = self._next_change(now_s)
        if self._rate > 0:
            end_s = now_s + max(0.0, self._flows[0][0] - self._service) * self._weights / self._rate
            change_s = min(change_s, end_s)
        self.clock.at(change_s, self._event, self._version)

    def _event(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        now_s = self.clock.now_s
        over: list[Flow] = []
        slack = 1e-6 * max(1.0, self._rate)  # bytes that a microsecond carries: rounding, not service
        while self._flows:
            target, _, flow = self._flows[0]
            if flow.alive and (target - self._service) * self._weights > slack:
                break
            heapq.heappop(self._flows)
            if flow.alive:
                flow.alive = False
                self._weights -= flow.weight
                over.append(flow)
        if not self._flows:
            self._weights = 0.0
            self.delivered_bytes = self.added_bytes
        self._rate = self._rate_now(now_s)
        self._plan()
        for flow in over:
            flow.call(flow.argument)

    # --- capacity --------------------------------------------------------------------------------------

    def _rate_now(self, now_s: float) -> float:
        """Return the bytes per second of payload that the link carries now."""
        spec = self.spec
        for start_s, seconds in spec.outages:
            if start_s <= now_s < start_s + seconds:
                return 0.0
        gbps = spec.gbps
        if self._varies:
            step = int(now_s / spec.period_s + 1e-9)
            while self._step < step:
                self._step += 1
                moved = self._level + self._rng.gauss(0.0, 0.15)
                moved = -moved if moved < 0 else moved
                self._level = min(1.0, max(0.0, 2.0 - moved if moved > 1 else moved))
            gbps = spec.low_gbps + self._level * (spec.high_gbps - spec.low_gbps)
        return gbps * 1.25e8 * (1.0 - spec.loss)

    def _next_change(self, now_s: float) -> float:
        found = float("inf")
        if self._varies:
            found = (int(now_s / self.spec.period_s + 1e-9) + 1) * self.spec.period_s
        for start_s, seconds in self.spec.outages:
            for edge_s in (start_s, start_s + seconds):
                if edge_s > now_s:
                    found = min(found, edge_s)
        return found

    # --- what the senders say --------------------------------------------------------------------------

    def _mark(self) -> None:
        self._sampled_s, self._sampled_bytes = self.clock.now_s, self.delivered_bytes
        self._sampled_busy_s = self.busy_s

    def _sample(self, _: object) -> None:
        self._advance()
        now_s = self.clock.now_s
        elapsed_s = now_s - self._sampled_s
        busy_s = self.busy_s - self._sampled_busy_s
        # With bytes waiting, the rate of delivery, as TCP reports it: pauses are not the link's.
        span_s = busy_s if self._flows and busy_s > 0 else elapsed_s
        goodput = (self.delivered_bytes - self._sampled_bytes) / span_s
        self._mark()
        waiting = max(0.0, self.added_bytes - self.delivered_bytes) if self._flows else 0.0
        sent = self.delivered_bytes / (1.0 - self.spec.loss)
        rtt_s = self.spec.rtt_s
        self.estimator.observe(
            Sample(goodput, sent, sent - self.delivered_bytes, rtt_s + self.spec.jitter_s, rtt_s, waiting),
            now_s,
        )
        self.estimator.tick(now_s)
        self._quiet = 0 if self._flows else self._quiet + 1
        if self._quiet < AFTERGLOW:
            self.clock.at(now_s + SAMPLE_S, self._sample)
