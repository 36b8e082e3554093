"""Rows to fewer bytes and back: lossless byte planes, and FP8 with one scale for each row.

Lossless: floats of one tensor have few different exponents and random mantissas. Elements are rotated by one
bit, so that the exponent has a byte of its own, and split into planes of first, second, ... bytes; a plane
that shrinks goes through zstd's entropy coder, the others as they are. Bit-exact for any bytes.

FP8: e4m3 (4 significant bits) times a power of two for each row, the codes as one plane. Frames with a NaN
or an infinity are not coded. Deterministic, and what lands is of the original type again.

What comes from a peer is checked before anything is allocated; RemoteProtocolError says what was wrong.
Formats: docs/wire-protocol.md. Functions are thread-safe.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import zstandard
from numpy.typing import NDArray

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from prfaas_sglang.core.compression import FP8, FP8_ELEMENTS
from prfaas_sglang.core.framing import Data
from prfaas_sglang.core.layout import ELEMENT_BYTES, Layout

Buffer = bytes | bytearray | memoryview
_Bytes = NDArray[np.uint8]

#: Matches are not worth looking for in exponents: a table of 64 entries makes zstd an entropy coder, 3 times
#: as fast as level 1 and denser (docs/compression.md).
_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=20,
    chain_log=6,
    hash_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_content_size=True,
    write_checksum=False,
)
#: Part of a plane that is tried first, and the gain that makes the rest worth it.
_SAMPLE_BYTES = 4096
_SAMPLE_GAIN = 0.97

_PLANES_HEAD = struct.Struct("<B")
_LENGTH = struct.Struct("<I")
_INTEGERS = {2: np.uint16, 4: np.uint32}
#: Distance of a row's largest exponent to the scale's: the largest value becomes one in [128, 256] of 448.
_TOP = 134
_E4M3_MAX = 448.0


class _Tools(threading.local):
    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 23)


_tools = _Tools()


def _bytes(views: Sequence[Buffer]) -> _Bytes:
    """Return the views' bytes as one array, without a copy when there is one view."""
    return np.frombuffer(views[0] if len(views) == 1 else b"".join(views), np.uint8)


# --- one plane ---


def _pack(plane: _Bytes) -> Buffer:
    """Return the plane coded, or itself when that is not shorter."""
    stored = memoryview(plane)
    compress = _tools.compressor.compress
    if len(plane) > 4 * _SAMPLE_BYTES:
        middle = len(plane) // 2
        sample = stored[middle : middle + _SAMPLE_BYTES]
        if len(compress(sample)) > _SAMPLE_GAIN * _SAMPLE_BYTES:
            return stored
    coded = compress(stored)
    return coded if len(coded) < len(plane) else stored


def _unpack(coded: memoryview, size: int) -> _Bytes:
    """Return the `size` bytes of a plane; one as long as that is stored."""
    if len(coded) == size:
        return np.frombuffer(coded, np.uint8)
    if len(coded) > size:
        raise _malformed("a plane is longer than its rows")
    try:
        if zstandard.frame_content_size(coded) != size:  # what the decoder would allocate
            raise _malformed("a plane announces another length than its rows have")
        plane = _tools.decompressor.decompress(coded, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _malformed(str(error)) from None
    if len(plane) != size:
        raise _malformed("a plane is shorter than its rows")
    return np.frombuffer(plane, np.uint8)


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"data: coded rows: {what}", reason="codec")


# --- lossless ---


def encode_planes(views: Sequence[Buffer], width: int) -> list[Buffer]:
    """Return a PLANES payload for the bytes of `views`, in order.

    Args:
        width: bytes of an element, 1, 2 or 4; 1 is taken for a length that is no multiple of it.
    """
    raw = _bytes(views)
    if len(raw) % width:
        width = 1
    if width == 1:
        planes = [raw]
    else:
        elements: NDArray[np.uint16] | NDArray[np.uint32] = raw.view(_INTEGERS[width])
        bits = 8 * width
        turned = (elements << 1) | (elements >> (bits - 1))
        planes = [(turned >> shift).astype(np.uint8) for shift in range(bits - 8, -8, -8)]
    packed = [_pack(plane) for plane in planes]
    head = _PLANES_HEAD.pack(width) + b"".join(_LENGTH.pack(len(plane)) for plane in packed)
    return [head, *packed]


