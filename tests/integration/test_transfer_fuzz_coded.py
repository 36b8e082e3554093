"""A live importer that accepts coded rows, against a peer whose planes and codes may be anything.

As test_transfer_fuzz.py; here checksums are right, so that the codec gets to see what is wrong.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.core.compression import CODECS, FP8, PLANES, Mode
from prfaas_sglang.core.framing import RAW, Data, FrameType, encode_data, encode_total
from prfaas_sglang.transfer.codec import decode, encode_fp8, encode_planes
from tests.fuzzing import budget, cut_up, mutations, raw_frame, splits, u8, u16
from tests.integration.test_transfer_fuzz import (
    AUX,
    AUX_BYTES,
    BAD,
    EXPECTED,
    PAGES,
    STATE,
    STATE_BYTES,
    Script,
    check_pools,
    data_frame,
    no_accident,
    read_frame,
    serve_one,
)
from tests.integration.transfer_support import LAYOUT, Pair

KV, *REST = LAYOUT.components
CODED = replace(LAYOUT, components=(replace(KV, element="float32"), *REST))
TOTAL = 2 * 4 * 4096 + 50_000 + 72

Rows = tuple[Data, bytes]
Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    how = {"prefill_layout": CODED, "decode_layout": CODED, "connections": 2}
    # the good peer sends what it has bit by bit; decode takes every codec
    with closing(Pair(**how, prefill_mode=Mode.LOSSLESS, decode_mode=Mode.FP8)) as value:  # type: ignore[arg-type]
        serve_one(value)
        yield value


def code(data: Data, rows: bytes, codec: int, width: int) -> Rows:
    """Return a frame's descriptor and payload in a codec, raw where that is not shorter."""
    coded = None
    if codec == FP8 and data.component == 0:
        coded = encode_fp8([rows], "float32", data.count)
    elif codec == PLANES:
        coded = encode_planes([rows], width)
    if coded is None or sum(map(len, coded)) >= len(rows):
        return data, rows
    return replace(data, codec=codec), b"".join(bytes(part) for part in coded)


def plain_rows(per_frame: int) -> list[Rows]:
    """Everything that the grant asks for."""
    found = [
        (Data(0, tensor, first, per_frame), b"".join(EXPECTED[tensor][first : first + per_frame]))
        for tensor, first in itertools.product(range(2), range(0, 4, per_frame))
    ]
    found.append((Data(1, 0, 0, 1), STATE_BYTES))
    return [*found, *((Data(2, t, 0, 1), AUX_BYTES[t]) for t in range(2))]


