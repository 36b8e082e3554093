"""Export and import halves together: every row arrives once at the right place, whatever the order."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError, RemoteProtocolError
from prfaas_sglang.core.framing import Data, Grant
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
from prfaas_sglang.core.plan import Piece, plan_component
from prfaas_sglang.core.session import ExportSession, ImportSession

LAYOUT = Layout(
    engine="sglang 0.5.21",
    model="tiny",
    page_size=64,
    kv_dtype="float32",
    tp_size=1,
    components=(
        Component("kv", (100, 100, 300), (3, 7, 7)),
        Component("mamba", (5000, 70), (0, 1)),
        Component("aux", (64, 8, 16)),
    ),
)


def make(pages: int, seed: int, frame_bytes: int) -> tuple[ExportSession, ImportSession, list[list[int]]]:
    """Return both halves and the sender's rows per component."""
    rng = random.Random(seed)
    source = [rng.sample(range(1000), pages), [rng.randrange(50)], [rng.randrange(50)]]
    grant = Grant(room=seed, pages=pages, prefix_tokens=0, state_rows=(1,))
    target = ImportSession(LAYOUT, rng.sample(range(1000), pages), [[rng.randrange(50)]], rng.randrange(50))
    return ExportSession(LAYOUT, grant, frame_bytes), target, source


def payload_bytes(data: Data) -> int:
    """Return the row bytes that belong to a descriptor."""
    return data.count * LAYOUT.components[data.component].row_bytes[data.tensor]


@settings(max_examples=150)
@given(
    st.integers(0, 60), st.integers(1, 5), st.integers(0, 1 << 30), st.sampled_from([1, 128, 1000, 1 << 18])
)
def test_every_row_arrives_exactly_once_in_any_order(
    pages: int, chunks: int, seed: int, frame_bytes: int
) -> None:
    """Pieces of several chunks, shuffled, move each source row to the granted row of the same position."""
    export, target, source = make(pages, seed, frame_bytes)
    rng = random.Random(seed)
    cuts = sorted(rng.randint(0, pages) for _ in range(chunks - 1))
    pieces: list[Piece] = []
    for start, end in zip([0, *cuts], [*cuts, pages], strict=True):
        if end == pages:
            pieces += export.chunk(source[0][start:end], states=[source[1]], aux_row=source[2][0], last=True)
            break
        pieces += export.chunk(source[0][start:end])
    rng.shuffle(pieces)
    moved: dict[tuple[int, int, int], int] = {}
    commit_at = rng.randint(0, len(pieces))
    for i, piece in enumerate(pieces):
        if i == commit_at:
            target.commit(export.total_bytes)
        assert not target.complete
        rows = target.place(piece.data, payload_bytes(piece.data))
        for src, dst in zip(piece.rows, rows, strict=True):
            key = (piece.data.component, piece.data.tensor, dst)
            assert key not in moved
            moved[key] = src
        target.arrived(piece.data)
    if target.committed_bytes is None:
        target.commit(export.total_bytes)
    assert target.complete
    for number, component in enumerate(LAYOUT.components):
        for tensor in range(len(component.row_bytes)):
            for src, dst in zip(source[number], target.rows(number), strict=True):
                assert moved[(number, tensor, dst)] == src


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5000))
def test_place_never_leaves_the_grant(
    component: int, tensor: int, first: int, count: int, length: int
) -> None:
    """Whatever a peer says, rows come from the grant or the frame is refused."""
    _, target, _ = make(20, 7, 1000)
    data = Data(component, tensor, first, count)
    try:
        rows = target.place(data, length)
    except RemoteProtocolError:
        return
    assert set(rows) <= set(target.rows(component))
    assert len(rows) == count > 0
    assert payload_bytes(data) == length


