"""Whether to compress KV on a link: the modes, the codec numbers of the wire, and the adaptive choice.

Compressing pays while the link is slower than the codec. With n threads that encode C raw bytes a second
each, m that decode D, a link of B and a ratio r, frames that are encoded, sent and decoded one behind the
other move

    min(n C, r B, m D)   raw bytes a second, against B

The chooser starts on this forecast and goes on by what it sees: what arrives, times the ratio, must beat
what the link gave without the codec. No clock, threads or bytes here: rates and times come in, a decision
goes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from prfaas_sglang.core.framing import RAW
from prfaas_sglang.core.layout import Component

#: Codec numbers of a DATA frame; RAW is 0. See docs/wire-protocol.md.
PLANES = 1
FP8 = 2
CODEC_NAMES = {RAW: "raw", PLANES: "lossless", FP8: "fp8"}


class Mode(StrEnum):
    """What an operator allows."""

    NONE = "none"
    LOSSLESS = "lossless"
    FP8 = "fp8"


#: Codecs that a side sends and accepts in each mode.
CODECS = {
    Mode.NONE: frozenset({RAW}),
    Mode.LOSSLESS: frozenset({RAW, PLANES}),
    Mode.FP8: frozenset({RAW, PLANES, FP8}),
}
#: Element types that FP8 may stand for.
FP8_ELEMENTS = frozenset({"float32", "float16", "bfloat16"})
#: Components that are read by attention alone: a rounded linear state would stay wrong for the whole answer.
FP8_KINDS = frozenset({"kv", "swa"})


def takes_fp8(component: Component) -> bool:
    """True when a component's rows may be rounded, where the operator wants it."""
    return component.kind in FP8_KINDS and component.element in FP8_ELEMENTS


def pipelined(threads: int, encode: float, ratio: float, link: float, decode: float) -> float:
    """Return the raw bytes per second of encoding, sending and decoding frames one behind the other.

    Args:
        threads: threads that encode; as many are assumed to decode.
        encode, decode: raw bytes per second of one thread.
        ratio: raw bytes over wire bytes.
        link: wire bytes per second.
    """
    return min(threads * encode, ratio * link, threads * decode)


class Step(Enum):
    """What to do with one frame."""

    RAW = "raw"
    PROBE = "probe"  # encode, decode again and report both times; send what is smaller
    CODE = "code"  # encode and report the time; send what is smaller


#: The forecast must promise this much before the codec starts, and what is seen must keep this much.
START = 1.10
KEEP = 1.02
#: A ratio under this is not worth any processor time.
MIN_RATIO = 1.05
#: Frames encoded at once to learn a component's ratio; then one in PROBE_S, or in HARD_OFF_S under MIN_RATIO.
FIRST_PROBES = 4
PROBE_S = 1.0
HARD_OFF_S = 30.0
#: Weight of a new measurement in the averages.
WEIGHT = 0.3
#: What the link gives without the codec is not seen while that is in use. It is measured anew this often,
#: more rarely while the codec could feed a link SLACK times as fast, for PAUSE_S. SETTLE_S after each change
#: are left out: frames of before are still under way.
RECHECK_S = 10.0
RECHECK_SLACK_S = 30.0
SLACK = 1.4
PAUSE_S = 0.6
SETTLE_S = 0.3
#: After the codec did not keep its promise it is off for this long, twice as long each time, unless the link
#: changed.
BACKOFF_S = 4.0
BACKOFF_MAX_S = 120.0
CHANGED = 0.25


@dataclass(slots=True)
class _Kind:
    """What the codec does to one component's rows."""

    encode: float = 0.0  # raw bytes per second of one thread
    decode: float = 0.0
    ratio: float = 0.0
    probes: int = 0
    next_probe_s: float = 0.0


def _blend(old: float, new: float) -> float:
    return new if not old else old + WEIGHT * (new - old)


