"""Simulated workers that share one machine's cores, as the fleet of this benchmark does. Pure.

`prfaas simulate` gives every worker a machine of its own. Here a worker's passes go on at a rate that depends
on who else computes at that moment; by how much each slows the other was measured before (Slowdowns).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from router.simulate.clock import Clock
from router.simulate.run import Simulation

#: Seconds of work below which a pass is over: rounding.
_OVER_S = 1e-9


@dataclass(frozen=True, slots=True)
class Slowdowns:
    """How many times as long a prefill takes: beside another prefill, beside decoding, beside both."""

    prefill: float = 1.0
    decode: float = 1.0
    both: float = 1.0

    def of_prefill(self, others: int, decoding: bool) -> float:
        """Return a prefill's, `others` more computing."""
        return (self.both if decoding else self.prefill) if others else (self.decode if decoding else 1.0)

    def of_decode(self, prefills: int) -> float:
        """Return a decode step's: taken to be slowed as much as it slows the others."""
        return self.both if prefills > 1 else self.decode if prefills else 1.0


@dataclass(slots=True)
class _Pass:
    left_s: float
    call: Callable[[Any], None]
    argument: Any


@dataclass(slots=True)
class _Worker:
    """What an engine takes for its clock: times that it asks for are work, not time."""

    machine: Machine
    decodes: bool
    passes: list[_Pass] = field(default_factory=list)
    rate: float = 1.0

    @property
    def now_s(self) -> float:
        return self.machine.clock.now_s

    def at(self, when_s: float, call: Callable[[Any], None], argument: Any = None) -> None:
        self.machine.begin(self, _Pass(when_s - self.now_s, call, argument))


class Machine:
    """The cores that the workers of a simulation share."""

    def __init__(self, clock: Clock, slowdowns: Slowdowns) -> None:
        self.clock, self._slowdowns = clock, slowdowns
        self._workers: list[_Worker] = []
        self._last_s = 0.0
        self._version = 0

    def put(self, engine: Any, *, decodes: bool) -> None:
        """Let an engine compute here; before it begins."""
        engine.clock = _Worker(self, decodes)
        self._workers.append(engine.clock)

    def begin(self, worker: _Worker, what: _Pass) -> None:
        """Start a pass (or an answer, which goes on beside the worker's others)."""
        self._advance()
        worker.passes.append(what)
        self._plan()

    def _advance(self) -> None:
        elapsed_s, self._last_s = self.clock.now_s - self._last_s, self.clock.now_s
        for worker in self._workers:
            for each in worker.passes:
                each.left_s -= elapsed_s * worker.rate

    def _plan(self) -> None:
        busy = [worker for worker in self._workers if worker.passes]
        decoding = any(worker.decodes for worker in busy)
        prefills = sum(not worker.decodes for worker in busy)
        ends = []
        for worker in busy:
            slow = self._slowdowns
            longer = slow.of_decode(prefills) if worker.decodes else slow.of_prefill(prefills - 1, decoding)
            worker.rate = 1.0 / longer
            ends.append(min(each.left_s for each in worker.passes) * longer)
        self._version += 1
        if ends:
            self.clock.at(self.clock.now_s + max(0.0, min(ends)), self._event, self._version)

    def _event(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        over = []
        for worker in self._workers:
            over += [each for each in worker.passes if each.left_s <= _OVER_S]
            worker.passes = [each for each in worker.passes if each.left_s > _OVER_S]
        self._plan()
        for each in over:
            each.call(each.argument)


def share(simulation: Simulation, slowdowns: Slowdowns) -> None:
    """Put all workers of a simulation that has not begun on one machine."""
    machine = Machine(simulation.clock, slowdowns)
    for prefill in simulation.prefills.values():
        machine.put(prefill, decodes=False)
    for decode in simulation.decodes.values():
        machine.put(decode, decodes=True)
