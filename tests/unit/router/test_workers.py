"""The fleet and its bookings: what is counted comes back to zero, and the least loaded is always at hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.ids import SiteId, WorkerId
from router.config import parse
from router.core.decision import Policy, PolicyName, Request
from router.core.match import Match
from router.core.policy import choose
from router.core.workers import Fleet, Role, WorkerState
from router.workers import WorkerTable
from tests.unit.router.test_config import GOOD

B = SiteId("B")


@pytest.mark.parametrize("prefill_first", [True, False])
def test_booking_is_released_once_on_each_side(prefill_first: bool) -> None:
    """Releasing twice changes nothing."""
    table = WorkerTable(parse(GOOD))
    policy = Policy(PolicyName.PRFAAS, 10)
    decision = choose(Request("r", 100, B), Match(), table.view(0.0), table.links, policy, 0.0)
    booking = table.book(decision, 100, 0.0)
    a0, d0 = table.fleet.workers[WorkerId("a0")], table.fleet.workers[WorkerId("d0")]
    assert (a0.queued_tokens, a0.jobs, d0.used_pages, d0.running) == (100, 1, 2, 1)
    assert (a0.assigned, d0.assigned) == (1, 1)
    if prefill_first:
        booking.release_prefill()
        assert table.in_flight() == {"a0": 0, "d0": 1}
    booking.release()
    booking.release()
    booking.release_prefill()
    assert table.in_flight() == {"a0": 0, "d0": 0}
    assert (a0.queued_tokens, a0.jobs, d0.used_pages, d0.running) == (0, 0, 0, 0)


def test_an_open_breaker_shows_in_the_view() -> None:
    """Unhealthy until the cool-down is over, and healthy again after it."""
    table = WorkerTable(parse(GOOD))
    a0 = WorkerId("a0")
    for _ in range(3):
        table.breakers.failed(a0, 5.0)
    assert not table.view(6.9).workers[a0].healthy
    assert table.view(7.0).workers[a0].healthy
    table.breakers.succeeded(a0)
    assert table.view(7.0).workers[a0].healthy


def test_the_wait_shrinks_with_time_but_not_below_the_work_behind_the_head() -> None:
    """Two prefills of 4 s: 8 s at once, 5 s after three, 4 s from four on until the first is over."""
    worker = WorkerState(WorkerId("p"), B, Role.PREFILL)
    fleet = Fleet([worker])
    for _ in range(2):
        fleet.give_prefill(worker, 100, 4.0, 10.0)
    assert [worker.wait_s(t) for t in (10.0, 13.0, 14.0, 99.0)] == [8.0, 5.0, 4.0, 4.0]
    fleet.end_prefill(worker, 100, 4.0, 20.0)
    assert worker.wait_s(21.0) == 3.0


def test_names_are_unique_and_a_removed_worker_is_gone() -> None:
    """A second worker of a name is refused; after its removal the site is empty."""
    worker = WorkerState(WorkerId("p"), B, Role.PREFILL)
    fleet = Fleet([worker])
    with pytest.raises(ValueError, match="'p' is there already"):
        fleet.add(worker)
    fleet.remove(worker.worker_id)
    assert (fleet.workers, fleet.prefill) == ({}, {})


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["give", "end", "sick", "well"])), max_size=80))
def test_the_least_loaded_is_that_of_a_search(steps: list[tuple[int, str]]) -> None:
    """After any changes the pool's answer equals the minimum over its healthy members."""
    workers = [WorkerState(WorkerId(f"p{i}"), B, Role.PREFILL) for i in range(5)]
    fleet = Fleet(workers)
    pool = fleet.prefill[B]
    for number, (index, what) in enumerate(steps):
        worker = workers[index]
        if what == "give":
            fleet.give_prefill(worker, 10 * index + 1, float(index), float(number))
        elif what == "end" and worker.jobs:
            fleet.end_prefill(worker, 10 * index + 1, float(index), float(number))
        elif what in ("sick", "well"):
            fleet.set_healthy(worker, what == "well")
        usable = [w for w in workers if w.healthy]
        assert pool.least() is min(usable, key=WorkerState.load, default=None)
        some = {usable[0].worker_id} if usable else set()
        left = [w for w in usable if w.worker_id not in some]
        assert pool.least(some) is min(left, key=WorkerState.load, default=None)
