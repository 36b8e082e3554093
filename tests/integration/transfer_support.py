"""Both sides of a transfer in one process, over real sockets, for the tests."""

from __future__ import annotations

import random
import threading

from prfaas_sglang.core.compression import CODECS, Mode
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.exporter import PARK_S, Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.memory import RowMemory
from prfaas_sglang.transfer.telemetry import Telemetry, TransferRecord
from prfaas_sglang.transfer.tls import Tls

WAIT_S = 20
NO_ROOM = -1  # what a side hears that belongs to no request
LAYOUT = Layout(
    engine="test 1",
    model="tiny",
    page_size=64,
    kv_dtype="float32",
    tp_size=1,
    components=(
        Component("kv", (4096, 4096)),
        Component("mamba", (50_000,)),
        Component("aux", (64, 8)),
    ),
)
ROWS = (512, 16, 8)


class _Telemetry(Telemetry):
    """Tells the test when a record is there, and when a peer was refused."""

    def __init__(self, side: Side) -> None:
        super().__init__("X")
        self._side = side

    def record(self, record: TransferRecord) -> None:
        super().record(record)
        self._side.hear(record.room, "ended")

    def refused(self, reason: str) -> None:
        super().refused(reason)
        self._side.hear(NO_ROOM, f"refused {reason}")


class Side:
    """Pools of one worker, and what its callbacks said, room by room."""

    def __init__(self, seed: int, layout: Layout = LAYOUT) -> None:
        rng = random.Random(seed)
        self.buffers = [
            [bytearray(rng.randbytes(size * rows)) for size in component.row_bytes]
            for component, rows in zip(layout.components, ROWS, strict=True)
        ]
        self.memory = RowMemory(layout, [[memoryview(b) for b in c] for c in self.buffers])
        self.telemetry = _Telemetry(self)
        self._lock = threading.Condition()
        self.heard: dict[tuple[int, str], str] = {}

    def hear(self, room: int, what: str, detail: str = "") -> None:
        with self._lock:
            self.heard.setdefault((room, what), detail)
            self._lock.notify_all()

    def wait(self, room: int, what: str) -> str:
        with self._lock:
            assert self._lock.wait_for(lambda: (room, what) in self.heard, WAIT_S), self.heard
            return self.heard[(room, what)]

    def ended(self, room: int) -> TransferRecord:
        """Wait until a room's transfer has ended on this side; return its record."""
        self.wait(room, "ended")
        (record,) = self.telemetry.transfers(room)
        return record

    def row(self, component: int, tensor: int, row: int) -> bytes:
        size = LAYOUT.components[component].row_bytes[tensor]
        return bytes(self.buffers[component][tensor][row * size : (row + 1) * size])


class Pair:
    """A prefill and a decode side, optionally with a middlebox between them."""

    def __init__(
        self,
        *,
        prefill_layout: Layout = LAYOUT,
        decode_layout: Layout = LAYOUT,
        prefill_mode: Mode = Mode.NONE,
        decode_mode: Mode = Mode.NONE,
        prefill_tls: Tls | None = None,
        decode_tls: Tls | None = None,
        staging_bytes: int = 0,
        hold_s: float = 60.0,
        park_s: float = PARK_S,
        connections: int = 4,
        decode_site: str = "B",
        prefill_peers: tuple[str, ...] = (),
        decode_peers: tuple[str, ...] = (),
    ) -> None:
        self.prefill, self.decode = Side(1), Side(2)
        self.exporter = Exporter(
            Identity("prefill", "A", "a-0", 0, prefill_layout, prefill_peers, CODECS[prefill_mode]),
            self.prefill.memory,
            self.prefill.telemetry,
            on_grant=lambda room, grant: self.prefill.hear(room, "grant"),
            on_done=lambda room: self.prefill.hear(room, "done"),
            on_failed=lambda room, reason: self.prefill.hear(room, "failed", reason),
            frame_bytes=64 << 10,
            staging_bytes=staging_bytes,
            hold_s=hold_s,
            park_s=park_s,
            tls=prefill_tls,
        )
        self.importer = Importer(
            Identity("decode", decode_site, "b-0", 0, decode_layout, decode_peers, CODECS[decode_mode]),
            self.decode.memory,
            self.decode.telemetry,
            on_progress=lambda room: self.decode.hear(room, "progress"),
            on_done=lambda room: self.decode.hear(room, "done"),
            on_failed=lambda room, reason: self.decode.hear(room, "failed", reason),
            connections=connections,
            tls=decode_tls,
        )
        self.address = ("127.0.0.1", self.exporter.listen("127.0.0.1", 0))

    def begin(self, room: int, pages: list[int], *, state: int, aux: int, prefix_pages: int = 0) -> None:
        self.importer.begin(
            room,
            self.address,
            pages,
            states=[[state]],
            aux_row=aux,
            prefix_tokens=prefix_pages * LAYOUT.page_size,
        )

    def close(self) -> None:
        self.importer.close()
        self.exporter.close()


def assert_moved(pair: Pair, sources: list[list[int]], targets: list[list[int]]) -> None:
    for component, (src, dst) in enumerate(zip(sources, targets, strict=True)):
        for tensor in range(len(LAYOUT.components[component].row_bytes)):
            for a, b in zip(src, dst, strict=True):
                assert pair.decode.row(component, tensor, b) == pair.prefill.row(component, tensor, a)