def landed(frames: Sequence[Rows]) -> list[list[bytes]]:
    """Return the KV rows that decode has in the end, as the codec alone says."""
    pages = [[b""] * 4 for _ in range(2)]
    for data, payload in frames:
        if data.component == 0:
            rows = payload if data.codec == RAW else bytes(decode(CODED, data, payload))
            for i in range(data.count):
                pages[data.tensor][data.first + i] = rows[i * 4096 : (i + 1) * 4096]
    return pages


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """What is wrong inside a payload."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "more", "lengths", "swap", "bomb", "noise"]))
    at, value, other = draw(u16), draw(u8), draw(st.binary(max_size=64))

    def apply(payload: bytes) -> bytes:
        data = bytearray(payload)
        here = at % max(1, len(data))
        match kind:
            case "flip":
                data[here : here + 1] = bytes([value])
            case "cut":
                del data[here:]
            case "more":
                data += other or b"\0"
            case "lengths":
                data[1:5] = struct.pack("<I", (at << 16) | value)
            case "swap":
                data = data[here:] + data[:here]
            case "bomb":  # a plane that announces, or has, far more than its rows
                plane = zstandard.ZstdCompressor(write_content_size=at % 2 == 0).compress(bytes(1 << 20))
                data = bytearray(struct.pack("<BI", 1, len(plane)) + plane)
            case _:
                data = bytearray(other)
        return bytes(data)

    return apply


codecs = st.sampled_from([RAW, PLANES, PLANES, FP8, FP8])


@given(
    st.sampled_from([1, 2, 4]),
    st.lists(st.tuples(codecs, st.sampled_from([1, 2, 4])), min_size=11, max_size=11),
    st.permutations(range(12)),
    st.lists(st.tuples(st.integers(0, 10), damages()), max_size=2),
    st.lists(st.tuples(st.integers(0, 10), u8), max_size=1),
    mutations(),
    splits,
    st.integers(0, 12),
)
@budget(120)
def test_an_importer_survives_any_coded_rows(  # type: ignore[no-untyped-def]
    pair: Pair, per_frame: int, coding, order, damaged, relabeled, mutate, sizes: list[int], cut: int
) -> None:
    """Done means that every row is what the codec makes of its frame; no other row ever changes."""
    room, before = next(BAD), [[bytes(b) for b in c] for c in pair.decode.buffers]
    plain = plain_rows(per_frame)
    frames = [code(*rows, *how) for rows, how in zip(plain, coding, strict=False)]
    expected = landed(frames)
    sent = list(frames)
    for at, damage in damaged:
        data, payload = sent[at % len(sent)]
        sent[at % len(sent)] = data, damage(payload)
    for at, codec in relabeled:
        data, payload = sent[at % len(sent)]
        sent[at % len(sent)] = replace(data, codec=codec), payload
    with no_accident(), closing(Script(CODED, sorted(CODECS[Mode.FP8]))) as script:
        pair.importer.begin(room, script.address, PAGES, states=[[STATE]], aux_row=AUX, prefix_tokens=0)
        script.accept()
        kind, transfer, _ = read_frame(script.sockets[0])
        assert kind is FrameType.GRANT
        stream = [raw_frame(FrameType.COMMIT, transfer, encode_total(TOTAL))]
        stream += [data_frame(transfer, *rows) for rows in sent]
        stream = [stream[i] for i in order if i < len(stream)]
        first = [f for n, f in enumerate(stream) if n >= cut or f[3] != FrameType.DATA]
        second = [f for n, f in enumerate(stream) if n < cut and f[3] == FrameType.DATA]
        mutated = mutate(first)
        for sock, data in zip(script.sockets, [mutated, b"".join(second)], strict=True):
            with suppress(ConnectionError):
                for piece in cut_up(data, sizes):
                    sock.sendall(piece)
        serve_one(pair)
        if sent == frames and mutated == b"".join(first):
            pair.decode.wait(room, "done")
        script.hang_up()
        pair.importer.abort(room, "over")  # it would be resumed on a new connection
    done = pair.decode.ended(room).outcome == "done"
    check_pools(pair, before, expected if done and sent == frames else None)


@pytest.mark.parametrize("codec", [PLANES, FP8])
def test_announced_content_takes_no_memory(pair: Pair, codec: int) -> None:
    """A plane that is a zstd frame of a gigabyte: refused for what it announces, and the room fails."""
    head = b"\x28\xb5\x2f\xfd\xe0" + struct.pack(
        "<Q", 1 << 30
    )  # magic, single segment, 8 bytes of content size
    plane = head + b"\x03\x00\x00" + b"x" * 16
    payload = struct.pack("<BI", 1, len(plane)) + plane if codec == PLANES else b"\x80" + plane
    room = next(BAD)
    with no_accident(), closing(Script(CODED, sorted(CODECS[Mode.FP8]))) as script:
        pair.importer.begin(room, script.address, PAGES, states=[[STATE]], aux_row=AUX, prefix_tokens=0)
        script.accept()
        _, transfer, _ = read_frame(script.sockets[0])
        frame = encode_data(Data(0, 0, 0, 1, codec)) + payload
        script.sockets[0].sendall(raw_frame(FrameType.DATA, transfer, frame))
        assert "announces another length" in pair.decode.wait(room, "failed")
        serve_one(pair)
        script.hang_up()


def test_what_the_fuzzer_starts_from_is_coded() -> None:
    """Rows shrink in every codec: the KV of a request does not travel raw."""
    for codec, width in ((PLANES, 1), (PLANES, 2), (PLANES, 4), (FP8, 1)):
        assert sum(code(*rows, codec, width)[0].codec == codec for rows in plain_rows(2)) >= 4
