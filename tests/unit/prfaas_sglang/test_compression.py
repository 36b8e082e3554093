"""The adaptive choice against a simulated link whose best answer is known."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.core.errors import RemoteProtocolError
from prfaas_sglang.core.compression import (
    CODECS,
    FIRST_PROBES,
    FP8,
    HARD_OFF_S,
    MIN_RATIO,
    PLANES,
    PROBE_S,
    Chooser,
    Mode,
    Step,
    pipelined,
    takes_fp8,
)
from prfaas_sglang.core.framing import Data
from prfaas_sglang.core.layout import (
    Component,
    Hello,
    Layout,
    check_layout,
    decode_hello,
    differences,
    encode_hello,
    to_json,
)
from prfaas_sglang.core.session import ImportSession

FRAME = 256 << 10
TICK_S = 0.02


@dataclass
class World:
    """A link and a codec: rates in bytes per second, `lie` what the codec really reaches of its rates."""

    link: float
    encode: float
    decode: float
    ratio: float
    threads: int = 4
    lie: float = 1.0

    @property
    def coded(self) -> float:
        """Raw bytes per second with the codec."""
        return pipelined(self.threads, self.encode * self.lie, self.ratio, self.link, self.decode * self.lie)


@dataclass
class Run:
    """Averages over a simulated stretch."""

    raw_rate: float
    coded_share: float


def run(chooser: Chooser, world: World, begin_s: float, seconds: float, skip_s: float = 0.0) -> Run:
    """Let the chooser decide for `seconds`; averages leave out the first `skip_s`."""
    rates, coded = [], []
    for tick in range(round(seconds / TICK_S)):
        now_s = begin_s + tick * TICK_S
        step = chooser.next(now_s, 0)
        if step is not Step.RAW:
            chooser.coded(
                now_s,
                0,
                raw_bytes=FRAME,
                wire_bytes=int(FRAME / world.ratio),
                encode_s=FRAME / world.encode,
                decode_s=FRAME / world.decode if step is Step.PROBE else None,
            )
        using = chooser.next(now_s, 0) is Step.CODE  # a probe is one frame of many
        rate = world.coded if using else world.link
        chooser.sampled(now_s, rate / world.ratio if using else rate, world.threads)
        if tick * TICK_S >= skip_s:
            rates.append(rate)
            coded.append(using)
    return Run(sum(rates) / len(rates), sum(coded) / len(coded))


rates = st.floats(5e6, 2e10)
worlds = st.builds(
    World,
    link=rates,
    encode=rates,
    decode=rates,
    ratio=st.floats(1.0, 8.0),
    threads=st.integers(1, 16),
)


@settings(max_examples=60, deadline=None)
@given(worlds)
def test_the_better_of_both_is_found(world: World) -> None:
    """After a few seconds the rate is within 15 % of the better of codec and no codec."""
    seen = run(Chooser(), world, 0.0, 40.0, skip_s=5.0)
    best = max(world.link, world.coded if world.ratio >= MIN_RATIO else 0.0)
    assert seen.raw_rate >= 0.85 * best


@settings(max_examples=60, deadline=None)
@given(worlds, st.floats(0.05, 1.0))
def test_a_codec_that_does_not_keep_its_promise_costs_little(world: World, lie: float) -> None:
    """Whatever the codec's measured times promise, less than 10 % of the link's rate is lost for good."""
    world.lie = lie
    seen = run(Chooser(), world, 0.0, 60.0, skip_s=20.0)
    assert seen.raw_rate >= 0.9 * world.link


@settings(max_examples=40, deadline=None)
@given(worlds, rates)
def test_it_follows_a_link_that_changes(world: World, later: float) -> None:
    """A link that becomes slower or faster is answered within 15 s."""
    chooser = Chooser()
    run(chooser, world, 0.0, 20.0)
    world.link = later
    seen = run(chooser, world, 20.0, 45.0, skip_s=15.0)
    best = max(world.link, world.coded if world.ratio >= MIN_RATIO else 0.0)
    assert seen.raw_rate >= 0.85 * best


@pytest.mark.parametrize(
    ("link", "share"), [(12.5e6, 0.9), (125e6, 0.9), (1.2e9, 0.9), (5e9, 0.0), (12.5e9, 0.0)]
)
def test_measured_codec_on_real_links(link: float, share: float) -> None:
    """100 Mbit/s to 10 Gbit/s are compressed on two cores of this codec, 40 and 100 Gbit/s are not."""
    world = World(link, encode=1.4e9, decode=2.9e9, ratio=1.45, threads=2)
    seen = run(Chooser(), world, 0.0, 30.0, skip_s=5.0)
    assert seen.coded_share >= share if share else seen.coded_share == 0.0


def test_what_does_not_shrink_is_tried_rarely() -> None:
    """Under MIN_RATIO a frame in HARD_OFF_S is encoded, above it one in PROBE_S."""
    for ratio, expected in ((1.0, 1), (1.04, 1), (1.3, HARD_OFF_S / PROBE_S)):
        chooser, probes = Chooser(), 0
        for tick in range(round((HARD_OFF_S + 10 * TICK_S) / TICK_S)):
            now_s = tick * TICK_S
            if chooser.next(now_s, 0) is Step.PROBE:
                probes += 1
                chooser.coded(
                    now_s, 0, raw_bytes=FRAME, wire_bytes=int(FRAME / ratio), encode_s=1e-4, decode_s=1e-4
                )
        assert abs(probes - FIRST_PROBES - expected) <= 2


def test_components_are_judged_apart() -> None:
    """A state that does not shrink stays raw beside KV that does."""
    chooser = Chooser()
    world = World(12.5e6, 1e9, 1e9, 1.5)
    for tick in range(200):
        now_s = tick * TICK_S
        for component, ratio in ((0, 1.5), (1, 1.01)):
            step = chooser.next(now_s, component)
            if step is not Step.RAW:
                chooser.coded(
                    now_s,
                    component,
                    raw_bytes=FRAME,
                    wire_bytes=int(FRAME / ratio),
                    encode_s=1e-4,
                    decode_s=1e-4,
                )
        chooser.sampled(now_s, world.link, 4)
    steps = {c: {chooser.next(4.0 + TICK_S * i, c) for i in range(10)} for c in (0, 1)}
    assert Step.CODE in steps[0]
    assert Step.CODE not in steps[1]


def test_a_hello_carries_codecs_and_an_older_one_none() -> None:
    """Missing means rows as they are; anything but small numbers is refused."""
    hello = Hello("decode", "B", "b", 0, {}, codecs=(0, 1, 2))
    assert decode_hello(encode_hello(hello)) == hello
    value = json.loads(encode_hello(hello))
    del value["codecs"]
    assert decode_hello(json.dumps(value).encode()).codecs == ()
    for wrong in ("1", [256], [-1], [True], [1.0], [0] * 17, {"0": 1}):
        with pytest.raises(RemoteProtocolError, match=r"hello\.codecs"):
            decode_hello(json.dumps({**value, "codecs": wrong}).encode())


def layout(element: str, row_bytes: int = 4096) -> Layout:
    """Return a layout of KV and metadata."""
    return Layout(
        "e", "m", 64, "auto", 1, (Component("kv", (row_bytes,), element=element), Component("aux", (8,)))
    )


def test_elements_are_checked_and_compared() -> None:
    """An unknown element or a row that is not whole elements is refused; none at all is as before."""
    check_layout(layout("bfloat16"))
    check_layout(layout(""))
    assert "element" not in json.dumps(to_json(layout("")))
    for wrong in (layout("float64"), layout("float32", 4098)):
        with pytest.raises(ValueError, match="elements are float32"):
            check_layout(wrong)
    assert "float16" in differences(layout("bfloat16"), to_json(layout("float16")))[0]


def test_coded_frames_are_bounded_before_they_are_read() -> None:
    """Only allowed codecs, only shorter than their rows, only rows that would fit a raw frame."""
    session = ImportSession(layout("bfloat16"), range(4000), [], 0, CODECS[Mode.LOSSLESS])
    for data, length, reason in (
        (Data(0, 0, 0, 2, 3), 100, "codec"),
        (Data(0, 0, 0, 2, FP8), 100, "codec"),
        (Data(0, 0, 0, 2, PLANES), 8192, "length"),
        (Data(0, 0, 0, 2049, PLANES), 100, "length"),
        (Data(0, 0, 0, 4001, PLANES), 100, "range"),
    ):
        with pytest.raises(RemoteProtocolError) as caught:
            session.place(data, length)
        assert caught.value.reason == reason
    assert list(session.place(Data(0, 0, 0, 2048, PLANES), 100)) == list(range(2048))
    rounding = ImportSession(layout("fp8"), range(4), [], 0, CODECS[Mode.FP8])
    with pytest.raises(RemoteProtocolError, match="codec 2"):
        rounding.place(Data(0, 0, 0, 1, FP8), 100)


def test_modes_and_components() -> None:
    """A wider mode allows what a narrower one does; only float KV is rounded."""
    assert CODECS[Mode.NONE] < CODECS[Mode.LOSSLESS] < CODECS[Mode.FP8]
    assert takes_fp8(Component("kv", (64,), element="bfloat16"))
    assert takes_fp8(Component("swa", (64,), element="float32"))
    assert not takes_fp8(Component("kv", (64,), element="fp8"))
    assert not takes_fp8(Component("kv", (64,)))
    assert not takes_fp8(Component("mamba", (64,), element="float32"))
    assert not takes_fp8(Component("aux", (64,), element="float32"))
