"""How fast one bundle of connections may send: the control loop over what TCP reports, as a pure function.

The kernel's congestion control fills the pipe per connection; several connections, and several bundles on one
link, together overfill it: queues stand, an urgent transfer waits behind them, and bytes are retransmitted
after every overflow. Capping the bundle just under what the link delivers keeps the queue empty at the same
goodput (measured: docs/adr/0008). This controller finds that cap and follows it:

    OPEN     no cap, until the link is full: round trips inflate
    CRUISE   cap = goodput * HEADROOM; probes upward, faster each time a probe pays
    DRAIN    cap well under goodput until round trips are short again

Round trips may be long for other reasons than a queue of ours: another route, acknowledgements held back on a
slow link, somebody else's traffic. Then slowing down does not shorten them; after a few futile steps the
length is taken for the path's own, until they are shorter again.

Loss alone does not slow it down: on a lossy path the kernel's model decides; a queue shows in round trips.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Sample:
    """What the connections of a bundle report at one moment.

    Attributes:
        now_s: monotonic time.
        acked_bytes: bytes that arrived so far as the peer's acknowledgements tell, selective ones included,
            all connections.
        srtt_s: smoothed round trip, the median connection.
        min_rtt_s: least round trip seen, all connections.
        busy: bytes waited to be sent ever since the last sample; otherwise goodput says nothing of the link.
    """

    now_s: float
    acked_bytes: int
    srtt_s: float
    min_rtt_s: float
    busy: bool


class Phase(Enum):
    """Where the controller is; see the module's text."""

    OPEN = "open"
    CRUISE = "cruise"
    DRAIN = "drain"


#: Goodput is taken over this many round trips, at least MIN_WINDOW_S.
WINDOW_RTTS = 1.0
MIN_WINDOW_S = 0.06
#: A queue stands when the smoothed round trip exceeds the least one by this part, and by MIN_QUEUE_S.
QUEUE_RATIO = 0.25
MIN_QUEUE_S = 0.003
#: Cap relative to the goodput measured when the link was full.
HEADROOM = 0.998
DRAIN_RATIO = 0.8
#: The same when the queue is deeper than a round trip: the link has become slower by far.
DEEP_DRAIN_RATIO = 0.5
#: After a probe has found the link full, the next one waits this long (and four windows at least).
FULL_PAUSE_S = 0.8
#: First probe, its growth with each probe that pays, and the largest.
PROBE = 1.05
PROBE_GROWTH = 2.0
PROBE_MAX = 1.6
#: A probe paid when goodput reaches this part of the cap.
PAID = 0.9
#: The cap is not raised further above goodput than this.
REACH = 1.5
#: After a partition TCP repairs what was lost first: goodput and round trips say nothing for so long.
RECOVERY_S = 0.5
#: Round trips after an idle spell until acknowledgements come at the sending rate.
FILL_RTTS = 1.5
FLOOR_BYTES_PER_S = 128 << 10
#: A step of DRAIN was futile when the smoothed round trip fell by less than this part.
RELIEF = 0.1
#: A queue of ours is emptying while goodput exceeds the cap by this factor.
EMPTYING = 1.2
#: Futile steps in a row until the round trip is taken for the path's own.
FUTILE_STEPS = 3