@dataclass(slots=True)
class Chooser:
    """The choice for one link. Not thread-safe.

    Attributes:
        on: the codec is in use for components that shrink.
        link: wire bytes per second that the link gives, 0 while unknown.
    """

    on: bool = False
    link: float = 0.0
    _kinds: dict[int, _Kind] = field(default_factory=dict)
    _changed_s: float = 0.0
    _pause_until_s: float = 0.0
    _measured_s: float = 0.0
    _arriving: float = 0.0
    _failed_link: float = 0.0
    _retry_s: float = 0.0
    _suspect: bool = False  # the link was measured anew because too little arrived
    _backoff_s: float = BACKOFF_S

    def next(self, now_s: float, component: int) -> Step:
        """Return what to do with the next frame of a component."""
        kind = self._kinds.setdefault(component, _Kind())
        if kind.probes < FIRST_PROBES or now_s >= kind.next_probe_s:
            kind.next_probe_s = now_s + (PROBE_S if self._shrinks(kind) or not kind.ratio else HARD_OFF_S)
            return Step.PROBE
        coding = self.on and now_s >= self._pause_until_s and self._shrinks(kind)
        return Step.CODE if coding else Step.RAW

    def coded(
        self,
        now_s: float,
        component: int,
        *,
        raw_bytes: int,
        wire_bytes: int,
        encode_s: float,
        decode_s: float | None = None,
    ) -> None:
        """Take what encoding one frame gave; `decode_s` with a probe."""
        kind = self._kinds.setdefault(component, _Kind())
        kind.encode = _blend(kind.encode, raw_bytes / max(encode_s, 1e-9))
        kind.ratio = _blend(kind.ratio, raw_bytes / max(wire_bytes, 1))
        if decode_s is not None:
            kind.decode = _blend(kind.decode, raw_bytes / max(decode_s, 1e-9))
            kind.probes += 1
            if kind.probes >= FIRST_PROBES and not self._shrinks(kind):
                kind.next_probe_s = now_s + HARD_OFF_S

    def sampled(self, now_s: float, goodput: float, threads: int) -> None:
        """Take a measurement of the link and decide.

        Args:
            goodput: wire bytes per second that arrived lately, while bytes waited to be sent.
            threads: threads that may encode at once.
        """
        pausing = now_s < self._pause_until_s
        changed_s = self._changed_s if pausing else max(self._changed_s, self._pause_until_s)
        if goodput <= 0 or now_s < changed_s + SETTLE_S:
            return
        kind = self._main()
        if pausing:
            self.link = _blend(self.link, goodput)
        elif not self.on:
            self.link = _blend(self.link, goodput)
            if kind is not None and self._promises(now_s, kind, threads):
                self._switch(now_s, on=True)
        elif kind is None:
            self._switch(now_s, on=False)
        else:
            self._judge(now_s, kind, goodput, threads)

    def _promises(self, now_s: float, kind: _Kind, threads: int) -> bool:
        if now_s < self._retry_s and abs(self.link / self._failed_link - 1) < CHANGED:
            return False
        forecast = pipelined(threads, kind.encode, kind.ratio, self.link, kind.decode)
        return forecast >= START * self.link

    def _judge(self, now_s: float, kind: _Kind, goodput: float, threads: int) -> None:
        self._arriving = _blend(self._arriving, goodput)
        if self._arriving > self.link:
            self.link = self._arriving
        slack = threads * min(kind.encode, kind.decode) >= SLACK * kind.ratio * self._arriving
        if pipelined(threads, kind.encode, kind.ratio, self.link, kind.decode) < KEEP * self.link:
            self._switch(now_s, on=False)  # the link has become faster, or the codec slower
        elif self._arriving * kind.ratio < KEEP * self.link:
            if not self._suspect:  # a slower link, or a codec that does not keep its promise?
                self._suspect = True
                self._pause(now_s)
            else:  # the latter: others use the processors
                self._failed_link, self._retry_s = self.link, now_s + self._backoff_s
                self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
                self._switch(now_s, on=False)
        elif now_s >= self._measured_s + (RECHECK_SLACK_S if slack else RECHECK_S):
            self._backoff_s = BACKOFF_S
            self._pause(now_s)
        elif now_s >= self._changed_s + RECHECK_S / 2:
            self._suspect = False

    def _pause(self, now_s: float) -> None:
        self._measured_s, self._pause_until_s = now_s, now_s + PAUSE_S
        self._changed_s = now_s
        self.link = self._arriving = 0.0

    def _switch(self, now_s: float, *, on: bool) -> None:
        self.on, self._changed_s, self._measured_s = on, now_s, now_s
        self._arriving, self._suspect = 0.0, False
        if not on:
            self.link = 0.0

    @staticmethod
    def _shrinks(kind: _Kind) -> bool:
        return kind.ratio >= MIN_RATIO

    def _main(self) -> _Kind | None:
        """Return what is known of the first component that shrinks: KV, where it does."""
        for number in sorted(self._kinds):
            kind = self._kinds[number]
            if kind.probes >= FIRST_PROBES and self._shrinks(kind):
                return kind
        return None
