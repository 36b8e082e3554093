"""KV transfer over loopback TCP, in this process, against a plain socket that copies the same bytes.

The peer is the limit of one Python thread per side: `sendall` of one buffer, `recv_into` another. Ours also
gathers and scatters pages, checks every frame and confirms the end.
"""

from __future__ import annotations

import random
import socket
import threading
import time

from benchmarks.harness import Row, alternate, run
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.memory import RowMemory
from prfaas_sglang.transfer.telemetry import Telemetry

LAYERS = 8


class Transfer:
    """An exporter and an importer with pools of `pages` pages of `page_bytes` in LAYERS tensors."""

    def __init__(self, page_bytes: int, pages: int) -> None:
        layout = Layout(
            "bench",
            "bench",
            64,
            "bfloat16",
            1,
            (Component("kv", (page_bytes,) * LAYERS), Component("aux", (64,))),
        )
        self.pages = pages
        self.bytes = page_bytes * pages * LAYERS
        self._rng = random.Random(0)
        self._granted, self._done = threading.Event(), threading.Event()
        self._room = 0
        telemetry = Telemetry("A")
        self.exporter = Exporter(
            Identity("prefill", "A", "a", 0, layout),
            self._pool(layout, page_bytes),
            telemetry,
            on_grant=lambda room, grant: self._granted.set(),
            on_done=lambda room: self._done.set(),
            on_failed=lambda room, reason: None,
        )
        self.importer = Importer(
            Identity("decode", "B", "b", 0, layout),
            self._pool(layout, page_bytes),
            Telemetry("B"),
            on_progress=lambda room: None,
            on_done=lambda room: None,
            on_failed=lambda room, reason: print(f"failed: {reason}"),
        )
        self.address = ("127.0.0.1", self.exporter.listen("127.0.0.1", 0))
        self.goodput()  # dials

    def _pool(self, layout: Layout, page_bytes: int) -> RowMemory:
        tensors = [memoryview(bytearray(page_bytes * self.pages)) for _ in range(LAYERS)]
        return RowMemory(layout, [tensors, [memoryview(bytearray(64))]])

    def goodput(self) -> float:
        """Move every page once, to shuffled places; return bytes per second."""
        self._room += 1
        self._granted.clear()
        self._done.clear()
        source, target = list(range(self.pages)), list(range(self.pages))
        self._rng.shuffle(source)
        self._rng.shuffle(target)
        started = time.perf_counter()
        self.importer.begin(self._room, self.address, target, states=[], aux_row=0, prefix_tokens=0)
        assert self._granted.wait(30)
        self.exporter.send(self._room, source, states=[], aux_row=0, last=True)
        assert self._done.wait(60)
        return self.bytes / (time.perf_counter() - started)

    def close(self) -> None:
        """End both sides."""
        self.importer.close()
        self.exporter.close()


def plain_socket(total: int, block: int) -> float:
    """Send `total` bytes in `block`s over one loopback connection; return bytes per second."""
    server = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(server.getsockname())
    receiver, _ = server.accept()
    target = memoryview(bytearray(block))

    def receive() -> None:
        left = total
        while left:
            left -= receiver.recv_into(target[: min(left, block)])

    thread = threading.Thread(target=receive)
    source = memoryview(bytearray(block))
    started = time.perf_counter()
    thread.start()
    for _ in range(total // block):
        sender.sendall(source)
    thread.join()
    elapsed = time.perf_counter() - started
    for end in (sender, receiver, server):
        end.close()
    return total / elapsed


def measure(smoke: bool) -> list[Row]:
    """Return one row per page size."""
    total = (8 if smoke else 256) << 20
    rows = []
    for page_bytes in (16 << 10, 64 << 10, 1 << 20):
        pages = max(1, total // (page_bytes * LAYERS))
        transfer = Transfer(page_bytes, pages)
        try:
            ours, peer = alternate(
                transfer.goodput, lambda t=transfer: plain_socket(t.bytes, 256 << 10), 1 if smoke else 5
            )
        finally:
            transfer.close()
        name = f"loopback goodput, {transfer.bytes >> 20} MiB in {page_bytes >> 10} KiB pages"
        rows.append(Row(name, "GB/s", ours / 1e9, peer / 1e9, "plain socket"))
    return rows


if __name__ == "__main__":
    run("transfer", measure, __doc__ or "")
