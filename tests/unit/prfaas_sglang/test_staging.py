"""The allocator of staging memory, against a map of every block."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.staging import ALIGN, Extents


@given(st.integers(0, 40), st.integers(0, 1 << 30))
def test_extents_never_overlap_and_nothing_is_lost(blocks: int, seed: int) -> None:
    """Against a list of blocks: first fit is found exactly when a run of free blocks is there."""
    rng = random.Random(seed)
    extents = Extents(blocks * ALIGN + rng.randrange(ALIGN))
    owner: list[int | None] = [None] * blocks
    taken: dict[int, int] = {}
    for _ in range(100):
        if taken and rng.random() < 0.45:
            offset = rng.choice(list(taken))
            for block in range(offset // ALIGN, offset // ALIGN + taken.pop(offset)):
                owner[block] = None
            extents.free(offset)
        else:
            size = rng.randint(1, 8 * ALIGN)
            need = -(-size // ALIGN)
            runs = [i for i in range(blocks - need + 1) if all(owner[j] is None for j in range(i, i + need))]
            offset_or_none = extents.reserve(size)
            assert offset_or_none == (runs[0] * ALIGN if runs else None)
            if offset_or_none is not None:
                taken[offset_or_none] = need
                for block in range(offset_or_none // ALIGN, offset_or_none // ALIGN + need):
                    owner[block] = offset_or_none
        assert extents.used == sum(o is not None for o in owner) * ALIGN
    for offset in list(taken):
        extents.free(offset)
    assert extents.used == 0
    if blocks:
        assert extents.reserve(blocks * ALIGN) == 0


def test_bad_calls_are_refused() -> None:
    """Nothing of size 0, nothing given back twice."""
    extents = Extents(ALIGN)
    with pytest.raises(ValueError, match="at least 1"):
        extents.reserve(0)
    offset = extents.reserve(1)
    assert offset == 0
    extents.free(offset)
    with pytest.raises(KeyError):
        extents.free(offset)
