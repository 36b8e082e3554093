"""Our two ends: `op_open(role=...)` decides which one this process is (see end.py)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.transfer.ours import Decode, Prefill, tls_of
from benchmarks.transfer.workload import Workload, arrived_rows, new_pool
from prfaas_sglang.core import outbox
from prfaas_sglang.transfer.importer import DEFAULT_CONNECTIONS


class End:
    """Operations of both roles."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._started_s: dict[int, float] = {}
        self._cpu_s = 0.0

    def op_open(
        self,
        role: str,
        host: str,
        workload: dict[str, Any],
        peer: dict[str, Any] | None = None,
        tls: list[str] | None = None,
        fifo: bool = False,
        bbr: bool = True,
        connections: int = DEFAULT_CONNECTIONS,
        staging: int = 0,
        fd: int = -1,
    ) -> dict[str, Any]:
        """Open this end; decode needs what prefill returned as `peer`.

        fifo: all deadlines equal their grant's time. bbr: False acts as a host that refuses the request for
        it (the real setting, tcp_allowed_congestion_control, holds for the whole machine).
        """
        if fifo:
            outbox.DUE_BYTES_PER_S = 1 << 60
        if not bbr:
            socket.TCP_CONGESTION = 0x7FFF  # type: ignore[misc] # setsockopt refuses it, as such a host does
        self.workload = Workload(**workload)
        self.pool = new_pool(self.workload, filled=role == "send", fd=fd)
        if role == "send":
            self.prefill = Prefill(self.workload, self.pool, host, tls_of(tls), staging_bytes=staging)
            return {"address": list(self.prefill.address)}
        assert peer is not None
        host, port = peer["address"]
        self.decode = Decode(self.workload, self.pool, (host, port), tls_of(tls), connections=connections)
        return {}

    def op_join(self, peer: dict[str, Any]) -> None:
        """Nothing: the connections are dialed by decode."""

    # --- decode ---

    def op_expect(self, room: int, target: Sequence[int] | None = None) -> None:
        """Grant a room."""
        self._cpu_s = time.process_time()
        self.decode.expect(room, self.workload.target() if target is None else target)

    def op_finish(self, room: int) -> dict[str, float]:
        """Wait for a room's last byte."""
        done_s = self.decode.heard.wait(room, "done")
        return {"done_s": done_s, "cpu_s": time.process_time() - self._cpu_s}

    def op_arrived(self, source: Sequence[int] | None = None, target: Sequence[int] | None = None) -> int:
        """Count rows that are what was sent."""
        source = self.workload.source() if source is None else source
        target = self.workload.target() if target is None else target
        return arrived_rows(self.workload, self.pool, source, target)

    # --- prefill ---

    def op_send(self, room: int, source: Sequence[int] | None = None) -> dict[str, float]:
        """Send a whole room once it is granted and wait until decode has verified it."""
        source = self.workload.source() if source is None else source
        self.prefill.ready(room, len(source))
        cpu_s, started_s = time.process_time(), time.monotonic()
        self.prefill.send(room, source)
        done_s = self.prefill.heard.wait(room, "done")
        return {"started_s": started_s, "done_s": done_s, "cpu_s": time.process_time() - cpu_s}

    def op_send_when_granted(self, room: int, source: Sequence[int]) -> None:
        """Send a room in the background, as soon as it is granted."""

        def run() -> None:
            self.prefill.ready(room, len(source))
            self._started_s[room] = time.monotonic()
            self.prefill.send(room, source)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def op_sent(self, room: int) -> dict[str, float]:
        """Wait for a room sent in the background."""
        done_s = self.prefill.heard.wait(room, "done")
        return {"started_s": self._started_s[room], "done_s": done_s}

    def op_failed(self, room: int) -> bool:
        """Whether a room has failed."""
        return self.prefill.heard.failed(room)

    def op_abort(self, room: int) -> None:
        """Give a room up."""
        self.prefill.exporter.abort(room, "enough")

    def op_stream(
        self, room: int, source: Sequence[int], chunk_pages: int, chunk_s: float, how: str
    ) -> dict[str, float]:
        """Act as an engine that computes a chunk of pages every `chunk_s`; return when it began and ended.

        how: "after" sends all at the end, "chunk" each chunk when it is computed, "layer" each tensor of a
        chunk when it is computed.
        """
        self.prefill.ready(room, len(source))
        began_s = time.monotonic()
        chunks = [source[i : i + chunk_pages] for i in range(0, len(source), chunk_pages)]
        tensors = self.workload.tensors
        for number, chunk in enumerate(chunks):
            if how == "layer":
                for tensor in range(tensors - 1):
                    _until(began_s + (number + (tensor + 1) / tensors) * chunk_s)
                    self.prefill.send_ahead(room, chunk, [tensor])
            _until(began_s + (number + 1) * chunk_s)
            if how != "after":
                self.prefill.send(room, chunk, last=number == len(chunks) - 1)
        ended_s = began_s + len(chunks) * chunk_s
        if how == "after":
            self.prefill.send(room, source)
        return {"began_s": began_s, "ended_s": ended_s}

    def op_samples(self) -> list[dict[str, Any]]:
        """Return and forget the link's samples."""
        found, self.prefill.telemetry.samples = self.prefill.telemetry.samples, []
        return [{"at_s": at, **asdict(sample)} for at, sample in found]


def _until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.monotonic()))
