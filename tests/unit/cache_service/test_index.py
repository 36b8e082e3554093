"""The prefix index against a brute-force model, and the cases that broke other people's indexes."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_service.core.errors import LocalProtocolError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Tier
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import Applied, IndexCounts, Match, PrefixIndex

SOURCES = [SourceId(WorkerId(f"w{i}"), i % 2) for i in range(4)]
A, B = SOURCES[:2]


def chain(*values: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(value) for value in values)


class Model:
    """The truth, said slowly: per source and tier a set of blocks."""

    def __init__(self) -> None:
        self.held: dict[SourceId, dict[Tier, set[int]]] = {}
        self.quarantined: set[SourceId] = set()

    def has(self, source: SourceId, block: int) -> bool:
        return any(block in blocks for blocks in self.held[source].values())

    def match(self, path: list[int]) -> dict[SourceId, int]:
        found = {}
        for source in self.held.keys() - self.quarantined:
            depth = 0
            while depth < len(path) and self.has(source, path[depth]):
                depth += 1
            if depth:
                found[source] = depth
        return found

    def entries(self) -> int:
        return sum(len(blocks) for tiers in self.held.values() for blocks in tiers.values())


class IndexMachine(RuleBasedStateMachine):
    """Random stores (parents unknown at times), removals with holes, clears, restarts, quarantine."""

    @initialize(seed=st.integers(0, 2**32))
    def build(self, seed: int) -> None:
        rng = random.Random(seed)
        self.parents: list[int | None] = [None] * 2
        self.parents += [rng.choice([i - 1, i - 1, rng.randrange(i)]) for i in range(2, 30)]
        self.index, self.model = PrefixIndex(), Model()

    def path(self, block: int | None) -> list[int]:
        nodes: list[int] = []
        while block is not None:
            nodes.append(block)
            block = self.parents[block]
        return nodes[::-1]

    def known(self, source: SourceId) -> dict[Tier, set[int]]:
        self.index.add(source)
        return self.model.held.setdefault(source, {tier: set() for tier in Tier})

    @rule(
        source=st.sampled_from(SOURCES),
        leaf=st.integers(0, 29),
        length=st.integers(1, 12),
        tier=st.sampled_from([Tier.GPU, Tier.GPU, Tier.HOST, Tier.DISK]),
    )
    def store(self, source: SourceId, leaf: int, length: int, tier: Tier) -> None:
        held = self.known(source)[tier]
        run = self.path(leaf)[-length:]
        applied = self.index.apply(source, BlocksStored(chain(*run), self.parents[run[0]], tier))
        fresh = len(set(run) - held)
        assert applied == Applied(stored=fresh, unchanged=len(run) - fresh)
        held.update(run)

    @rule(
        source=st.sampled_from(SOURCES),
        blocks=st.sets(st.integers(0, 29), min_size=1, max_size=6),
        tier=st.sampled_from([Tier.GPU, Tier.GPU, Tier.HOST, Tier.DISK]),
    )
    def remove(self, source: SourceId, blocks: set[int], tier: Tier) -> None:
        held = self.known(source)[tier]
        applied = self.index.apply(source, BlocksRemoved(chain(*blocks), tier))
        gone = len(blocks & held)
        assert applied == Applied(removed=gone, unchanged=len(blocks) - gone)
        held -= blocks

    @rule(source=st.sampled_from(SOURCES))
    def clear(self, source: SourceId) -> None:
        tiers = self.known(source)
        applied = self.index.apply(source, AllCleared())
        assert applied.removed == sum(len(blocks) for blocks in tiers.values())
        for blocks in tiers.values():
            blocks.clear()

    @rule(source=st.sampled_from(SOURCES), back=st.booleans())
    def drop(self, source: SourceId, back: bool) -> None:
        """A worker goes, and may come back under the same name with nothing."""
        self.known(source)
        self.index.drop(source)
        del self.model.held[source]
        self.model.quarantined.discard(source)
        if back:
            self.known(source)

    @rule(source=st.sampled_from(SOURCES), on=st.booleans())
    def quarantine(self, source: SourceId, on: bool) -> None:
        self.known(source)
        if on:
            self.index.quarantine(source)
            self.model.quarantined.add(source)
        else:
            self.index.restore(source)
            self.model.quarantined.discard(source)

    @rule(leaf=st.integers(0, 29), beyond=st.integers(0, 3))
    def match(self, leaf: int, beyond: int) -> None:
        path = self.path(leaf) + [1000 + i for i in range(beyond)]
        found = self.index.match(chain(*path))
        assert {match.source: match.matched for match in found} == self.model.match(path)
        assert found == sorted(found, key=lambda match: (-match.matched, match.source))

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def consistent(self) -> None:
        self.index.check()
        counts = self.index.counts()
        assert counts.entries == self.model.entries()
        assert counts.holders == len(self.model.held)

    @rule()
    def rebuild_from_dump(self) -> None:
        """A dump in an empty index gives an index that answers the same."""
        copy = PrefixIndex()
        for source in self.index.sources():
            copy.add(source)
        for source, event in self.index.dump():
            applied = copy.apply(source, event)
            assert applied == Applied(stored=len(event.hashes))
        copy.check()
        assert copy.counts() == self.index.counts()

    @rule(source=st.sampled_from(SOURCES), blocks=st.sets(st.integers(0, 29), min_size=1, max_size=6))
    def copy(self, source: SourceId, blocks: set[int]) -> None:
        """A copy is whole, and what is done to it does not reach the original."""
        copy = self.index.copy()
        copy.check()
        assert list(copy.dump()) == list(self.index.dump())
        copy.add(source)
        copy.apply(source, BlocksRemoved(chain(*blocks)))
        for block in blocks:
            copy.apply(source, BlocksStored(chain(block), self.parents[block]))
        copy.check()

    def teardown(self) -> None:
        """After churn nothing is left behind."""
        if hasattr(self, "index"):
            for source in self.index.sources():
                self.index.drop(source)
            self.index.check()
            assert self.index.counts() == IndexCounts(0, 0, 0, 0)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex()
    index.add(A)
    index.add(B)
    return index


def test_hole_ends_the_prefix(index: PrefixIndex) -> None:
    """A holder that lost an inner block matches up to it, and again in full when it is stored anew."""
    index.apply(A, BlocksStored(chain(1, 2, 3, 4, 5), None))
    index.apply(A, BlocksRemoved(chain(3)))
    assert index.match(chain(1, 2, 3, 4, 5)) == [Match(A, 2, 2)]
    assert index.counts().orphans == 1
    index.apply(A, BlocksStored(chain(3), BlockHash(2)))
    assert index.match(chain(1, 2, 3, 4, 5)) == [Match(A, 5, 5)]
    assert index.counts().orphans == 0


def test_lower_tier_keeps_a_block(index: PrefixIndex) -> None:
    """A block evicted from the device to the host is held until the host lets go of it too."""
    index.apply(A, BlocksStored(chain(1, 2), None))
    index.apply(A, BlocksStored(chain(1, 2), None, Tier.HOST))
    index.apply(A, BlocksRemoved(chain(2)))
    assert index.match(chain(1, 2)) == [Match(A, 2, 2)]
    index.apply(A, BlocksRemoved(chain(2), Tier.HOST))
    assert index.match(chain(1, 2)) == [Match(A, 1, 1)]


def test_unknown_parent(index: PrefixIndex) -> None:
    """Blocks whose parent was never seen are kept, and count as soon as the parent is there."""
    index.apply(A, BlocksStored(chain(3, 4), BlockHash(2)))
    assert index.match(chain(1, 2, 3, 4)) == []
    index.apply(A, BlocksStored(chain(1, 2), None))
    assert index.match(chain(1, 2, 3, 4)) == [Match(A, 4, 4)]


def test_another_parent_is_refused(index: PrefixIndex) -> None:
    """A hash covers its prefix: an event that hangs a known block elsewhere is refused from there on."""
    index.apply(A, BlocksStored(chain(1, 2), None))
    applied = index.apply(B, BlocksStored(chain(9, 2, 3), None))
    assert applied == Applied(stored=1, conflicts=2)
    assert index.match(chain(1, 2)) == [Match(A, 2, 2)]
    index.check()


def test_cycle_of_lies_is_dumped(index: PrefixIndex) -> None:
    """Two blocks that claim each other as parent do not hang or vanish from a dump."""
    index.apply(A, BlocksStored(chain(1), BlockHash(2)))
    index.apply(A, BlocksStored(chain(2), BlockHash(1)))
    index.check()
    assert {block for _, event in index.dump() for block in event.hashes} == {1, 2}


def test_order_and_empty_queries(index: PrefixIndex) -> None:
    """Deepest holder first; nothing asked, nothing found."""
    index.apply(A, BlocksStored(chain(1), None))
    index.apply(B, BlocksStored(chain(1, 2), None))
    assert index.match(chain(1, 2, 3)) == [Match(B, 2, 2), Match(A, 1, 1)]
    assert index.match(()) == []
    assert index.match(chain(7)) == []


def test_revision_moves_with_changes_only(index: PrefixIndex) -> None:
    """A duplicate store leaves the revision; every visible change moves it."""
    start = index.revision
    index.apply(A, BlocksStored(chain(1), None))
    after = index.revision
    index.apply(A, BlocksStored(chain(1), None))
    assert start < after == index.revision
    index.quarantine(A)
    assert index.revision > after


def test_unregistered_source(index: PrefixIndex) -> None:
    """Events of a holder that was not added are our bug, not a new holder."""
    with pytest.raises(LocalProtocolError, match="w3"):
        index.apply(SOURCES[3], AllCleared())


def test_slot_of_a_dropped_holder_is_clean(index: PrefixIndex) -> None:
    """A newcomer in a freed slot inherits neither blocks nor quarantine."""
    index.apply(A, BlocksStored(chain(1), None))
    index.quarantine(A)
    index.drop(A)
    index.add(SOURCES[2])
    index.apply(SOURCES[2], BlocksStored(chain(5), None))
    assert index.match(chain(1)) == []
    assert index.match(chain(5)) == [Match(SOURCES[2], 1, 1)]


def test_match_probes_grow_with_log_n() -> None:
    """Ten times the query costs a few probes more, not ten times as many."""

    class Counting(dict[BlockHash, int]):
        probes = 0

        def get(self, block: BlockHash, default: int = 0) -> int:  # type: ignore[override]
            self.probes += 1
            return super().get(block, default)

    probes = {}
    for length in (100, 1000, 10_000):
        index, table = PrefixIndex(), Counting()
        index._tiers[Tier.GPU] = table
        index.add(A)
        blocks = chain(*range(1, length + 1))
        index.apply(A, BlocksStored(blocks[: length // 3], None))
        table.probes = 0
        assert index.match(blocks) == [Match(A, length // 3, length // 3)]
        probes[length] = table.probes
    assert probes[10_000] <= probes[100] + 10
