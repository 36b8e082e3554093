"""Pool memory as rows: the only place that turns (component, tensor, row) into bytes.

Knows nothing of torch: the engine hands in one writable buffer per tensor. Every access is bounds-checked
here once more, whatever the session said.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache_service.core.errors import LocalProtocolError
from prfaas_sglang.core.layout import Layout


class RowMemory:
    """Views of rows of a worker's pools.

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
