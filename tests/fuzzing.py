"""Frames of every wrong kind, for the fuzz tests, and how many examples they try.

PRFAAS_FUZZ=N multiplies the examples; 1 takes seconds. A long run, without pytest's limit per test:
`PRFAAS_FUZZ=100 pytest --timeout 0 tests/unit/prfaas_sglang/test_protocol_fuzz.py
tests/integration/test_transfer_fuzz*.py`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence

import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from prfaas_sglang.core.framing import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    Grant,
    Missing,
    encode_grant,
    encode_reason,
    encode_resume,
    encode_room,
    encode_total,
)

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
#: Lengths at and beyond every bound.
LENGTHS = (0, 1, 7, 8, 16, MAX_CONTROL_BYTES, MAX_CONTROL_BYTES + 1, MAX_PAYLOAD_BYTES, 2**31, 2**32 - 1)


def budget(examples: int) -> Callable[..., object]:
    """Settings of one fuzz test."""
    factor = float(os.environ.get("PRFAAS_FUZZ", "1"))
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max(1, int(examples * factor)), deadline=None, suppress_health_check=unhealthy
    )


def raw_frame(
    kind: int,
    transfer: int,
    payload: bytes,
    *,
    length: int | None = None,
    checksum: int | None = None,
    version: int = 1,
    magic: bytes = b"PK",
) -> bytes:
    """Return a frame whose header checksum is right, whatever else is wrong with it."""
    head = struct.pack(
        "<2sBBIQQ",
        magic,
        version,
        kind,
        len(payload) if length is None else length,
        transfer,
        xxhash.xxh3_64_intdigest(payload) if checksum is None else checksum,
    )
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def payloads(rooms: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    """Payloads of every message, and garbage."""
    small = st.integers(0, 20)
    states = st.lists(small | u32, max_size=3).map(tuple)
    return st.one_of(
        st.binary(max_size=64),
        st.builds(Grant, rooms, small | u32, st.sampled_from([0, 64, 65]) | u32, states).map(encode_grant),
        rooms.map(encode_room),
        st.builds(encode_resume, rooms, st.lists(st.builds(Missing, small, small, small | u32, small | u32))),
        (small | u64).map(encode_total),
        st.text(max_size=40).map(encode_reason),
        st.just(b"\xff" * 2000),
        st.just(b""),
    )


@st.composite
def frames(
    draw: st.DrawFn, contents: st.SearchStrategy[bytes], transfers: st.SearchStrategy[int] = u64
) -> bytes:
    """One frame, right or wrong in a field or two."""
    payload = draw(contents)
    wrong: dict[str, object] = {}
    if draw(st.integers(0, 4)) == 0:
        wrong["length"] = draw(st.sampled_from(LENGTHS) | u32)
    if draw(st.integers(0, 6)) == 0:
        wrong["checksum"] = draw(u64)
    if draw(st.integers(0, 20)) == 0:
        wrong["version"] = draw(u8)
    if draw(st.integers(0, 20)) == 0:
        wrong["magic"] = draw(st.binary(min_size=2, max_size=2))
    kind = draw(st.integers(1, 10) | u8)
    return raw_frame(kind, draw(transfers), payload, **wrong)  # type: ignore[arg-type]


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Sequence[bytes]], bytes]:
    """What happens to a stream of frames on its way; most often nothing."""
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(["flip", "cut", "repeat", "swap", "drop", "insert", "late"]), u16, u16),
            max_size=3,
        )
    )

    def apply(given: Sequence[bytes]) -> bytes:
        parts = list(given)
        after: list[tuple[str, int, int]] = []
        for step, a, b in steps:
            if not parts:
                break
            i, j = a % len(parts), b % len(parts)
            match step:
                case "repeat":
                    parts.insert(j, parts[i])
                case "swap":
                    parts[i], parts[j] = parts[j], parts[i]
                case "drop":
                    del parts[i]
                case "late":
                    parts.append(parts.pop(i))
                case _:
                    after.append((step, a, b))
        data = bytearray(b"".join(parts))
        for step, a, b in after:
            if data:
                at = (a << 4 | b & 15) % len(data)
                if step == "flip":
                    data[at] ^= 1 << b % 8
                elif step == "cut":
                    del data[at:]
                else:
                    data[at:at] = bytes([b & 255])
        return bytes(data)

    return apply


#: Sizes of the pieces in which a stream is sent, over and over; [] is all at once.
splits = st.sampled_from([[], [], [1], [HEADER_BYTES], [3, 27]]) | st.lists(st.integers(1, 4000), max_size=6)


def cut_up(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Split a stream, at most 4096 pieces."""
    if not sizes or len(data) > 4096 * min(sizes):
        return [data]
    pieces, at, turn = [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        pieces.append(data[at : at + size])
        at, turn = at + size, turn + 1
    return pieces
