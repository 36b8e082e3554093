"""Plain Python sockets, one thread a connection, whole buffers (see end.py): no paging, no checks."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from benchmarks.transfer.workload import Workload, new_pool
from prfaas_sglang.transfer.importer import DEFAULT_CONNECTIONS

BLOCK = 1 << 20


class End:
    """Operations of both roles."""

    def op_open(
        self,
        role: str,
        host: str,
        workload: dict[str, Any],
        peer: dict[str, Any] | None = None,
        connections: int = DEFAULT_CONNECTIONS,
    ) -> dict[str, Any]:
        """Connect, as many times as our own ends do; the sender listens, as ours does."""
        self.workload = Workload(**workload)
        self.pool = new_pool(self.workload, filled=role == "send")
        self.socks: list[socket.socket] = []
        if role == "send":
            self._listener = socket.create_server((host, 0))
            return {"address": list(self._listener.getsockname()), "connections": connections}
        assert peer is not None
        self.socks = [socket.create_connection(tuple(peer["address"])) for _ in range(connections)]
        return {"connections": connections}

    def op_join(self, peer: dict[str, Any]) -> None:
        """Accept the connections."""
        self.socks = [self._listener.accept()[0] for _ in range(peer["connections"])]

    def op_expect(self, room: int) -> None:
        """Start receiving."""
        self._cpu_s = time.process_time()
        self._receivers = self._each(self._receive)

    def op_finish(self, room: int) -> dict[str, float]:
        """Wait for the last byte."""
        for thread in self._receivers:
            thread.join()
        return {"done_s": time.monotonic(), "cpu_s": time.process_time() - self._cpu_s}

    def op_send(self, room: int) -> dict[str, float]:
        """Send the pool, split evenly over the connections."""
        cpu_s, started_s = time.process_time(), time.monotonic()
        for thread in self._each(self._send):
            thread.join()
        return {"started_s": started_s, "done_s": time.monotonic(), "cpu_s": time.process_time() - cpu_s}

    def _each(self, work: Any) -> list[threading.Thread]:
        share = self.workload.bytes // len(self.socks)
        parts = [self.pool[i * share : (i + 1) * share] for i in range(len(self.socks))]
        threads = [threading.Thread(target=work, args=pair) for pair in zip(self.socks, parts, strict=True)]
        for thread in threads:
            thread.start()
        return threads

    @staticmethod
    def _send(sock: socket.socket, part: memoryview) -> None:
        for i in range(0, len(part), BLOCK):
            sock.sendall(part[i : i + BLOCK])

    @staticmethod
    def _receive(sock: socket.socket, part: memoryview) -> None:
        while part:
            part = part[sock.recv_into(part[:BLOCK], 0, socket.MSG_WAITALL) :]
