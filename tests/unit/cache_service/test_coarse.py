"""The index of what other sites publish: anchors and ends make per-block answers; holders come and go."""

from __future__ import annotations

import pytest

from cache_service.core.coarse import CoarseIndex
from cache_service.core.delta import Declared
from cache_service.core.errors import LocalProtocolError
from cache_service.core.events import (
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    Group,
    GroupRemoved,
    GroupStored,
)
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.index_types import Applied, Match

HYBRID, DENSE, OTHER = (SourceId(WorkerId(name)) for name in ("hybrid", "dense", "other"))
CHAIN = tuple(BlockHash(i) for i in range(1, 21))
ANCHORS = CHAIN[3::4]


@pytest.fixture
def index() -> CoarseIndex:
    """Two holders of blocks 1 to 16 of the chain, one of which has ends at 3, 8 and 18."""
    made = CoarseIndex(4, PrefixIndex())
    for source in (HYBRID, DENSE):
        made.add(source)
        made.apply(source, BlocksStored(ANCHORS[:4], None))
    made.declare(HYBRID, Declared(True, 0))
    made.apply(HYBRID, GroupStored(Group.STATE, (CHAIN[2], CHAIN[7], CHAIN[17])))
    return made


@pytest.mark.parametrize(
    ("limit", "hybrid", "dense"),
    [
        (20, (18, 18), 16),
        (17, (18, 8), 16),
        (13, (18, 8), 13),
        (7, (18, 3), 7),
        (2, (18, 0), 2),
        (0, (18, 0), 0),
    ],
)
def test_answers_are_per_block(index: CoarseIndex, limit: int, hybrid: tuple[int, int], dense: int) -> None:
    """An end counts up to a stride below the anchors; a limit inside a run does not round it away."""
    assert index.match(CHAIN, limit) == [Match(HYBRID, *hybrid), Match(DENSE, 16, dense)]


def test_ends_beyond_a_hole_do_not_count(index: CoarseIndex) -> None:
    """Without the anchor at 8, what lies behind it is out of reach; what is left are the ends before it."""
    index.apply(HYBRID, BlocksRemoved((ANCHORS[1],)))
    assert index.match(CHAIN)[-1] == Match(HYBRID, 4, 3)
    index.apply(HYBRID, BlocksRemoved((ANCHORS[0],)))
    assert index.match(CHAIN)[-1] == Match(HYBRID, 3, 3)
    index.apply(HYBRID, GroupRemoved(Group.STATE, (CHAIN[2],)))
    assert index.match(CHAIN) == [Match(DENSE, 16, 16)]


def test_quarantine_clear_and_drop(index: CoarseIndex) -> None:
    """Withheld entries are kept; a cleared holder keeps its needs, one after a dropped one inherits none."""
    index.quarantine(HYBRID)
    assert [match.source for match in index.match(CHAIN)] == [DENSE]
    index.restore(HYBRID)
    assert index.match(CHAIN)[0] == Match(HYBRID, 18, 18)
    assert index.held_blocks(HYBRID) == 7
    assert index.apply(HYBRID, AllCleared()) == Applied(removed=7)
    index.apply(HYBRID, BlocksStored(ANCHORS, None))
    assert index.match(CHAIN)[0] == Match(HYBRID, 20, 0)
    index.drop(HYBRID)
    index.add(OTHER)
    index.apply(OTHER, BlocksStored(ANCHORS, None))
    assert index.match(CHAIN) == [Match(OTHER, 20, 20), Match(DENSE, 16, 16)]
    with pytest.raises(LocalProtocolError):
        index.apply(HYBRID, AllCleared())


def test_a_source_published_twice_is_counted_once(index: CoarseIndex) -> None:
    """What is said again changes nothing."""
    again = GroupStored(Group.STATE, (CHAIN[2], CHAIN[4]))
    assert index.apply(HYBRID, again) == Applied(stored=1, unchanged=1)
    assert index.apply(HYBRID, GroupRemoved(Group.STATE, (CHAIN[4], CHAIN[5]))) == Applied(
        removed=1, unchanged=1
    )
