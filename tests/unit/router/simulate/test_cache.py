"""Prefix caches of simulated workers and the index over them, against slow and obvious ones."""

from __future__ import annotations

import random

from cache_service.core.ids import SiteId, WorkerId
from router.simulate.cache import PrefixCache, SimMatch, SiteIndex


def prompt(rng: random.Random, tree: dict[tuple[int, ...], int]) -> list[int]:
    """Return block ids of a random path in a small tree: equal prefixes, equal ids."""
    path: tuple[int, ...] = ()
    found = []
    for _ in range(rng.randrange(1, 8)):
        path = (*path, rng.randrange(3))
        found.append(tree.setdefault(path, len(tree)))
    return found


def test_a_cache_is_closed_under_prefixes_and_never_over_its_size() -> None:
    """Bisection and the index agree with a linear walk after every store, lock, release and eviction."""
    rng = random.Random(1)
    tree: dict[tuple[int, ...], int] = {}
    index = SiteIndex(0.0, hybrid=False)
    name = WorkerId("w")
    bit = index.add_worker(name)
    cache = PrefixCache(20, index, bit)
    running: list[list[int]] = []
    for _ in range(3000):
        blocks = prompt(rng, tree)
        linear = next((i for i, b in enumerate(blocks) if b not in cache.refs), len(blocks))
        assert cache.depth(blocks) == linear == index.depth(blocks, bit)
        cache.lock(blocks, linear)
        if cache.room(len(blocks) - linear, 0.0):
            cache.store(blocks, linear, (), 0.0)
            running.append(blocks)
        else:
            cache.release(blocks, linear)
        while len(running) > rng.randrange(4):
            blocks = running.pop(rng.randrange(len(running)))
            cache.release(blocks, len(blocks))
        assert len(cache.refs) <= 20
        assert {b for b, mask in index.masks.items() if mask & bit} == set(cache.refs)
    assert cache.evicted > 100


def test_the_leaf_that_was_not_used_goes_first() -> None:
    """Of two branches the older one loses its leaf, and the shared root stays."""
    cache = PrefixCache(4)
    for blocks in ([0, 1], [0, 2]):
        held = cache.depth(blocks)
        cache.lock(blocks, held)
        cache.store(blocks, held, (), 0.0)
        cache.release(blocks, 2)
    assert cache.room(2, 0.0)
    assert set(cache.refs) == {0, 2}


def test_what_is_in_use_stays() -> None:
    """No room is made out of locked blocks, and nothing is evicted for an attempt that fails."""
    cache = PrefixCache(3)
    cache.store([0, 1], 0, (), 0.0)
    assert not cache.room(2, 0.0)
    assert set(cache.refs) == {0, 1}


def test_a_hybrid_prefix_ends_where_a_state_was_kept() -> None:
    """Full-attention blocks without the linear state behind them are of no use."""
    index = SiteIndex(0.0, hybrid=True)
    cache = PrefixCache(100, index, index.add_worker(WorkerId("w")), state_slots=2)
    cache.store([0, 1, 2, 3, 4], 0, [2, 5], 0.0)
    assert cache.usable([0, 1, 2, 3, 4], 99) == 5
    assert cache.usable([0, 1, 2, 3, 9], 99) == 2
    assert cache.usable([0, 8], 99) == 0
    assert index.depth([0, 1, 2, 3, 9], 1) == 2
    assert index.deepest([0, 1, 2, 3, 9]) == [(2, 1)]


def test_states_have_slots_of_their_own() -> None:
    """The least recently used state goes first; its blocks stay, and are of no use without it."""
    index = SiteIndex(0.0, hybrid=True)
    cache = PrefixCache(100, index, index.add_worker(WorkerId("w")), state_slots=1)
    cache.store([0, 1], 0, [2], 0.0)
    cache.store([5, 6], 0, [2], 0.0)
    assert cache.usable([0, 1], 99) == 0
    assert cache.depth([0, 1]) == 2
    assert index.depth([0, 1], 1) == 0


def test_the_index_is_behind_by_its_delay() -> None:
    """A store is known when the delay is over, not before."""
    index = SiteIndex(2.0, hybrid=False)
    bit = index.add_worker(WorkerId("w"))
    index.change(10.0, True, False, bit, [1])
    index.catch_up(11.9)
    assert index.depth([1], bit) == 0
    index.catch_up(12.0)
    assert index.depth([1], bit) == 1


def test_a_match_names_the_deepest_holders_and_answers_for_the_others() -> None:
    """Deepest first; a worker that is not named is looked up when it is asked for."""
    site, index = SiteId("A"), SiteIndex(0.0, hybrid=False)
    places = {}
    for n in range(12):
        name = WorkerId(f"w{n:02}")
        places[name] = (index, index.add_worker(name))
        index.change(0.0, True, False, places[name][1], list(range(1 + n)))
    match = SimMatch({site: index}, places, list(range(20)), 512)
    assert match.by_site[site] == [f"w{n:02}" for n in range(11, 3, -1)]
    assert match.longest_tokens == 12 * 512
    assert match.usable[WorkerId("w00")] == 512
    assert match.usable.get(WorkerId("nobody"), 0) == 0
