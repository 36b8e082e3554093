"""Workers that share one machine's cores: `shared_cores` of a scenario, a test fleet on one host. Pure.

Without it every worker has cores of its own. With it passes go on at a rate that depends on who else
computes at that moment; by how much each slows the other is measured before (docs/simulation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from router.simulate.clock import Clock
from router.simulate.spec import SharedCores

#: Seconds of work below which a pass is over: rounding.
_OVER_S = 1e-9


class Work(Enum):
    """What a pass does. REQUEST is HTTP, tokenising and scheduling: it is slowed, and slows nobody."""

    PREFILL = auto()
    DECODE = auto()
    REQUEST = auto()


@dataclass(slots=True)
class _Pass:
    left_s: float
    call: Callable[[Any], None]
    argument: Any


@dataclass(slots=True)
class Worker:
    """What an engine takes for its clock: times that it asks for are work, not time."""

    machine: Machine
    work: Work
    passes: list[_Pass] = field(default_factory=list)
    rate: float = 1.0

    @property
    def now_s(self) -> float:
        return self.machine.clock.now_s

    def at(self, when_s: float, call: Callable[[Any], None], argument: Any = None) -> None:
        self.machine.begin(self, _Pass(when_s - self.now_s, call, argument))


class Machine:
    """The cores that the workers of a simulation share."""

    def __init__(self, clock: Clock, shared: SharedCores) -> None:
        self.clock, self._shared = clock, shared
        self._workers: list[Worker] = []
        self._last_s = 0.0
        self._version = 0

    def worker(self, work: Work) -> Worker:
        """Return a clock for one more worker, or for the requests."""
        self._workers.append(Worker(self, work))
        return self._workers[-1]

    def begin(self, worker: Worker, what: _Pass) -> None:
        """Start a pass (or an answer or a request, which go on beside the worker's others)."""
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
        decoding = any(worker.work is Work.DECODE for worker in busy)
        prefills = sum(worker.work is Work.PREFILL for worker in busy)
        ends = []
        for worker in busy:
            longer = self._longer(worker.work, prefills, decoding)
            worker.rate = 1.0 / longer
            ends.append(min(each.left_s for each in worker.passes) * longer)
        self._version += 1
        if ends:
            self.clock.at(self.clock.now_s + max(0.0, min(ends)), self._event, self._version)

    def _longer(self, work: Work, prefills: int, decoding: bool) -> float:
        """Return how many times as long `work` takes beside what runs, itself counted in.

        Decoding is taken to be slowed as much as it slows the others; a request as a prefill in its place.
        """
        shared = self._shared
        if work is Work.DECODE:
            return shared.both if prefills > 1 else shared.decode if prefills else 1.0
        if prefills > (work is Work.PREFILL):
            return shared.both if decoding else shared.prefill
        return shared.decode if decoding else 1.0

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
