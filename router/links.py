"""What the KV transfers say of links (once a second) and pools (once): asked of every prefill worker.

Keeps the latest word of each worker and link; a worker that does not answer is silent, never an error.
Nothing is believed beyond its shape: numbers that are not numbers, other sites than the worker's own, and
more than MAX_LINKS of them are left out.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cache_service import logs
from cache_service.core.errors import RemoteProtocolError
from router.config import WorkerConfig
from router.core.profile import KvShape
from router.plan.pools import kv_shape, parse

_log = logging.getLogger(__name__)
PERIOD_S = 1.0
TIMEOUT_S = 2.0
MAX_BYTES = 1 << 20
MAX_LINKS = 256
#: After this long without news a link's figures are not told any more.
STALE_S = 10.0


class LinkReport(msgspec.Struct, frozen=True):
    """One bundle of connections as its sender sees it (transfer/telemetry.py: LinkSample)."""

    src_site: str
    dst_site: str
    srtt_s: float
    min_rtt_s: float
    goodput_bytes_per_s: float
    sent_bytes: int
    retransmitted_bytes: int
    cap_bytes_per_s: float | None = None
    open_transfers: int = 0
    pending_bytes: int = 0
    busy_ratio: float = 1.0

    def sound(self) -> bool:
        """True when every number can be one."""
        seconds = (self.srtt_s, self.min_rtt_s, self.goodput_bytes_per_s, self.cap_bytes_per_s or 0.0)
        counts = (self.sent_bytes, self.retransmitted_bytes, self.open_transfers, self.pending_bytes)
        sound = all(math.isfinite(x) and x >= 0 for x in seconds) and min(counts) >= 0
        return sound and 0 <= self.busy_ratio <= 1


class _Answer(msgspec.Struct):
    links: list[LinkReport]


@dataclass(frozen=True, slots=True)
class Link:
    """The sum over a link's bundles, of all workers that send on it.

    Attributes:
        srtt_s, min_rtt_s: the longest smoothed and the least round trip.
        goodput_bytes_per_s: delivered lately.
        retransmitted_bytes, sent_bytes: since the bundles were opened.
        open_transfers, pending_bytes: granted and not acknowledged; computed and not yet handed to TCP.
        busy_ratio: share of the last second in which bytes waited, of the busiest bundle.
    """

    src_site: str
    dst_site: str
    srtt_s: float
    min_rtt_s: float
    goodput_bytes_per_s: float
    sent_bytes: int
    retransmitted_bytes: int
    open_transfers: int
    pending_bytes: int
    busy_ratio: float


class LinkTable:
    """The latest reports. One event loop only: no locks."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, list[LinkReport]]] = {}

    def take(self, worker_id: str, site: str, body: bytes, now_s: float) -> None:
        """Take a worker's answer. Raises msgspec.DecodeError or ValidationError when it is not one."""
        answer = msgspec.json.decode(body, type=_Answer)
        reports = [r for r in answer.links[:MAX_LINKS] if r.src_site == site and r.sound()]
        self._reports[worker_id] = (now_s, reports)

    def links(self, now_s: float) -> list[Link]:
        """Return every link that somebody has lately told about."""
        by_link: dict[tuple[str, str], list[LinkReport]] = {}
        for told_s, reports in self._reports.values():
            if now_s - told_s <= STALE_S:
                for report in reports:
                    by_link.setdefault((report.src_site, report.dst_site), []).append(report)
        return [_sum(src, dst, reports) for (src, dst), reports in sorted(by_link.items())]


def _sum(src: str, dst: str, reports: Sequence[LinkReport]) -> Link:
    return Link(
        src,
        dst,
        srtt_s=max(r.srtt_s for r in reports),
        min_rtt_s=min(r.min_rtt_s for r in reports),
        goodput_bytes_per_s=sum(r.goodput_bytes_per_s for r in reports),
        sent_bytes=sum(r.sent_bytes for r in reports),
        retransmitted_bytes=sum(r.retransmitted_bytes for r in reports),
        open_transfers=sum(r.open_transfers for r in reports),
        pending_bytes=sum(r.pending_bytes for r in reports),
        busy_ratio=max(r.busy_ratio for r in reports),
    )


