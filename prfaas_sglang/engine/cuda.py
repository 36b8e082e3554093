"""What `transfer/device.py` needs of a device, with torch: streams, events and pinned memory of CUDA.

`TensorLane` holds the row operations; they are the same for tensors of any device, only how work is queued
differs. Torch's own caches of pinned and device memory are not used once a worker runs: taking from them may
synchronise the device.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from cache_service.core.errors import ConfigError, TransferError, UnsupportedEngine
from prfaas_sglang.transfer.device import Batch, Pool
from prfaas_sglang.transfer.ring import Event, Slot

#: Streams shared by all threads. Few: torch hands out 32 per device in turn, the engine's among them.
LANES = 4
#: Pinned memory is registered in pieces of this size: one call over all of it would keep the driver's lock
#: for long, and tell late that there is too little. A copy may not cross from one piece into the next.
PIECE_BYTES = 1 << 30
_WIDE = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))

_early = threading.local()


@contextmanager
def early_send(sender: Any) -> Iterator[None]:
    """Make this thread's marks pass only after the event that SGLang left at a sender, too, if it did.

    The overlap scheduler sends a cached prefix that the batch before may still be writing on another stream,
    and leaves that stream's event (a torch.cuda.Event) as an attribute, for the next `send` to take.
    """
    _early.event = vars(sender).pop("_early_send_wait_event", None)
    try:
        yield
    finally:
        _early.event = None


def early_event() -> Any:
    """Return the event that marks of this thread include now, None for none."""
    return getattr(_early, "event", None)


def pool_of(tensor: torch.Tensor, row_bytes: int) -> Pool:
    """Return a flat uint8 tensor as rows; what is left behind the last whole row is not used."""
    rows = tensor.numel() // row_bytes
    return Pool(tensor[: rows * row_bytes].view(rows, row_bytes), rows, row_bytes)


def pieces(base: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Cut addresses start .. stop where memory that was registered from `base` on has its seams."""
    edges = range(base + ((start - base) // PIECE_BYTES + 1) * PIECE_BYTES, stop, PIECE_BYTES)
    points = [start, *edges, stop]
    return list(itertools.pairwise(points))


def _host(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8)


def _wide(pool: Pool) -> torch.dtype:
    """Return the widest type in which rows can be moved."""
    address = pool.tensor.data_ptr()
    return next(kind for size, kind in _WIDE if pool.row_bytes % size == 0 and address % size == 0)


class TensorLane:
    """Row operations on tensors (see Lane)."""

    def __init__(self, scratch: torch.Tensor) -> None:
        self._scratch = scratch  # as long as the ring

    def queue(self, work: Callable[[], None]) -> None:
        """Do work after what was queued before."""
        raise NotImplementedError

    def event(self) -> Event:
        """Return the event after what was queued so far."""
        raise NotImplementedError

    def download(self, source: torch.Tensor, out: memoryview) -> None:
        """Copy device bytes to pinned memory."""
        _host(out).copy_(source, non_blocking=True)

    def fetch(self, pool: Pool, start: int, stop: int, out: memoryview) -> None:
        """Queue one copy of neighbouring rows."""
        self.queue(lambda: self.download(pool.tensor[start:stop].view(-1), out))

    def put(self, data: memoryview, pool: Pool, start: int, stop: int) -> None:
        """Queue one copy to neighbouring rows."""

        def work() -> None:
            pool.tensor[start:stop].view(-1).copy_(_host(data), non_blocking=True)

        self.queue(work)

    def gather(self, pool: Pool, batch: Batch, out: memoryview) -> None:
        """Queue: row numbers up, a kernel that gathers into scratch, one copy down."""

        def work() -> None:
            index, data = self._parts(batch)
            self._part(batch.slot)[: batch.count * 8].copy_(_host(batch.index), non_blocking=True)
            wide = _wide(pool)
            into = data.view(wide).view(batch.count, -1)
            torch.index_select(pool.tensor.view(wide), 0, index, out=into)
            self.download(data, out)

        self.queue(work)

    def scatter(self, batch: Batch, pool: Pool) -> None:
        """Queue: row numbers and bytes up in one copy, a kernel that writes the rows."""

        def work() -> None:
            index, data = self._parts(batch)
            self._part(batch.slot).copy_(_host(batch.slot.host), non_blocking=True)
            wide = _wide(pool)
            pool.tensor.view(wide).index_copy_(0, index, data.view(wide).view(batch.count, -1))

        self.queue(work)

    def _part(self, slot: Slot) -> torch.Tensor:
        return self._scratch[slot.offset : slot.offset + len(slot.host)]

    def _parts(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        part = self._part(batch.slot)
        return part[: batch.count * 8].view(torch.int64), part[batch.data_at :]


@contextmanager
def _device_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = (str(error).splitlines() or ["no reason"])[0]
        raise TransferError(f"the CUDA device failed: {first}", reason="device") from error


class CudaEvent:
    """Events that have passed when all of them have (see Event)."""

    def __init__(self, *events: torch.cuda.Event) -> None:
        self._events = events

    def wait(self) -> None:
        """Sleep until it has passed, without the interpreter's lock."""
        with _device_errors():
            for event in self._events:
                event.synchronize()

    def passed(self) -> bool:
        """Ask the device."""
        with _device_errors():
            return all(event.query() for event in self._events)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # who waits sleeps
    event.record(stream)
    return event


class CudaLane(TensorLane):
    """Row operations on one stream; threads may share it."""

    def __init__(self, device: CudaDevice, stream: torch.cuda.Stream) -> None:
        super().__init__(device.scratch)
        self._device, self._stream = device, stream

    def queue(self, work: Callable[[], None]) -> None:
        """Queue on the stream."""
        # pools may be made in inference mode, where SGLang runs, and can be written in it only
        with _device_errors(), torch.inference_mode(), torch.cuda.stream(self._stream):
            work()

    def event(self) -> CudaEvent:
        """Record an event on the stream."""
        with _device_errors():
            return CudaEvent(_record(self._stream))

    def download(self, source: torch.Tensor, out: memoryview) -> None:
        """Copy device bytes to pinned memory, one copy per registered piece."""
        for start, stop in self._device.seams(out):
            _host(out[start:stop]).copy_(source[start:stop], non_blocking=True)


class CudaDevice:
    """One CUDA device (see Device).

    Args:
        index: its number among the visible devices.
    """

    def __init__(self, index: int) -> None:
        self._torch = torch.device("cuda", index)
        self._registered: list[tuple[int, int]] = []  # (address, size) of all that `pinned` gave
        self._maps: list[mmap.mmap] = []
        # priority 0 is the lowest that CUDA has
        streams = [torch.cuda.Stream(self._torch, priority=0) for _ in range(LANES + 1)]
        self._marks, self._streams = streams[0], streams[1:]
        self._turn = itertools.count()
        self.scratch = torch.empty(0, dtype=torch.uint8, device=self._torch)

    def mark(self) -> CudaEvent:
        """Record an event on the calling thread's current stream (see also `early_send`)."""
        with _device_errors():
            now = _record(torch.cuda.current_stream(self._torch))
            early = early_event()
            if early is None:
                return CudaEvent(now)
            self._marks.wait_event(early)
            return CudaEvent(now, _record(self._marks))

    def lane(self) -> CudaLane:
        """Return one of the streams, in turn."""
        return CudaLane(self, self._streams[next(self._turn) % LANES])

    def ring(self, size: int) -> memoryview:
        """Return pinned memory; as much of the device's is scratch from now on."""
        try:
            self.scratch = torch.zeros(size, dtype=torch.uint8, device=self._torch)
            self._load_kernels()
        except RuntimeError as error:
            raise ConfigError(
                f"--mem-fraction-static: leaves no {size >> 20} MiB of device memory for the KV transfer "
                f"({error})"
            ) from error
        return self.pinned(size)

    def _load_kernels(self) -> None:
        """Use what the lanes use, before anything is served: CUDA loads a kernel on its first use, and may
        wait for all of the device's work then.
        """
        for width, kind in _WIDE:
            for count in (8, 64):  # index_select has a kernel for few rows and one for many
                source, target = (self.scratch[at:][: 64 * count * width].view(kind) for at in (0, 1 << 20))
                index = torch.arange(count, device=self._torch)
                rows = target.view(count, -1)
                torch.index_select(source.view(count, -1), 0, index, out=rows)
                source.view(count, -1).index_copy_(0, index, rows)
        torch.cuda.synchronize(self._torch)

    def pinned(self, size: int) -> memoryview:
        """Return memory of the system that is registered with CUDA, piece by piece.

        Raises ConfigError naming staging_bytes when the system or the driver refuses.
        """
        runtime: Any = torch.cuda.cudart()
        memory = anonymous(size)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        done: list[int] = []
        with torch.cuda.device(self._torch):
            for start, stop in pieces(base, base, base + size):
                code = int(runtime.cudaHostRegister(start, stop - start, 0))
                if code:
                    for address in done:
                        runtime.cudaHostUnregister(address)
                    raise _not_pinned(size, f"CUDA error {code} after {start - base} of them")
                done.append(start)
        self._maps.append(memory)
        self._registered.append((base, size))
        return memoryview(memory)

    def seams(self, out: memoryview) -> Sequence[tuple[int, int]]:
        """Return the parts of `out` that one copy each may fill."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(out))
        for base, size in self._registered:
            if base <= address < base + size:
                found = pieces(base, address, address + len(out))
                return [(start - address, stop - address) for start, stop in found]
        raise TransferError("a copy to memory that is not pinned", reason="pinned")

    def close(self) -> None:
        """Let go of all pinned memory, once nothing is queued; for tests, a worker never does."""
        with _device_errors():
            for stream in self._streams:
                stream.synchronize()
        runtime: Any = torch.cuda.cudart()
        while self._registered:
            base, size = self._registered.pop()
            for start, _ in pieces(base, base, base + size):
                runtime.cudaHostUnregister(start)
        self._maps.clear()


def _not_pinned(size: int, why: str) -> ConfigError:
    return ConfigError(
        f"PRFAAS_CONFIG.staging_bytes: cannot pin {size} bytes of host memory ({why}); lower it, or raise "
        "the memory limit (the container's, ulimit -l) of this worker"
    )


def anonymous(size: int) -> mmap.mmap:
    """Return memory of the system, not pinned yet, in huge pages where there are some.

    Raises ConfigError naming staging_bytes when there is too little.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _not_pinned(size, str(error)) from error
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _Memory:
    """Device memory as an object that torch takes without a copy."""

    def __init__(self, pointer: int, length: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (length,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def cuda_span(pointer: int, length: int, index: int) -> torch.Tensor:
    """Return device memory that somebody else owns as a flat uint8 tensor.

    Raises UnsupportedEngine when it is not memory of that device.
    """
    try:
        tensor = torch.as_tensor(_Memory(pointer, length), device=torch.device("cuda", index))
    except (RuntimeError, ValueError) as error:
        raise UnsupportedEngine(f"a pool that is not in CUDA memory: {error}") from error
    if tensor.data_ptr() != pointer:
        raise UnsupportedEngine(f"a pool that is not in the memory of CUDA device {index}")
    return tensor
