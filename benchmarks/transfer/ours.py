"""The project's data plane without an engine: a thin adapter, the one place that knows its API."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.transfer.workload import Workload
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.memory import RowMemory
from prfaas_sglang.transfer.telemetry import LinkSample, Telemetry
from prfaas_sglang.transfer.tls import Tls, TlsFiles

WAIT_S = 240.0
AUX_BYTES = 64


def layout_of(workload: Workload) -> Layout:
    """Return the layout of a workload: KV tensors and a small metadata row."""
    parts = (Component("kv", (workload.row_bytes,) * workload.tensors), Component("aux", (AUX_BYTES,)))
    return Layout("bench", "bench", 64, "bfloat16", 1, parts)


def memory_of(workload: Workload, pool: memoryview) -> RowMemory:
    """Return the pool as rows."""
    size = workload.row_bytes * workload.pages
    tensors = [pool[t * size : (t + 1) * size] for t in range(workload.tensors)]
    return RowMemory(layout_of(workload), [tensors, [memoryview(bytearray(AUX_BYTES))]])


def tls_of(files: Sequence[str] | None) -> Tls | None:
    """Return contexts from the paths (authority, certificate, key)."""
    return Tls(TlsFiles(*files)) if files else None


class Heard:
    """When callbacks said what of which room, monotonic seconds."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at: dict[tuple[int, str], float] = {}
        self._failed: dict[int, str] = {}

    def hear(self, room: int, what: str, reason: str = "") -> None:
        """Note it; wakes who waits."""
        with self._changed:
            self._at[(room, what)] = time.monotonic()
            if what == "failed":
                self._failed[room] = reason
            self._changed.notify_all()

    def has(self, room: int, what: str) -> bool:
        """Whether it was said, without waiting. Raises RuntimeError when the room failed."""
        with self._changed:
            if room in self._failed:
                raise RuntimeError(f"room {room} failed: {self._failed[room]}")
            return (room, what) in self._at

    def failed(self, room: int) -> bool:
        """Whether the room failed."""
        with self._changed:
            return room in self._failed

    def wait(self, room: int, what: str, timeout_s: float = WAIT_S) -> float:
        """Return when it was. Raises RuntimeError when the room failed, TimeoutError."""
        with self._changed:
            key = (room, what)
            if not self._changed.wait_for(lambda: key in self._at or room in self._failed, timeout_s):
                raise TimeoutError(f"room {room}: not {what} in {timeout_s:.0f} s")
            if key not in self._at:
                raise RuntimeError(f"room {room} failed: {self._failed[room]}")
            return self._at[key]


class RecordingTelemetry(Telemetry):
    """Telemetry that keeps every sample of the link, with its time."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.samples: list[tuple[float, LinkSample]] = []

    def sampled(self, dst_site: str, bundle: str, sample: LinkSample) -> None:
        """Keep it too."""
        self.samples.append((time.monotonic(), sample))
        super().sampled(dst_site, bundle, sample)


class Prefill:
    """The sending side."""

    def __init__(
        self, workload: Workload, pool: memoryview, host: str, tls: Tls | None = None, **options: Any
    ) -> None:
        self.heard = Heard()
        self.telemetry = RecordingTelemetry("A")
        self.exporter = Exporter(
            Identity("prefill", "A", "a", 0, layout_of(workload)),
            memory_of(workload, pool),
            self.telemetry,
            on_grant=lambda room, grant: self.heard.hear(room, "grant"),
            on_done=lambda room: self.heard.hear(room, "done"),
            on_failed=lambda room, reason: self.heard.hear(room, "failed", reason),
            tls=tls,
            **options,
        )
        self.address = (host, self.exporter.listen(host, 0))

    def ready(self, room: int, pages: int) -> float:
        """Announce a room and wait until decode has granted it; return when that was."""
        self.exporter.open(room, pages)
        return self.heard.wait(room, "grant")

    def send(self, room: int, pages: Sequence[int], *, last: bool = True) -> None:
        """Queue the next chunk."""
        if last:
            self.exporter.send(room, pages, states=[], aux_row=0, last=True)
        else:
            self.exporter.send(room, pages)

    def send_ahead(self, room: int, pages: Sequence[int], tensors: Sequence[int]) -> None:
        """Queue some tensors of the next chunk."""
        self.exporter.send_ahead(room, pages, tensors)


class Decode:
    """The receiving side."""

    def __init__(
        self,
        workload: Workload,
        pool: memoryview,
        address: tuple[str, int],
        tls: Tls | None = None,
        **options: Any,
    ) -> None:
        self.heard = Heard()
        self.address = address
        self.importer = Importer(
            Identity("decode", "B", "b", 0, layout_of(workload)),
            memory_of(workload, pool),
            Telemetry("B"),
            on_progress=lambda room: self.heard.hear(room, "progress"),
            on_done=lambda room: self.heard.hear(room, "done"),
            on_failed=lambda room, reason: self.heard.hear(room, "failed", reason),
            tls=tls,
            **options,
        )

    def expect(self, room: int, pages: Sequence[int]) -> None:
        """Grant pages."""
        self.importer.begin(room, self.address, pages, states=[], aux_row=0, prefix_tokens=0)
