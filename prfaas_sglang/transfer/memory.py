"""Pool memory as rows: the only place that turns (component, tensor, row) into bytes.

`PoolMemory` is what the transfer shells need of a pool; `RowMemory` is the one for pools in host memory,
where rows go straight between the pool and a socket. Every access is bounds-checked here once more, whatever
the session said.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_service.core.errors import LocalProtocolError
from prfaas_sglang.core.layout import Layout


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Rows of one tensor and where their bytes go, in order."""

    component: int
    tensor: int
    rows: Sequence[int]
    out: memoryview


class Landing(Protocol):
    """Where the bytes of some rows are received.

    Fill `views` in order, then call `land` (the rows get them) or `drop` (nothing is written).
    """

    views: list[memoryview]

    def land(self) -> None:
        """Give the rows their bytes; may only queue it (see PoolMemory.settle)."""

    def drop(self) -> None:
        """Give the place back without it."""


def scatter(content: memoryview, views: Sequence[memoryview]) -> None:
    """Copy `content` into views of the same length in all, in order; other threads run meanwhile."""
    for view in views:
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(content[: len(view)], np.uint8))
        content = content[len(view) :]


class PoolMemory(Protocol):
    """A worker's pools, as rows. Thread-safe. Raises LocalProtocolError for a row outside a pool."""

    def mark(self) -> object:
        """Return a mark of the work that the engine has queued so far; called on the engine's thread.

        Rows may be read when that work is done; what reads them takes the mark.
        """

    def reading(
        self, mark: object, component: int, tensor: int, rows: Sequence[int]
    ) -> AbstractContextManager[list[memoryview]]:
        """Give the bytes of `rows`, in order, for as long as the context is open."""

    def copy_out(self, mark: object, copies: Sequence[RowCopy]) -> None:
        """Copy rows to host memory; everything is there on return."""

    def landing(self, component: int, tensor: int, rows: Sequence[int]) -> Landing:
        """Return a place for the bytes of `rows`."""

    def settle(self) -> None:
        """Block until everything that landed before is in the pools."""

    def host_memory(self, size: int) -> memoryview:
        """Return `size` bytes of host memory that `copy_out` writes fast; untouched pages cost nothing."""


@dataclass(slots=True)
class _InPlace:
    """Rows received where they stay."""

    views: list[memoryview]

    def land(self) -> None:
        """Nothing to do: the bytes are there."""

    def drop(self) -> None:
        """Nothing to give back."""


class RowMemory:
    """Pools in host memory (see PoolMemory).

    Args:
        layout: row sizes per component and tensor.
        buffers: one buffer per tensor, per component, in the layout's order; each a whole number of rows.
            The caller keeps the memory alive.

    Raises LocalProtocolError when the buffers do not fit the layout.
    """

    def __init__(self, layout: Layout, buffers: Sequence[Sequence[memoryview]]) -> None:
        if len(buffers) != len(layout.components):
            raise LocalProtocolError(f"{len(buffers)} components of {len(layout.components)}")
        self._tensors: list[list[tuple[memoryview, int, int]]] = []
        for component, tensors in zip(layout.components, buffers, strict=True):
            if len(tensors) != len(component.row_bytes):
                raise LocalProtocolError(
                    f"{component.kind}: {len(tensors)} buffers of {len(component.row_bytes)}"
                )
            entries = []
            for view, row_bytes in zip(tensors, component.row_bytes, strict=True):
                flat = view.cast("B") if view.format != "B" or view.ndim != 1 else view
                entries.append((flat, row_bytes, len(flat) // row_bytes))
            self._tensors.append(entries)

    def views(self, component: int, tensor: int, rows: Sequence[int]) -> list[memoryview]:
        """Return the bytes of `rows`, in order, neighbouring rows joined into one view.

        Raises LocalProtocolError for a row outside the pool.
        """
        memory, row_bytes, capacity = self._tensors[component][tensor]
        found: list[memoryview] = []
        start = end = -1
        for row in rows:
            if not 0 <= row < capacity:
                raise LocalProtocolError(f"row {row} outside a pool of {capacity}", reason="row")
            if row == end:
                end += 1
                continue
            if start >= 0:
                found.append(memory[start * row_bytes : end * row_bytes])
            start, end = row, row + 1
        if start >= 0:
            found.append(memory[start * row_bytes : end * row_bytes])
        return found

    # --- PoolMemory ---

    def mark(self) -> None:
        """The CPU has done what it was told by the time it says so."""

    def reading(
        self, mark: object, component: int, tensor: int, rows: Sequence[int]
    ) -> AbstractContextManager[list[memoryview]]:
        """Give the rows' own memory."""
        return nullcontext(self.views(component, tensor, rows))

    def copy_out(self, mark: object, copies: Sequence[RowCopy]) -> None:
        """Copy rows one run of neighbours at a time; numpy lets other threads run meanwhile."""
        for copy in copies:
            at = 0
            for view in self.views(copy.component, copy.tensor, copy.rows):
                np.copyto(
                    np.frombuffer(copy.out[at : at + len(view)], np.uint8), np.frombuffer(view, np.uint8)
                )
                at += len(view)

    def landing(self, component: int, tensor: int, rows: Sequence[int]) -> Landing:
        """Return the rows' own memory."""
        return _InPlace(self.views(component, tensor, rows))

    def settle(self) -> None:
        """Nothing is ever queued."""

    def host_memory(self, size: int) -> memoryview:
        """Return anonymous memory, in huge pages where the system has them (its first use costs far less)."""
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(memory)
