"""Pools in the memory of a device: rows pass through pinned host memory, on streams of our own.

Three rules keep this right. Rows are read only when the mark of the engine's work has passed, and it is the
host that waits for it, so that nothing of ours on the device ever waits for the engine. A slot of the ring is
used again only when the event after its last use has passed. And the engine's own streams are never waited
for, made to wait, or synchronised.

What a device must be able to do is `Device` and `Lane`; `prfaas_sglang/engine/cuda.py` has the one for CUDA.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cache_service.core.errors import LocalProtocolError
from prfaas_sglang.core.framing import MAX_PAYLOAD_BYTES
from prfaas_sglang.core.layout import Layout
from prfaas_sglang.transfer.memory import Landing, RowCopy, RowMemory
from prfaas_sglang.transfer.ring import Event, Ring, Slot

#: Pinned memory that frames pass through, and as much of the device's memory beside it.
RING_BYTES = 64 << 20
#: Rows are gathered by a kernel unless they are so few runs of neighbours, or runs so long, that the copy
#: engine does better alone (a copy costs some microseconds to start).
FEW_RUNS = 4
LONG_RUN_BYTES = 256 << 10
#: Bytes gathered at a time on their way to staging memory.
COPY_BYTES = 4 << 20
#: Row numbers in a slot end at a multiple of this, so that the rows behind them are aligned.
_ALIGN = 64

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """One tensor of the device: [rows, row_bytes] uint8, contiguous."""

    tensor: Any
    rows: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A slot with the numbers of some rows (int64) at its begin, and place for their bytes behind them."""

    slot: Slot
    count: int
    data_at: int  #: where the bytes begin in the slot

    @property
    def index(self) -> memoryview:
        """The row numbers."""
        return self.slot.host[: self.count * 8]

    @property
    def data(self) -> memoryview:
        """The rows' bytes, pinned."""
        return self.slot.host[self.data_at :]


class Lane(Protocol):
    """A stream of the device, used by one thread: what is queued is done in order.

    Everything but `event` only queues. Raises TransferError (reason "device") when the device fails.
    """

    def fetch(self, pool: Pool, start: int, stop: int, out: memoryview) -> None:
        """Copy rows start .. stop to pinned memory."""

    def put(self, data: memoryview, pool: Pool, start: int, stop: int) -> None:
        """Copy pinned memory to rows start .. stop."""

    def gather(self, pool: Pool, batch: Batch, out: memoryview) -> None:
        """Copy a batch's rows to pinned memory; the slot's part of device memory is scratch."""

    def scatter(self, batch: Batch, pool: Pool) -> None:
        """Copy a batch's bytes to its rows, likewise."""

    def event(self) -> Event:
        """Return the event that passes when all that was queued so far is done."""


class Device(Protocol):
    """What this module needs of a device."""

    def mark(self) -> Event:
        """Return the event that passes when all that the engine has queued so far is done."""

    def lane(self) -> Lane:
        """Return a stream of low priority."""

    def ring(self, size: int) -> memoryview:
        """Return pinned memory that the lanes have as much device memory for. Called once."""

    def pinned(self, size: int) -> memoryview:
        """Return pinned memory. Raises ConfigError when the system gives none."""


def checked(pool: Pool, rows: Sequence[int]) -> Rows:
    """Return row numbers as an array. Raises LocalProtocolError for a row outside the pool."""
    index: Rows = np.asarray(rows, np.int64)
    if len(index) and (index.min() < 0 or index.max() >= pool.rows):
        wrong = next(row for row in rows if not 0 <= row < pool.rows)
        raise LocalProtocolError(f"row {wrong} outside a pool of {pool.rows}", reason="row")
    return index


def runs(index: Rows) -> list[tuple[int, int]]:
    """Return runs of neighbours, as (first position, position behind the last)."""
    if not len(index):
        return []
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    edges = [0, *cuts.tolist(), len(index)]
    return list(itertools.pairwise(edges))


def long_runs(pool: Pool, index: Rows) -> list[tuple[int, int]] | None:
    """Return the runs of some rows, None when the rows are better gathered."""
    found = runs(index)
    if len(found) <= FEW_RUNS or len(index) * pool.row_bytes >= len(found) * LONG_RUN_BYTES:
        return found
    return None


