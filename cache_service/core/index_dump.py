"""The index as events: its radix tree, node by node.

Decides how little says everything: a node is a maximal path of blocks with equal holders in one tier, said
once per holder; a group's blocks are said per holder, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cache_service.core.events import MAX_BLOCKS_PER_EVENT, BlocksStored, GroupStored
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.index_search import Held

if TYPE_CHECKING:
    from cache_service.core.index import PrefixIndex


def dump(index: PrefixIndex) -> Iterator[tuple[SourceId, BlocksStored | GroupStored]]:
    """Yield what `PrefixIndex.dump` says."""
    for tier, held in index._tiers.items():
        for run in runs(index, held):
            event = BlocksStored(tuple(run), index._chains.parent[run[0]], tier)
            for source in _holders(index, held[run[0]]):
                yield source, event
    for group, tiers in index._groups.items():
        for tier, held in tiers.items():
            by_holders: dict[int, list[BlockHash]] = {}
            for block, mask in held.items():
                by_holders.setdefault(mask, []).append(block)
            for mask, blocks in by_holders.items():
                for start in range(0, len(blocks), MAX_BLOCKS_PER_EVENT):
                    part = GroupStored(group, tuple(blocks[start : start + MAX_BLOCKS_PER_EVENT]), tier)
                    for source in _holders(index, mask):
                        yield source, part


def runs(index: PrefixIndex, held: Held) -> Iterator[list[BlockHash]]:
    """Yield the radix nodes of one tier. O(blocks in it)."""
    reached = 0
    found = []
    for run in _runs(index, held):
        reached += len(run)
        found.append(run)
    yield from found
    if reached != len(held):
        # Only lies make a cycle of parents, which no run reaches: its blocks one by one.
        known = {block for run in found for block in run}
        yield from ([block] for block in held if block not in known)


def _runs(index: PrefixIndex, held: Held) -> Iterator[list[BlockHash]]:
    for block, mask in held.items():
        parent = index._chains.parent[block]
        if parent is not None and held.get(parent) == mask and index._chains.children[parent] == block:
            continue  # inside its parent's run
        run = [block]
        child = index._chains.children.get(block)
        while child is not None and not isinstance(child, set) and held.get(child) == mask:
            run.append(child)
            child = index._chains.children.get(child)
        for start in range(0, len(run), MAX_BLOCKS_PER_EVENT):
            yield run[start : start + MAX_BLOCKS_PER_EVENT]


def _holders(index: PrefixIndex, mask: int) -> list[SourceId]:
    return [source for slot, source in enumerate(index._sources) if source is not None and mask >> slot & 1]
