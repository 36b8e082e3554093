"""Device pools: what passes through the pinned ring, against a plain pinned copy and against host pools.

Without a CUDA device every row says so. `tests/unit/benchmarks` runs the same cases on CPU tensors, so that
they do not rot; figures from there would mean nothing.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Row, alternate, run
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.engine import cuda
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.device import Device, DeviceMemory
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.memory import PoolMemory, RowCopy, RowMemory
from prfaas_sglang.transfer.telemetry import Telemetry

MIB = 1 << 20
ROW_BYTES = 64 << 10  # a page of 64 tokens, 4 heads of 128, bf16
TENSORS, THREADS, FRAME_BYTES = 8, 4, 256 << 10
WAIT_S = 120.0
NO_DEVICE = "no CUDA device here"
NAMES = (
    "copy_out, shuffled rows",
    "copy_out, neighbouring rows",
    "reading frames of 256 KiB, 4 threads",
    "landing frames of 256 KiB, 4 threads",
    "pool to pool over loopback, shuffled rows",
    "a compute stream's time while copy_out runs",
)
LAYOUT = Layout(
    "bench", "bench", 64, "bfloat16", 1, (Component("kv", (ROW_BYTES,) * TENSORS), Component("aux", (64,)))
)


@dataclass(frozen=True, slots=True)
class Bed:
    """Pools of `rows` rows on a device, and the device's way to say that all is done."""

    torch_device: str
    make: Callable[[], Device]
    synchronize: Callable[[], None]
    rows: int

    def pools(self) -> tuple[list[torch.Tensor], DeviceMemory]:
        """Return new pools, random bytes."""
        size = self.rows * ROW_BYTES
        tensors = [
            torch.randint(0, 256, (size,), dtype=torch.uint8, device=self.torch_device)
            for _ in range(TENSORS)
        ]
        self.synchronize()
        rows = [cuda.pool_of(t, ROW_BYTES) for t in tensors]
        return tensors, DeviceMemory(LAYOUT, [rows, [memoryview(bytearray(64))]], self.make())

    @property
    def bytes(self) -> int:
        """Bytes of all KV tensors."""
        return self.rows * ROW_BYTES * TENSORS

    def shuffled(self) -> list[int]:
        """Return all rows in an order without neighbours worth speaking of."""
        return random.Random(1).sample(range(self.rows), self.rows)


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def in_threads(jobs: Sequence[Callable[[], None]]) -> None:
    """Do jobs, THREADS at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result(WAIT_S)


def row(
    bed: Bed, name: str, ours: Callable[[], object], peer: Callable[[], object], peer_name: str, rounds: int
) -> Row:
    """Measure two ways to move all of the pools' bytes, in turn."""
    ours(), peer()
    ours_s, peer_s = alternate(lambda: seconds(ours), lambda: seconds(peer), rounds)
    return Row(name, "GB/s", bed.bytes / ours_s / 1e9, bed.bytes / peer_s / 1e9, peer_name)


def copies(bed: Bed, rounds: int) -> list[Row]:
    """Rows in and out of one worker, against copies of whole tensors between the same memories."""
    tensors, memory = bed.pools()
    out = memory.host_memory(bed.bytes)
    each = bed.rows * ROW_BYTES
    parts = [out[i * each : (i + 1) * each] for i in range(TENSORS)]
    hosts = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]

    def copy_out(rows: list[int]) -> None:
        wanted = [RowCopy(0, i, rows, part) for i, part in enumerate(parts)]
        memory.copy_out(memory.mark(), wanted)

    def down() -> None:
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        bed.synchronize()

    def up() -> None:
        for host, tensor in zip(hosts, tensors, strict=True):
            tensor.copy_(host, non_blocking=True)
        bed.synchronize()

    def frames(job: Callable[[int, list[int]], None]) -> Callable[[], None]:
        shuffled, count = bed.shuffled(), FRAME_BYTES // ROW_BYTES
        chunks = [shuffled[i : i + count] for i in range(0, bed.rows, count)]
        pieces = list(itertools.product(range(TENSORS), chunks))

        def work(mine: list[tuple[int, list[int]]]) -> None:
            for tensor, rows in mine:
                job(tensor, rows)

        def all_of_them() -> None:
            in_threads([lambda mine=pieces[i::THREADS]: work(mine) for i in range(THREADS)])
            memory.settle()

        return all_of_them

    def read(tensor: int, rows: list[int]) -> None:
        with memory.reading(memory.mark(), 0, tensor, rows):
            pass

    def land(tensor: int, rows: list[int]) -> None:
        memory.landing(0, tensor, rows).land()

    shuffled, neighbours = bed.shuffled(), list(range(bed.rows))
    copy = "one pinned copy per tensor"
    return [
        row(bed, NAMES[0], lambda: copy_out(shuffled), down, copy, rounds),
        row(bed, NAMES[1], lambda: copy_out(neighbours), down, copy, rounds),
        row(bed, NAMES[2], frames(read), down, copy, rounds),
        row(bed, NAMES[3], frames(land), up, copy, rounds),
    ]


