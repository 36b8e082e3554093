"""Events are refused whole, with the field named, when they cannot be true."""

from __future__ import annotations

import pytest

from cache_service.core import events
from cache_service.core.errors import RemoteProtocolError
from cache_service.core.events import BlocksRemoved, BlocksStored, Tier


def test_stored() -> None:
    """SGLang's values become a BlocksStored in the right tier."""
    event = events.stored([1, -2], 7, medium="CPU_PINNED", block_tokens=64, page_size=64)
    assert event == BlocksStored((1, -2), 7, Tier.HOST)
    assert events.stored([1], None, medium=None, block_tokens=1, page_size=1).tier is Tier.GPU
    assert events.removed([3], medium="DISK") == BlocksRemoved((3,), Tier.DISK)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hashes": []}, "stored.hashes"),
        ({"hashes": [1, 1]}, "twice"),
        ({"hashes": [2**63]}, "64-bit"),
        ({"hashes": [-(2**63) - 1]}, "64-bit"),
        ({"parent": 2**63}, "stored.parent"),
        ({"hashes": [5, 6], "parent": 6}, "cycle"),
        ({"medium": "TAPE"}, "medium"),
        ({"block_tokens": 32}, "block_size"),
    ],
)
def test_refused(changes: dict[str, object], named: str) -> None:
    """Every wrong value is refused and named."""
    values: dict[str, object] = {"hashes": [5], "parent": 1, "medium": "GPU", "block_tokens": 64}
    values.update(changes)
    with pytest.raises(RemoteProtocolError, match=named):
        events.stored(
            values["hashes"],  # type: ignore[arg-type]
            values["parent"],  # type: ignore[arg-type]
            medium=values["medium"],  # type: ignore[arg-type]
            block_tokens=values["block_tokens"],  # type: ignore[arg-type]
            page_size=64,
        )


def test_event_size_is_bounded() -> None:
    """A run longer than any prompt is refused before it reaches the index."""
    with pytest.raises(RemoteProtocolError, match="at most"):
        events.removed(range(events.MAX_BLOCKS_PER_EVENT + 1), medium=None)
