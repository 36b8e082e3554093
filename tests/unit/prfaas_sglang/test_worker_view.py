"""The view of a worker says exactly what follows from its slots, and its dump is its content."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.events import AllCleared, BlocksStored, Event, Group, GroupRemoved, GroupStored
from cache_service.core.ids import BlockHash, SourceId, WorkerId
from cache_service.core.index import PrefixIndex
from prfaas_sglang.core.worker_view import Change, Filled, Freed, WorkerView

SOURCE = SourceId(WorkerId("w"))


def filled(group: Group, *pairs: tuple[int, int]) -> Filled:
    return Filled(group, [BlockHash(block) for block, _ in pairs], [slot for _, slot in pairs])


def test_only_net_changes_are_said() -> None:
    """What comes and goes within a step is not mentioned; what moves stays."""
    view = WorkerView()
    assert view.step([], [filled(Group.STATE, (1, 10)), Freed(Group.STATE, [10])]) == []
    assert view.step([], [filled(Group.STATE, (1, 10))]) == [GroupStored(Group.STATE, (BlockHash(1),))]
    assert view.step([], [filled(Group.STATE, (1, 11)), Freed(Group.STATE, [10])]) == []
    assert view.step([], [filled(Group.STATE, (2, 11))]) == [
        GroupRemoved(Group.STATE, (BlockHash(1),)),
        GroupStored(Group.STATE, (BlockHash(2),)),
    ]
    assert view.sizes() == (0, 1)


def test_a_clear_takes_the_groups_too() -> None:
    """Slots of before a clear mean nothing after it."""
    view = WorkerView()
    view.step([BlocksStored((BlockHash(1),), None)], [filled(Group.SWA, (1, 5))])
    assert view.step([AllCleared()], [Freed(Group.SWA, [5])]) == [AllCleared()]
    assert view.sizes() == (0, 0)


CHANGES = st.lists(
    st.one_of(
        st.builds(
            lambda group, pairs: filled(group, *pairs),
            st.sampled_from(Group),
            st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), max_size=3, unique_by=lambda p: p[1]),
        ),
        st.builds(Freed, st.sampled_from(Group), st.lists(st.integers(1, 8), max_size=3)),
    ),
    max_size=6,
)
BLOCKS = st.lists(
    st.one_of(
        st.just(AllCleared()),
        st.integers(1, 6).map(lambda n: BlocksStored((BlockHash(n),), BlockHash(n - 1) if n > 1 else None)),
    ),
    max_size=3,
)


@given(st.lists(st.tuples(BLOCKS, CHANGES), max_size=12))
def test_events_and_dump_agree(steps: list[tuple[list[Event], list[Change]]]) -> None:
    """An index fed with every event, one fed with the dump, and the slots themselves say the same."""
    view, followed = WorkerView(), PrefixIndex()
    followed.add(SOURCE)
    #: The truth: per group the block of each slot; a block is in its latest slot only.
    slots: dict[Group, dict[int, int]] = {group: {} for group in Group}
    latest: dict[Group, dict[int, int]] = {group: {} for group in Group}
    for blocks, changes in steps:
        if AllCleared() in blocks:
            for group in Group:
                slots[group].clear()
                latest[group].clear()
        for change in changes:
            at, last = slots[change.group], latest[change.group]
            freed = change.slots if isinstance(change, Freed) else ()
            for slot in freed:
                if last.get(at.pop(slot, -1)) == slot:
                    last = {b: s for b, s in last.items() if s != slot}
            if isinstance(change, Filled):
                for block, slot in zip(change.hashes, change.slots, strict=True):
                    last = {b: s for b, s in last.items() if s != slot}
                    at[slot] = block
                    last[block] = slot
            latest[change.group] = last
        for event in view.step(blocks, changes):
            followed.apply(SOURCE, event)
    dumped = PrefixIndex()
    dumped.add(SOURCE)
    for event in view.dump():
        dumped.apply(SOURCE, event)
    followed.check()
    assert content(dumped) == content(followed)
    assert view.sizes() == (followed.counts().entries, followed.counts().group_entries)
    for group in Group:
        held = {block for name, block in content(followed) if name == group}
        assert held == set(latest[group])


def content(index: PrefixIndex) -> set[tuple[str, int]]:
    return {
        (event.group if isinstance(event, GroupStored) else "block", block)
        for _, event in index.dump()
        for block in event.hashes
    }
