"""Every invariant of the prefix index, said as assertions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cache_service.core.ids import BlockHash
from cache_service.core.index_types import Needs

if TYPE_CHECKING:
    from cache_service.core.index import PrefixIndex


def check(index: PrefixIndex) -> None:
    """Raise AssertionError unless every invariant holds; O(entries x holders)."""
    _check_blocks(index)
    for slot in range(len(index._sources)):
        _check_holder(index, slot)
    members = 0
    for needs, mask in index._needs.items():
        assert mask
        assert needs != Needs()
        assert not mask & members
        members |= mask
    ranks = [index._rank[index._slot[source]] for source in sorted(index._slot)]
    assert ranks == sorted(set(ranks)), "ranks are not the order of names"
    if index._uses is not None:
        leaves = {block for block in index._chains.parent if index._chains.is_leaf(block)}
        assert index._uses.unplaced or leaves <= index._uses.blocks(), "a leaf that eviction would not find"
        assert index._uses.blocks() <= index._chains.parent.keys(), "a place of a block that nobody holds"
        assert index.bytes_estimate <= index._budget_bytes, "over the budget"


def _check_blocks(index: PrefixIndex) -> None:
    held_anywhere: set[BlockHash] = set().union(*index._tiers.values())
    assert held_anywhere == set(index._chains.parent), "a parent entry for a block that nobody holds, or none"
    assert index._active == tuple(held for held in index._tiers.values() if held)
    inverse: dict[BlockHash, set[BlockHash]] = {}
    for block, parent in index._chains.parent.items():
        assert parent != block
        if parent is not None:
            inverse.setdefault(parent, set()).add(block)
    children = {p: c if isinstance(c, set) else {c} for p, c in index._chains.children.items()}
    assert children == inverse, "children are not the inverse of parents"
    assert all(len(c) > 1 for c in index._chains.children.values() if isinstance(c, set))
    assert all(mask > 0 for held in (*index._active, *index._group_tables()) for mask in held.values()), (
        "an empty bitset"
    )


def _check_holder(index: PrefixIndex, slot: int) -> None:
    bit = 1 << slot
    source = index._sources[slot]
    mine = {block for block in index._chains.parent if index._holders(block) & bit}
    entries = sum(1 for held in index._tiers.values() for mask in held.values() if mask & bit)
    grouped = [block for held in index._group_tables() for block, mask in held.items() if mask & bit]
    tops = {block for block in mine if index._chains.parent[block] not in mine}
    assert index._blocks[slot] == len(mine), f"{source}: {len(mine)} blocks, not {index._blocks[slot]}"
    assert index._entries[slot] == entries, f"{source}: {entries} entries, not {index._entries[slot]}"
    assert index._group_entries[slot] == len(grouped)
    assert index._grouped[slot] == set(grouped)
    assert index._tops[slot] == tops, f"{source}: the tops are {tops}, not {index._tops[slot]}"
    assert index._orphans[slot] == sum(1 for block in tops if index._chains.parent[block] is not None)
    assert bool(index._with_orphans & bit) == bool(index._orphans[slot])
    if source is None:
        assert not entries
        assert not grouped
        assert not (index._quarantined | sum(index._needs.values())) & bit
    else:
        assert index._slot[source] == slot