def decode_planes(payload: Buffer, size: int) -> memoryview:
    """Return the `size` bytes of a PLANES payload. Raises RemoteProtocolError."""
    view = memoryview(payload)
    width = view[0] if len(view) else 0
    head = _PLANES_HEAD.size + width * _LENGTH.size
    if width not in (1, 2, 4) or size % width or len(view) < head:
        raise _malformed("bad element width")
    lengths = [_LENGTH.unpack_from(view, _PLANES_HEAD.size + i * _LENGTH.size)[0] for i in range(width)]
    if head + sum(lengths) != len(view):
        raise _malformed("planes and payload differ in length")
    planes = []
    for length in lengths:
        planes.append(_unpack(view[head : head + length], size // width))
        head += length
    if width == 1:
        return memoryview(planes[0])
    kind = _INTEGERS[width]
    turned = planes[0].astype(kind)
    for plane in planes[1:]:
        turned <<= 8
        turned |= plane
    return memoryview(((turned >> 1) | (turned << (8 * width - 1))).view(np.uint8))


# --- FP8 ---


def encode_fp8(views: Sequence[Buffer], element: str, rows: int) -> list[Buffer] | None:
    """Return an FP8 payload for the bytes of `views`, in order; None when a value is NaN or infinite.

    Args:
        element: type of the values, one of FP8_ELEMENTS.
        rows: how many rows of equal size the bytes are.
    """
    if element not in FP8_ELEMENTS:
        raise LocalProtocolError(f"fp8 for {element or 'unknown'} elements", reason="codec")
    values = _as_bfloat16(_bytes(views), element).reshape(rows, -1)
    tops = (values & 0x7FFF).max(axis=1) >> 7
    if tops.max() == 255:
        return None
    codes = np.empty(values.shape, np.uint8)
    for i, top in enumerate(tops.tolist()):
        _code_table(top).take(values[i], out=codes[i], mode="clip")
    packed = _pack(codes.reshape(-1))
    return [tops.astype(np.uint8).tobytes(), packed]


def decode_fp8(payload: Buffer, element: str, rows: int, size: int) -> memoryview:
    """Return the `size` bytes of an FP8 payload of `rows` rows. Raises RemoteProtocolError."""
    if element not in FP8_ELEMENTS or size % (rows * ELEMENT_BYTES[element]):
        raise _malformed(f"fp8 for rows of {element or 'unknown'} elements")
    view = memoryview(payload)
    if len(view) < rows:
        raise _malformed("too short for its scales")
    codes = _unpack(view[rows:], size // ELEMENT_BYTES[element]).reshape(rows, -1)
    values = np.empty(codes.shape, _PATTERNS[element])
    for i, top in enumerate(view[:rows].tolist()):
        _value_table(top, element).take(codes[i], out=values[i], mode="clip")
    return memoryview(values.reshape(-1).view(np.uint8))


_PATTERNS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
#: Largest finite value.
_MAX = {"bfloat16": 2.0**128 - 2.0**120, "float16": 65504.0, "float32": float(np.finfo(np.float32).max)}


def _as_bfloat16(raw: _Bytes, element: str) -> NDArray[np.uint16]:
    """Return bit patterns of bfloat16, rounded to odd: rounding them again to 4 bits is as rounding once."""
    if element == "bfloat16":
        return raw.view(np.uint16)
    if element == "float32":
        single = raw.view(np.float32)
    else:
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            single = raw.view(np.float16).astype(np.float32)
    bits = single.view(np.uint32)
    odd: NDArray[np.uint16] = ((bits >> 16) | ((bits & 0xFFFF) != 0)).astype(np.uint16)
    return odd


def _from_bfloat16(patterns: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@lru_cache(maxsize=256)
def _code_table(top: int) -> _Bytes:
    """Return the e4m3 code of every bfloat16 pattern, in a row whose largest exponent is `top`."""
    with np.errstate(all="ignore"):
        value = _from_bfloat16(np.arange(1 << 16, dtype=np.uint16)) * 2.0 ** (_TOP - top)
        size = np.nan_to_num(np.abs(value), nan=_E4M3_MAX, posinf=_E4M3_MAX)
    size = np.minimum(size, _E4M3_MAX)
    _, exponent = np.frexp(size)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3.0)
    size = np.rint(size / step) * step  # to even
    codes = np.searchsorted(_e4m3()[:127], size).astype(np.uint8)
    codes |= (np.arange(1 << 16) >> 8 & 0x80).astype(np.uint8)
    return codes


@lru_cache(maxsize=1024)
def _value_table(top: int, element: str) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """Return the element's bit pattern for every e4m3 code, in a row whose largest exponent is `top`."""
    scaled = _e4m3() * 2.0 ** (top - _TOP)
    value = np.clip(scaled, -_MAX[element], _MAX[element])  # NaN stays
    if element == "float16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.astype(np.float32).view(np.uint32)
    # 4 significant bits are exact in bfloat16 too, but for its least subnormals, which are cut
    return bits if element == "float32" else (bits >> 16).astype(np.uint16)


@lru_cache(maxsize=1)
def _e4m3() -> NDArray[np.float64]:
    """Return the value of every e4m3 code."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code >= 128, -size, size)


# --- a frame ---


def decode(layout: Layout, data: Data, payload: Buffer) -> memoryview:
    """Return the row bytes of a coded frame that `ImportSession.place` took. Raises RemoteProtocolError."""
    component = layout.components[data.component]
    size = data.count * component.row_bytes[data.tensor]
    if data.codec == FP8:
        return decode_fp8(payload, component.element, data.count, size)
    return decode_planes(payload, size)
