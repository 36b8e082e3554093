"""The prefix index against a brute-force model, and the cases that broke other people's indexes."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import settings

from cache_service.core.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Group, GroupStored, Tier
from cache_service.core.ids import BlockHash, SiteId, SourceId, WorkerId
from cache_service.core.index import Applied, Match, PrefixIndex, best_per_site
from tests.unit.cache_service.index_machine import SOURCES, BudgetMachine, IndexMachine, chain

A, B = SOURCES[:2]

TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


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


def test_state_snapshot_decides_what_is_usable(index: PrefixIndex) -> None:
    """A full match without a snapshot at its end is usable up to the deepest one and the limit."""
    index.declare(A, needs_state=True, swa_window_blocks=0)
    index.apply(A, BlocksStored(chain(1, 2, 3, 4), None))
    index.apply(B, BlocksStored(chain(1, 2), None))
    assert index.match(chain(1, 2, 3, 4)) == [Match(A, 4, 0), Match(B, 2, 2)]
    index.apply(A, GroupStored(Group.STATE, chain(1, 3)))
    assert index.match(chain(1, 2, 3, 4)) == [Match(A, 4, 3), Match(B, 2, 2)]
    assert index.match(chain(1, 2, 3, 4), 2) == [Match(A, 4, 1), Match(B, 2, 2)]
    assert index.match(chain(1, 2, 3, 4), 0) == [Match(A, 4, 0), Match(B, 2, 0)]
    index.declare(A, needs_state=False, swa_window_blocks=0)
    assert index.match(chain(1, 2, 3, 4)) == [Match(A, 4, 4), Match(B, 2, 2)]


def test_window_decides_what_is_usable(index: PrefixIndex) -> None:
    """The last w blocks before a boundary must have their window KV; near the root, all there are."""
    index.declare(A, needs_state=False, swa_window_blocks=2)
    index.apply(A, BlocksStored(chain(1, 2, 3, 4, 5), None))
    index.apply(A, GroupStored(Group.SWA, chain(1, 3, 5)))
    assert index.match(chain(1, 2, 3, 4, 5)) == [Match(A, 5, 1)]
    index.apply(A, GroupStored(Group.SWA, chain(4)))
    assert index.match(chain(1, 2, 3, 4, 5)) == [Match(A, 5, 5)]
    assert index.match(chain(1, 2, 3, 4, 5), 4) == [Match(A, 5, 4)]
    assert index.match(chain(1, 2, 3, 4, 5), 3) == [Match(A, 5, 1)]


def test_best_holder_of_each_site() -> None:
    """Usable before matched, then the name."""
    near, far = SiteId("near"), SiteId("far")
    matches = [
        Match(SOURCES[0], 9, 1),
        Match(SOURCES[2], 4, 4),
        Match(SOURCES[1], 4, 4),
        Match(SOURCES[3], 2, 0),
    ]
    sites = {SOURCES[0]: near, SOURCES[1]: near, SOURCES[2]: near, SOURCES[3]: far}
    assert best_per_site(matches, sites) == {near: matches[2], far: matches[3]}
    assert best_per_site([], sites) == {}


def test_budget_evicts_the_leaf_used_longest_ago() -> None:
    """What was matched last stays; a chain goes from its end."""
    index = PrefixIndex(budget_bytes=15_000)
    index.add(A)
    for first in range(0, 60, 10):
        index.apply(A, BlocksStored(chain(*range(first, first + 10)), None))
    assert index.evicted_blocks == 0
    index.match(chain(*range(10)))
    index.apply(A, BlocksStored(chain(*range(100, 130)), None))
    assert 0 < index.evicted_blocks < 30
    assert index.match(chain(*range(10)))[0].matched == 10
    left = index.match(chain(*range(10, 20)))
    assert not left or left[0].matched < 10
    assert index.bytes_estimate <= 15_000
    index.check()


def test_budget_smaller_than_an_event() -> None:
    """An event that does not fit leaves its beginning; states of unknown blocks go as well."""
    index = PrefixIndex(budget_bytes=1000)
    index.add(A)
    index.apply(A, BlocksStored(chain(*range(50)), None))
    (match,) = index.match(chain(*range(50)))
    assert 0 < match.matched <= 5
    index.apply(A, GroupStored(Group.STATE, chain(*range(1000, 1100))))
    index.check()


def test_cycle_of_lies_is_evicted() -> None:
    """Blocks that claim each other as parent have no leaf, and go all the same."""
    index = PrefixIndex(budget_bytes=300)
    index.add(A)
    index.apply(A, BlocksStored(chain(1), BlockHash(2)))
    index.apply(A, BlocksStored(chain(2), BlockHash(1)))
    index.check()
    assert index.evicted_blocks == 1


def test_cycle_of_lies_is_cleared(index: PrefixIndex) -> None:
    """A cycle has no top to start from."""
    index.apply(A, BlocksStored(chain(1), BlockHash(2)))
    index.apply(A, BlocksStored(chain(2), BlockHash(1)))
    assert index.clear(A) == 2
    index.check()


def test_clear_looks_at_own_blocks_only(index: PrefixIndex) -> None:
    """What others hold is not walked."""

    class Counting(dict[BlockHash, int]):
        probes = 0

        def get(self, block: BlockHash, default: int = 0) -> int:  # type: ignore[override]
            self.probes += 1
            return super().get(block, default)

    table = Counting()
    index._tiers[Tier.GPU] = table
    index.apply(A, BlocksStored(chain(*range(1000)), None))
    index.apply(B, BlocksStored(chain(*range(5)), None))
    table.probes = 0
    assert index.clear(B) == 5
    assert table.probes < 40


@pytest.mark.parametrize("budget_bytes", [-1])
def test_bad_budget(budget_bytes: int) -> None:
    """A negative budget is refused by name."""
    with pytest.raises(ConfigError, match="budget_bytes"):
        PrefixIndex(budget_bytes=budget_bytes)


def test_bad_window(index: PrefixIndex) -> None:
    """A negative window is refused by name."""
    with pytest.raises(ConfigError, match="swa_window_blocks"):
        index.declare(A, needs_state=True, swa_window_blocks=-1)


def test_unknown_group() -> None:
    """A group nobody knows is refused by name, with the names there are."""
    with pytest.raises(RemoteProtocolError, match=r"group.*state, swa"):
        GroupStored("mamba", chain(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("holders", "grouped"), [(1, False), (16, False), (16, True)])
def test_bytes_estimate_is_near_the_truth(holders: int, grouped: bool) -> None:
    """What the budget is held against is within a factor of two of what Python allocates."""
    index = PrefixIndex(budget_bytes=1 << 40)
    sources = [SourceId(WorkerId(f"w{i}")) for i in range(holders)]
    tracemalloc.start()
    try:
        for source in sources:
            index.add(source)
        for first in range(1 << 40, (1 << 40) + 20_000, 200):
            run = chain(*range(first, first + 200))
            for source in sources:
                index.apply(source, BlocksStored(run, None))
                if grouped:
                    index.apply(source, GroupStored(Group.SWA, run))
        del run
        taken, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 2 < index.bytes_estimate < taken * 2
