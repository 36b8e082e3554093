"""Faults of the link in the middle of a transfer between two real workers: exact, or a clean error in time.

`attempt` asserts before and after each: idle, connected, nothing leaked, and the next request exact.
"""

from __future__ import annotations

import pytest

from tests.e2e.wan.conftest import Try

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]


@pytest.mark.parametrize("family", ["gdn", "swa"])
def test_a_cut_of_two_seconds_is_survived(attempt: Try, family: str) -> None:
    with attempt(family) as trial:
        trial.slow()
        running = trial.underway()
        trial.wan.partition()
        with pytest.raises(TimeoutError):
            running.result(2.0)
        trial.wan.heal()
        trial.exact(running.result(60))
