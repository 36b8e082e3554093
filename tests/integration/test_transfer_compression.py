"""Coded frames over real sockets: lossless is bit-exact, FP8 is bounded, and nobody gets what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from prfaas_sglang.core.compression import CODECS, FIRST_PROBES, Mode
from prfaas_sglang.core.layout import Component
from prfaas_sglang.transfer import compressor, exporter
from prfaas_sglang.transfer.codec import encode_planes
from prfaas_sglang.transfer.compressor import Compressor
from tests.integration.test_transfer_tcp import Middlebox
from tests.integration.transfer_support import LAYOUT, Pair, assert_moved
from tests.wan.fixtures import MakeWan, wan_fixture  # noqa: F401

KV, *REST = LAYOUT.components
CODED = replace(LAYOUT, components=(replace(KV, element="float32"), *REST))
PAGES = list(range(200))
TARGETS = list(reversed(range(300, 500)))
ROW_BYTES = 4096


def coded_pair(prefill: Mode, decode: Mode) -> Pair:
    """Return a pair whose prefill side holds floats with 16 random bits, state and KV alike."""
    pair = Pair(prefill_layout=CODED, decode_layout=CODED, prefill_mode=prefill, decode_mode=decode)
    rng = np.random.default_rng(0)
    for component in pair.prefill.buffers[:2]:
        for buffer in component:
            values = rng.standard_normal(len(buffer) // 4, np.float32)
            buffer[:] = (values.view(np.uint32) & 0xFFFF0000).astype("<u4").tobytes()
    return pair


def move(pair: Pair, room: int) -> None:
    """Send a room's pages, state and metadata."""
    pair.begin(room, TARGETS, state=3, aux=2)
    pair.prefill.wait(room, "grant")
    pair.exporter.send(room, PAGES, states=[[5]], aux_row=1, last=True)


def sent(pair: Pair, form: str, codec: str) -> float:
    """Return a counter of the prefill side."""
    value = pair.prefill.telemetry.registry.get_sample_value(
        f"prfaas_transfer_{form}_bytes_total", {"src_site": "X", "dst_site": "B", "codec": codec}
    )
    return value or 0.0


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every frame be coded that may be."""
    monkeypatch.setattr("prfaas_sglang.core.compression.FIRST_PROBES", 10**9)


@pytest.fixture
def lossless(always: None) -> Iterator[Pair]:
    with closing(coded_pair(Mode.LOSSLESS, Mode.LOSSLESS)) as value:
        yield value


def test_lossless_is_bit_exact_and_shorter(lossless: Pair) -> None:
    """KV of known elements and a state of unknown ones halve, metadata goes as it is; records say so."""
    move(lossless, 1)
    lossless.decode.wait(1, "done")
    assert_moved(lossless, [PAGES, [5], [1]], [TARGETS, [3], [2]])
    record = lossless.prefill.ended(1)
    assert record.bytes == lossless.decode.ended(1).bytes
    assert record.wire_bytes < 0.45 * record.bytes
    assert sent(lossless, "raw", "lossless") == 2 * len(PAGES) * ROW_BYTES + 50_000
    assert sent(lossless, "raw", "raw") == 72
    assert sent(lossless, "wire", "lossless") + 72 == record.wire_bytes
    decoding = lossless.decode.telemetry.registry.get_sample_value(
        "prfaas_codec_seconds_total",
        {"src_site": "A", "dst_site": "X", "codec": "lossless", "operation": "decode"},
    )
    assert decoding


def test_coded_and_raw_frames_mix_while_the_link_is_unknown() -> None:
    """The first frames of a component are probes, which are sent coded; the others wait for the forecast."""
    with closing(coded_pair(Mode.LOSSLESS, Mode.LOSSLESS)) as pair:
        move(pair, 1)
        pair.decode.wait(1, "done")
        assert_moved(pair, [PAGES, [5], [1]], [TARGETS, [3], [2]])
        assert sent(pair, "raw", "lossless") >= FIRST_PROBES * (64 << 10)


def test_random_bytes_go_as_they_are(always: None) -> None:
    """What does not shrink costs no byte more."""
    with closing(Pair(prefill_mode=Mode.LOSSLESS, decode_mode=Mode.LOSSLESS)) as pair:
        move(pair, 1)
        pair.decode.wait(1, "done")
        assert_moved(pair, [PAGES, [5], [1]], [TARGETS, [3], [2]])
        assert pair.prefill.ended(1).wire_bytes == pair.prefill.ended(1).bytes


def test_fp8_rounds_kv_and_nothing_else(always: None) -> None:
    """KV lands as its own type within e4m3's rounding, the state and metadata bit-exact."""
    with closing(coded_pair(Mode.FP8, Mode.FP8)) as pair:
        move(pair, 1)
        pair.decode.wait(1, "done")
        for tensor in range(2):
            for a, b in zip(PAGES, TARGETS, strict=True):
                before = np.frombuffer(pair.prefill.row(0, tensor, a), np.float32)
                after = np.frombuffer(pair.decode.row(0, tensor, b), np.float32)
                assert (np.abs(after - before) <= np.maximum(np.abs(before) / 16, 2.0**-12)).all()
        assert_moved(pair, [[], [5], [1]], [[], [3], [2]])
        assert sent(pair, "wire", "fp8") < 0.26 * sent(pair, "raw", "fp8")
        assert sent(pair, "raw", "lossless") == 50_000


