"""The router's Prometheus metrics, declared once on a registry that the caller owns.

Labels come from closed sets (routes, reasons, outcomes, sides) or from the configuration (worker ids); no
label ever comes from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cache_service.core.ids import WorkerId
from router.core.decision import LinkState

#: Powers of two from 1 ms: TTFT spans a cached local prompt to minutes of remote prefill.
_SECONDS = tuple(0.001 * 2**n for n in range(19))


class RouterMetrics:
    """All counters and histograms of one router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "prfaas_router_requests",
            "Requests answered, by how they ended",
            ["api", "outcome"],
            registry=registry,
        )
        self.decisions = Counter(
            "prfaas_router_decisions",
            "Routes taken, retries included",
            ["route", "reason"],
            registry=registry,
        )
        self.failures = Counter(
            "prfaas_router_upstream_failures",
            "Calls to workers that failed before the client got a byte",
            ["side", "kind"],
            registry=registry,
        )
        self.retries = Counter(
            "prfaas_router_retries", "Requests sent again on another route", registry=registry
        )
        self.aborts = Counter(
            "prfaas_router_aborts", "Abort calls to workers", ["side", "outcome"], registry=registry
        )
        self.first_tokens = Counter(
            "prfaas_router_first_tokens",
            "Streams by where their first token came from: prefill, or why it was decode's",
            ["outcome"],
            registry=registry,
        )
        self.ttft = Histogram(
            "prfaas_router_ttft_seconds",
            "Arrival of a streamed request to its first byte to the client",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "prfaas_router_request_seconds",
            "Arrival to last byte of served requests",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokenize = Histogram(
            "prfaas_router_tokenize_seconds", "Tokenising and hashing", buckets=_SECONDS, registry=registry
        )
        self.index = Histogram(
            "prfaas_router_index_seconds", "Index queries", ["outcome"], buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter(
            "prfaas_router_prompt_tokens", "Prompt tokens of served requests", ["route"], registry=registry
        )
        self.matched_tokens = Counter(
            "prfaas_router_matched_tokens",
            "Tokens the index claimed usable on the chosen worker, for requests whose hit is known",
            ["route"],
            registry=registry,
        )
        self.hit_tokens = Counter(
            "prfaas_router_hit_tokens",
            "Tokens the engine reported as reused, for requests whose hit is known",
            ["route"],
            registry=registry,
        )
        self.admission = Counter(
            "prfaas_router_admissions", "Outcomes of admission", ["outcome", "class"], registry=registry
        )
        self.admission_wait = Histogram(
            "prfaas_router_admission_wait_seconds",
            "Time in the admission queue",
            ["class"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.wire_bytes = Counter(
            "prfaas_router_wire_bytes",
            "Predicted bytes between sites of the routes taken, retries included",
            ["src_site", "dst_site"],
            registry=registry,
        )
        self.wire_cost = Counter(
            "prfaas_router_wire_cost", "Their price", ["src_site", "dst_site"], registry=registry
        )
        self.length_mismatches = Counter(
            "prfaas_router_prompt_length_mismatches",
            "Answers whose prompt length differs from the router's own count",
            registry=registry,
        )

    def watch_queue(
        self, waiting: Callable[[], Mapping[str, int]], links: Callable[[], list[LinkState]]
    ) -> None:
        """Export the admission queue and what is believed of the links, read at each scrape."""
        self.registry.register(_QueueCollector(waiting, links))

    def watch_workers(
        self, in_flight: Callable[[], Mapping[WorkerId, int]], usable: Callable[[], Mapping[WorkerId, bool]]
    ) -> None:
        """Export requests in flight and breaker state of every worker, read at each scrape."""
        self.registry.register(_WorkerCollector(in_flight, usable))


class _WorkerCollector(Collector):
    def __init__(
        self, in_flight: Callable[[], Mapping[WorkerId, int]], usable: Callable[[], Mapping[WorkerId, bool]]
    ) -> None:
        self._in_flight = in_flight
        self._usable = usable

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the two gauges."""
        requests = GaugeMetricFamily(
            "prfaas_router_in_flight_requests", "Requests in flight on a worker", labels=["worker"]
        )
        for worker_id, count in self._in_flight().items():
            requests.add_metric([worker_id], count)
        usable = GaugeMetricFamily(
            "prfaas_router_worker_usable", "1 when the worker may be given requests", labels=["worker"]
        )
        for worker_id, state in self._usable().items():
            usable.add_metric([worker_id], int(state))
        yield requests
        yield usable


class _QueueCollector(Collector):
    def __init__(
        self, waiting: Callable[[], Mapping[str, int]], links: Callable[[], list[LinkState]]
    ) -> None:
        self._waiting = waiting
        self._links = links

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the queue's gauge, then one for each figure of the links."""
        waiting = GaugeMetricFamily("prfaas_router_waiting_requests", "Not admitted yet", labels=["class"])
        for name, count in self._waiting().items():
            waiting.add_metric([name], count)
        yield waiting
        for field, metric, what in (
            ("rate_bytes_per_s", "rate_bytes_per_second", "What new transfers may count on"),
            ("committed_bytes", "committed_bytes", "Routed over it and not delivered yet"),
            ("loss_ratio", "loss_ratio", "Retransmitted share of the bytes lately"),
            ("up", "up", "1 while something gets through"),
            ("abundant", "abundant", "1 in the regime of abundant bandwidth"),
        ):
            gauge = GaugeMetricFamily(f"prfaas_router_link_{metric}", what, labels=["src_site", "dst_site"])
            for link in self._links():
                gauge.add_metric([link.src, link.dst], float(getattr(link, field)))
            yield gauge