@dataclass(slots=True)
class RateController:
    """The control loop of one bundle. Feed `update` about every 20 ms while sending."""

    phase: Phase = Phase.OPEN
    cap_bytes_per_s: float | None = None
    goodput_bytes_per_s: float = 0.0
    _history: deque[Sample] = field(default_factory=deque)
    _next_probe_s: float = 0.0
    _step: float = PROBE
    _filling_until_s: float | None = None
    _queued_since_s: float | None = None
    _full_bytes_per_s: float = 0.0
    _drain_until_s: float = 0.0
    _drained_from_s: float = 0.0  # smoothed round trip at the last step
    _before_drain_bytes_per_s: float = 0.0
    _futile: int = 0
    _stalled_at_bytes: int | None = None
    _path_rtt_s: float = 0.0  # round trip without a queue of ours, 0 while that is the least one

    def update(self, sample: Sample) -> float | None:
        """Take a sample; return the cap in bytes per second, None for no cap."""
        history = self._history
        if not sample.busy:
            # an idle spell says nothing about the link: keep the cap, measure afresh
            history.clear()
            self._filling_until_s = None
            return self.cap_bytes_per_s
        if self._stalled_at_bytes is not None:
            if sample.acked_bytes == self._stalled_at_bytes:
                return self.cap_bytes_per_s
            self._stalled_at_bytes = None
            self._filling_until_s = sample.now_s + max(RECOVERY_S, FILL_RTTS * sample.min_rtt_s)
        if self._filling_until_s is None:
            # the pipe is empty: for a round trip acknowledgements say nothing of the link either
            self._filling_until_s = sample.now_s + FILL_RTTS * sample.min_rtt_s
            self._next_probe_s = self._filling_until_s
        if sample.now_s < self._filling_until_s:
            return self.cap_bytes_per_s
        history.append(sample)
        window = self._window(sample)
        while len(history) > 2 and history[1].now_s <= sample.now_s - window:
            history.popleft()
        span = sample.now_s - history[0].now_s
        if span < 0.5 * window:
            return self.cap_bytes_per_s
        self.goodput_bytes_per_s = (sample.acked_bytes - history[0].acked_bytes) / span
        if not self.goodput_bytes_per_s:
            # nothing arrives at all: a partition; what comes after it starts with an empty pipe
            history.clear()
            self._stalled_at_bytes = sample.acked_bytes
            return self.cap_bytes_per_s
        self._path_rtt_s = min(self._path_rtt_s, sample.srtt_s)
        path_rtt_s = max(self._path_rtt_s, sample.min_rtt_s)
        queued = sample.srtt_s - path_rtt_s > max(MIN_QUEUE_S, QUEUE_RATIO * path_rtt_s)
        match self.phase:
            case Phase.OPEN:
                self._open(sample, queued, window)
            case Phase.CRUISE:
                self._cruise(sample, queued, window)
            case Phase.DRAIN:
                self._drain(sample, queued, window)
        return self.cap_bytes_per_s

    @staticmethod
    def _window(sample: Sample) -> float:
        return max(MIN_WINDOW_S, WINDOW_RTTS * sample.min_rtt_s)

    def _open(self, sample: Sample, queued: bool, window: float) -> None:
        if not queued:
            self._queued_since_s = None
            return
        if self._queued_since_s is None:
            self._queued_since_s = sample.now_s
        # while a queue stands, acknowledgements come at the link's rate; take a window of them
        if sample.now_s - self._queued_since_s >= window:
            self._start_drain(sample, window)

    def _cruise(self, sample: Sample, queued: bool, window: float) -> None:
        if queued:
            self._start_drain(sample, window)
            return
        if sample.now_s < self._next_probe_s or self.cap_bytes_per_s is None:
            return
        self._next_probe_s = sample.now_s + 2 * window
        paid = self.goodput_bytes_per_s >= PAID * self.cap_bytes_per_s
        # without a queue it is not the link that holds goodput under the cap: repaired losses, or the
        # kernel's own ramp; the cap stays in reach above it
        ceiling = max(self.cap_bytes_per_s, REACH * self.goodput_bytes_per_s)
        self.cap_bytes_per_s = min(self.cap_bytes_per_s * self._step, ceiling)
        self._step = min(PROBE_MAX, 1 + (self._step - 1) * PROBE_GROWTH) if paid else PROBE

    def _drain(self, sample: Sample, queued: bool, window: float) -> None:
        if queued:
            self._full_bytes_per_s = max(self._full_bytes_per_s, self.goodput_bytes_per_s)
        if sample.now_s < self._drain_until_s:
            return
        if queued:
            # still standing: what comes back now is all that the link gives
            self._full_bytes_per_s = self.goodput_bytes_per_s
            relieved = sample.srtt_s < (1 - RELIEF) * self._drained_from_s
            # more comes back than the cap lets out: a queue of ours is emptying, however slowly
            emptying = self.goodput_bytes_per_s > EMPTYING * (self.cap_bytes_per_s or 0.0)
            self._futile = 0 if relieved or emptying else self._futile + 1
            self._drained_from_s = sample.srtt_s
            if self._futile < FUTILE_STEPS:
                deep = sample.srtt_s > 2 * sample.min_rtt_s
                self._set_cap((DEEP_DRAIN_RATIO if deep else DRAIN_RATIO) * self._full_bytes_per_s)
                self._drain_until_s = sample.now_s + max(window, sample.srtt_s)
                return
            self._path_rtt_s = sample.srtt_s
            self._full_bytes_per_s = self._before_drain_bytes_per_s
        self.phase = Phase.CRUISE
        self._set_cap(self._full_bytes_per_s * HEADROOM)
        self._step = PROBE
        self._next_probe_s = sample.now_s + max(FULL_PAUSE_S, 4 * window)

    def _start_drain(self, sample: Sample, window: float) -> None:
        self.phase = Phase.DRAIN
        self._full_bytes_per_s = self._before_drain_bytes_per_s = self.goodput_bytes_per_s
        self._drained_from_s, self._futile = sample.srtt_s, 0
        self._set_cap(DRAIN_RATIO * self.goodput_bytes_per_s)
        self._drain_until_s = sample.now_s + window

    def _set_cap(self, value: float) -> None:
        self.cap_bytes_per_s = max(FLOOR_BYTES_PER_S, value)