def test_a_page_with_infinity_is_sent_lossless(always: None) -> None:
    """FP8 has no infinity: such a frame is exact instead."""
    with closing(coded_pair(Mode.FP8, Mode.FP8)) as pair:
        pair.prefill.buffers[0][0][:ROW_BYTES] = np.full(ROW_BYTES // 4, np.inf, np.float32).tobytes()
        move(pair, 1)
        pair.decode.wait(1, "done")
        assert pair.decode.row(0, 0, TARGETS[0]) == pair.prefill.row(0, 0, 0)


@pytest.mark.parametrize(("prefill", "decode"), [(Mode.FP8, Mode.NONE), (Mode.NONE, Mode.FP8)])
def test_both_sides_must_allow_a_codec(always: None, prefill: Mode, decode: Mode) -> None:
    """The narrower configuration counts."""
    with closing(coded_pair(prefill, decode)) as pair:
        move(pair, 1)
        pair.decode.wait(1, "done")
        assert_moved(pair, [PAGES, [5], [1]], [TARGETS, [3], [2]])
        assert pair.prefill.ended(1).wire_bytes == pair.prefill.ended(1).bytes


@pytest.mark.parametrize(("used", "allowed"), [(Mode.LOSSLESS, Mode.NONE), (Mode.FP8, Mode.LOSSLESS)])
def test_a_codec_that_was_not_allowed_is_a_protocol_error(
    always: None, monkeypatch: pytest.MonkeyPatch, used: Mode, allowed: Mode
) -> None:
    """A sender that ignores the hello is disconnected and its transfer fails."""
    monkeypatch.setattr(exporter, "Compressor", lambda *a: Compressor(a[0], CODECS[used], a[2]))
    with closing(coded_pair(used, allowed)) as pair:
        move(pair, 1)
        assert "codec" in pair.decode.wait(1, "failed")
        assert pair.decode.telemetry.registry.get_sample_value(
            "prfaas_transfer_refused_peers_total", {"reason": "codec"}
        )


def test_a_payload_that_does_not_decode_is_a_protocol_error(
    always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right checksum, wrong planes: nothing is written and the transfer fails."""

    def damaged(views: list[memoryview], width: int) -> list[bytes]:
        head, *planes = (bytes(part) for part in encode_planes(views, width))
        return [head, bytes(len(planes[0])), *planes[1:]]

    monkeypatch.setattr(compressor, "encode_planes", damaged)
    monkeypatch.setattr(compressor, "decode_planes", lambda payload, size: payload)
    with closing(coded_pair(Mode.LOSSLESS, Mode.LOSSLESS)) as pair:
        before = pair.decode.row(0, 0, TARGETS[0])
        move(pair, 1)
        assert "coded rows" in pair.decode.wait(1, "failed")
        assert pair.decode.row(0, 0, TARGETS[0]) == before


def test_a_flipped_byte_of_a_coded_frame_fails_only_its_transfer(lossless: Pair) -> None:
    """The checksum is over the coded bytes and is compared before they are decoded."""
    with closing(Middlebox(lossless.address)) as box:
        lossless.address = box.address
        box.flip_at = 40_000
        move(lossless, 1)
        assert "checksum" in lossless.decode.wait(1, "failed")
        box.flip_at = None
        move(lossless, 2)
        lossless.decode.wait(2, "done")
        assert_moved(lossless, [PAGES, [5], [1]], [TARGETS, [3], [2]])


def test_layouts_of_other_elements_do_not_meet() -> None:
    """The element type is part of the layout."""
    other = replace(CODED, components=(replace(CODED.components[0], element="float16"), *REST))
    with closing(Pair(prefill_layout=CODED, decode_layout=other)) as pair:
        pair.begin(1, [0], state=0, aux=0)
        assert "float16" in pair.decode.wait(1, "failed")
    assert Component("kv", (1,)).element == ""


def test_a_slow_link_turns_the_codec_on(wan: MakeWan) -> None:
    """Without being told, 100 Mbit/s are found slower than the codec: most row bytes travel coded."""
    link = wan("metro", rate_bps=100e6)
    pair = coded_pair(Mode.LOSSLESS, Mode.LOSSLESS)
    try:
        with link.entered("a"):
            pair.address = (link.address("a"), pair.exporter.listen(link.address("a"), 0))
        with link.entered("b"):
            pair.importer.connect(pair.address)
            pair.begin(1, TARGETS, state=3, aux=2)
        pair.prefill.wait(1, "grant")
        pair.exporter.send(1, PAGES, states=[[5]], aux_row=1, last=True)
        pair.decode.wait(1, "done")
        for room in range(2, 40):
            with link.entered("b"):
                move(pair, room)
            pair.decode.wait(room, "done")
            if sent(pair, "raw", "lossless") > 20e6:
                break
        assert_moved(pair, [PAGES, [5], [1]], [TARGETS, [3], [2]])
        assert sent(pair, "raw", "lossless") > 20e6
    finally:
        pair.close()