#: What asking a worker may end in.
_FAILURES = (
    aiohttp.ClientError,
    OSError,
    TimeoutError,
    ValueError,
    msgspec.MsgspecError,
    RemoteProtocolError,
)


class LinkPoller:
    """Asks every worker that has a telemetry address; made and used inside a running loop."""

    def __init__(
        self, table: LinkTable, workers: Sequence[WorkerConfig], set_kv: Callable[[str, KvShape], None]
    ) -> None:
        """`set_kv` is told what a worker's pools look like, again after it was silent."""
        self._table = table
        self._set_kv = set_kv
        self._laid_out: set[str] = set()
        self._workers = [w for w in workers if w.telemetry_url]
        self._task: asyncio.Task[None] | None = None
        self._silent: set[str] = set()

    def start(self) -> None:
        """Begin, if there is anybody to ask."""
        if self._workers:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                await asyncio.gather(*(self._ask(session, worker) for worker in self._workers))
                await asyncio.sleep(PERIOD_S)

    async def _ask(self, session: aiohttp.ClientSession, worker: WorkerConfig) -> None:
        loop = asyncio.get_running_loop()
        try:
            body = await _get(session, worker, "/links")
            self._table.take(worker.worker_id, worker.site, body, loop.time())
            if worker.worker_id not in self._laid_out:
                await self._ask_layout(session, worker)
                self._laid_out.add(worker.worker_id)
            self._silent.discard(worker.worker_id)
        except _FAILURES as error:
            self._laid_out.discard(worker.worker_id)
            if worker.worker_id not in self._silent:  # once, not once a second
                self._silent.add(worker.worker_id)
                logs.event(
                    _log, "telemetry_silent", logging.WARNING, worker_id=worker.worker_id, error=str(error)
                )

    async def _ask_layout(self, session: aiohttp.ClientSession, worker: WorkerConfig) -> None:
        """Take what a worker says of its pools; one that knows no such question just has not said it."""
        try:
            layout = await _get(session, worker, "/layout")
        except aiohttp.ClientResponseError as error:
            if error.status != 404:
                raise
            logs.event(_log, "layout_unknown", worker_id=worker.worker_id)
            return
        self._set_kv(worker.worker_id, kv_shape(parse(layout)))


async def _get(session: aiohttp.ClientSession, worker: WorkerConfig, path: str) -> bytes:
    async with session.get(worker.telemetry_url.rstrip("/") + path) as response:
        response.raise_for_status()
        body = await response.content.read(MAX_BYTES + 1)
        while len(body) <= MAX_BYTES and (more := await response.content.read(MAX_BYTES)):
            body += more
    if len(body) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes")
    return body


class LinkCollector(Collector):
    """The table as Prometheus gauges, read at each scrape."""

    def __init__(self, table: LinkTable) -> None:
        self._table = table

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield a gauge for each figure."""
        figures = {
            "srtt_s": ("srtt_seconds", "Longest smoothed round trip"),
            "min_rtt_s": ("min_rtt_seconds", "Least round trip"),
            "goodput_bytes_per_s": ("goodput_bytes_per_second", "Delivered lately"),
            "open_transfers": ("transfers_in_flight", "Granted and not acknowledged"),
            "pending_bytes": ("pending_bytes", "Computed and not yet handed to TCP"),
            "busy_ratio": ("busy_ratio", "Share of the last second in which bytes waited, busiest bundle"),
        }
        try:
            links = self._table.links(asyncio.get_running_loop().time())
        except RuntimeError:  # scraped outside the loop, as at registration
            links = []
        for name, (metric, what) in figures.items():
            gauge = GaugeMetricFamily(
                f"prfaas_router_link_{metric}", f"{what}, as the senders say", labels=["src_site", "dst_site"]
            )
            for link in links:
                gauge.add_metric([link.src_site, link.dst_site], getattr(link, name))
            yield gauge
