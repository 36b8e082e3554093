"""When a path that was cut carries packets again although its connections do not. Pure.

After a cut TCP tries again when its timer says so, up to a second later at best, and slowly at first. Decode
finds out earlier: it asks over the connections, and when nothing answers it knocks with new ones. One that is
answered after some were not says that the path is back; the bundle is replaced then.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

#: Nothing heard for so long while transfers are open: ask. A prompt that is still computed looks the same.
QUIET_S = 0.8
#: For the answer to come, beside a few round trips. Behind data it comes late, but the data is heard.
ANSWER_S = 0.4
#: For one knock to be answered, likewise.
KNOCK_S = 0.25


class Step(Enum):
    """What to do now."""

    WAIT = auto()
    #: Send something that the peer answers.
    ASK = auto()
    #: Try a new connection and report to `knocked`.
    KNOCK = auto()
    #: End the connections: a new one gets through and they are not heard.
    REPLACE = auto()


@dataclass(slots=True)
class Lifeline:
    """Watches one bundle."""

    _heard_bytes: int = -1
    _heard_s: float = 0.0
    _asked_s: float | None = None
    _unanswered: int = 0
    _answered: bool = False

    def step(self, now_s: float, heard_bytes: int, rtt_s: float) -> Step:
        """Return what to do; call it some times a second while transfers are open.

        Args:
            now_s: monotonic time.
            heard_bytes: bytes received so far over all connections.
            rtt_s: round trip in quiet times.
        """
        if heard_bytes != self._heard_bytes:
            self._heard_bytes = heard_bytes
            self.rest(now_s)
        elif self._asked_s is None:
            if now_s - self._heard_s >= QUIET_S:
                self._asked_s = now_s
                return Step.ASK
        elif self._answered:
            # reached at the first knock: the peer is there and busy, or TCP has it right in a moment
            return Step.REPLACE if self._unanswered else Step.WAIT
        elif now_s - self._asked_s >= ANSWER_S + 4 * rtt_s:
            return Step.KNOCK
        return Step.WAIT

    def knocked(self, reached: bool) -> None:
        """Note how a knock ended."""
        if reached:
            self._answered = True
        else:
            self._unanswered += 1

    def rest(self, now_s: float) -> None:
        """Begin anew: something was heard, or nothing is expected."""
        self._heard_s = now_s
        self._asked_s = None
        self._unanswered = 0
        self._answered = False
