"""Bookings: what is counted in flight comes back to zero, whichever side ends first."""

from __future__ import annotations

import pytest

from cache_service.core.ids import WorkerId
from router.config import parse
from router.core.model import Match, Policy, PolicyName, Request
from router.core.policy import choose
from router.workers import WorkerTable
from tests.unit.router.test_config import GOOD


@pytest.mark.parametrize("prefill_first", [True, False])
def test_booking_is_released_once_on_each_side(prefill_first: bool) -> None:
    """Releasing twice changes nothing."""
    table = WorkerTable(parse(GOOD))
    decision = choose(
        Request("r", 100), Match(), table.view(0.0), table.links, Policy(PolicyName.PRFAAS, 10), 0.0
    )
    booking = table.book(decision, 100, 0.0)
    view = table.view(0.0)
    assert (view.prefill[0].in_flight_tokens, view.decode[0].in_flight_tokens) == (100, 100)
    assert (view.prefill[0].assigned, view.decode[0].assigned) == (1, 1)
    if prefill_first:
        booking.release_prefill()
        assert table.in_flight() == {"a0": 0, "d0": 1}
    booking.release()
    booking.release()
    booking.release_prefill()
    assert table.in_flight() == {"a0": 0, "d0": 0}
    assert table.view(0.0).prefill[0].in_flight_tokens == 0


def test_an_open_breaker_shows_in_the_view() -> None:
    """Unhealthy until the cool-down is over."""
    table = WorkerTable(parse(GOOD))
    for _ in range(3):
        table.breakers.failed(WorkerId("a0"), 5.0)
    assert not table.view(6.9).prefill[0].healthy
    assert table.view(7.0).prefill[0].healthy