class Heard:
    """Rooms that a thread can wait for."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rooms: dict[int, str] = {}

    def __call__(self, room: int, reason: str = "") -> None:
        with self._condition:
            self._rooms[room] = reason
            self._condition.notify_all()

    def wait(self, room: int) -> None:
        """Raises RuntimeError when the room failed or nothing was heard of it."""
        with self._condition:
            heard = self._condition.wait_for(lambda: room in self._rooms, WAIT_S)
        if not heard or self._rooms[room]:
            raise RuntimeError(f"room {room}: {self._rooms.get(room, 'nothing was heard')}")


class Loopback:
    """An exporter and an importer of this process between two memories."""

    def __init__(self, source: PoolMemory, target: PoolMemory) -> None:
        self._granted, self._done, self._room = Heard(), Heard(), itertools.count(1)
        self.exporter = Exporter(
            Identity("prefill", "A", "a-0", 0, LAYOUT),
            source,
            Telemetry("A"),
            on_grant=lambda room, _: self._granted(room),
            on_done=lambda room: None,
            on_failed=self._done,
            frame_bytes=FRAME_BYTES,
        )
        self.importer = Importer(
            Identity("decode", "B", "b-0", 0, LAYOUT),
            target,
            Telemetry("B"),
            on_progress=lambda room: None,
            on_done=self._done,
            on_failed=self._done,
        )
        self._address = ("127.0.0.1", self.exporter.listen("127.0.0.1", 0))

    def move(self, source: list[int], target: list[int]) -> None:
        """Move rows of every tensor."""
        room = next(self._room)
        self.importer.begin(room, self._address, target, states=[], aux_row=0, prefix_tokens=0)
        self._granted.wait(room)
        self.exporter.open(room, len(source))
        self.exporter.send(room, source, states=[], aux_row=0, last=True)
        self._done.wait(room)

    def close(self) -> None:
        """End both sides."""
        self.importer.close()
        self.exporter.close()


def loopback(bed: Bed, rounds: int) -> Row:
    """Device to device against host to host, the same sockets and threads."""

    def host() -> RowMemory:
        tensors = [memoryview(bytearray(bed.rows * ROW_BYTES)) for _ in range(TENSORS)]
        return RowMemory(LAYOUT, [tensors, [memoryview(bytearray(64))]])

    (_a, source), (_b, target) = bed.pools(), bed.pools()
    rows = bed.shuffled()
    with closing(Loopback(source, target)) as ours, closing(Loopback(host(), host())) as peer:
        return row(
            bed,
            NAMES[4],
            lambda: ours.move(rows, rows[::-1]),
            lambda: peer.move(rows, rows[::-1]),
            "host pools, same sockets",
            rounds,
        )


def stolen(bed: Bed, rounds: int) -> Row:
    """Matrix products on a stream, alone and while copy_out runs without pause."""
    _tensors, memory = bed.pools()
    out = memory.host_memory(bed.rows * ROW_BYTES)
    side = 4096 if bed.torch_device != "cpu" else 64
    a = torch.randn(side, side, dtype=torch.bfloat16, device=bed.torch_device)
    rows, stop = bed.shuffled(), threading.Event()

    def compute() -> float:
        bed.synchronize()

        def products() -> None:
            b: Any = a
            for _ in range(100):
                b = a @ b
            if bed.torch_device != "cpu":
                torch.cuda.current_stream().synchronize()

        return seconds(products)

    def copying() -> None:
        while not stop.is_set():
            memory.copy_out(None, [RowCopy(0, 0, rows, out)])

    alone = [compute() for _ in range(1 + rounds)][1:]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(copying)
        beside = [compute() for _ in range(1 + rounds)][1:]
        stop.set()
        busy.result(WAIT_S)
    return Row(
        NAMES[5], "s", statistics.median(beside), statistics.median(alone), "alone", lower_is_better=True
    )


def cases(bed: Bed, rounds: int) -> list[Row]:
    """Run all of them."""
    return [*copies(bed, rounds), loopback(bed, rounds), stolen(bed, rounds)]


def measure(smoke: bool) -> list[Row]:
    """Return the rows, empty ones without a CUDA device."""
    if not torch.cuda.is_available():
        return [Row(name, "", None, None, NO_DEVICE) for name in NAMES]
    bed = Bed("cuda:0", lambda: cuda.CudaDevice(0), torch.cuda.synchronize, 64 if smoke else 1024)
    return cases(bed, 1 if smoke else 5)


if __name__ == "__main__":
    run("device", measure, __doc__ or "")
