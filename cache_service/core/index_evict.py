"""How the prefix index keeps its budget; who goes first is said in index_lru.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cache_service.core.ids import BlockHash
from cache_service.core.index_lru import Uses
from cache_service.core.index_search import bits

if TYPE_CHECKING:
    from cache_service.core.index import PrefixIndex


def evict_to_budget(index: PrefixIndex, uses: Uses) -> None:
    """Forget blocks until the estimate is within the budget."""
    while index.bytes_estimate > index._budget_bytes:
        if evict_next(index, uses) is None:
            return


def evict_next(index: PrefixIndex, uses: Uses) -> BlockHash | None:
    """Forget the block that is next in line, for all holders, and return it; None when there is none."""
    block = uses.first()
    if block is None:
        # States of blocks that nobody holds, and cycles of lies: nothing that a match could use.
        block = next((b for table in (*index._active, *index._group_tables()) for b in table), None)
    if block is not None:
        _evict(index, block)
        uses.settle()
        index._evicted += 1
        index._revision += 1
    return block


def _evict(index: PrefixIndex, block: BlockHash) -> None:
    """Take a block and its group entries from everyone."""
    everyone = index._holders(block)
    for held in index._active:
        for slot in bits(held.pop(block, 0)):
            index._entries[slot] -= 1
    for held in index._group_tables():
        for slot in bits(held.pop(block, 0)):
            index._group_entries[slot] -= 1
            index._grouped[slot].discard(block)
    for slot in bits(everyone):
        index._lose(slot, block)
        index._count(slot, 0)
    if everyone:
        index._forget(block)
    index._settle()
