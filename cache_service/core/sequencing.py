"""Put one source's batches in order: what to apply, to skip, to ask again, and when the source is a new one.

Decides from sequence numbers, publish times and the last payload; it must not touch sockets or the index: it
answers with a `Step` and the shell performs it.

The outside facts, from SGLang 0.5.21 `srt/disaggregation/kv_events.py`, ZmqEventPublisher:
* live batches carry seq 0, 1, 2, ...; PUB drops silently when a subscriber is slow or not there yet;
* a restarted worker counts from 0 again under the same address, and nothing in a batch says which life it
  is of;
* a replay request names a first seq; the answer is every batch from it on that the ring of 10,000 still has,
  oldest first, then an end mark. A request older than the ring is answered from the oldest batch, silently;
* a batch is in the ring before the publisher serves the next replay request;
* the answer goes through a ROUTER socket that drops, silently, what exceeds its high-water mark.

So a replay is asked from the last applied batch, **inclusive**. Its answer must begin with that very
payload: if so, same life, nothing missed before it. Another payload under that number, or no batch at all,
is a new epoch; a later number means that the ring has rolled past (or a new epoch did): both lose what is
known.

    live batch                          step
    seq == next                         APPLY
    seq >  next, or no position yet     REPLAY
    seq <  next, published later        REPLAY   (a new epoch, says the clock; the replay decides)
    seq <  next                         SKIP     (duplicate or late)

    replayed batch, first of an answer  step
    the anchor, equal payload           SKIP     (same epoch)
    the anchor, other payload           RESTART  (new epoch: drop all, replay from 0)
    above the anchor                    LOST     (drop all, then apply this one)
    no anchor: 0 / above 0              APPLY / APPLY, history incomplete
    replayed batch, later ones          APPLY, or AGAIN when the answer has a hole
    end mark                            DONE, or RESTART when the anchor never came
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: SGLang counts in 8 bytes unsigned on the wire; its end mark is -1, that is 2^64 - 1.
END_SEQ = (1 << 64) - 1


class Step(Enum):
    """What the shell does with a batch or an end mark."""

    APPLY = "apply"
    SKIP = "skip"
    REPLAY = "replay"
    AGAIN = "again"
    LOST = "lost"
    RESTART = "restart"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Position:
    """The last batch applied; `sent_unix_s` is its publisher's wall clock, None when it was unreadable."""

    seq: int
    payload: bytes
    sent_unix_s: float | None


class Sequencer:
    """The order of one source's stream; when a batch gets `APPLY` or `LOST`, the position has moved."""

    def __init__(self) -> None:
        self._position: Position | None = None
        #: In a replay: whether its first batch is still awaited.
        self._first = True
        #: True when batches before the first one applied were out of the ring.
        self.truncated = False

    @property
    def placed(self) -> bool:
        """Whether there is a position: a batch was applied, or `resume` said where to go on."""
        return self._position is not None

    @property
    def next_seq(self) -> int:
        """The sequence number that comes next; 0 before anything was seen."""
        return 0 if self._position is None else self._position.seq + 1

    def live(self, seq: int, payload: bytes, sent_unix_s: float | None) -> Step:
        """Place a batch of the live stream."""
        last = self._position
        if seq == self.next_seq:
            self._advance(seq, payload, sent_unix_s)
            return Step.APPLY
        if seq > self.next_seq or last is None:
            return Step.REPLAY
        if sent_unix_s is not None and last.sent_unix_s is not None and sent_unix_s > last.sent_unix_s:
            return Step.REPLAY
        return Step.SKIP

    def skip_to(self, seq: int, payload: bytes, sent_unix_s: float | None) -> None:
        """Take a live batch as the new position although batches are missing: there is no replay to ask."""
        self.truncated = True
        self._advance(seq, payload, sent_unix_s)

    def resume(self, seq: int, payload: bytes, sent_unix_s: float) -> None:
        """Go on behind a batch whose content, and all before it, came in a full dump."""
        self.truncated = False
        self._advance(seq, payload, sent_unix_s)

    def begin_replay(self) -> int:
        """Start reading an answer; return the seq to ask from (the anchor, or 0)."""
        self._first = True
        return 0 if self._position is None else self._position.seq

    def replayed(self, seq: int, payload: bytes, sent_unix_s: float | None) -> Step:
        """Place a batch of the answer to the request that `begin_replay` gave the number for."""
        last, first, self._first = self._position, self._first, False
        if first and last is not None:
            if seq == last.seq and payload == last.payload:
                return Step.SKIP
            if seq > last.seq:
                self.truncated = True
                self._advance(seq, payload, sent_unix_s)
                return Step.LOST
            self.forget()
            return Step.RESTART
        if last is not None and seq != last.seq + 1:
            return Step.AGAIN
        if last is None:
            self.truncated = seq > 0
        self._advance(seq, payload, sent_unix_s)
        return Step.APPLY

    def replay_end(self) -> Step:
        """Place the end mark of an answer."""
        if self._first and self._position is not None:
            self.forget()
            return Step.RESTART
        return Step.DONE

    def forget(self) -> None:
        """Start over, as if nothing had been seen."""
        self._position = None
        self._first = True
        self.truncated = False

    def _advance(self, seq: int, payload: bytes, sent_unix_s: float | None) -> None:
        self._position = Position(seq, payload, sent_unix_s)
