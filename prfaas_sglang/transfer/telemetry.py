"""What the transfers of this process did: the latest ones by room, and counters for Prometheus.

Bounded: the log keeps the latest KEEP transfers. Threads of the transfer shells write, HTTP threads read.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from prfaas_sglang.core.compression import CODEC_NAMES

logger = logging.getLogger(__name__)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
#: Transfers remembered for GET /transfers.
KEEP = 1024


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """One ended transfer, as seen from one side.

    Attributes:
        room: bootstrap room.
        role: "send" (prefill) or "receive" (decode).
        peer_site: site at the other end.
        outcome: "done" or "failed".
        bytes: row bytes that crossed the connection.
        pages: KV pages granted.
        seconds: from grant to end.
        reason: why it failed, "" when it did not.
        wire_bytes: payload bytes that carried them (fewer when compressed); send only.
        queued_s: how long the first piece that could go waited for others; send only.
        exposed_s: from the end of prefill to decode's word that all arrived; send only, None when it failed.
        staged: it went through staging memory.
        ahead_bytes: row bytes queued layer by layer, before their chunk was computed; send only.
        early_bytes: row bytes handed to TCP before prefill ended; send only.
    """

    room: int
    role: str
    peer_site: str
    outcome: str
    bytes: int
    pages: int
    seconds: float
    reason: str
    wire_bytes: int = 0
    queued_s: float = 0.0
    exposed_s: float | None = None
    staged: bool = False
    ahead_bytes: int = 0
    early_bytes: int = 0


class StagingUse(Protocol):
    """What staging memory says of itself."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes in all."""

    @property
    def used_bytes(self) -> int:
        """Bytes in use now."""


@dataclass(frozen=True, slots=True)
class LinkSample:
    """What the connections of one bundle report at one moment, as the sender sees it.

    Attributes:
        srtt_s, min_rtt_s: smoothed (median connection) and least round trip.
        goodput_bytes_per_s: delivered lately, 0 when nothing is being sent.
        cap_bytes_per_s: what the rate controller allows, None for no cap.
        sent_bytes, retransmitted_bytes: since the bundle was opened, the second part of the first.
        open_transfers: granted and not yet acknowledged.
        pending_bytes: row bytes of those that are computed and were not handed to TCP yet.
        busy_ratio: share of the last second or so in which bytes waited to be sent: near 1, goodput is what
            the link gives; well below, it is what there was to send.
    """

    srtt_s: float
    min_rtt_s: float
    goodput_bytes_per_s: float
    cap_bytes_per_s: float | None
    sent_bytes: int
    retransmitted_bytes: int
    open_transfers: int = 0
    pending_bytes: int = 0
    busy_ratio: float = 0.0


