"""Named links. A test says `wan("continental")` and means the same link as every other test and benchmark.

Queues are one bandwidth-delay product (5 MB at 1 Gbit/s and 40 ms) or more, unless the queue is the subject.
Values describe leased or well-peered paths between datacenters, not access lines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cache_service.core.errors import ConfigError
from tests.wan.settings import Direction


@dataclass(frozen=True)
class Profile:
    """Both directions of a link and why it is in the list."""

    name: str
    about: str
    a2b: Direction
    b2a: Direction

    @property
    def rtt_s(self) -> float:
        """Round trip without queueing or serialisation."""
        return self.a2b.delay_s + self.b2a.delay_s

    @property
    def bdp_bytes(self) -> float:
        """Bytes that fill the path from a to b for one round trip; 0 without a rate limit."""
        return self.a2b.rate_bps * self.rtt_s / 8

    def with_(self, **changes: Any) -> Profile:
        """Return the profile with `changes` (fields of Direction) in both directions."""
        return replace(self, a2b=replace(self.a2b, **changes), b2a=replace(self.b2a, **changes))


def _symmetric(name: str, about: str, **values: Any) -> Profile:
    direction = Direction(**values)
    return Profile(name, about, direction, direction)


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        _symmetric(
            "metro",
            "two sites of one region: 1 Gbit/s, 2 ms RTT, 2.5 MB queue, no loss",
            rate_bps=1e9,
            delay_s=0.001,
            queue_bytes=2.5e6,
        ),
        _symmetric(
            "continental",
            "the benchmark's link: 1 Gbit/s, 40 ms RTT, 5 MB queue (one BDP), no loss",
            rate_bps=1e9,
            delay_s=0.020,
            queue_bytes=5e6,
        ),
        _symmetric(
            "intercontinental",
            "1 Gbit/s, 150 ms RTT, 18.75 MB queue (one BDP), 0.5 ms jitter, 0.01 % loss",
            rate_bps=1e9,
            delay_s=0.075,
            jitter_s=0.0005,
            loss=1e-4,
            queue_bytes=18.75e6,
        ),
        _symmetric(
            "lossy",
            "continental with 1 % of segments lost, in bursts of 3 on average, each way",
            rate_bps=1e9,
            delay_s=0.020,
            loss=0.01,
            loss_burst=3,
            queue_bytes=5e6,
        ),
        _symmetric(
            "bufferbloat",
            "200 Mbit/s, 40 ms RTT, 25 MB queue: a sender that fills it sees an RTT of one second",
            rate_bps=200e6,
            delay_s=0.020,
            queue_bytes=25e6,
        ),
        _symmetric(
            "flapping",
            "continental, down for the last 0.2 s of every 2 s, both ways",
            rate_bps=1e9,
            delay_s=0.020,
            queue_bytes=5e6,
            outage_every_s=2.0,
            outage_s=0.2,
        ),
        _symmetric(
            "partition",
            "continental, down for the last 3 s of every 13 s, both ways (for one cut use Wan.partition)",
            rate_bps=1e9,
            delay_s=0.020,
            queue_bytes=5e6,
            outage_every_s=13.0,
            outage_s=3.0,
        ),
    )
}


def profile(which: str | Profile) -> Profile:
    """Look a profile up by name. Raises ConfigError listing the names."""
    if isinstance(which, Profile):
        return which
    if which not in PROFILES:
        raise ConfigError(f"wan.profile: {which!r} is unknown; there are {', '.join(PROFILES)}")
    return PROFILES[which]
