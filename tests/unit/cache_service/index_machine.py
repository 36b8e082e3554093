"""One hypothesis machine for every index: a brute-force model, and all implementations against it at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Event,
    Group,
    GroupRemoved,
    GroupStored,
    Tier,
)
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import Applied, IndexCounts, PrefixIndex

BLOCKS = 30
SOURCES = [SourceId(WorkerId(f"w{i}"), i % 2) for i in range(4)]

any_source = st.sampled_from(SOURCES)
any_block = st.integers(0, BLOCKS - 1)
any_tier = st.sampled_from([Tier.GPU, Tier.GPU, Tier.HOST, Tier.DISK])
any_group = st.sampled_from(list(Group))
some_blocks = st.sets(any_block, min_size=1, max_size=6)


def chain(*values: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(value) for value in values)


class Holder:
    """One source's truth: sets, said slowly. Group None is the full-attention blocks."""

    def __init__(self) -> None:
        self.sets: dict[tuple[Group | None, Tier], set[int]] = {
            (group, tier): set() for group in (None, *Group) for tier in Tier
        }
        self.quarantined = False
        self.needs_state = False
        self.window_blocks = 0

    def has(self, block: int, group: Group | None = None) -> bool:
        return any(block in self.sets[group, tier] for tier in Tier)

    def matched(self, path: list[int]) -> int:
        return next((i for i, block in enumerate(path) if not self.has(block)), len(path))

    def usable(self, path: list[int], limit: int) -> int:
        return next(
            (
                b
                for b in range(min(self.matched(path), limit), 0, -1)
                if (not self.needs_state or self.has(path[b - 1], Group.STATE))
                and all(self.has(path[i], Group.SWA) for i in range(max(0, b - self.window_blocks), b))
            ),
            0,
        )

    def entries(self, *groups: Group | None) -> int:
        return sum(len(blocks) for (group, _), blocks in self.sets.items() if group in groups)


class IndexMachine(RuleBasedStateMachine):
    """Random stores (parents unknown at times), states, windows, holes, clears, restarts, quarantine."""

    factories: ClassVar[tuple[Callable[[], Any], ...]] = (PrefixIndex,)

    @initialize(seed=st.integers(0, 2**32))
    def build(self, seed: int) -> None:
        rng = random.Random(seed)
        self.parents: list[int | None] = [None] * 2
        self.parents += [rng.choice([i - 1, i - 1, rng.randrange(i)]) for i in range(2, BLOCKS)]
        self.indexes = [make() for make in self.factories]
        self.model: dict[SourceId, Holder] = {}

    def path(self, block: int | None) -> list[int]:
        nodes: list[int] = []
        while block is not None:
            nodes.append(block)
            block = self.parents[block]
        return nodes[::-1]

    def known(self, source: SourceId) -> Holder:
        for index in self.indexes:
            index.add(source)
        return self.model.setdefault(source, Holder())

    def apply(self, source: SourceId, event: Event, expected: Applied) -> None:
        for index in self.indexes:
            assert index.apply(source, event) == expected

    def put(self, source: SourceId, event: BlocksStored | GroupStored, group: Group | None) -> None:
        held = self.known(source).sets[group, event.tier]
        fresh = len(set(event.hashes) - held)
        self.apply(source, event, Applied(stored=fresh, unchanged=len(event.hashes) - fresh))
        held.update(event.hashes)

    def take(self, source: SourceId, event: BlocksRemoved | GroupRemoved, group: Group | None) -> None:
        held = self.known(source).sets[group, event.tier]
        gone = len(held & set(event.hashes))
        self.apply(source, event, Applied(removed=gone, unchanged=len(event.hashes) - gone))
        held.difference_update(event.hashes)

    @rule(source=any_source, leaf=any_block, length=st.integers(1, 12), tier=any_tier)
    def store(self, source: SourceId, leaf: int, length: int, tier: Tier) -> None:
        run = self.path(leaf)[-length:]
        parent = self.parents[run[0]]
        self.put(source, BlocksStored(chain(*run), None if parent is None else BlockHash(parent), tier), None)

    @rule(source=any_source, blocks=some_blocks, tier=any_tier)
    def remove(self, source: SourceId, blocks: set[int], tier: Tier) -> None:
        self.take(source, BlocksRemoved(chain(*blocks), tier), None)

    @rule(source=any_source, group=any_group, blocks=some_blocks, tier=any_tier)
    def store_group(self, source: SourceId, group: Group, blocks: set[int], tier: Tier) -> None:
        self.put(source, GroupStored(group, chain(*blocks), tier), group)

    @rule(source=any_source, leaf=any_block, length=st.integers(1, 12), group=any_group)
    def store_group_path(self, source: SourceId, leaf: int, length: int, group: Group) -> None:
        """Windows and states come in runs."""
        self.put(source, GroupStored(group, chain(*self.path(leaf)[-length:])), group)

    @rule(source=any_source, group=any_group, blocks=some_blocks, tier=any_tier)
    def remove_group(self, source: SourceId, group: Group, blocks: set[int], tier: Tier) -> None:
        self.take(source, GroupRemoved(group, chain(*blocks), tier), group)

    @rule(source=any_source, needs_state=st.booleans(), window_blocks=st.sampled_from([0, 0, 1, 2, 4, 40]))
    def declare(self, source: SourceId, needs_state: bool, window_blocks: int) -> None:
        holder = self.known(source)
        holder.needs_state, holder.window_blocks = needs_state, window_blocks
        for index in self.indexes:
            index.declare(source, needs_state, window_blocks)

    @rule(source=any_source)
    def clear(self, source: SourceId) -> None:
        holder = self.known(source)
        self.apply(source, AllCleared(), Applied(removed=holder.entries(None, *Group)))
        for blocks in holder.sets.values():
            blocks.clear()

    @rule(source=any_source, back=st.booleans())
    def drop(self, source: SourceId, back: bool) -> None:
        """A worker goes, and may come back under the same name with nothing."""
        entries = self.known(source).entries(None, *Group)
        for index in self.indexes:
            assert index.drop(source) == entries
        del self.model[source]
        if back:
            self.known(source)

    @rule(source=any_source, on=st.booleans())
    def quarantine(self, source: SourceId, on: bool) -> None:
        self.known(source).quarantined = on
        for index in self.indexes:
            (index.quarantine if on else index.restore)(source)

    @rule(leaf=any_block, beyond=st.integers(0, 3), limit=st.none() | st.integers(0, 12))
    def match(self, leaf: int, beyond: int, limit: int | None) -> None:
        path = self.path(leaf) + [1000 + i for i in range(beyond)]
        at_most = len(path) if limit is None else limit
        expected = [
            (source, holder.matched(path), holder.usable(path, at_most))
            for source, holder in self.model.items()
            if holder.matched(path) and not holder.quarantined
        ]
        expected.sort(key=lambda match: (-match[1], match[0]))
        for index in self.indexes:
            assert index.match(chain(*path), limit) == expected

    @precondition(lambda self: hasattr(self, "indexes"))
    @invariant()
    def consistent(self) -> None:
        for index in self.indexes:
            index.check()
            counts = index.counts()
            assert counts.entries == sum(holder.entries(None) for holder in self.model.values())
            assert counts.group_entries == sum(holder.entries(*Group) for holder in self.model.values())
            assert counts.holders == len(self.model)
            assert counts == self.indexes[0].counts()
            assert index.nodes() == self.indexes[0].nodes()
            assert index.revision == self.indexes[0].revision

    @rule()
    def rebuild_from_dump(self) -> None:
        """A dump in an empty index, of any kind, gives an index that holds the same."""
        for index in self.indexes:
            for make in self.factories:
                copy = make()
                for source in index.sources():
                    copy.add(source)
                for source, event in index.dump():
                    assert copy.apply(source, event) == Applied(stored=len(event.hashes))
                copy.check()
                assert copy.counts() == index.counts()
                assert copy.nodes() == index.nodes()

    @rule(source=any_source, blocks=some_blocks)
    def copy(self, source: SourceId, blocks: set[int]) -> None:
        """A copy is whole, and what is done to it does not reach the original."""
        for index in self.indexes:
            copy = index.copy()
            copy.check()
            assert sorted(map(repr, copy.dump())) == sorted(map(repr, index.dump()))
            copy.add(source)
            copy.apply(source, BlocksRemoved(chain(*blocks)))
            for block in blocks:
                parent = self.parents[block]
                copy.apply(source, BlocksStored(chain(block), None if parent is None else BlockHash(parent)))
                copy.apply(source, GroupStored(Group.STATE, chain(block)))
            copy.check()

    def teardown(self) -> None:
        """After churn nothing is left behind."""
        for index in getattr(self, "indexes", ()):
            for source in index.sources():
                index.drop(source)
            index.check()
            assert index.counts() == IndexCounts(0, 0, 0, 0)
            assert index.nodes() == 0


