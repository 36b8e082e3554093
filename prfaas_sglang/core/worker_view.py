"""What one worker holds, followed event by event, so that it can be said in full at any time.

Decides which group events (states, windows) follow from slots being filled and freed: the engine frees slots,
never names. Nothing here knows the engine, threads or the wire. The caller owes changes in the engine's
order; within a step, block events come first.

The outside fact: a reset of the engine's tree is in the block events of the same step as AllCleared, and no
slot that was filled before it is mentioned again (the caller drops those).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cache_service.core.events import (
    MAX_BLOCKS_PER_EVENT,
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.ids import BlockHash


@dataclass(frozen=True, slots=True)
class Filled:
    """`slots[i]` now holds `group` of block `hashes[i]`. A slot is a number that is freed as a whole."""

    group: Group
    hashes: Sequence[BlockHash]
    slots: Sequence[int]


@dataclass(frozen=True, slots=True)
class Freed:
    """`slots` are empty again; slots that never held anything of the group are ignored."""

    group: Group
    slots: Sequence[int]


Change = Filled | Freed


class WorkerView:
    """One worker's content. Not thread-safe.

    A step runs beside the engine's scheduler and takes the interpreter from it, so blocks are kept in plain
    dicts (some 0.1 us a block) and chains are only looked for in a dump.
    """

    def __init__(self) -> None:
        self._parent_of: dict[Tier, dict[BlockHash, BlockHash | None]] = {tier: {} for tier in Tier}
        self._block_at: dict[Group, dict[int, BlockHash]] = {group: {} for group in Group}
        self._slot_of: dict[Group, dict[BlockHash, int]] = {group: {} for group in Group}

    def step(self, blocks: Iterable[Event], changes: Iterable[Change]) -> list[Event]:
        """Take what happened since the last step; return the events that say it, group events last."""
        said: list[Event] = []
        for event in blocks:
            self._follow(event)
            said.append(event)
        held_before: dict[tuple[Group, BlockHash], bool] = {}
        for change in changes:
            if isinstance(change, Filled):
                for block, slot in zip(change.hashes, change.slots, strict=True):
                    self._fill(change.group, block, slot, held_before)
            else:
                for slot in change.slots:
                    self._free(change.group, slot, held_before)
        return said + self._net(held_before)

    def dump(self) -> Iterator[BlocksStored | GroupStored]:
        """Yield events that rebuild the content from nothing; no step may come before the last one."""
        for tier, parent_of in self._parent_of.items():
            for run in _runs(parent_of):
                yield BlocksStored(run, parent_of[run[0]], tier)
        for group, slot_of in self._slot_of.items():
            held = tuple(slot_of)
            for start in range(0, len(held), MAX_BLOCKS_PER_EVENT):
                yield GroupStored(group, held[start : start + MAX_BLOCKS_PER_EVENT])

    def sizes(self) -> tuple[int, int]:
        """Return how many block entries and group entries are held."""
        return sum(map(len, self._parent_of.values())), sum(map(len, self._slot_of.values()))

    def _follow(self, event: Event) -> None:
        match event:
            case BlocksStored(hashes, parent, tier):
                self._parent_of[tier].update(zip(hashes, (parent, *hashes[:-1]), strict=True))
            case BlocksRemoved(hashes, tier):
                held = self._parent_of[tier]
                for block in hashes:
                    held.pop(block, None)
            case AllCleared():
                for table in self._parent_of.values():
                    table.clear()
                for group in Group:
                    self._block_at[group].clear()
                    self._slot_of[group].clear()

    def _fill(
        self, group: Group, block: BlockHash, slot: int, before: dict[tuple[Group, BlockHash], bool]
    ) -> None:
        self._free(group, slot, before)
        before.setdefault((group, block), block in self._slot_of[group])
        self._block_at[group][slot] = block
        # A block may move: freeing its former slot must not take it away.
        self._slot_of[group][block] = slot

    def _free(self, group: Group, slot: int, before: dict[tuple[Group, BlockHash], bool]) -> None:
        block = self._block_at[group].pop(slot, None)
        if block is None or self._slot_of[group].get(block) != slot:
            return
        before.setdefault((group, block), True)
        del self._slot_of[group][block]

    def _net(self, before: dict[tuple[Group, BlockHash], bool]) -> list[Event]:
        said: list[Event] = []
        for group in Group:
            held = self._slot_of[group]
            touched = {block: was for (of, block), was in before.items() if of is group}
            gone = tuple(block for block, was in touched.items() if was and block not in held)
            new = tuple(block for block, was in touched.items() if not was and block in held)
            if gone:
                said.append(GroupRemoved(group, gone))
            if new:
                said.append(GroupStored(group, new))
        return said


def _runs(parent_of: Mapping[BlockHash, BlockHash | None]) -> Iterator[tuple[BlockHash, ...]]:
    """Yield the blocks as chains, as long as nothing branches off. O(blocks)."""
    child_of: dict[BlockHash, BlockHash | None] = {}
    for block, parent in parent_of.items():
        if parent is not None:
            child_of[parent] = None if parent in child_of else block
    for block, parent in parent_of.items():
        if parent is not None and parent in parent_of and child_of[parent] is not None:
            continue  # inside its parent's run
        run = [block]
        child = child_of.get(block)
        while child is not None:
            run.append(child)
            child = child_of.get(child)
        for start in range(0, len(run), MAX_BLOCKS_PER_EVENT):
            yield tuple(run[start : start + MAX_BLOCKS_PER_EVENT])
