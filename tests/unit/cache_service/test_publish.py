"""What is published never claims more than what is held, and without thresholds nothing less than a run."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_service.core.errors import ConfigError
from cache_service.core.events import AllCleared, BlocksRemoved, BlocksStored, Tier
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from cache_service.core.publish import PublishFilter, PublishPolicy

SOURCES = [SourceId(WorkerId(f"w{i}")) for i in range(3)]
EVERYTHING = PublishPolicy(stride=4, min_blocks=1, min_seen=1)


@dataclass(frozen=True)
class GroupStored:
    group: str
    hashes: tuple[BlockHash, ...]
    tier: Tier = Tier.GPU


@dataclass(frozen=True)
class GroupRemoved:
    group: str
    hashes: tuple[BlockHash, ...]
    tier: Tier = Tier.GPU


def tree(rng: random.Random, chains: int = 5) -> list[list[BlockHash]]:
    """Chains of 1 to 20 blocks that share prefixes; a block's name says its chain and depth."""
    made: list[list[BlockHash]] = []
    for number in range(chains):
        shared = rng.choice(made) if made and rng.random() < 0.7 else []
        keep = rng.randint(0, len(shared))
        own = [BlockHash(1000 * (number + 1) + i) for i in range(keep, keep + rng.randint(1, 14))]
        made.append([*shared[:keep], *own])
    return made


def random_event(rng: random.Random, chains: list[list[BlockHash]]) -> object:
    chain = rng.choice(chains)
    first = rng.randrange(len(chain))
    run = tuple(chain[first : first + rng.randint(1, len(chain))])
    tier = rng.choice([Tier.GPU, Tier.HOST])
    kind = rng.random()
    if kind < 0.5:
        return BlocksStored(run, chain[first - 1] if first else None, tier)
    if kind < 0.65:
        return BlocksRemoved(run, tier)
    if kind < 0.85:
        return GroupStored(rng.choice(["state", "swa"]), run, tier)
    if kind < 0.98:
        return GroupRemoved(rng.choice(["state", "swa"]), run, tier)
    return AllCleared()


class Model:
    """Who holds what, as sets."""

    def __init__(self) -> None:
        self.held: set[tuple[SourceId, str, BlockHash, Tier]] = set()
        self.rooted: set[BlockHash] = set()

    def take(self, source: SourceId, event: object) -> None:
        if isinstance(event, AllCleared):
            self.held = {entry for entry in self.held if entry[0] != source}
            return
        group = getattr(event, "group", "full")
        entries = {(source, group, block, event.tier) for block in event.hashes}  # type: ignore[attr-defined]
        if type(event).__name__.endswith("Removed"):
            self.held -= entries
        else:
            self.held |= entries

    def holds(self, source: SourceId, group: str, blocks: list[BlockHash]) -> bool:
        return all(any((source, group, block, tier) in self.held for tier in Tier) for block in blocks)


def published_after(filter_: PublishFilter, events: list[tuple[SourceId, object]]) -> tuple[Model, Model]:
    """Feed a filter; return what is held and, as a reader sees it, what is published."""
    held, published = Model(), Model()
    for source, event in events:
        held.take(source, event)
        for owner, change in filter_.take(source, event):  # type: ignore[arg-type]
            published.take(owner, change)
    return held, published


def random_events(seed: int, number: int) -> tuple[list[list[BlockHash]], list[tuple[SourceId, object]]]:
    rng = random.Random(seed)
    chains = tree(rng)
    return chains, [(rng.choice(SOURCES), random_event(rng, chains)) for _ in range(number)]


@given(st.integers(0, 2**32), st.integers(0, 80))
@example(819, 59)  # blocks that come back between a known ancestor and a known child
@example(195, 68)
def test_without_thresholds_it_is_exact(seed: int, number: int) -> None:
    """Every whole run, and nothing else, is published: full, state and window, at every time."""
    chains, events = random_events(seed, number)
    filter_ = PublishFilter(EVERYTHING)
    held, published = published_after(filter_, events)
    known = filter_.known_depth
    for source in SOURCES:
        for chain in chains:
            for end in range(4, len(chain) + 1, 4):
                run, anchor = chain[end - 4 : end], chain[end - 1]
                whole = held.holds(source, "full", run) and bool(known(anchor))
                assert published.holds(source, "full", [anchor]) == whole
                if whole:
                    state = held.holds(source, "state", [anchor])
                    assert published.holds(source, "state", [anchor]) == state
                    assert published.holds(source, "swa", [anchor]) == held.holds(source, "swa", run)
    anchors = {chain[end - 1] for chain in chains for end in range(4, len(chain) + 1, 4)}
    assert {block for _, _, block, _ in published.held} <= anchors


