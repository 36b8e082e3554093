"""The pure parts behind HotPrefixes, Watch, Dump and Explain."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Group, GroupStored, Tier
from cache_service.core.explain import presence, report
from cache_service.core.history import FellBehind, History, slices
from cache_service.core.hot import HotPrefixes
from cache_service.core.ids import SourceId
from cache_service.core.index import PrefixIndex

ONE = SourceId("one")


def test_hot_finds_the_shared_prefix() -> None:
    """A system prompt shared by prompts that all go on differently is one hot prefix, at its own length."""
    hot = HotPrefixes(capacity=64)
    shared = list(range(1, 9))
    for prompt in range(500):
        hot.saw([*shared, *range(1000 * prompt + 1000, 1000 * prompt + 1008)], 16)
    first, *_ = hot.top(3)
    assert (first.last, first.blocks, first.uses) == (8, 8, 500)
    assert len(hot) <= 128


@pytest.mark.parametrize("seed", range(5))
def test_hot_bounds_hold(seed: int) -> None:
    """uses - error <= true uses <= uses, and everything used much more than the floor is there."""
    rng = random.Random(seed)
    hot, truth = HotPrefixes(capacity=32), Counter[int]()
    for _ in range(5000):
        block = int(rng.paretovariate(1.0))
        truth[block] += 1
        hot.saw([block], 1)
    top = hot.top(64)
    for found in top:
        assert found.uses - found.error <= truth[found.last] <= found.uses
    for block, uses in truth.most_common(5):
        assert block in {found.last for found in top}, f"{block} used {uses} times"


def test_hot_follows_the_traffic() -> None:
    """What was used long ago gives way."""
    hot = HotPrefixes(halve_every=100)
    for _ in range(400):
        hot.saw([1], 1)
    for _ in range(600):
        hot.saw([2], 1)
    assert hot.top(1)[0].last == 2
    hot.saw([3], 0)
    assert hot.observed == 1000


def test_history_resumes_and_refuses() -> None:
    """A follower goes on from any remembered revision; one that fell behind is told."""
    history = History(max_blocks=10)
    assert not history.wanted
    with pytest.raises(FellBehind):
        history.position(5)
    history.start(5)
    position = history.position(5)
    assert history.read(position, 5, 100).changes == []
    for revision in range(6, 11):
        history.add(revision, (ONE, BlocksRemoved((revision,))))
    batch = history.read(position, 5, 3)
    assert [change[1].hashes for change in batch.changes] == [(6,), (7,)]
    assert batch.revision == 7
    assert history.read(history.position(8), 8, 100).revision == 10
    history.add(11, (ONE, AllCleared()))
    assert history.read(batch.position, batch.revision, 100).revision == 11
    with pytest.raises(FellBehind, match="too slowly"):
        history.read(position, 5, 3)
    with pytest.raises(FellBehind):
        history.position(5)
    history.stop()
    with pytest.raises(FellBehind):
        history.read(batch.position, 7, 3)


def test_history_of_one_revision_is_not_split() -> None:
    """Half of the changes of one revision is not that revision."""
    history = History()
    history.start(0)
    for block in (1, 2, 3):
        history.add(7, (ONE, BlocksStored((block,), None)))
    batch = history.read(history.position(0), 0, 2)
    assert (len(batch.changes), batch.revision) == (1, 6)
    assert len(history.read(batch.position, batch.revision, 100).changes) == 2


def test_history_memory_is_bounded() -> None:
    """Long use keeps no more than the bound, and positions stay true."""
    history = History(max_blocks=100)
    history.start(0)
    for revision in range(1, 20_000):
        history.add(revision, (ONE, BlocksRemoved((revision,))))
    assert len(history._changes) < 2200
    batch = history.read(history.position(19_990), 19_990, 1000)
    assert [change[1].hashes[0] for change in batch.changes] == list(range(19_991, 20_000))


@pytest.mark.parametrize("page", [1, 2, 3, 7, 100])
def test_slices_rebuild(page: int) -> None:
    """Pages keep the bound, and an index built from them is the same."""
    index = PrefixIndex()
    index.add(ONE)
    index.apply(ONE, BlocksStored(tuple(range(1, 11)), None))
    index.apply(ONE, BlocksStored((20, 21), 4, Tier.HOST))
    index.apply(ONE, GroupStored(Group.STATE, (3, 9)))
    twin = PrefixIndex()
    twin.add(ONE)
    for changes in slices(index.dump(), page):
        assert sum(len(event.hashes) for _, event in changes) <= page
        for source, event in changes:
            twin.apply(source, event)
    twin.check()
    assert twin.counts() == index.counts()


def test_explain_names_what_is_missing() -> None:
    """Per group the deepest boundary, per tier the blocks, and a reason where usable ends."""
    index = PrefixIndex()
    index.add(ONE)
    index.declare(ONE, True, 0)
    index.apply(ONE, BlocksStored((1, 2, 3, 4), None))
    index.apply(ONE, BlocksStored((3, 4), 2, Tier.HOST))
    index.apply(ONE, BlocksStored((6,), 5))
    index.apply(ONE, GroupStored(Group.STATE, (2,)))
    hashes = [1, 2, 3, 4, 5, 6]
    ((source, matched, usable),) = index.match(hashes, 6)
    found = report(source, matched, usable, 6, len(hashes), presence(hashes, index.dump()))
    full, state = found.groups
    assert (full.group, full.present, full.deepest) == (None, 5, 4)
    assert full.tiers == {Tier.GPU: 5, Tier.HOST: 2}
    assert (state.group, state.present, state.deepest) == (Group.STATE, 1, 2)
    assert (found.matched, found.usable) == (4, 2)
    assert "block 4 of 6 is not held, though 1 blocks behind it" in found.missing
    assert "no state snapshot" in found.missing


def test_explain_of_a_full_match() -> None:
    """A whole match whose last page is computed again says so."""
    index = PrefixIndex()
    index.add(ONE)
    index.apply(ONE, BlocksStored((1, 2), None))
    held = presence([1, 2], index.dump())
    assert "last token" in report(ONE, 2, 1, 1, 2, held).missing
    assert report(ONE, 2, 2, 2, 2, held).missing == ""
