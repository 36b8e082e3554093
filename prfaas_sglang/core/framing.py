"""Frames of the KV wire protocol: what a header and each control message look like in bytes.

Sans-I/O: bytes in, values out. Nothing here reads a socket or trusts a length it has not bounded.
The format is specified in docs/wire-protocol.md; all integers are little-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from cache_service.core.errors import RemoteProtocolError

MAGIC = b"PK"
VERSION = 1

#: magic, version, type, payload length, transfer id, XXH3-64 of the payload, CRC-32 of the 24 bytes before.
_HEADER = struct.Struct("<2sBBIQQ")
_HEADER_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _HEADER_CRC.size

#: Upper bound of one frame's payload: a data frame carries at most this much KV.
MAX_PAYLOAD_BYTES = 8 << 20
#: Upper bound of a control message's payload (a hello carries the pool layout).
MAX_CONTROL_BYTES = 256 << 10
MAX_REASON_BYTES = 1024


class FrameType(IntEnum):
    """Kind of a frame; who may send it is in parentheses."""

    HELLO = 1  # both, first frame on a connection: JSON, see layout.py
    GRANT = 2  # decode: "write these pages, state rows and aux row of mine"
    DATA = 3  # prefill: rows of one tensor
    COMMIT = 4  # prefill: everything was sent
    DONE = 5  # decode: everything arrived and was verified
    ABORT = 6  # both: the transfer (or, with transfer id 0, the connection) is over
    PING = 7  # both: liveness probe
    PONG = 8  # both: its answer
    CANCEL = 9  # decode: "nothing will be granted for this room"
    RESUME = 10  # decode: "the connection broke; of what I granted this is missing"


@dataclass(frozen=True, slots=True)
class Header:
    """One frame's header.

    Attributes:
        type: kind of the frame.
        length: bytes of payload that follow.
        transfer: the transfer it belongs to, 0 for the connection itself.
        checksum: XXH3-64 of the payload.
    """

    type: FrameType
    length: int
    transfer: int
    checksum: int


def encode_header(header: Header) -> bytes:
    """Return the 28 header bytes."""
    head = _HEADER.pack(MAGIC, VERSION, header.type, header.length, header.transfer, header.checksum)
    return head + _HEADER_CRC.pack(zlib.crc32(head))


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """Parse exactly HEADER_BYTES bytes.

    Raises RemoteProtocolError when the bytes are not a header of this version or announce more than the
    bound of their frame type; the connection cannot be trusted any further then.
    """
    if len(data) != HEADER_BYTES:
        raise RemoteProtocolError(f"header: {len(data)} bytes instead of {HEADER_BYTES}", reason="header")
    magic, version, kind, length, transfer, checksum = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise RemoteProtocolError("header: not the prfaas KV protocol", reason="magic")
    (crc,) = _HEADER_CRC.unpack_from(data, _HEADER.size)
    if crc != zlib.crc32(data[: _HEADER.size]):
        raise RemoteProtocolError("header: checksum mismatch", reason="header_checksum")
    if version != VERSION:
        raise RemoteProtocolError(
            f"header: protocol version {version}; this side speaks {VERSION}", reason="version"
        )
    try:
        frame_type = FrameType(kind)
    except ValueError:
        raise RemoteProtocolError(f"header: unknown frame type {kind}", reason="frame_type") from None
    bound = MAX_PAYLOAD_BYTES if frame_type is FrameType.DATA else MAX_CONTROL_BYTES
    if length > bound:
        raise RemoteProtocolError(
            f"header: {length} bytes of {frame_type.name}, at most {bound}", reason="length"
        )
    return Header(frame_type, length, transfer, checksum)


# --- control messages -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """Decode's permission to write.

    Attributes:
        room: SGLang's bootstrap room, which pairs the two halves of a request.
        pages: KV pages granted, counted from the end of the prefix that decode already holds.
        prefix_tokens: tokens that decode already holds (page aligned).
        state_rows: rows granted in each state component, in the layout's order.
    """

    room: int
    pages: int
    prefix_tokens: int
    state_rows: tuple[int, ...]


_GRANT = struct.Struct("<QIIB")
_ROWS = struct.Struct("<I")


def encode_grant(grant: Grant) -> bytes:
    """Return a GRANT payload."""
    head = _GRANT.pack(grant.room, grant.pages, grant.prefix_tokens, len(grant.state_rows))
    return head + b"".join(_ROWS.pack(rows) for rows in grant.state_rows)


def decode_grant(payload: bytes) -> Grant:
    """Parse a GRANT payload. Raises RemoteProtocolError on a wrong length."""
    if len(payload) < _GRANT.size:
        raise RemoteProtocolError("grant: too short", reason="grant")
    room, pages, prefix, components = _GRANT.unpack_from(payload)
    if len(payload) != _GRANT.size + components * _ROWS.size:
        raise RemoteProtocolError("grant: length does not match its component count", reason="grant")
    rows = tuple(_ROWS.unpack_from(payload, _GRANT.size + i * _ROWS.size)[0] for i in range(components))
    return Grant(room, pages, prefix, rows)


@dataclass(frozen=True, slots=True)
class Data:
    """Descriptor at the head of a DATA payload: `count` rows of one tensor, from position `first`.

    Positions count inside the transfer (0 = first granted page, state row or the aux row); they are never
    the receiver's own row numbers, so a peer cannot name memory that was not granted. `codec` says how the
    rows that follow are coded; RAW means byte for byte.
    """

    component: int
    tensor: int
    first: int
    count: int
    codec: int = 0


#: Rows travel byte for byte.
RAW = 0
_DATA = struct.Struct("<HHIIB3x")
DATA_BYTES = _DATA.size


def encode_data(data: Data) -> bytes:
    """Return the descriptor bytes."""
    return _DATA.pack(data.component, data.tensor, data.first, data.count, data.codec)


def decode_data(payload: bytes | bytearray | memoryview) -> Data:
    """Parse a descriptor of DATA_BYTES bytes. Raises RemoteProtocolError on a wrong length."""
    if len(payload) != DATA_BYTES:
        raise RemoteProtocolError("data: descriptor too short", reason="data")
    return Data(*_DATA.unpack(payload))


_ROOM = struct.Struct("<Q")


def encode_room(room: int) -> bytes:
    """Return a CANCEL payload."""
    return _ROOM.pack(room)


def decode_room(payload: bytes) -> int:
    """Parse a CANCEL payload. Raises RemoteProtocolError on a wrong length."""
    if len(payload) != _ROOM.size:
        raise RemoteProtocolError("cancel: expected 8 bytes", reason="cancel")
    return int(_ROOM.unpack(payload)[0])


@dataclass(frozen=True, slots=True)
class Missing:
    """Positions of one tensor that have not arrived: first, first + 1, ..., `count` of them."""

    component: int
    tensor: int
    first: int
    count: int


_RESUME = struct.Struct("<QI")
_MISSING = struct.Struct("<HHII")
#: Ranges that one RESUME may list.
MAX_MISSING = (MAX_CONTROL_BYTES - _RESUME.size) // _MISSING.size


def encode_resume(room: int, missing: Sequence[Missing]) -> bytes:
    """Return a RESUME payload. Raises ValueError for more than MAX_MISSING ranges."""
    if len(missing) > MAX_MISSING:
        raise ValueError(f"{len(missing)} missing ranges, at most {MAX_MISSING}")
    ranges = b"".join(_MISSING.pack(m.component, m.tensor, m.first, m.count) for m in missing)
    return _RESUME.pack(room, len(missing)) + ranges


def decode_resume(payload: bytes) -> tuple[int, list[Missing]]:
    """Parse a RESUME payload into room and ranges.

    Raises RemoteProtocolError on a wrong length, and for ranges that are empty, out of order or overlap: a
    position that is listed often would be sent often.
    """
    if len(payload) < _RESUME.size:
        raise RemoteProtocolError("resume: too short", reason="resume")
    room, count = _RESUME.unpack_from(payload)
    if len(payload) != _RESUME.size + count * _MISSING.size:
        raise RemoteProtocolError("resume: length does not match its count", reason="resume")
    ranges = [Missing(*fields) for fields in _MISSING.iter_unpack(payload[_RESUME.size :])]
    end = (0, 0, 0)
    for m in ranges:
        if not m.count or (m.component, m.tensor, m.first) < end:
            raise RemoteProtocolError(
                "resume: ranges are empty, overlap or are out of order", reason="resume"
            )
        end = (m.component, m.tensor, m.first + m.count)
    return room, ranges


_TOTAL = struct.Struct("<Q")


def encode_total(total_bytes: int) -> bytes:
    """Return a COMMIT or DONE payload: row bytes of the whole transfer."""
    return _TOTAL.pack(total_bytes)


def decode_total(payload: bytes) -> int:
    """Parse a COMMIT or DONE payload. Raises RemoteProtocolError on a wrong length."""
    if len(payload) != _TOTAL.size:
        raise RemoteProtocolError("total: expected 8 bytes", reason="total")
    return int(_TOTAL.unpack(payload)[0])


def encode_reason(reason: str) -> bytes:
    """Return an ABORT payload, cut to MAX_REASON_BYTES."""
    return reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]


def decode_reason(payload: bytes) -> str:
    """Parse an ABORT payload into printable text of bounded length."""
    text = payload[:MAX_REASON_BYTES].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)
