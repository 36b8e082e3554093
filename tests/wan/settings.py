"""What one direction of a link is like: the values, their ranges, and how people write them.

Fields carry their unit; `parse` takes the short spelling of the command line (`rate=1gbit`, `delay=20ms`).
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields

from cache_service.core.errors import ConfigError

#: Largest share of the wire rate that TCP payload can have: 1448 bytes (with timestamps) of 1500 + 38.
TCP_SHARE = 1448 / 1538
#: The same for UDP datagrams of `payload` bytes: 28 bytes of headers, 38 of framing.
UDP_HEADERS, FRAMING = 28, 38


@dataclass(frozen=True)
class Direction:
    """One direction. Immutable; `Wan.set` changes a running link."""

    rate_bps: float = 1e9  #: bit/s on the wire, framing included; 0 = no limit
    delay_s: float = 0.01  #: one way, without queueing
    jitter_s: float = 0.0  #: standard deviation of an extra delay that changes smoothly; never reorders
    jitter_step_s: float = 0.01  #: time in which that extra delay moves to a new random value
    loss: float = 0.0  #: probability that a segment is lost
    loss_burst: float = 1.0  #: mean number of segments lost in a row (Gilbert-Elliott); 1 = independent
    corrupt: float = 0.0  #: probability that a segment has one bit of payload flipped, unseen by TCP
    queue_bytes: float = 2.5e6  #: drop-tail queue before the bottleneck
    up: bool = True  #: False: everything is dropped, packets in flight too
    drop_port: float = 0.0  #: packets from or to this TCP or UDP port are dropped as they come; 0 = none
    outage_every_s: float = 0.0  #: period of outages; 0 = none
    outage_s: float = 0.0  #: the last part of each period, in which the link is down
    lump_s: float = 250e-6  #: serialisation time that may arrive in one piece
    quantum_s: float = 200e-6  #: pause between rounds: less CPU, up to this much delay under load
    seed: int = 1  #: of the random numbers; the same seed loses the same segments

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(name, value)

    @property
    def tcp_limit_bps(self) -> float:
        """Payload rate that TCP cannot exceed at an MTU of 1500; infinite without a rate limit."""
        return self.rate_bps * TCP_SHARE if self.rate_bps else math.inf

    def udp_limit_bps(self, payload: int) -> float:
        """Payload rate of datagrams of `payload` bytes; infinite without a rate limit."""
        return self.rate_bps * payload / (payload + UDP_HEADERS + FRAMING) if self.rate_bps else math.inf


NAMES = tuple(field.name for field in fields(Direction))
RANGES: dict[str, tuple[float, float]] = {
    "rate_bps": (0, 1e12),
    "delay_s": (0, 10),
    "jitter_s": (0, 10),
    "jitter_step_s": (1e-5, 100),
    "loss": (0, 1),
    "loss_burst": (1, 1e6),
    "corrupt": (0, 1),
    "queue_bytes": (0, 1e9),
    "up": (0, 1),
    "drop_port": (0, 65535),
    "outage_every_s": (0, 1e6),
    "outage_s": (0, 1e6),
    "lump_s": (0, 1),
    "quantum_s": (0, 0.1),
    "seed": (0, 9e15),
}
_UNITS: dict[str, dict[str, float]] = {
    "bps": {"": 1, "bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9},
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6},
    "bytes": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "kib": 1024, "mib": 1 << 20},
    "": {"": 1, "%": 0.01},
}
#: Short name of the command line -> (field, unit family).
SHORT: dict[str, tuple[str, str]] = {}
for _name in NAMES:
    _head, _, _tail = _name.rpartition("_")
    _family = _tail if _head and _tail in _UNITS else ""
    SHORT[_head if _family else _name] = (_name, _family)


def check(name: str, value: object) -> float:
    """Return `value` as the number the emulator takes. Raises ConfigError naming the field and its range."""
    if name not in RANGES:
        raise ConfigError(f"wan.{name}: unknown; there are {', '.join(NAMES)}")
    low, high = RANGES[name]
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"wan.{name}: {value!r} is not a number from {low:g} to {high:g}")
    return float(value)


def parse(text: str) -> tuple[str, float]:
    """Turn `rate=1gbit` into ("rate_bps", 1e9). Raises ConfigError naming the key and the accepted units."""
    key, _, written = text.partition("=")
    if key not in SHORT:
        raise ConfigError(f"wan.{key}: unknown; write KEY=VALUE with a key of {', '.join(SHORT)}")
    name, family = SHORT[key]
    units = _UNITS[family]
    found = re.fullmatch(r"([0-9.]+(?:e-?[0-9]+)?)([a-z%]*)", written.strip().lower())
    if not found or found[2] not in units:
        spelled = ", ".join(u or "(none)" for u in units)
        raise ConfigError(f"wan.{key}: {written!r} is not a number with a unit of {spelled}")
    try:
        return name, check(name, float(found[1]) * units[found[2]])
    except ValueError as error:
        raise ConfigError(f"wan.{key}: {written!r} is not a number") from error