def test_duplicate_rows_and_double_commit_are_refused() -> None:
    """The second arrival of a position, and a second or wrong commit, end the connection."""
    export, target, source = make(4, 1, 1000)
    piece = next(iter(export.chunk(source[0], states=[source[1]], aux_row=3, last=True)))
    target.place(piece.data, payload_bytes(piece.data))
    target.arrived(piece.data)
    with pytest.raises(RemoteProtocolError, match="twice"):
        target.place(piece.data, payload_bytes(piece.data))
    with pytest.raises(RemoteProtocolError, match="granted"):
        target.commit(export.total_bytes - 1)
    target.commit(export.total_bytes)
    with pytest.raises(RemoteProtocolError, match="twice"):
        target.commit(export.total_bytes)


def test_export_refuses_what_the_grant_does_not_cover() -> None:
    """Too many pages, too few at the end, missing state or metadata row: our engine's fault, said so."""
    cases = [
        ({"pages": [1, 2, 3]}, "granted"),
        ({"pages": [1], "states": [[0]], "aux_row": 0, "last": True}, "ended after 1 pages"),
        ({"pages": [1, 2], "states": [[0]], "aux_row": None, "last": True}, "metadata"),
        ({"pages": [1, 2], "states": [], "aux_row": 0, "last": True}, "state components"),
        ({"pages": [1, 2], "states": [[0, 1]], "aux_row": 0, "last": True}, "rows of state mamba"),
    ]
    for arguments, message in cases:
        session = ExportSession(LAYOUT, Grant(1, 2, 0, (1,)))
        with pytest.raises(LocalProtocolError, match=message):
            session.chunk(**arguments)  # type: ignore[arg-type]


def test_pieces_respect_the_frame_bound() -> None:
    """A piece carries at most frame_bytes of rows, or a single larger row."""
    component = Component("kv", (1000, 10))
    pieces = list(plan_component(0, component, list(range(100)), first=5, frame_bytes=2500))
    for piece in pieces:
        size = piece.data.count * component.row_bytes[piece.data.tensor]
        assert size <= 2500 or piece.data.count == 1
    assert [p.data.first for p in pieces if p.data.tensor == 0] == [5 + 2 * i for i in range(50)]


def test_differences_name_the_field() -> None:
    """Layouts that differ are told apart field by field; equal ones have equal fingerprints."""
    assert differences(LAYOUT, to_json(LAYOUT)) == []
    other = dataclasses.replace(LAYOUT, page_size=32)
    assert differences(LAYOUT, to_json(other)) == ["page_size: 64 here, 32 at the peer"]
    assert other.fingerprint() != LAYOUT.fingerprint()
    dense = dataclasses.replace(LAYOUT, components=(LAYOUT.components[0], LAYOUT.components[2]))
    assert differences(LAYOUT, to_json(dense)) == ["components: kv, mamba, aux here, kv, aux at the peer"]
    wide = dataclasses.replace(
        LAYOUT, components=(Component("kv", (200, 100, 300), (3, 7, 7)), *LAYOUT.components[1:])
    )
    assert differences(LAYOUT, to_json(wide))[0].startswith("components[0] (kv)")
    assert differences(LAYOUT, {}) != []


def test_hello_round_trip_and_refusals() -> None:
    """A hello survives its bytes; each missing or mistyped field is named."""
    hello = Hello("prefill", "A", "a-0", 0, to_json(LAYOUT))
    assert decode_hello(encode_hello(hello)) == hello
    for payload, message in [
        (b"\xff", "not JSON"),
        (b"[]", "not an object"),
        (b'{"role": 1}', "hello.role"),
        (encode_hello(dataclasses.replace(hello, role="boss")), "prefill and decode"),
    ]:
        with pytest.raises(RemoteProtocolError, match=message):
            decode_hello(payload)


def test_check_layout_refuses_pools_that_cannot_travel() -> None:
    """Zero-byte rows and a missing aux component are refused before serving."""
    check_layout(LAYOUT)
    with pytest.raises(ValueError, match="kv, the states, aux"):
        check_layout(dataclasses.replace(LAYOUT, components=LAYOUT.components[:2]))
    empty = (Component("kv", (0,)), LAYOUT.components[2])
    with pytest.raises(ValueError, match="row of 0 bytes"):
        check_layout(dataclasses.replace(LAYOUT, components=empty))
