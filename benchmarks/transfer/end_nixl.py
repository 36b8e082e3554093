"""NIXL over UCX's TCP transport (see end.py): one-sided writes with a notification at the end."""

from __future__ import annotations

import base64
import ctypes
import time
from typing import Any

from benchmarks.transfer.workload import Workload, arrived_rows, new_pool

WAIT_S = 240.0


class End:
    """Operations of both roles."""

    def op_open(
        self, role: str, host: str, workload: dict[str, Any], peer: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Open this end and register its pool."""
        from nixl._api import nixl_agent, nixl_agent_config

        self.workload = Workload(**workload)
        self.pool = new_pool(self.workload, filled=role == "send")
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.pool))
        self.agent = nixl_agent(role, nixl_agent_config(backends=["UCX"]))
        region = [(self.base, self.workload.bytes, 0, "")]
        self.agent.register_memory(self.agent.get_reg_descs(region, "DRAM"))
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "base": self.base}

    def op_join(self, peer: dict[str, Any]) -> None:
        """Take the receiving end's metadata."""
        name = self.agent.add_remote_agent(base64.b64decode(peer["metadata"]))
        self.name = name.decode() if isinstance(name, bytes) else name
        self.peer_base = peer["base"]

    def op_expect(self, room: int) -> None:
        """Start counting."""
        self._cpu_s = time.process_time()

    def op_finish(self, room: int) -> dict[str, float]:
        """Wait for the notification."""
        deadline_s = time.monotonic() + WAIT_S
        while not self.agent.get_new_notifs():
            if time.monotonic() > deadline_s:
                raise TimeoutError("no notification")
            time.sleep(0.001)
        return {"done_s": time.monotonic(), "cpu_s": time.process_time() - self._cpu_s}

    def op_send(self, room: int) -> dict[str, float]:
        """Write every row and notify."""
        w = self.workload
        pairs = list(zip(w.source(), w.target(), strict=True))
        here = [(self.base + w.offset(t, a), w.row_bytes, 0) for t in range(w.tensors) for a, _ in pairs]
        there = [
            (self.peer_base + w.offset(t, b), w.row_bytes, 0) for t in range(w.tensors) for _, b in pairs
        ]
        local = self.agent.get_xfer_descs(here, "DRAM")
        remote = self.agent.get_xfer_descs(there, "DRAM")
        cpu_s, started_s = time.process_time(), time.monotonic()
        handle = self.agent.initialize_xfer("WRITE", local, remote, self.name, b"room%d" % room)
        state = self.agent.transfer(handle)
        while state == "PROC":
            time.sleep(0.0005)
            state = self.agent.check_xfer_state(handle)
        done_s = time.monotonic()
        self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"transfer state {state}")
        return {"started_s": started_s, "done_s": done_s, "cpu_s": time.process_time() - cpu_s}

    def op_arrived(self) -> int:
        """Count rows that are what was sent."""
        return arrived_rows(self.workload, self.pool, self.workload.source(), self.workload.target())
