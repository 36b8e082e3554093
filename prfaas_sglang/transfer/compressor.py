"""How the frames of one bundle are coded: what the operator allows, what pays on this link, and doing it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from prfaas_sglang.core.compression import FP8, PLANES, Chooser, Step, takes_fp8
from prfaas_sglang.core.framing import RAW, Data
from prfaas_sglang.core.layout import ELEMENT_BYTES, Layout
from prfaas_sglang.transfer.codec import Buffer, decode_planes, encode_fp8, encode_planes

#: A frame with fewer row bytes goes as it is.
MIN_FRAME_BYTES = 2048

#: (codec, row bytes, bytes as sent, seconds of encoding)
Observe = Callable[[int, int, int, float], None]
Coded = tuple[Data, Sequence[Buffer]]


class Compressor:
    """The sending side of one bundle's compression. Thread-safe.

    FP8, where both sides allow it, is not left to chance: KV is always rounded then, so that an answer does
    not depend on the link's load. Lossless is used when it pays (core/compression.py).

    Args:
        layout: what the rows are.
        codecs: codecs that both sides allow.
        observe: hears of every frame, on writer threads.
    """

    def __init__(self, layout: Layout, codecs: frozenset[int], observe: Observe) -> None:
        self._layout = layout
        self._codecs = codecs
        self._only_raw = codecs <= {RAW}
        self._observe = observe
        self._cores = len(os.sched_getaffinity(0))
        self._lock = threading.Lock()
        self._chooser = Chooser()
        self._widths: dict[tuple[int, int], int] = {}

    def sampled(self, goodput_bytes_per_s: float, connections: int) -> None:
        """Take what the link delivered lately, 0 when nothing was sent."""
        with self._lock:
            self._chooser.sampled(time.monotonic(), goodput_bytes_per_s, min(connections, self._cores))

    def encode(self, data: Data, views: Sequence[Buffer]) -> Coded:
        """Return the descriptor and the payload of a frame whose rows are `views`."""
        raw_bytes = wire_bytes = sum(map(len, views))
        coded, seconds = (data, views), 0.0
        if raw_bytes >= MIN_FRAME_BYTES and not self._only_raw:
            begin_s = time.perf_counter()
            tried = self._coded(data, views, raw_bytes)
            seconds = time.perf_counter() - begin_s
            if tried is not None and (shorter := sum(map(len, tried[1]))) < raw_bytes:
                coded, wire_bytes = tried, shorter
        self._observe(coded[0].codec, raw_bytes, wire_bytes, seconds)
        return coded

    def _coded(self, data: Data, views: Sequence[Buffer], raw_bytes: int) -> Coded | None:
        component = self._layout.components[data.component]
        if FP8 in self._codecs and takes_fp8(component):
            parts = encode_fp8(views, component.element, data.count)
            if parts is not None:
                return replace(data, codec=FP8), parts
        if PLANES not in self._codecs:
            return None
        with self._lock:
            step = self._chooser.next(time.monotonic(), data.component)
        if step is Step.RAW:
            return None
        return replace(data, codec=PLANES), self._planes(data, views, raw_bytes, probe=step is Step.PROBE)

    def _planes(self, data: Data, views: Sequence[Buffer], raw_bytes: int, *, probe: bool) -> list[Buffer]:
        width = self._width(data, views)
        begin_s = time.perf_counter()
        parts = encode_planes(views, width)
        end_s = time.perf_counter()
        decode_s = None
        if probe:
            payload = b"".join(parts)
            joined_s = time.perf_counter()
            decode_planes(payload, raw_bytes)
            decode_s = time.perf_counter() - joined_s
        with self._lock:
            self._chooser.coded(
                time.monotonic(),
                data.component,
                raw_bytes=raw_bytes,
                wire_bytes=min(raw_bytes, sum(len(part) for part in parts)),
                encode_s=end_s - begin_s,
                decode_s=decode_s,
            )
        return parts

    def _width(self, data: Data, views: Sequence[Buffer]) -> int:
        """Return an element's bytes: as the engine says, or what shrinks the tensor's first frame most."""
        known = ELEMENT_BYTES.get(self._layout.components[data.component].element)
        if known is not None:
            return known
        key = data.component, data.tensor
        width = self._widths.get(key)
        if width is None:
            sizes = {w: sum(len(part) for part in encode_planes(views, w)) for w in (1, 2, 4)}
            width = self._widths[key] = min(sizes, key=lambda w: (sizes[w], w))
        return width
