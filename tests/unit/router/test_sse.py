"""The event-stream parser gives the same events however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import RemoteProtocolError
from router.core.sse import SseParser

STREAM = (
    b"\xef\xbb\xbf: comment\r\nid: 1\nevent: x\ndata: one\r\ndata:two\r\r\n"
    b'\ndata\n\ndata: {"a": "\xc3\xa9"}\n\n: ping\n\ndata: [DONE]\r\n\r\ndata: never finished'
)
EVENTS = [b"one\ntwo", b"", b'{"a": "\xc3\xa9"}', b"[DONE]"]


def feed(pieces: list[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_whole_stream() -> None:
    """Comments, other fields, three line ends, several data lines, an unfinished tail."""
    assert feed([STREAM]) == EVENTS


def test_split_at_every_byte() -> None:
    """Every cut in two, and one byte at a time."""
    for cut in range(len(STREAM) + 1):
        assert feed([STREAM[:cut], STREAM[cut:]]) == EVENTS
    assert feed([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(
    st.lists(st.sampled_from([b"data: x", b"data:", b":c", b"\n", b"\r", b"\r\n", b"id: 3", b"y"])), st.data()
)
def test_any_cut_equals_a_line_by_line_reading(parts: list[bytes], data: st.DataObject) -> None:
    """Against a reading that splits lines with the standard library."""
    stream = b"".join(parts)
    expected: list[bytes] = []
    lines: list[bytes] = []
    text = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if stream.endswith(b"\r"):
        text = text[:-1]  # a \n may follow
    for line in text.split(b"\n")[:-1]:
        if line:
            name, _, value = line.partition(b":")
            lines += [value[1:] if value.startswith(b" ") else value] if name == b"data" else []
        else:
            expected += [b"\n".join(lines)] if lines else []
            lines = []
    pieces, rest = [], stream
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    assert feed(pieces) == expected


@pytest.mark.parametrize("piece", [b"data: 12345678901", b"data: 123\ndata: 456\ndata: 789\n", b"x" * 20])
def test_event_size_is_bounded(piece: bytes) -> None:
    """A peer that never ends an event cannot fill the memory."""
    with pytest.raises(RemoteProtocolError):
        SseParser(max_event_bytes=10).feed(piece)
