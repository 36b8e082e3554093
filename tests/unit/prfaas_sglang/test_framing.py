"""The codec: what is encoded is decoded, what is damaged is refused, nothing else happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import RemoteProtocolError
from prfaas_sglang.core.framing import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_REASON_BYTES,
    Data,
    FrameType,
    Grant,
    Header,
    decode_data,
    decode_grant,
    decode_header,
    decode_reason,
    decode_total,
    encode_data,
    encode_grant,
    encode_header,
    encode_reason,
    encode_total,
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
headers = st.builds(Header, st.sampled_from(FrameType), st.integers(0, MAX_CONTROL_BYTES), u64, u64)


@given(headers)
def test_header_round_trip(header: Header) -> None:
    """A header survives its bytes."""
    assert decode_header(encode_header(header)) == header


@given(headers, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_any_damaged_header_byte_is_refused(header: Header, at: int, flip: int) -> None:
    """No single damaged byte gets past the header's checks."""
    data = bytearray(encode_header(header))
    data[at] ^= flip
    with pytest.raises(RemoteProtocolError):
        decode_header(data)


@given(st.binary(max_size=64))
def test_random_bytes_are_never_a_crash(data: bytes) -> None:
    """Decoders answer garbage with RemoteProtocolError alone."""
    for decode in (decode_header, decode_grant, decode_data, decode_total):
        try:
            decode(data)
        except RemoteProtocolError:
            continue


@pytest.mark.parametrize(
    ("kind", "bound"), [(FrameType.DATA, MAX_PAYLOAD_BYTES), (FrameType.GRANT, MAX_CONTROL_BYTES)]
)
def test_length_is_bounded_by_kind(kind: FrameType, bound: int) -> None:
    """A header may not announce more than its kind's bound."""
    assert decode_header(encode_header(Header(kind, bound, 1, 0))).length == bound
    with pytest.raises(RemoteProtocolError, match=str(bound + 1)):
        decode_header(encode_header(Header(kind, bound + 1, 1, 0)))


def test_another_version_is_named() -> None:
    """A peer of another protocol version is told which one this side speaks."""
    import struct
    import zlib

    head = struct.pack("<2sBBIQQ", b"PK", 9, 1, 0, 0, 0)
    with pytest.raises(RemoteProtocolError, match="version 9; this side speaks 1"):
        decode_header(head + struct.pack("<I", zlib.crc32(head)))


@given(st.builds(Grant, u64, u32, u32, st.lists(u32, max_size=8).map(tuple)))
def test_grant_round_trip(grant: Grant) -> None:
    """A grant survives its bytes, and a shorter or longer payload is refused."""
    payload = encode_grant(grant)
    assert decode_grant(payload) == grant
    for wrong in (payload[:-1], payload + b"x"):
        with pytest.raises(RemoteProtocolError):
            decode_grant(wrong)


@given(st.builds(Data, u16, u16, u32, u32), u64)
def test_descriptors_round_trip(data: Data, total: int) -> None:
    """Descriptors and totals survive their bytes."""
    assert decode_data(encode_data(data)) == data
    assert decode_total(encode_total(total)) == total


@given(st.text(max_size=3000))
def test_reason_is_bounded_and_printable(reason: str) -> None:
    """A reason from a peer can be put into a log line."""
    text = decode_reason(encode_reason(reason))
    assert text.isprintable()
    assert len(encode_reason(reason)) <= MAX_REASON_BYTES
    if reason.isascii() and reason.isprintable() and len(reason) <= MAX_REASON_BYTES:
        assert text == reason
