"""The pure protocol against anything: a value or RemoteProtocolError, never a crash or a wrong row."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from cache_service.core.ids import parse_name
from prfaas_sglang.core import framing
from prfaas_sglang.core.framing import HEADER_BYTES, Data, FrameType, Grant, Missing, decode_header
from prfaas_sglang.core.layout import (
    MAX_CONNECTIONS,
    Component,
    Hello,
    Layout,
    decode_hello,
    differences,
    encode_hello,
    to_json,
)
from prfaas_sglang.core.session import ExportSession, ImportSession, ranges_of
from tests.fuzzing import budget, frames, mutations, payloads, u8, u16, u32, u64

LAYOUT = Layout(
    engine="test 1",
    model="tiny",
    page_size=64,
    kv_dtype="float32",
    tp_size=1,
    components=(Component("kv", (64, 32)), Component("mamba", (200,)), Component("aux", (16, 8))),
)
DECODERS = {
    FrameType.GRANT: framing.decode_grant,
    FrameType.COMMIT: framing.decode_total,
    FrameType.DONE: framing.decode_total,
    FrameType.CANCEL: framing.decode_room,
    FrameType.RESUME: framing.decode_resume,
    FrameType.ABORT: framing.decode_reason,
    FrameType.HELLO: decode_hello,
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(frames(payloads(u64)), max_size=6), mutations())
@budget(300)
def test_a_stream_is_parsed_or_refused(parts: list[bytes], mutate) -> None:  # type: ignore[no-untyped-def]
    """Frame after frame until one is refused; a length that is announced is within its bound."""
    data = mutate(parts)
    at = 0
    while at + HEADER_BYTES <= len(data):
        try:
            header = decode_header(data[at : at + HEADER_BYTES])
            bound = framing.MAX_PAYLOAD_BYTES if header.type is FrameType.DATA else framing.MAX_CONTROL_BYTES
            assert header.length <= bound
            at += HEADER_BYTES
            payload = data[at : at + header.length]
            at += header.length
            if header.type is FrameType.DATA:
                framing.decode_data(payload[: framing.DATA_BYTES])
            elif header.type in DECODERS:
                DECODERS[header.type](payload)  # type: ignore[operator]
        except RemoteProtocolError:
            return


hellos = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["prefill", "decode"]) | json_values,
        "site": st.sampled_from(["A", "B", "a b", "\n", "\ud800", "x" * 64]) | json_values,
        "worker": st.sampled_from(["w", "", "\x1b[2J", "w" * 70]) | json_values,
        "rank": st.sampled_from([0, -1, True, 10**4000]) | json_values,
        "layout": st.just(to_json(LAYOUT)) | st.dictionaries(st.text(max_size=5), json_values) | json_values,
        "bundle": st.sampled_from(["b", "x" * 65, "\u202e"]) | json_values,
        "index": st.sampled_from([0, 63, 64, -1, False]) | json_values,
    },
)


@given(hellos)
@budget(300)
def test_a_hello_is_names_and_small_numbers_or_refused(value: dict[str, object]) -> None:
    """What gets through can be a label, a log field, an index; its layout is compared without a crash."""
    try:
        hello = decode_hello(json.dumps(value).encode())
    except RemoteProtocolError as error:
        reason = str(error)
    else:
        reason = ""
        check_hello(hello)
    assert reason == "" or reason.isprintable()
    assert len(reason) < 200


def check_hello(hello: Hello) -> None:
    """What got through is safe to use."""
    parse_name(hello.site, field="site")
    parse_name(hello.worker, field="worker")
    assert type(hello.rank) is int
    assert 0 <= hello.index < MAX_CONNECTIONS
    for line in differences(LAYOUT, hello.layout):
        assert line.isprintable()
        assert len(line) < 1000


@pytest.mark.parametrize("depth", [10, 500, 900, 950, 960, 970, 980, 985, 990, 995, 1000, 5000, 100_000])
def test_deep_layouts_are_refused_or_compared(depth: int) -> None:
    """JSON that the parser takes just so, and that is too deep to be shown."""
    hello = encode_hello(Hello("decode", "B", "b-0", 0, {"engine": "DEEP"}))
    payload = hello.replace(b'"DEEP"', b"[" * depth + b"]" * depth)
    try:
        found = differences(LAYOUT, decode_hello(payload).layout)
    except RemoteProtocolError:
        return
    assert found
    assert all(len(line) < 1000 for line in found)


def test_long_kinds_of_a_peer_are_cut() -> None:
    """A refusal is logged: what the peer wrote in it is short and on one line."""
    theirs = to_json(LAYOUT) | {"components": [{"kind": "x\n" * 1000}] * 1000}
    (line,) = differences(LAYOUT, theirs)
    assert line.isprintable()
    assert len(line) < 1000


small = st.integers(0, 12)
wild_data = st.builds(
    Data, st.integers(0, 3) | u16, st.integers(0, 2) | u16, small | u32, small | u32, st.just(0) | u8
)


@given(
    st.integers(0, 9),
    st.lists(st.tuples(wild_data, st.integers(0, 2000) | st.none()), max_size=40),
    st.lists(u64, max_size=3),
)
@example(3, [(Data(0, 0, 2**32 - 1, 2**32 - 1), None)], [])
@budget(300)
def test_an_import_claims_each_granted_row_once(
    pages: int, offered: list[tuple[Data, int | None]], totals: list[int]
) -> None:
    """Whatever is offered, rows come from the grant, no position twice, and complete means all of them."""
    granted = [list(range(100, 100 + pages)), [7], [3]]
    session = ImportSession(LAYOUT, granted[0], [granted[1]], 3)
    seen: set[tuple[int, int, int]] = set()
    for data, payload_bytes in offered:
        if payload_bytes is None:  # the length that fits, where there is one
            sizes = LAYOUT.components[data.component].row_bytes if data.component < 3 else ()
            payload_bytes = sizes[data.tensor] * data.count if data.tensor < len(sizes) else 0
        try:
            rows = session.place(data, payload_bytes)
        except RemoteProtocolError:
            continue
        assert list(rows) == granted[data.component][data.first : data.first + data.count]
        assert payload_bytes == LAYOUT.components[data.component].row_bytes[data.tensor] * len(rows)
        for position in range(data.first, data.first + data.count):
            assert (data.component, data.tensor, position) not in seen
            seen.add((data.component, data.tensor, position))
        session.arrived(data)
    for total in [*totals, session.expected_bytes(), session.expected_bytes()]:
        try:
            session.commit(total)
        except RemoteProtocolError:
            continue
        assert total == session.expected_bytes()
    wanted = 2 * pages + 1 + 2
    assert session.complete == (len(seen) == wanted)


@given(
    st.builds(
        Grant,
        u64,
        small | u32,
        st.integers(0, 5).map(lambda n: n * 64) | u32,
        st.just((1,)) | st.lists(u32, max_size=3).map(tuple),
    ),
    st.none() | small,
    st.lists(st.integers(0, 4), max_size=5),
    st.booleans(),
)
@budget(300)
def test_an_export_sends_exactly_what_was_granted(
    grant: Grant, prompt: int | None, chunks: list[int], first: bool
) -> None:
    """Any grant, before or after the chunks: it is refused, or the pieces cover it and nothing else."""
    if not first and prompt is None:
        prompt = sum(chunks)  # the engine says it before it offers anything
    session = ExportSession(LAYOUT, frame_bytes=4096, prompt_pages=prompt)
    parts, page = [], 0
    try:
        if first:
            session.accept(grant)
        for n, count in enumerate(chunks, 1):
            last = n == len(chunks)
            pages = range(page, page + count)
            parts += session.chunk(
                pages, states=[[5]] if last else None, aux_row=1 if last else None, last=last
            )
            page += count
        if not first:
            session.accept(grant)
        pieces = [piece for part in parts for piece in session.pieces(part)]
    except (LocalProtocolError, RemoteProtocolError):
        return
    if not session.last_seen:
        return
    sent = [(p.data.component, p.data.tensor, p.data.first + i) for p in pieces for i in range(p.data.count)]
    expected = {(0, t, i) for t in (0, 1) for i in range(grant.pages)} | {(1, 0, 0), (2, 0, 0), (2, 1, 0)}
    assert len(sent) == len(set(sent))
    assert set(sent) == expected


@given(
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), small, st.integers(1, 4))),
    st.lists(st.builds(Missing, small, small, small | u32, small | u32), max_size=4),
)
@budget(200)
def test_what_is_missing_is_sent_once_whatever_a_peer_lists(
    pages: int, arrived: list[tuple[int, int, int, int]], listed: list[Missing]
) -> None:
    """An import's list survives the wire and is what it lacks; any other list adds nothing twice."""
    importing = ImportSession(LAYOUT, range(pages), [[7]], 3)
    for fields in arrived:
        data = Data(*fields)
        with suppress(RemoteProtocolError, IndexError):
            importing.place(data, LAYOUT.components[data.component].row_bytes[data.tensor] * data.count)
            importing.arrived(data)
    exporting = ExportSession(LAYOUT, frame_bytes=64, prompt_pages=pages)
    parts = exporting.chunk(range(pages), states=[[5]], aux_row=1, last=True)
    exporting.accept(Grant(1, pages, 0, (1,)))
    for ranges in (importing.resume(), listed):
        try:
            room, missing = framing.decode_resume(framing.encode_resume(1, ranges))
        except RemoteProtocolError:
            assert ranges is listed
            continue
        assert (room, missing) == (1, ranges)
        pieces = [piece.data for part in parts for piece in exporting.pieces(part, ranges_of(missing))]
        sent = [(d.component, d.tensor, d.first + i) for d in pieces for i in range(d.count)]
        assert len(sent) == len(set(sent))
        if ranges is not listed:
            for data in pieces:
                importing.place(data, LAYOUT.components[data.component].row_bytes[data.tensor] * data.count)
                importing.arrived(data)
            importing.commit(importing.expected_bytes())
            assert importing.complete
