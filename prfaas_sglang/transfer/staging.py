"""Host memory that takes KV off the pool, and where in it the rows of a part lie."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from itertools import accumulate

from prfaas_sglang.core.layout import KV, Layout
from prfaas_sglang.core.session import Part
from prfaas_sglang.core.staging import Extents
from prfaas_sglang.transfer.memory import PoolMemory, RowCopy

#: Tensors of a part are handed on in groups of about this many bytes, so that sending begins early.
GROUP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """Staging memory of a transfer's KV: `pages` pages from prompt page `first_page`, tensor by tensor."""

    offset: int
    first_page: int
    pages: int


class Staging:
    """Staging memory of one prefill rank. Thread-safe.

    Args:
        memory: the pools to copy from.
        capacity_bytes: bytes of host memory, 0 for none; taken from the system when first written.
    """

    def __init__(self, memory: PoolMemory, capacity_bytes: int) -> None:
        self._memory = memory
        self._extents = Extents(capacity_bytes)
        self._slab = memory.host_memory(self._extents.capacity) if self._extents.capacity else memoryview(b"")
        self._lock = threading.Lock()

    @property
    def capacity_bytes(self) -> int:
        """Bytes in all."""
        return self._extents.capacity

    @property
    def used_bytes(self) -> int:
        """Bytes reserved now."""
        with self._lock:
            return self._extents.used

    def reserve(self, size: int) -> int | None:
        """Return the offset of `size` bytes, None when there is no room."""
        with self._lock:
            return self._extents.reserve(size)

    def free(self, offset: int) -> None:
        """Give an extent back."""
        with self._lock:
            self._extents.free(offset)

    def view(self, offset: int, size: int) -> memoryview:
        """Return staged bytes."""
        return self._slab[offset : offset + size]

    def copy(self, layout: Layout, part: Part) -> None:
        """Copy a part's rows to where `part.staged` says; they are there on return."""
        assert part.staged is not None
        row_bytes = layout.components[part.component].row_bytes
        self._memory.copy_out(
            part.mark,
            [
                RowCopy(part.component, tensor, part.rows, self.view(at, row_bytes[tensor] * len(part.rows)))
                for tensor, at in zip(part.tensors, part.staged, strict=True)
            ],
        )


def place_kv(layout: Layout, part: Part, extent: Extent) -> Part | None:
    """Return a KV part with its place in the extent.

    Pages before the extent's first are left out (decode holds them); None when nothing is left.
    """
    skip = min(max(0, extent.first_page - part.first), len(part.rows))
    if skip == len(part.rows):
        return None
    row_bytes = layout.components[KV].row_bytes
    first = part.first + skip
    before = [0, *accumulate(row_bytes)]  # bytes of a page in the tensors before each
    staged = tuple(
        extent.offset + before[tensor] * extent.pages + (first - extent.first_page) * row_bytes[tensor]
        for tensor in part.tensors
    )
    return replace(part, first=first, rows=part.rows[skip:], staged=staged)


def place_rows(layout: Layout, parts: list[Part], offset: int) -> list[Part]:
    """Return parts of whole tensors with their places, one after the other from `offset`."""
    placed = []
    for part in parts:
        row_bytes = layout.components[part.component].row_bytes
        staged = []
        for tensor in part.tensors:
            staged.append(offset)
            offset += row_bytes[tensor] * len(part.rows)
        placed.append(replace(part, staged=tuple(staged)))
    return placed


def part_bytes(layout: Layout, part: Part) -> int:
    """Return the row bytes of a part."""
    row_bytes = layout.components[part.component].row_bytes
    return sum(row_bytes[tensor] for tensor in part.tensors) * len(part.rows)


def groups(layout: Layout, part: Part) -> list[Part]:
    """Split a staged part by tensors into groups of about GROUP_BYTES."""
    assert part.staged is not None
    row_bytes, found, start, size = layout.components[part.component].row_bytes, [], 0, 0
    for i, tensor in enumerate(part.tensors):
        size += row_bytes[tensor] * len(part.rows)
        if size >= GROUP_BYTES or i + 1 == len(part.tensors):
            span = slice(start, i + 1)
            found.append(replace(part, tensors=part.tensors[span], staged=part.staged[span]))
            start, size = i + 1, 0
    return found
