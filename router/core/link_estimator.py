"""What a link can carry now, from what its senders tell once a second; acts before queues build.

One estimator for each direction of each pair of sites, feeding one LinkState. Rests on TCP's own signals
(TCP_INFO, as prfaas_sglang/transfer/telemetry.py sums them up): a share of retransmitted bytes and a round
trip grown above its least one say that a queue is filling somewhere, before goodput falls. Goodput is
capacity only where bytes were waiting to be sent all the while; an idle link, or one that prefill cannot
fill, says nothing and keeps its figure.

    state       event                                          next         rate
    CLEAR       loss or inflated round trip, bytes waiting     CONGESTED    cut to CUT x min(rate, goodput)
    CLEAR       bytes waiting                                  CLEAR        goodput's, down fast, up slowly
    CLEAR       nothing waiting, or no news                    CLEAR        as it is
    CONGESTED   loss or inflated round trip, bytes waiting     CONGESTED    cut again, once a CUT_PERIOD_S
    CONGESTED   CLEAN samples in a row without                 RECOVERING   as it is
    RECOVERING  as CLEAR -> CONGESTED                          CONGESTED    cut
    RECOVERING  clean                                          RECOVERING   up by STEP of capacity a second
    RECOVERING  capacity reached                               CLEAR        capacity
    any         bytes waiting, nothing delivered for DEAD_S    DOWN         no route uses it
    DOWN        bytes delivered, or HOLD over: one is tried    RECOVERING   half of capacity, CLEAN samples on

HOLD starts at HOLD_S and doubles with each DOWN, up to MAX_HOLD_S, while they come less than FORGET_S apart:
a link that flaps is tried ever more rarely. Must not read a clock or sample anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.core.decision import LinkState

#: Retransmitted share of the bytes, and round trip over its least plus SLACK_S, that mean congestion.
#: Measured on an emulated 1 Gbit/s, 40 ms path: 8.9 % and 2.0 unpaced, 0.0 % and 1.02 paced.
LOSS = 0.02
INFLATION = 1.5
SLACK_S = 0.005
CUT, CUT_PERIOD_S = 0.85, 1.0
DOWN_GAIN, UP_GAIN = 0.5, 0.2
STEP = 0.05
CLEAN = 3
DEAD_S = 3.0
#: Bytes must have waited for this share of the last second for goodput to be what the link gives: between the
#: chunks of a prefill there is nothing to send.
BUSY = 0.8
HOLD_S, MAX_HOLD_S, FORGET_S = 2.0, 30.0, 120.0
#: Regime of `prfaas`: abundant below the one share of the rate used, scarce again above the other.
ABUNDANT, SCARCE = 0.5, 0.75
#: Never below this share of the configured capacity: a floor to recover from.
FLOOR = 0.01


class State(StrEnum):
    """State of one link's estimate."""

    CLEAR = "clear"
    CONGESTED = "congested"
    RECOVERING = "recovering"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Sample:
    """What all senders of one link said, summed, at one moment.

    Attributes:
        goodput_bytes_per_s: delivered lately.
        sent_bytes, retransmitted_bytes: cumulative; they may restart.
        srtt_s, min_rtt_s: longest smoothed and least round trip, 0 when there is none yet.
        waiting_bytes: computed and not yet handed to TCP; 0 is an idle link.
        busy_ratio: share of the last second in which bytes waited.
    """

    goodput_bytes_per_s: float
    sent_bytes: float
    retransmitted_bytes: float
    srtt_s: float
    min_rtt_s: float
    waiting_bytes: float
    busy_ratio: float = 1.0