class Telemetry:
    """Counters and the log of one worker's transfers. Thread-safe."""

    def __init__(self, site: str) -> None:
        self._lock = threading.Lock()
        self._latest: OrderedDict[tuple[int, str], TransferRecord] = OrderedDict()
        self.registry = CollectorRegistry()
        labels = ("role", "src_site", "dst_site")
        self._site = site
        self._bytes = Counter(
            "prfaas_transfer_bytes_total", "Row bytes moved.", labels, registry=self.registry
        )
        self._ended = Counter(
            "prfaas_transfer_ended_total",
            "Transfers by outcome.",
            (*labels, "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "prfaas_transfer_seconds",
            "From grant to end, successful transfers.",
            labels,
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._exposed = self._histogram(
            "exposed_seconds", "From the end of prefill to the last byte's acknowledgement.", labels
        )
        self._queued = self._histogram("queued_seconds", "First piece's wait for its turn.", labels)
        self._scheduler = Histogram(
            "prfaas_scheduler_call_seconds",
            "Time of the engine's scheduler thread in one call of ours.",
            ("call",),
            registry=self.registry,
            buckets=(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 0.1),
        )
        self._ahead = Counter(
            "prfaas_transfer_ahead_bytes_total",
            "Row bytes queued layer by layer, before their chunk was computed.",
            registry=self.registry,
        )
        self._fallbacks = Counter(
            "prfaas_layerwise_fallbacks_total",
            "Batches of which some layers could not be sent ahead of their chunk.",
            registry=self.registry,
        )
        self._peers = Gauge(
            "prfaas_transfer_connections_count", "Open data connections.", registry=self.registry
        )
        links = ("src_site", "dst_site")
        self._gauges = {
            "srtt_s": self._gauge("srtt_seconds", "Smoothed round trip, latest bundle.", links),
            "min_rtt_s": self._gauge("min_rtt_seconds", "Least round trip, latest bundle.", links),
            "goodput_bytes_per_s": self._gauge("goodput_bytes_per_second", "Delivered lately.", links),
            "cap_bytes_per_s": self._gauge("cap_bytes_per_second", "Allowed now; 0 means no cap.", links),
            "open_transfers": self._gauge("in_flight_count", "Granted, not yet acknowledged.", links),
            "pending_bytes": self._gauge("pending_bytes", "Computed, not yet handed to TCP.", links),
            "busy_ratio": self._gauge("busy_ratio", "Share of late time in which bytes waited.", links),
        }
        self._link_gauges: dict[str, list[tuple[str, Gauge]]] = {}
        self._retransmitted = Counter(
            "prfaas_transfer_retransmitted_bytes_total",
            "Bytes that TCP sent again.",
            links,
            registry=self.registry,
        )
        by_codec = (*links, "codec")
        self._raw = Counter(
            "prfaas_transfer_raw_bytes_total", "Row bytes sent.", by_codec, registry=self.registry
        )
        self._wire = Counter(
            "prfaas_transfer_wire_bytes_total", "The same, as coded.", by_codec, registry=self.registry
        )
        self._codec_s = Counter(
            "prfaas_codec_seconds_total",
            "Time in the codec, all threads.",
            (*by_codec, "operation"),
            registry=self.registry,
        )
        self._coding: dict[tuple[str, int], tuple[Counter, Counter, Counter]] = {}
        self._resumed = Counter(
            "prfaas_transfer_resumed_total",
            "Transfers that went on over a new connection after theirs had broken.",
            registry=self.registry,
        )
        self._links: dict[str, dict[str, LinkSample]] = {}
        self._refused = Counter(
            "prfaas_transfer_refused_peers_total",
            "Connections closed because the peer could not be trusted.",
            ("reason",),
            registry=self.registry,
        )

    def _gauge(self, name: str, what: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"prfaas_transfer_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(f"prfaas_transfer_{name}", what, labels, registry=self.registry, buckets=_SECONDS)

    def watch_staging(self, staging: StagingUse) -> None:
        """Export how much staging memory there is and is taken; once for each process."""
        used = self._gauge("staging_used_bytes", "Staging memory that transfers have.", ())
        used.set_function(lambda: staging.used_bytes)
        self._gauge("staging_capacity_bytes", "Staging memory in all.", ()).set(staging.capacity_bytes)

    def watch_open(self, count: Callable[[], int]) -> None:
        """Export how many transfers are open, from the first word of them to their end."""
        self._gauge("open_count", "Transfers open now.", ()).set_function(count)

    @contextmanager
    def scheduler_call(self, call: str) -> Iterator[None]:
        """Measure one call of the engine's scheduler thread into our code."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self._scheduler.labels(call).observe(time.perf_counter() - begin_s)

    def fell_back(self) -> None:
        """Count a batch that was not sent layer by layer, or not all of it."""
        self._fallbacks.inc()

    def sampled(self, dst_site: str, bundle: str, sample: LinkSample) -> None:
        """Take a sample of the bundle `bundle` (any unique name) towards a site."""
        gauges = self._link_gauges.get(dst_site)
        if gauges is None:  # looking a label up takes longer than setting
            gauges = self._link_gauges[dst_site] = [
                (name, gauge.labels(self._site, dst_site)) for name, gauge in self._gauges.items()
            ]
        for name, gauge in gauges:
            gauge.set(getattr(sample, name) or 0.0)
        with self._lock:
            site = self._links.setdefault(dst_site, {})
            before = site.get(bundle)
            site[bundle] = sample
        again = sample.retransmitted_bytes - (before.retransmitted_bytes if before else 0)
        self._retransmitted.labels(self._site, dst_site).inc(max(0, again))

    def closed(self, dst_site: str, bundle: str) -> None:
        """Forget a bundle that has ended."""
        with self._lock:
            self._links.get(dst_site, {}).pop(bundle, None)

    def links(self) -> list[dict[str, object]]:
        """Return the latest sample of each open bundle that has sent."""
        with self._lock:
            return [
                {"src_site": self._site, "dst_site": site, **asdict(sample)}
                for site, bundles in self._links.items()
                for sample in bundles.values()
            ]

    def record(self, record: TransferRecord) -> None:
        """Add an ended transfer."""
        src, dst = self._site, record.peer_site
        if record.role == "receive":
            src, dst = dst, src
        self._bytes.labels(record.role, src, dst).inc(record.bytes)
        self._ahead.inc(record.ahead_bytes)
        self._ended.labels(record.role, src, dst, record.outcome).inc()
        if record.outcome == "done":
            self._seconds.labels(record.role, src, dst).observe(record.seconds)
            if record.exposed_s is not None:
                self._exposed.labels(record.role, src, dst).observe(record.exposed_s)
                self._queued.labels(record.role, src, dst).observe(record.queued_s)
        with self._lock:
            key = (record.room, record.role)
            self._latest.pop(key, None)
            self._latest[key] = record
            while len(self._latest) > KEEP:
                self._latest.popitem(last=False)

    def encoded(self, dst_site: str, codec: int, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """Count a frame that is about to be sent."""
        found = self._coding.get((dst_site, codec))
        if found is None:
            labels = self._site, dst_site, CODEC_NAMES[codec]
            found = self._coding[dst_site, codec] = (
                self._raw.labels(*labels),
                self._wire.labels(*labels),
                self._codec_s.labels(*labels, "encode"),
            )
        raw, wire, codec_s = found
        raw.inc(raw_bytes)
        wire.inc(wire_bytes)
        if seconds:
            codec_s.inc(seconds)

    def decoded(self, src_site: str, codec: int, seconds: float) -> None:
        """Count a frame that was decoded."""
        self._codec_s.labels(src_site, self._site, CODEC_NAMES[codec], "decode").inc(seconds)

    def connected(self, change: int) -> None:
        """Count an opened (+1) or ended (-1) connection."""
        self._peers.inc(change)

    def resumed(self) -> None:
        """Count a transfer that went on after its connection had broken."""
        self._resumed.inc()

    def refused(self, reason: str) -> None:
        """Count a connection closed for a protocol or layout violation."""
        self._refused.labels(reason).inc()

    def transfers(self, room: int | None = None) -> list[TransferRecord]:
        """Return the remembered transfers (of one room), oldest first."""
        with self._lock:
            return [r for r in self._latest.values() if room is None or r.room == room]


def serve(
    telemetry: Telemetry, host: str, port: int, layout: Mapping[str, object] | None = None
) -> ThreadingHTTPServer:
    """Answer GET /metrics, /links, /layout and /transfers[?room=N] on host:port from a daemon thread.

    Args:
        layout: JSON values for /layout: what the worker's pools look like; None answers 404.

    Raises OSError when the address is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(telemetry.registry))
            elif url.path == "/transfers":
                rooms = parse_qs(url.query).get("room", [])
                try:
                    room = int(rooms[0]) if rooms else None
                except ValueError:
                    self._answer(400, "text/plain", b"room: not a whole number\n")
                    return
                body = {"transfers": [asdict(r) for r in telemetry.transfers(room)]}
                self._answer(200, "application/json", json.dumps(body).encode())
            elif url.path == "/links":
                self._answer(200, "application/json", json.dumps({"links": telemetry.links()}).encode())
            elif url.path == "/layout" and layout is not None:
                self._answer(200, "application/json", json.dumps(layout).encode())
            else:
                self._answer(404, "text/plain", b"try /metrics, /links, /layout or /transfers?room=N\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            logger.debug("telemetry_request %s", format % args)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="prfaas-telemetry", daemon=True).start()
    return server
