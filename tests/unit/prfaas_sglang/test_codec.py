"""Coded frames: bit-exact or within the rounding of e4m3, bounded, and never a crash on other bytes."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from prfaas_sglang.core.compression import FP8, FP8_ELEMENTS, PLANES
from prfaas_sglang.core.framing import RAW, Data
from prfaas_sglang.core.layout import ELEMENT_BYTES, Component, Layout
from prfaas_sglang.transfer.codec import decode, decode_fp8, decode_planes, encode_fp8, encode_planes

FLOATS = sorted(FP8_ELEMENTS)


def to_bytes(values: np.ndarray, element: str) -> bytes:
    """Return float64 values as bytes of an element type (bfloat16 by cutting)."""
    if element == "float16":
        return values.astype(np.float16).tobytes()
    single = values.astype(np.float32)
    return (
        single.tobytes() if element == "float32" else (single.view(np.uint32) >> 16).astype("<u2").tobytes()
    )


def to_floats(raw: bytes | memoryview, element: str) -> np.ndarray:
    """Return bytes of an element type as float64."""
    if element == "bfloat16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        raw, element = wide.tobytes(), "float32"
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.frombuffer(raw, element).astype(np.float64)


def normal(rows: int, columns: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)) * scale


blobs = st.one_of(
    st.binary(max_size=4096),
    st.builds(lambda part, n: part * n, st.binary(min_size=1, max_size=64), st.integers(1, 2000)),
    st.builds(lambda n, seed: np.random.default_rng(seed).bytes(n), st.integers(0, 100_000), st.integers(0)),
    st.builds(
        lambda rows, seed, element: to_bytes(normal(rows, 512, seed=seed), element),
        st.integers(1, 40),
        st.integers(0),
        st.sampled_from(FLOATS),
    ),
)


@settings(max_examples=300, deadline=None)
@given(blobs, st.sampled_from([1, 2, 4]), st.lists(st.integers(0, 100_000), max_size=4))
def test_planes_give_back_any_bytes(raw: bytes, width: int, cuts: list[int]) -> None:
    """Whatever the bytes are and however they are scattered in memory; hardly longer than they were."""
    ends = sorted(min(cut, len(raw)) for cut in cuts)
    views = [memoryview(raw)[a:b] for a, b in zip([0, *ends], [*ends, len(raw)], strict=True)]
    payload = b"".join(encode_planes(views, width))
    assert len(payload) <= len(raw) + 17
    assert decode_planes(payload, len(raw)) == raw


def test_real_floats_shrink_to_their_entropy() -> None:
    """Normal bf16 values shrink by 1.4 (8 random bits of 16 stay), zeros to almost nothing."""
    raw = to_bytes(normal(16, 8192), "bfloat16")
    assert len(raw) / sum(map(len, encode_planes([raw], 2))) > 1.4
    assert sum(map(len, encode_planes([bytes(1 << 20)], 4))) < 1000


@settings(max_examples=500, deadline=None)
@given(blobs, st.sampled_from([1, 2, 4]), st.data())
def test_damaged_planes_raise_or_decode(raw: bytes, width: int, data: st.DataObject) -> None:
    """A cut, a flipped bit, other lengths and other bytes: an error of ours, or bytes of the asked length."""
    payload = bytearray(b"".join(encode_planes([raw], width)))
    match data.draw(st.sampled_from(["cut", "flip", "grow", "size"])):
        case "cut":
            del payload[data.draw(st.integers(0, len(payload) - 1)) :]
        case "flip":
            bit = data.draw(st.integers(0, 8 * len(payload) - 1))
            payload[bit // 8] ^= 1 << bit % 8
        case "grow":
            payload += data.draw(st.binary(min_size=1, max_size=16))
    size = data.draw(st.sampled_from([len(raw), len(raw) + 4, max(0, len(raw) - 4), 1 << 23]))
    with contextlib.suppress(RemoteProtocolError):
        assert len(decode_planes(bytes(payload), size)) == size


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2000), st.integers(1, 8), st.sampled_from(FLOATS))
def test_any_bytes_as_payload(payload: bytes, size: int, rows: int, element: str) -> None:
    """Bytes that no encoder made never do more than raise."""
    for attempt in (
        lambda: decode_planes(payload, size),
        lambda: decode_fp8(payload, element, rows, size),
    ):
        with contextlib.suppress(RemoteProtocolError):
            assert len(attempt()) == size


def test_a_plane_may_not_announce_more_than_its_rows() -> None:
    """The announced size is compared before anything is allocated: 1 EiB costs nothing, nor does a bomb."""
    huge = bytes.fromhex("28b52ffd") + bytes([0b11100000]) + struct.pack("<Q", 1 << 60) + bytes(3)
    bomb = zstandard.compress(bytes(64 << 20))
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    for plane in (huge, bomb, unknown, bomb + bomb):
        payload = struct.pack("<BI", 1, len(plane)) + plane
        with pytest.raises(RemoteProtocolError):
            decode_planes(payload, 1 << 20)


@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_fp8_rounds_to_the_nearest(element: str, scale: float) -> None:
    """Each value lands within half a step of e4m3 (1/16 of it, or 2^-17 of the row's largest)."""
    raw = to_bytes(normal(8, 2048, scale), element)
    parts = encode_fp8([raw], element, 8)
    assert parts is not None
    payload = b"".join(parts)
    assert len(payload) <= 8 + 8 * 2048
    before = to_floats(raw, element).reshape(8, -1)
    after = to_floats(decode_fp8(payload, element, 8, len(raw)), element).reshape(8, -1)
    least = np.abs(before).max(axis=1, keepdims=True) * 2.0**-16
    assert (np.abs(after - before) <= np.maximum(np.abs(before) / 16, least)).all()
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.03
    assert b"".join(encode_fp8([raw], element, 8) or []) == payload


@pytest.mark.parametrize("element", FLOATS)
@settings(max_examples=200, deadline=None)
@given(raw=st.binary(min_size=64, max_size=64), rows=st.sampled_from([1, 2, 4]))
def test_fp8_of_any_finite_bits_is_finite(element: str, raw: bytes, rows: int) -> None:
    """Largest, subnormal and zero values included; frames with NaN or infinity are not coded."""
    finite = np.isfinite(to_floats(raw, element)).all()
    parts = encode_fp8([raw], element, rows)
    assert (parts is not None) == finite
    if parts is not None:
        after = to_floats(decode_fp8(b"".join(parts), element, rows, 64), element)
        before = to_floats(raw, element)
        assert np.isfinite(after).all()
        assert (np.signbit(after) == np.signbit(before)).all()
        least = 2.0**-9 * np.abs(before).max() + 2.0**-132  # float32's own subnormals are cut
        assert (np.abs(after) <= np.abs(before) * 1.0626 + least).all()


def test_fp8_refuses_other_elements() -> None:
    """Unknown elements are a bug on this side and a broken peer on the other."""
    with pytest.raises(LocalProtocolError, match="unknown"):
        encode_fp8([bytes(64)], "", 1)
    with pytest.raises(RemoteProtocolError, match="fp8"):
        decode_fp8(bytes(64), "fp8", 1, 64)


def test_frames_are_decoded_by_their_layout() -> None:
    """The element and the size come from this side's layout."""
    layout = Layout(
        "e", "m", 64, "bfloat16", 1, (Component("kv", (4096,), element="bfloat16"), Component("aux", (8,)))
    )
    raw = to_bytes(normal(3, 2048), "bfloat16")
    planes = b"".join(encode_planes([raw], ELEMENT_BYTES["bfloat16"]))
    assert decode(layout, Data(0, 0, 0, 3, PLANES), planes) == raw
    rounded = decode(layout, Data(0, 0, 0, 3, FP8), b"".join(encode_fp8([raw], "bfloat16", 3) or []))
    assert len(rounded) == len(raw)
    assert RAW not in (PLANES, FP8)