class LinkEstimator:
    """Keeps one LinkState's rate, rtt, loss, up and abundant; the rest of it belongs to others."""

    def __init__(self, link: LinkState) -> None:
        self.link = link
        self.state = State.CLEAR
        self.estimate_bytes_per_s = link.capacity_bytes_per_s
        self._last: Sample | None = None
        self._last_s = 0.0
        self._cut_s = float("-inf")
        self._clean = 0
        self._silent_since_s: float | None = None
        self._down_s = float("-inf")
        self._hold_s = HOLD_S
        self._publish()

    def observe(self, sample: Sample, now_s: float) -> None:
        """Take the senders' word; `now_s` must not go back. O(1)."""
        link, last = self.link, self._last
        elapsed_s = now_s - self._last_s if last is not None else 0.0
        sent = sample.sent_bytes - last.sent_bytes if last is not None else 0.0
        lost = sample.retransmitted_bytes - last.retransmitted_bytes if last is not None else 0.0
        if sent < 0 or lost < 0:  # a sender has started again
            sent = lost = 0.0
        self._last, self._last_s = sample, now_s
        link.loss_ratio += 0.5 * (min(1.0, lost / sent if sent else 0.0) - link.loss_ratio)
        link.rtt_s = sample.srtt_s or link.rtt_s
        link.goodput_bytes_per_s = sample.goodput_bytes_per_s
        link.in_flight_bytes = sample.waiting_bytes
        waiting = sample.waiting_bytes > 0
        delivering = sample.goodput_bytes_per_s > FLOOR * FLOOR * link.capacity_bytes_per_s
        self._look_for_death(waiting, delivering, now_s)
        if self.state is not State.DOWN:
            inflated = sample.min_rtt_s > 0 and sample.srtt_s > INFLATION * sample.min_rtt_s + SLACK_S
            bad = waiting and (inflated or (sent > 0 and lost / sent > LOSS))
            loaded = waiting and delivering and sample.busy_ratio >= BUSY
            self._step(bad, loaded, elapsed_s, now_s)
        self._publish()

    def tick(self, now_s: float) -> None:
        """Let time pass without news: the hold of a dead link ends. Call at least once a second."""
        if self.state is State.DOWN and now_s >= self._down_s + self._hold_s:
            self._revive(now_s)
            self._publish()

    def _look_for_death(self, waiting: bool, delivering: bool, now_s: float) -> None:
        if not waiting or delivering:
            self._silent_since_s = None
            if self.state is State.DOWN and delivering:
                self._revive(now_s)
            return
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        if self.state is not State.DOWN and now_s - self._silent_since_s >= DEAD_S:
            again = now_s - self._down_s < FORGET_S
            self._hold_s = min(MAX_HOLD_S, 2 * self._hold_s) if again else HOLD_S
            self.state, self._down_s = State.DOWN, now_s

    def _revive(self, now_s: float) -> None:
        self.state, self._clean = State.RECOVERING, 0
        self._silent_since_s = None
        self.estimate_bytes_per_s = min(self.estimate_bytes_per_s, 0.5 * self.link.capacity_bytes_per_s)
        self._last_s = now_s

    def _step(self, bad: bool, loaded: bool, elapsed_s: float, now_s: float) -> None:
        capacity, goodput = self.link.capacity_bytes_per_s, self.link.goodput_bytes_per_s
        if bad:
            self._clean = 0
            if now_s - self._cut_s >= CUT_PERIOD_S:
                self._cut_s = now_s
                base = min(self.estimate_bytes_per_s, goodput) if loaded else self.estimate_bytes_per_s
                self.estimate_bytes_per_s = CUT * base
            self.state = State.CONGESTED
            return
        self._clean += 1
        if self.state is State.CONGESTED:
            if self._clean >= CLEAN:
                self.state = State.RECOVERING
        elif self.state is State.RECOVERING:
            if self._clean >= CLEAN:
                self.estimate_bytes_per_s += STEP * capacity * min(elapsed_s, 5.0)
                if loaded:  # never far above what it is seen to carry
                    self.estimate_bytes_per_s = min(self.estimate_bytes_per_s, 1.25 * goodput)
            if self.estimate_bytes_per_s >= 0.98 * capacity:
                self.state = State.CLEAR
        elif loaded:
            gain = DOWN_GAIN if goodput < self.estimate_bytes_per_s else UP_GAIN
            self.estimate_bytes_per_s += gain * (goodput - self.estimate_bytes_per_s)
        else:
            # Nothing is known of an idle link: doubt in a low figure fades.
            self.estimate_bytes_per_s += 0.01 * min(elapsed_s, 5.0) * (capacity - self.estimate_bytes_per_s)

    def _publish(self) -> None:
        link = self.link
        floor = FLOOR * link.capacity_bytes_per_s
        self.estimate_bytes_per_s = min(max(self.estimate_bytes_per_s, floor), link.capacity_bytes_per_s)
        link.up = self.state is not State.DOWN
        link.rate_bytes_per_s = min(self.estimate_bytes_per_s, link.ceiling_bytes_per_s)
        used = link.goodput_bytes_per_s / link.rate_bytes_per_s
        if self.state is not State.CLEAR or used > SCARCE or link.in_flight_bytes > link.rate_bytes_per_s:
            link.abundant = False
        elif used < ABUNDANT:
            link.abundant = True