class BudgetMachine(RuleBasedStateMachine):
    """An index with a budget: bounded, consistent, claims only what was stored, all kinds alike."""

    factories: ClassVar[tuple[Callable[[], Any], ...]] = (lambda: PrefixIndex(budget_bytes=6000),)

    def __init__(self) -> None:
        super().__init__()
        self.indexes = [make() for make in self.factories]
        self.said: dict[SourceId, set[int]] = {source: set() for source in SOURCES}
        for index in self.indexes:
            for source in SOURCES:
                index.add(source)

    def path(self, leaf: int, length: int) -> tuple[BlockHash, ...]:
        """Chains of 10 below one another: 100 a, 100 b, ..."""
        return chain(*range(leaf * 100, leaf * 100 + length))

    @rule(source=any_source, leaf=st.integers(0, 9), length=st.integers(1, 10))
    def store(self, source: SourceId, leaf: int, length: int) -> None:
        for index in self.indexes:
            index.apply(source, BlocksStored(self.path(leaf, length), None))
        self.said[source].update(self.path(leaf, length))

    @rule(source=any_source, leaf=st.integers(0, 9), length=st.integers(1, 10))
    def store_state(self, source: SourceId, leaf: int, length: int) -> None:
        for index in self.indexes:
            index.apply(source, GroupStored(Group.STATE, self.path(leaf, length)[-2:]))

    @rule(source=any_source, leaf=st.integers(0, 9), length=st.integers(1, 10))
    def remove(self, source: SourceId, leaf: int, length: int) -> None:
        for index in self.indexes:
            index.apply(source, BlocksRemoved(self.path(leaf, 10)[length - 1 :]))

    @rule(source=any_source)
    def clear(self, source: SourceId) -> None:
        for index in self.indexes:
            index.clear(source)

    @rule(leaf=st.integers(0, 9))
    def match(self, leaf: int) -> None:
        path = self.path(leaf, 10)
        answers = [index.match(path) for index in self.indexes]
        for source, matched, _usable in answers[0]:
            assert self.said[source].issuperset(path[:matched])

    @rule()
    def match_a_copy(self) -> None:
        for index in self.indexes:
            index.copy().check()

    @invariant()
    def consistent(self) -> None:
        for index in self.indexes:
            index.check()
