"""Connections that stand still are told from idle and from slow ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.stall import STALL_S, StallWatch


@given(st.lists(st.tuples(st.floats(0.01, 3), st.booleans(), st.booleans()), max_size=60))
def test_a_flow_is_stalled_exactly_when_it_had_data_on_its_way_and_none_arrived(
    steps: list[tuple[float, bool, bool]],
) -> None:
    """Against the definition: no sample of the last STALL_S saw progress or nothing on its way."""
    watch, now_s, delivered = StallWatch(), 100.0, 0
    last_good_s = now_s
    for pause_s, progress, on_the_way in steps:
        now_s += pause_s
        delivered += progress
        if progress or not on_the_way or now_s == 100.0 + pause_s:
            last_good_s = now_s
        stalled = watch.update(now_s, {3: (delivered, int(on_the_way))})
        assert stalled == ([3] if now_s - last_good_s >= STALL_S else [])


def test_one_flow_does_not_hide_another() -> None:
    """Flow 1 goes on, flow 2 stands still, flow 3 is idle."""
    watch = StallWatch()
    assert watch.update(0.0, {1: (0, 1), 2: (5, 1), 3: (7, 0)}) == []
    assert watch.update(5.0, {1: (9, 1), 2: (5, 1), 3: (7, 0)}) == []
    assert watch.update(6.0, {1: (12, 1), 2: (5, 1), 3: (7, 0)}) == [2]
