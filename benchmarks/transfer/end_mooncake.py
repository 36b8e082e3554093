"""Mooncake's Transfer Engine over TCP (see end.py): one-sided writes from the sending end."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from benchmarks.transfer.workload import Workload, arrived_rows, new_pool

#: Requests of one call. The engine's default limits refuse a batch of 4096.
BATCH = 1024


class End:
    """Operations of both roles."""

    def op_open(
        self, role: str, host: str, workload: dict[str, Any], peer: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Open this end and register its pool."""
        from mooncake.engine import TransferEngine

        self.workload = Workload(**workload)
        self.pool = new_pool(self.workload, filled=role == "send")
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.pool))
        self.engine = TransferEngine()
        if self.engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("initialize failed")
        if self.engine.register_memory(self.base, self.workload.bytes) != 0:
            raise RuntimeError("register_memory failed")
        return {"session": f"{host}:{self.engine.get_rpc_port()}", "base": self.base}

    def op_join(self, peer: dict[str, Any]) -> None:
        """Take the receiving end's name and address."""
        self.peer = peer

    def op_expect(self, room: int) -> None:
        """One-sided: only the processor time counts here."""
        self._cpu_s = time.process_time()

    def op_finish(self, room: int) -> dict[str, float]:
        """One-sided: the sender knows the end."""
        return {"done_s": 0.0, "cpu_s": time.process_time() - self._cpu_s}

    def op_send(self, room: int) -> dict[str, float]:
        """Write every row; the call returns when the engine says that they arrived."""
        w = self.workload
        pairs = list(zip(w.source(), w.target(), strict=True))
        here = [self.base + w.offset(t, a) for t in range(w.tensors) for a, _ in pairs]
        there = [self.peer["base"] + w.offset(t, b) for t in range(w.tensors) for _, b in pairs]
        cpu_s, started_s = time.process_time(), time.monotonic()
        for i in range(0, len(here), BATCH):
            rows = here[i : i + BATCH]
            status = self.engine.batch_transfer_sync_write(
                self.peer["session"], rows, there[i : i + BATCH], [w.row_bytes] * len(rows)
            )
            if status != 0:
                raise RuntimeError(f"batch_transfer_sync_write: {status}")
        done_s = time.monotonic()
        return {"started_s": started_s, "done_s": done_s, "cpu_s": time.process_time() - cpu_s}

    def op_arrived(self) -> int:
        """Count rows that are what was sent."""
        return arrived_rows(self.workload, self.pool, self.workload.source(), self.workload.target())
