"""Which of several services to ask: a circuit breaker for each, and a preference that sticks.

Decides whom the next attempt goes to (one that is still starting comes last) and when a service that failed
is tried again; pure, time is given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

#: After the first failure, and at most after many: how long until a probe.
_FIRST_PROBE_S = 0.1
_LAST_PROBE_S = 2.0
#: How long until a probe of a service that is starting.
_STARTING_PROBE_S = 0.2


@dataclass(slots=True)
class _Circuit:
    """`failures` in a row; open (not to be asked) from the first one until a probe or an answer.

    `starting`: it answers, and says that it knows less than it will.
    """

    failures: int = 0
    starting: bool = False
    probe_at_s: float = 0.0


class Endpoints:
    """Addresses of services that answer alike."""

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        self._circuits: dict[str, _Circuit] = {}
        self._preferred: str | None = None
        self.update(addresses)

    def update(self, addresses: Iterable[str]) -> frozenset[str]:
        """Make these the addresses; what is known of those that stay is kept. Return those that went."""
        new = {address: self._circuits.get(address) or _Circuit() for address in addresses}
        gone = frozenset(self._circuits.keys() - new.keys())
        self._circuits = new
        if self._preferred not in new:
            self._preferred = None
        return gone

    def __iter__(self) -> Iterator[str]:
        return iter(self._circuits)

    def __len__(self) -> int:
        return len(self._circuits)

    @property
    def broken(self) -> int:
        """How many have an open circuit."""
        return sum(1 for circuit in self._circuits.values() if circuit.failures)

    def pick(self, tried: Collection[str], *, starting: bool = True) -> str | None:
        """Return whom to ask: the last one that answered, else the first with a closed circuit.

        One that is known to be starting only when there is no other, and never unless `starting`.
        """
        if self._preferred is not None and self._preferred not in tried:
            return self._preferred
        last = None
        for address, circuit in self._circuits.items():
            if circuit.failures or address in tried:
                continue
            if not circuit.starting:
                return address
            last = last or address
        return last if starting else None

    def answered(self, address: str) -> None:
        """Note an answer of one that is ready: its circuit is closed; it is preferred if nobody is."""
        circuit = self._circuits.get(address)
        if circuit is not None:
            circuit.failures, circuit.starting = 0, False
            if self._preferred is None:
                self._preferred = address

    def starts(self, address: str, now_s: float) -> None:
        """Note an answer of one that is starting: the circuit is closed, others are asked first."""
        circuit = self._circuits.get(address)
        if circuit is not None:
            circuit.failures, circuit.starting = 0, True
            circuit.probe_at_s = now_s + _STARTING_PROBE_S
            if self._preferred == address:
                self._preferred = None

    def failed(self, address: str, now_s: float) -> None:
        """Note that an attempt or a probe failed: not asked until `answered`."""
        circuit = self._circuits.get(address)
        if circuit is not None:
            circuit.failures += 1
            delay_s = min(_LAST_PROBE_S, _FIRST_PROBE_S * 2.0 ** (min(circuit.failures, 16) - 1))
            circuit.probe_at_s = now_s + delay_s
            if self._preferred == address:
                self._preferred = None

    def due(self, now_s: float) -> list[str]:
        """Return the addresses to probe now."""
        return [a for a, c in self._circuits.items() if (c.failures or c.starting) and c.probe_at_s <= now_s]

    def next_probe_s(self) -> float | None:
        """Return when the next probe is due, None when all are well."""
        return min((c.probe_at_s for c in self._circuits.values() if c.failures or c.starting), default=None)
