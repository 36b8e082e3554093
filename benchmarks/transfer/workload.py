"""What is moved in a round: a flat pool of rows, random bytes from a seed, pages in shuffled order.

Every kind of end (ours and the peers) moves the same rows from the same places to the same places. Only the
standard library and numpy: peers run in a virtual environment of their own.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SEED = 7


@dataclass(frozen=True)
class Workload:
    """Pools of `pages` pages; a page is one row of `row_bytes` in each of `tensors` tensors."""

    row_bytes: int
    pages: int
    tensors: int = 8

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all tensors."""
        return self.row_bytes * self.tensors

    @property
    def bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.page_bytes * self.pages

    def offset(self, tensor: int, page: int) -> int:
        """Where a row lies in the flat pool."""
        return (tensor * self.pages + page) * self.row_bytes

    def source(self) -> list[int]:
        """The sender's pages in prompt order."""
        return _shuffled(self.pages, SEED)

    def target(self) -> list[int]:
        """The receiver's pages in prompt order."""
        return _shuffled(self.pages, SEED + 1)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; the constructor takes them back."""
        return asdict(self)

    def random_pool(self) -> np.ndarray:
        """Return the sender's pool, uint8 [bytes]."""
        return np.frombuffer(np.random.default_rng(SEED).bytes(self.bytes), np.uint8)


def of_bytes(total: int, row_bytes: int, tensors: int = 8) -> Workload:
    """Return the workload of about `total` bytes in rows of `row_bytes`."""
    return Workload(row_bytes, max(1, total // (row_bytes * tensors)), tensors)


def new_pool(workload: Workload, *, filled: bool, fd: int = -1) -> memoryview:
    """Return a writable flat pool, of random bytes or of touched zeros; `fd` is shared memory to map."""
    pool = memoryview(mmap.mmap(fd, workload.bytes))
    view = np.frombuffer(pool, np.uint8)
    view[:] = workload.random_pool() if filled else 0
    return pool


def arrived_rows(workload: Workload, pool: memoryview, source: Sequence[int], target: Sequence[int]) -> int:
    """Count the rows that hold their bytes, of the pages `target` that were sent from `source`."""
    there = np.frombuffer(pool, np.uint8).reshape(workload.tensors, workload.pages, workload.row_bytes)
    here = workload.random_pool().reshape(there.shape)
    return sum(
        int(np.array_equal(here[tensor, a], there[tensor, b]))
        for tensor in range(workload.tensors)
        for a, b in zip(source, target, strict=True)
    )


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
