"""Simulated links: fair shares, weights, changing capacity, outages, and nothing lost."""

from __future__ import annotations

import random

import pytest

from router.simulate.clock import Clock
from router.simulate.link import Link
from router.simulate.spec import LinkSpec

GB = 1e9


def link(clock: Clock, **values: object) -> Link:
    """Return a link of 8 Gbit/s, a gigabyte a second."""
    return Link(clock, LinkSpec(src="A", dst="B", gbps=8.0, **values), random.Random(1))  # type: ignore[arg-type]


def ends(clock: Clock, path: Link, sends: list[tuple[float, float, float]]) -> list[float]:
    """Return when each of (start, bytes, weight) is over."""
    found = [0.0] * len(sends)

    def over(i: object) -> None:
        found[int(str(i))] = clock.now_s

    for i, (at_s, size, weight) in enumerate(sends):
        clock.at(at_s, lambda a: path.send(a[1], a[2], over, a[0]), (i, size, weight))
    clock.run()
    return found


def test_two_transfers_share_and_the_rest_is_for_who_is_left() -> None:
    """Equal weights: half each until the shorter one is over."""
    clock = Clock()
    assert ends(clock, link(clock), [(0, 1 * GB, 1), (0, 2 * GB, 1)]) == pytest.approx([2.0, 3.0])


def test_weights() -> None:
    """Three to one."""
    clock = Clock()
    assert ends(clock, link(clock), [(0, 3 * GB, 3), (0, 1.5 * GB, 1)]) == pytest.approx([4.0, 4.5])


def test_an_outage_delays_and_loses_nothing() -> None:
    """Nothing crosses for five seconds; the router's estimator sees the link die and come back."""
    clock = Clock()
    path = link(clock, outages=((1.0, 5.0),))
    seen: list[bool] = []
    clock.at(5.5, lambda _: seen.append(path.state.up))
    assert ends(clock, path, [(0, 3 * GB, 1)]) == pytest.approx([8.0])
    assert seen == [False]
    assert path.delivered_bytes == pytest.approx(3 * GB)


def test_loss_takes_its_share() -> None:
    """A tenth sent again: a tenth slower."""
    clock = Clock()
    assert ends(clock, link(clock, loss=0.1), [(0, 0.9 * GB, 1)]) == pytest.approx([1.0])


def test_a_fluctuating_link_stays_in_its_range_and_repeats() -> None:
    """Equal seeds give equal ends; the mean rate lies between the bounds."""
    runs = []
    for _ in range(2):
        clock = Clock()
        path = link(clock, low_gbps=2.0, high_gbps=8.0, period_s=0.5)
        runs.append(ends(clock, path, [(0.3 * i, 0.4 * GB, 1) for i in range(100)]))
        assert 40 * GB / 1e9 < max(runs[-1]) < 4 * 40 * GB / 1e9 + 30
        assert path.delivered_bytes == pytest.approx(40 * GB)
    assert runs[0] == runs[1]


def test_a_cancelled_transfer_leaves_its_share_to_others() -> None:
    """What it had sent counts as delivered."""
    clock = Clock()
    path = link(clock)
    flow = path.send(5 * GB, 1.0, lambda _: pytest.fail("cancelled"), None)
    over: list[float] = []
    path.send(2 * GB, 1.0, lambda _: over.append(clock.now_s), None)
    clock.at(2.0, lambda _: path.cancel(flow))
    clock.run()
    assert over == pytest.approx([3.0])
    assert path.delivered_bytes == pytest.approx(3 * GB)


def test_the_estimator_follows_the_link() -> None:
    """A link that carries half of what is configured is believed to carry about half."""
    clock = Clock()
    path = link(clock, low_gbps=4.0, high_gbps=4.0)
    path.send(20 * GB, 1.0, lambda _: None, None)
    rates: list[float] = []
    clock.at(30.0, lambda _: rates.append(path.state.rate_bytes_per_s))
    clock.run()
    assert rates[0] == pytest.approx(0.5 * GB, rel=0.05)
