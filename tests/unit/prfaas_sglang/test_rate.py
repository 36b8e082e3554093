"""The rate controller against a fluid link: it finds the rate, keeps queues short, follows drops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from prfaas_sglang.core.rate import RateController, Sample

MBIT = 125_000.0
STEP_S = 0.002
SAMPLE_S = 0.02
CONNECTIONS, SEGMENT = 4, 1448


@dataclass
class Link:
    """A bottleneck with a queue, and kernel connections that keep `gain` times the pipe in flight.

    Without a cap the kernels push until in-flight data reaches gain * bandwidth-delay product, as several bbr
    connections do together; a cap bounds what leaves. `extra_s`(time, cap) is added to round trips.
    """

    rate: Callable[[float], float]
    rtt_s: float
    gain: float = 2.0
    extra_s: Callable[[float, float | None], float] = lambda now, cap: 0.0
    queue_bytes: float = 0.0
    acked: float = 0.0
    now_s: float = 0.0
    srtt_s: float = 0.0
    pipe: list[float] = field(default_factory=list)

    def step(self, cap: float | None, busy: bool = True) -> None:
        """Advance by STEP_S."""
        capacity = self.rate(self.now_s)
        room = self.gain * capacity * self.rtt_s - self.queue_bytes - capacity * self.rtt_s
        wish = capacity * 1.25 if room > 0 else capacity
        sent = min(wish, cap if cap is not None else wish) * STEP_S if busy else 0.0
        self.queue_bytes += sent
        served = min(self.queue_bytes, capacity * STEP_S)
        self.queue_bytes -= served
        self.pipe.append(served)
        if len(self.pipe) > self.rtt_s / STEP_S:
            self.acked += self.pipe.pop(0)
        rtt = self.rtt_s + self.extra_s(self.now_s, cap) + self.queue_bytes / max(capacity, 1.0)
        # an eighth of each acknowledgement's, but not faster than within half a round trip
        share = min(1.0, STEP_S / (self.rtt_s / 2), served / SEGMENT / CONNECTIONS / 8)
        self.srtt_s += (rtt - self.srtt_s) * share if self.srtt_s else rtt
        self.now_s += STEP_S


@dataclass
class Run:
    """What happened, sampled every SAMPLE_S."""

    times: list[float] = field(default_factory=list)
    acked: list[float] = field(default_factory=list)
    inflation: list[float] = field(default_factory=list)

    def goodput(self, start_s: float, end_s: float) -> float:
        a = next(i for i, t in enumerate(self.times) if t >= start_s)
        b = next(i for i, t in enumerate(self.times) if t >= end_s)
        return (self.acked[b] - self.acked[a]) / (self.times[b] - self.times[a])

    def worst_inflation(self, start_s: float, end_s: float) -> float:
        return max(r for t, r in zip(self.times, self.inflation, strict=True) if start_s <= t <= end_s)


def simulate(link: Link, seconds: float, busy: Callable[[float], bool] = lambda now: True) -> Run:
    """Drive a controller over a link."""
    controller, run = RateController(), Run()
    cap: float | None = None
    next_sample = SAMPLE_S
    while link.now_s < seconds:
        link.step(cap, busy(link.now_s))
        if link.now_s >= next_sample:
            next_sample += SAMPLE_S
            sample = Sample(link.now_s, int(link.acked), link.srtt_s, link.rtt_s, busy(link.now_s))
            cap = controller.update(sample)
            run.times.append(link.now_s)
            run.acked.append(link.acked)
            run.inflation.append(link.srtt_s / link.rtt_s)
    return run


@pytest.mark.parametrize("mbit", [20, 100, 1000, 10_000])
@pytest.mark.parametrize("rtt_ms", [2, 10, 40, 150])
def test_a_steady_link_is_filled_with_short_round_trips(mbit: int, rtt_ms: int) -> None:
    """After start-up at least 93 % of the link, and round trips under 1.5 times the least."""
    rtt = rtt_ms / 1000
    run = simulate(Link(lambda now: mbit * MBIT, rtt), 40 * max(rtt, 0.05) + 2)
    start = 20 * max(rtt, 0.05)
    assert run.goodput(start, run.times[-1]) >= 0.93 * mbit * MBIT
    limit = 1.5 if rtt_ms >= 10 else 4.0  # a few milliseconds of queue are many round trips there
    assert run.worst_inflation(start, run.times[-1]) <= limit


def test_a_drop_to_a_tenth_and_back_is_followed() -> None:
    """1 Gbit/s, 100 Mbit/s from 4 s to 8 s: short round trips 2 s after the drop, full rate 2 s after."""

    def rate(now: float) -> float:
        return (100 if 4 <= now < 8 else 1000) * MBIT

    run = simulate(Link(rate, 0.04), 12)
    assert run.worst_inflation(6, 8) <= 1.5
    assert run.goodput(6, 8) >= 0.9 * 100 * MBIT
    assert run.goodput(10, 12 - 2 * SAMPLE_S) >= 0.93 * 1000 * MBIT


def test_idle_spells_leave_the_cap_alone() -> None:
    """A bundle that pauses for seconds starts again at the rate it had."""

    def busy(now: float) -> bool:
        return not 3 <= now < 6

    run = simulate(Link(lambda now: 1000 * MBIT, 0.04), 8, busy)
    assert run.goodput(6.2, 8 - 2 * SAMPLE_S) >= 0.9 * 1000 * MBIT


def test_no_sample_gives_a_cap_of_nothing() -> None:
    """A link that delivers nothing for a while never gets a cap below the floor."""
    controller = RateController()
    cap = None
    for i in range(200):
        cap = controller.update(Sample(i * SAMPLE_S, min(i, 50) * 100_000, 0.2, 0.04, True))
    assert cap is None or cap >= 128 << 10


def test_a_longer_path_is_not_taken_for_a_queue() -> None:
    """From 4 s on round trips take 50 ms instead of 10, as after a change of route; the least one stays."""
    link = Link(lambda now: 200 * MBIT, 0.01, extra_s=lambda now, cap: 0.04 if now >= 4 else 0.0)
    run = simulate(link, 12)
    assert run.goodput(9, 12 - 2 * SAMPLE_S) >= 0.8 * 200 * MBIT


@pytest.mark.parametrize("mbit", [4, 8])
def test_delayed_acknowledgements_of_a_slow_link_are_not_a_queue(mbit: int) -> None:
    """200 Mbit/s, much less from 4 s to 8 s: the link is used then, and at full rate again 5 s after.

    A receiver that gets less than two segments in 40 ms, of each of four connections, holds its
    acknowledgement back for as long.
    """

    def rate(now: float) -> float:
        return (mbit if 4 <= now < 8 else 200) * MBIT

    def held_back(now: float, cap: float | None) -> float:
        through = min(rate(now), cap or rate(now)) / CONNECTIONS
        return 0.04 if through < 2 * SEGMENT / 0.04 else 0.0

    run = simulate(Link(rate, 0.004, gain=6, extra_s=held_back), 18)
    assert run.goodput(5, 8) >= 0.7 * mbit * MBIT
    assert run.goodput(13, 18 - 2 * SAMPLE_S) >= 0.8 * 200 * MBIT


def test_a_partition_leaves_the_cap_alone() -> None:
    """For 3 s nothing arrives; then TCP repairs, with round trips that say nothing; the cap is as before."""
    controller, acked, now_s = RateController(), 0.0, 0.0
    for i in range(150):
        rtt_s = 0.08 if 50 <= i < 60 else 0.04  # once full, so that there is a cap
        acked, now_s = acked + 1e8 * SAMPLE_S, now_s + SAMPLE_S
        before = controller.update(Sample(now_s, int(acked), rtt_s, 0.04, True))
    assert before is not None
    for i in range(170):
        now_s += SAMPLE_S
        if i >= 150:  # a little at first, behind round trips of half a second
            acked += 1e8 * SAMPLE_S * (i - 149) / 20
        cap = controller.update(Sample(now_s, int(acked), 0.5 if i >= 150 else 0.04, 0.04, True))
    assert cap == before