class DeviceMemory:
    """Pools in device memory, some components of them in host memory (see PoolMemory).

    Args:
        layout: row sizes per component and tensor.
        pools: one entry per tensor, per component, in the layout's order: a Pool, or a buffer for a tensor
            in host memory. The caller keeps the memory alive.
        device: the device's streams and memory.
        ring_bytes: pinned memory that frames pass through.

    Raises LocalProtocolError when the pools do not fit the layout, ConfigError without pinned memory.
    """

    def __init__(
        self,
        layout: Layout,
        pools: Sequence[Sequence[Pool | memoryview]],
        device: Device,
        *,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self._host = RowMemory(
            layout, [[memoryview(b"") if isinstance(p, Pool) else p for p in tensors] for tensors in pools]
        )
        self._pools = [[p if isinstance(p, Pool) else None for p in tensors] for tensors in pools]
        for component, tensors in zip(layout.components, self._pools, strict=True):
            for row_bytes, pool in zip(component.row_bytes, tensors, strict=True):
                if pool is not None and pool.row_bytes != row_bytes:
                    raise LocalProtocolError(
                        f"{component.kind}: rows of {pool.row_bytes} bytes, the layout says {row_bytes}"
                    )
        self._device = device
        self._ring = Ring(device.ring(max(ring_bytes, 2 * MAX_PAYLOAD_BYTES)))
        self._lanes = threading.local()

    @property
    def ring(self) -> Ring:
        """What frames pass through."""
        return self._ring

    # --- PoolMemory ---

    def mark(self) -> Event:
        """Record an event on the engine's stream; costs microseconds."""
        return self._device.mark()

    def reading(
        self, mark: object, component: int, tensor: int, rows: Sequence[int]
    ) -> AbstractContextManager[list[memoryview]]:
        """Give copies of the rows in a slot of the ring.

        Raises TransferError when the ring has no room in time or the device fails.
        """
        pool = self._pools[component][tensor]
        if pool is None:
            return self._host.reading(mark, component, tensor, rows)
        return self._reading(mark, pool, checked(pool, rows))

    @contextmanager
    def _reading(self, mark: Any, pool: Pool, index: Rows) -> Iterator[list[memoryview]]:
        if not len(index):
            yield []
            return
        if mark is not None:
            mark.wait()
        batch = self._batch(pool, index)
        lane = self._lane()
        # when one of these fails, nobody knows what the device still writes: the slot is not used again
        self._pull(lane, pool, index, batch)
        lane.event().wait()
        try:
            yield [batch.data]
        finally:
            self._ring.give(batch.slot)

    def copy_out(self, mark: Any, copies: Sequence[RowCopy]) -> None:
        """Gather rows and copy them to pinned memory that `host_memory` gave (see `reading`)."""
        if mark is not None:
            mark.wait()
        lane = self._lane()
        try:
            for copy in copies:
                pool = self._pools[copy.component][copy.tensor]
                if pool is None:
                    self._host.copy_out(mark, [copy])
                else:
                    self._copy_out(lane, pool, checked(pool, copy.rows), copy.out)
        finally:
            lane.event().wait()  # whoever has the memory next may not find our copies still going on

    def _copy_out(self, lane: Lane, pool: Pool, index: Rows, out: memoryview) -> None:
        if len(out) != len(index) * pool.row_bytes:
            raise LocalProtocolError(f"{len(out)} bytes for {len(index)} rows of {pool.row_bytes}")
        found = long_runs(pool, index)
        if found is not None:
            _fetch_runs(lane, pool, index, found, out)
            return
        step = max(1, COPY_BYTES // pool.row_bytes)
        for at in range(0, len(index), step):
            part = index[at : at + step]
            into = out[at * pool.row_bytes : (at + len(part)) * pool.row_bytes]
            batch = self._batch(pool, part)
            lane.gather(pool, batch, into)
            self._ring.give_after(batch.slot, lane.event())

    def landing(self, component: int, tensor: int, rows: Sequence[int]) -> Landing:
        """Return a slot of the ring; raises as `reading`."""
        pool = self._pools[component][tensor]
        if pool is None:
            return self._host.landing(component, tensor, rows)
        return _SlotLanding(self, pool, checked(pool, rows))

    def settle(self) -> None:
        """Wait for the events of all that landed. Raises TransferError when the device failed."""
        self._ring.settle()

    def host_memory(self, size: int) -> memoryview:
        """Return pinned memory, all of it taken from the system at once.

        Raises ConfigError when the system gives none.
        """
        return self._device.pinned(size)

    # ---

    def _lane(self) -> Lane:
        """Return this thread's lane."""
        lane: Lane | None = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = self._device.lane()
        return lane

    def _batch(self, pool: Pool, index: Rows) -> Batch:
        """Return a slot for rows, their numbers written."""
        data_at = -(-len(index) * 8 // _ALIGN) * _ALIGN
        slot = self._ring.take(data_at + len(index) * pool.row_bytes)
        batch = Batch(slot, len(index), data_at)
        np.frombuffer(batch.index, np.int64)[:] = index
        return batch

    def _pull(self, lane: Lane, pool: Pool, index: Rows, batch: Batch) -> None:
        found = long_runs(pool, index)
        if found is None:
            lane.gather(pool, batch, batch.data)
        else:
            _fetch_runs(lane, pool, index, found, batch.data)

    def _push(self, pool: Pool, index: Rows, batch: Batch) -> None:
        """Queue a landed batch's way into the pool."""
        lane = self._lane()
        found = long_runs(pool, index)
        if found is None:
            lane.scatter(batch, pool)
        else:
            for a, b in found:
                first = int(index[a])
                data = batch.data[a * pool.row_bytes : b * pool.row_bytes]
                lane.put(data, pool, first, first + b - a)
        self._ring.give_after(batch.slot, lane.event())


def _fetch_runs(lane: Lane, pool: Pool, index: Rows, found: list[tuple[int, int]], out: memoryview) -> None:
    for a, b in found:
        first = int(index[a])
        lane.fetch(pool, first, first + b - a, out[a * pool.row_bytes : b * pool.row_bytes])


class _SlotLanding:
    """Rows received in a slot of the ring."""

    def __init__(self, memory: DeviceMemory, pool: Pool, index: Rows) -> None:
        self.views: list[memoryview] = []
        self._memory, self._pool, self._index = memory, pool, index
        self._batch: Batch | None = None
        if len(index):
            self._batch = memory._batch(pool, index)
            self.views.append(self._batch.data)

    def land(self) -> None:
        """Queue the rows' way into the pool (see PoolMemory.settle)."""
        batch, self._batch = self._batch, None
        if batch is not None:
            # when this fails the slot is not used again: the device may still read it
            self._memory._push(self._pool, self._index, batch)

    def drop(self) -> None:
        """Give the slot back."""
        batch, self._batch = self._batch, None
        if batch is not None:
            self._memory.ring.give(batch.slot)

    def __del__(self) -> None:
        # a connection that breaks in the middle of a frame leaves its landing behind
        batch = getattr(self, "_batch", None)
        if batch is not None:
            self._memory.ring.abandon(batch.slot)