@given(st.integers(0, 2**32), st.integers(0, 80), st.integers(1, 16), st.integers(1, 3))
@example(56, 14, 1, 2)  # asked for while its place in the chain is unknown
def test_never_more_than_what_is_held(seed: int, number: int, min_blocks: int, min_seen: int) -> None:
    """Whatever the thresholds, and while a budget moves them, a published anchor's run is held."""
    chains, events = random_events(seed, number)
    filter_ = PublishFilter(PublishPolicy(4, min_blocks, min_seen, bytes_per_s=10))
    held, published = Model(), Model()
    rng = random.Random(seed)
    for source, event in events:
        held.take(source, event)
        changes = filter_.take(source, event)  # type: ignore[arg-type]
        if rng.random() < 0.3:
            filter_.adapt(rng.choice([0.0, 100.0]))
        if rng.random() < 0.3:
            changes += filter_.saw(rng.choice(chains))
        for owner, change in changes:
            published.take(owner, change)
    for chain in chains:
        for end in range(4, len(chain) + 1, 4):
            for source in SOURCES:
                if published.holds(source, "full", [chain[end - 1]]):
                    assert held.holds(source, "full", chain[end - 4 : end])


@given(st.integers(0, 2**32), st.integers(0, 60))
def test_nothing_is_left_when_all_is_gone(seed: int, number: int) -> None:
    """After every source cleared, the filter holds no block."""
    _, events = random_events(seed, number)
    filter_ = PublishFilter(EVERYTHING)
    _, published = published_after(filter_, events + [(source, AllCleared()) for source in SOURCES])
    assert not published.held
    assert not filter_.blocks


def chain(length: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(1 + i) for i in range(length))


def test_a_long_chain_is_published_with_its_ancestors() -> None:
    """Chunk by chunk: nothing below the length, then all of it, parents first, as a chain for the index."""
    filter_ = PublishFilter(PublishPolicy(stride=4, min_blocks=16, min_seen=9))
    blocks = chain(20)
    assert filter_.take(SOURCES[0], BlocksStored(blocks[:12], None)) == []
    changes = filter_.take(SOURCES[0], BlocksStored(blocks[12:], blocks[11]))
    index = PrefixIndex()
    index.add(SOURCES[0])
    for source, event in changes:
        index.apply(source, event)
    assert [match.matched for match in index.match(blocks[3::4])] == [5]
    assert index.counts().orphans == 0


def test_a_short_chain_is_published_when_it_is_asked_for() -> None:
    """Stored once and asked for once makes two sightings."""
    filter_ = PublishFilter(PublishPolicy(stride=4, min_blocks=100, min_seen=2))
    blocks = chain(8)
    assert filter_.take(SOURCES[0], BlocksStored(blocks, None)) == []
    (change, more) = filter_.saw(blocks)
    assert (change[1], more[1]) == (BlocksStored(blocks[3:4], None), BlocksStored(blocks[7:8], blocks[3]))


def test_an_inner_block_takes_its_run_back() -> None:
    """Losing a block that is no anchor takes back the anchor that vouched for it."""
    filter_ = PublishFilter(EVERYTHING)
    blocks = chain(8)
    filter_.take(SOURCES[0], BlocksStored(blocks, None))
    (change,) = filter_.take(SOURCES[0], BlocksRemoved(blocks[5:6]))
    assert change == (SOURCES[0], BlocksRemoved(blocks[7:8]))
    (change,) = filter_.take(SOURCES[0], BlocksStored(blocks[5:6], blocks[4]))
    assert change == (SOURCES[0], BlocksStored(blocks[7:8], blocks[3]))


def test_a_budget_tightens_and_relaxes() -> None:
    """Over budget the length doubles; well below it halves again."""
    filter_ = PublishFilter(PublishPolicy(stride=4, min_blocks=4, min_seen=50, bytes_per_s=100))
    filter_.adapt(1000)
    assert filter_.take(SOURCES[0], BlocksStored(chain(4), None)) == []
    filter_.adapt(10)
    assert len(filter_.take(SOURCES[0], BlocksStored(chain(8)[4:], BlockHash(4)))) == 1


@pytest.mark.parametrize(("name", "value"), [("stride", 0), ("min_blocks", 0), ("bytes_per_s", -1)])
def test_wrong_policies(name: str, value: int) -> None:
    """A value out of bounds is refused by name."""
    with pytest.raises(ConfigError, match=name):
        PublishPolicy(**{name: value})  # type: ignore[arg-type]
