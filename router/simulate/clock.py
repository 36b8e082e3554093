"""The queue of events: virtual time, in order, ties by the order they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Protocol


class Timer(Protocol):
    """What tells the time and calls back: the Clock itself, or cores that are shared (machine.py)."""

    @property
    def now_s(self) -> float: ...

    def at(self, when_s: float, call: Callable[[Any], None], argument: Any = None) -> None: ...


class Clock:
    """Virtual seconds since the start. Events are plain tuples, compared by time and number only."""

    __slots__ = ("_heap", "_number", "handled", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.handled = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._number = 0

    def at(self, when_s: float, call: Callable[[Any], None], argument: Any = None) -> None:
        """Call `call(argument)` at `when_s`, which is not in the past. O(log events)."""
        self._number += 1
        heapq.heappush(self._heap, (when_s, self._number, call, argument))

    def run(self) -> None:
        """Handle events until there are none."""
        heap, pop = self._heap, heapq.heappop
        handled = 0
        while heap:
            when_s, _, call, argument = pop(heap)
            self.now_s = when_s
            handled += 1
            call(argument)
        self.handled += handled
