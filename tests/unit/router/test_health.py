"""The breaker table, row by row, and against any order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.ids import WorkerId
from router.core.health import BreakerLimits, BreakerTable, State

W = WorkerId("w")
LIMITS = BreakerLimits(failures=2, cooldown_s=1.0, max_cooldown_s=3.0)


def opened() -> BreakerTable:
    table = BreakerTable(LIMITS)
    table.failed(W, 0.0)
    table.failed(W, 0.0)
    return table


def test_closed_until_the_failures_in_a_row_are_reached() -> None:
    """A success in between starts the count again."""
    table = BreakerTable(LIMITS)
    table.failed(W, 0.0)
    table.succeeded(W)
    table.failed(W, 0.0)
    assert table.state(W) is State.CLOSED
    assert table.usable(W, 0.0)
    table.failed(W, 0.0)
    assert table.state(W) is State.OPEN


def test_open_admits_one_probe_after_the_cool_down() -> None:
    """Closed to everybody during the cool-down, then to everybody but one."""
    table = opened()
    assert not table.usable(W, 0.99)
    table.started(W, 0.5)
    assert table.state(W) is State.OPEN
    assert table.usable(W, 1.0)
    table.started(W, 1.0)
    assert table.state(W) is State.PROBING
    assert not table.usable(W, 1.5)


def test_probe_outcome_decides() -> None:
    """Success closes; failure opens for twice as long, at most the maximum."""
    table = opened()
    table.started(W, 1.0)
    table.failed(W, 1.0)
    assert not table.usable(W, 2.9)
    assert table.usable(W, 3.0)
    table.started(W, 3.0)
    table.failed(W, 3.0)
    assert not table.usable(W, 5.9)
    assert table.usable(W, 6.0), "4 s would exceed the maximum of 3 s"
    table.started(W, 6.0)
    table.succeeded(W)
    assert table.state(W) is State.CLOSED


def test_late_failures_do_not_prolong_the_cool_down() -> None:
    """Requests sent before the breaker opened may still fail afterwards."""
    table = opened()
    table.failed(W, 0.9)
    assert table.usable(W, 1.0)


def test_abandoned_probe_makes_room_for_another() -> None:
    """A client that left says nothing about the worker."""
    table = opened()
    table.started(W, 1.0)
    table.abandoned(W, 1.1)
    assert (table.state(W), table.usable(W, 1.1)) == (State.OPEN, True)
    table.abandoned(WorkerId("unknown"), 1.1)


def test_lost_probe_does_not_lock_the_worker_out() -> None:
    """A probe without an outcome is given up after the longest cool-down."""
    table = opened()
    table.started(W, 1.0)
    assert not table.usable(W, 3.9)
    assert table.usable(W, 4.0)


@given(st.lists(st.tuples(st.sampled_from(["started", "succeeded", "failed", "abandoned"]), st.floats(0, 2))))
def test_a_worker_always_comes_back(events: list[tuple[str, float]]) -> None:
    """After any history, the longest cool-down later the worker may be tried again."""
    table, now_s = BreakerTable(LIMITS), 0.0
    for name, gap_s in events:
        now_s += gap_s
        if name == "succeeded":
            table.succeeded(W)
        elif name != "started" or table.usable(W, now_s):
            getattr(table, name)(W, now_s)
    assert table.usable(W, now_s + LIMITS.max_cooldown_s)
