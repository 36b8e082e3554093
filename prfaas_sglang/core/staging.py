"""Who has which part of the staging memory: a first-fit allocator over one range of bytes. Pure.

Staging is host memory on the prefill side: KV is copied there when it is computed, so that the engine gets
its pages back without waiting for the link. A transfer that finds no room there is sent straight from the
pool instead, so running out is an answer, not an error.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

#: Every extent starts and ends at a multiple of this.
ALIGN = 4096


@dataclass(slots=True)
class Extents:
    """Free and taken ranges of `capacity` bytes."""

    capacity: int
    used: int = 0
    _free: list[tuple[int, int]] = field(default_factory=list)  # (offset, size), sorted, never adjacent
    _taken: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.capacity -= self.capacity % ALIGN
        if self.capacity > 0:
            self._free = [(0, self.capacity)]

    def reserve(self, size: int) -> int | None:
        """Return the offset of `size` contiguous bytes, None when there are none.

        Raises ValueError for a size below 1.
        """
        if size < 1:
            raise ValueError(f"size: {size}, at least 1")
        size = -(-size // ALIGN) * ALIGN
        for i, (offset, there) in enumerate(self._free):
            if there < size:
                continue
            if there == size:
                del self._free[i]
            else:
                self._free[i] = (offset + size, there - size)
            self._taken[offset] = size
            self.used += size
            return offset
        return None

    def free(self, offset: int) -> None:
        """Give the extent at `offset` back. Raises KeyError when none starts there."""
        size = self._taken.pop(offset)
        self.used -= size
        i = bisect.bisect(self._free, (offset, 0))
        if i < len(self._free) and offset + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == offset:
            i -= 1
            before, there = self._free.pop(i)
            offset, size = before, there + size
        self._free.insert(i, (offset, size))
