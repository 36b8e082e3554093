"""The estimate of a link against scripted traces of a link whose capacity is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.ids import SiteId
from router.core import link_estimator as le
from router.core.decision import LinkState
from router.core.link_estimator import LinkEstimator, Sample, State

CAPACITY = 1e9


class Trace:
    """A sender with `demand` on a link with `capacity`, one sample a second."""

    def __init__(self, **link: float) -> None:
        self.link = LinkState(SiteId("A"), SiteId("B"), CAPACITY, **link)  # type: ignore[arg-type]
        self.estimator = LinkEstimator(self.link)
        self.now_s = self.sent = self.lost = 0.0

    def run(
        self,
        seconds: int,
        *,
        capacity: float = CAPACITY,
        demand: float = 2 * CAPACITY,
        loss: float = 0.0,
        srtt_s: float = 0.04,
        busy: float = 1.0,
    ) -> list[float]:
        rates = []
        for _ in range(seconds):
            self.now_s += 1.0
            goodput = min(capacity, demand) * (1 - loss)
            self.sent += goodput
            self.lost += goodput * loss
            waiting = 1e8 if demand > capacity or loss else 0.0
            sample = Sample(goodput, self.sent, self.lost, srtt_s, 0.04, waiting, busy)
            self.estimator.observe(sample, self.now_s)
            self.estimator.tick(self.now_s)
            rates.append(self.link.rate_bytes_per_s)
        return rates


def test_a_drop_is_followed_within_seconds_and_taken_back() -> None:
    """Capacity to a fifth: the rate is within a quarter of it after three samples, and grows back with it."""
    trace = Trace()
    trace.run(5)
    assert trace.run(5, capacity=0.2 * CAPACITY)[3] < 0.27 * CAPACITY
    assert trace.run(30)[-1] > 0.95 * CAPACITY


def test_a_prefill_slower_than_the_link_says_nothing_of_the_link() -> None:
    """Chunks come with pauses: a tenth of the capacity, bytes waiting at every sample, keep the rate."""
    trace = Trace()
    assert trace.run(60, capacity=0.1 * CAPACITY, busy=0.3)[-1] == CAPACITY
    assert trace.run(10, capacity=0.1 * CAPACITY, busy=0.95)[-1] < 0.15 * CAPACITY


def test_loss_and_round_trip_act_before_goodput_falls() -> None:
    """Full goodput, but retransmissions or a filling queue: the first such sample cuts the rate."""
    for sign in ({"loss": 0.05}, {"srtt_s": 0.09}):
        trace = Trace()
        trace.run(3)
        assert trace.run(1, **sign)[0] <= 0.86 * CAPACITY  # type: ignore[arg-type]
        assert trace.estimator.state is State.CONGESTED
        assert not trace.link.abundant


def test_a_burst_costs_one_cut_and_is_forgotten() -> None:
    """One bad second: one cut, then clean samples, then capacity again."""
    trace = Trace()
    trace.run(3)
    low = trace.run(1, loss=0.1)[0]
    after = trace.run(20)
    assert min(after) >= low * 0.999
    assert trace.estimator.state is State.CLEAR
    assert after[-1] > 0.97 * CAPACITY


def test_a_flapping_link_is_tried_ever_more_rarely() -> None:
    """Dead for three seconds: down; each further death holds it longer, up to the maximum."""
    trace = Trace()
    holds = []
    for _ in range(6):
        while trace.link.up:
            trace.run(1, capacity=0.0)
        held = 0
        while not trace.link.up:
            trace.run(1, capacity=0.0)
            held += 1
        holds.append(held)
    assert holds[:4] == [2, 4, 8, 16]
    assert max(holds) <= le.MAX_HOLD_S
    assert not trace.link.abundant


def test_a_dead_link_that_delivers_is_back_at_once_but_not_at_full_rate() -> None:
    """Bytes that arrive are proof enough; half of the capacity until it has shown more."""
    trace = Trace()
    trace.run(5, capacity=0.0)
    assert not trace.link.up
    assert trace.run(1)[0] <= 0.5 * CAPACITY
    assert trace.link.up


def test_a_slow_leak_is_tracked() -> None:
    """Capacity lost at 1 % a second: the rate is never more than a tenth above it."""
    trace = Trace()
    trace.run(3)
    for second in range(60):
        capacity = CAPACITY * (1 - 0.01 * second)
        assert trace.run(1, capacity=capacity)[0] <= 1.1 * capacity


def test_an_idle_link_says_nothing() -> None:
    """Little traffic on a free link does not lower its rate; a lowered one is doubted slowly."""
    trace = Trace()
    assert trace.run(60, demand=1e6)[-1] == CAPACITY
    trace.run(10, capacity=0.3 * CAPACITY)
    rates = trace.run(60, demand=0.0)
    assert rates == sorted(rates)
    assert 0.4 * CAPACITY < rates[-1] < CAPACITY


def test_directions_are_told_apart() -> None:
    """Congestion one way leaves the other way alone."""
    there, back = Trace(), Trace()
    there.run(5, capacity=0.1 * CAPACITY, loss=0.1)
    back.run(5)
    assert there.link.rate_bytes_per_s < 0.1 * CAPACITY
    assert back.link.rate_bytes_per_s == CAPACITY


def test_the_ceiling_is_never_passed() -> None:
    """A ceiling bounds what is used, not what is believed."""
    trace = Trace(ceiling_bytes_per_s=2e8)
    assert trace.link.rate_bytes_per_s == 2e8
    assert set(trace.run(10)) == {2e8}


def test_the_regime_has_hysteresis() -> None:
    """Abundant below half of the rate, scarce above three quarters, unchanged between."""
    trace = Trace()
    trace.run(1, demand=0.4 * CAPACITY)
    assert trace.link.abundant
    trace.run(1, demand=0.6 * CAPACITY)
    assert trace.link.abundant
    trace.run(1, demand=0.8 * CAPACITY)
    assert not trace.link.abundant
    trace.run(1, demand=0.6 * CAPACITY)
    assert not trace.link.abundant


@pytest.mark.parametrize("restart", [True, False])
def test_counters_may_start_again(restart: bool) -> None:
    """A sender that starts again has smaller counters: no negative loss, no cut."""
    trace = Trace()
    trace.run(5, loss=0.01)
    if restart:
        trace.sent = trace.lost = 0.0
    trace.run(2)
    assert 0 <= trace.link.loss_ratio < le.LOSS


_FIGURE = st.floats(0, 1e12, allow_nan=False)


@given(st.lists(st.builds(Sample, _FIGURE, _FIGURE, _FIGURE, st.floats(0, 10), st.floats(0, 10), _FIGURE)))
def test_any_samples_leave_a_usable_figure(samples: list[Sample]) -> None:
    """Whatever the senders say, the rate stays between the floor and the capacity, the loss a ratio."""
    link = LinkState(SiteId("A"), SiteId("B"), CAPACITY)
    estimator = LinkEstimator(link)
    for second, sample in enumerate(samples):
        estimator.observe(sample, float(second))
        assert le.FLOOR * CAPACITY <= link.rate_bytes_per_s <= CAPACITY
        assert link.loss_ratio >= 0
