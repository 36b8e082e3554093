"""Export and import halves together: every row arrives once at the right place, whatever the order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

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
from prfaas_sglang.core.session import ExportSession, ImportSession, Part

LAYOUT = Layout(
    engine="sglang 0.5.21",
    model="tiny",
    page_size=64,
    kv_dtype="float32",
    tp_size=1,
    components=(
        Component("kv", (100, 100, 300), (3, 7, 7)),
        Component("mamba", (5000, 70), (0, 1)),
        Component("swa", (40, 90)),
        Component("aux", (64, 8, 16)),
    ),
)


def make(
    pages: int, seed: int, frame_bytes: int, *, prefix: int = 0, window: int = 0
) -> tuple[ExportSession, ImportSession, list[list[int]], Grant]:
    """Return both halves, the sender's rows per component, and the grant.

    Decode holds `prefix` pages of the prompt already, and wants `window` of the sender's window pages less.
    """
    rng = random.Random(seed)
    source = [
        rng.sample(range(1000), pages),
        [rng.randrange(50)],
        rng.sample(range(50), 6),
        [rng.randrange(50)],
    ]
    target = ImportSession(
        LAYOUT,
        rng.sample(range(1000), pages - prefix),
        [[rng.randrange(50)], rng.sample(range(50), 6 - window)],
        rng.randrange(50),
    )
    grant = Grant(seed, pages - prefix, prefix * 64, (1, 6 - window))
    return ExportSession(LAYOUT, frame_bytes, prompt_pages=pages), target, source, grant


def payload_bytes(data: Data) -> int:
    """Return the row bytes that belong to a descriptor."""
    return data.count * LAYOUT.components[data.component].row_bytes[data.tensor]


def offer(export: ExportSession, source: list[list[int]], rng: random.Random) -> Iterator[list[Part]]:
    """Offer a prompt in random chunks, some layers of some of them ahead of the rest."""
    pages = source[0]
    cuts = sorted(rng.randint(0, len(pages)) for _ in range(rng.randint(0, 4)))
    for start, end in zip([0, *cuts], [*cuts, len(pages)], strict=True):
        chunk = pages[start:end]
        tensors = rng.sample(range(3), rng.randint(0, 3))
        early = chunk[: rng.randint(0, len(chunk))]
        while tensors and early:
            yield [export.ahead(early, [tensors.pop()])]
        if end == len(pages):
            yield export.chunk(chunk, states=[source[1], source[2]], aux_row=source[3][0], last=True)
            return
        yield export.chunk(chunk)


@settings(max_examples=200)
@given(
    st.integers(0, 60), st.integers(0, 1 << 30), st.sampled_from([1, 128, 1000, 1 << 18]), st.integers(0, 6)
)
def test_every_row_arrives_exactly_once_in_any_order(
    pages: int, seed: int, frame_bytes: int, window: int
) -> None:
    """Whatever the chunks, the layers sent ahead, the moment of the grant, decode's prefix: rows move right.

    The brute-force model: the sender's row of prompt page p belongs where decode's list says, page by page.
    """
    rng = random.Random(seed)
    prefix = rng.randint(0, pages)
    export, target, source, grant = make(pages, seed, frame_bytes, prefix=prefix, window=window)
    granted_at = rng.randint(0, 8)
    pieces: list[Piece] = []
    waiting: list[Part] = []
    for i, parts in enumerate(offer(export, source, rng)):
        if i == granted_at:
            export.accept(grant)
        waiting += parts
        if export.grant is not None:
            pieces += [piece for part in waiting for piece in export.pieces(part)]
            waiting.clear()
    if export.grant is None:
        export.accept(grant)
    pieces += [piece for part in waiting for piece in export.pieces(part)]
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
    wanted = [source[0][prefix:], source[1], source[2][window:], source[3]]
    for number, component in enumerate(LAYOUT.components):
        for tensor in range(len(component.row_bytes)):
            for src, dst in zip(wanted[number], target.rows(number), strict=True):
                assert moved[(number, tensor, dst)] == src
    assert len(moved) == sum(
        len(c.row_bytes) * len(rows) for c, rows in zip(LAYOUT.components, wanted, strict=True)
    )


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5000))
def test_place_never_leaves_the_grant(
    component: int, tensor: int, first: int, count: int, length: int
) -> None:
    """Whatever a peer says, rows come from the grant or the frame is refused."""
    _, target, _, _ = make(20, 7, 1000)
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
    export, target, source, grant = make(4, 1, 1000)
    export.accept(grant)
    parts = export.chunk(source[0], states=[source[1], source[2]], aux_row=3, last=True)
    piece = next(export.pieces(parts[0]))
    target.place(piece.data, payload_bytes(piece.data))
    target.arrived(piece.data)
    with pytest.raises(RemoteProtocolError, match="twice"):
        target.place(piece.data, payload_bytes(piece.data))
    with pytest.raises(RemoteProtocolError, match="granted"):
        target.commit(export.total_bytes - 1)
    target.commit(export.total_bytes)
    with pytest.raises(RemoteProtocolError, match="twice"):
        target.commit(export.total_bytes)


def test_export_refuses_what_does_not_fit_prompt_or_grant() -> None:
    """Too many pages, too few at the end, missing state or metadata row: our engine's fault, said so."""
    good = [[0], [0, 1]]
    cases: list[tuple[dict[str, object], str]] = [
        ({"pages": [1, 2, 3]}, "prompt of 2"),
        ({"pages": [1], "states": good, "aux_row": 0, "last": True}, "ended after 1 of 2"),
        ({"pages": [1, 2], "states": good, "aux_row": None, "last": True}, "metadata"),
        ({"pages": [1, 2], "states": [], "aux_row": 0, "last": True}, "state components"),
        ({"pages": [1, 2], "states": [[0, 1], [0, 1]], "aux_row": 0, "last": True}, "rows of state mamba"),
        ({"pages": [1, 2], "states": [[0], [0]], "aux_row": 0, "last": True}, "rows of state swa"),
    ]
    for arguments, message in cases:
        for known in (2, None):
            session = ExportSession(LAYOUT, prompt_pages=known)
            session.accept(Grant(1, 2, 0, (1, 2)))
            with pytest.raises(LocalProtocolError, match=message):
                session.chunk(**arguments)  # type: ignore[arg-type]


def test_only_what_was_offered_could_be_under_way() -> None:
    """Three pages of which decode holds one: nothing before a chunk, then chunk by chunk, all at the end."""
    session = ExportSession(LAYOUT, prompt_pages=3)
    offered = [session.offered_bytes]
    session.accept(Grant(1, 2, LAYOUT.page_size, (1, 2)))
    offered.append(session.offered_bytes)
    for page in (7, 8):
        session.chunk([page])
        offered.append(session.offered_bytes)
    session.chunk([9], states=[[0], [0, 1]], aux_row=0, last=True)
    page_bytes = LAYOUT.components[0].bytes_per_row
    assert offered == [0, 0, 0, page_bytes]
    assert session.offered_bytes == session.total_bytes > 2 * page_bytes


@pytest.mark.parametrize(
    ("grant", "message"),
    [
        (Grant(1, 2, 0, (1,)), "state components"),
        (Grant(1, 1, 63, (1, 2)), "whole pages"),
        (Grant(1, 2, 64, (1, 2)), "make 3 pages"),
        (Grant(1, 1, 0, (1, 2)), "make 1 pages"),
    ],
)
def test_a_grant_that_does_not_fit_is_refused(grant: Grant, message: str) -> None:
    """Decode's numbers are checked against layout and prompt before anything is sent."""
    with pytest.raises(RemoteProtocolError, match=message):
        ExportSession(LAYOUT, prompt_pages=2).accept(grant)


def test_a_grant_after_the_last_chunk_that_wants_other_state_is_refused() -> None:
    """State rows that were offered before the grant came are compared when it comes."""
    session = ExportSession(LAYOUT, prompt_pages=1)
    parts = session.chunk([4], states=[[0], [0, 1]], aux_row=0, last=True)
    session.accept(Grant(1, 1, 0, (1, 3)))
    with pytest.raises(RemoteProtocolError, match="rows of state swa"):
        session.pieces(parts[2])


def test_layers_ahead_must_be_the_chunks_own() -> None:
    """Changed pages and repeated layers are refused before a position could travel twice."""
    session = ExportSession(LAYOUT, prompt_pages=4)
    session.ahead([5, 6], [0])
    for pages, tensors in (([5], [1]), ([5, 6], [0])):
        with pytest.raises(LocalProtocolError, match="ahead"):
            session.ahead(pages, tensors)
    with pytest.raises(LocalProtocolError, match="changed"):
        session.chunk([5, 7])
    assert [p.tensors for p in session.chunk([5, 6, 7])] == [(1, 2), (0, 1, 2)]


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
    dense = dataclasses.replace(LAYOUT, components=(LAYOUT.components[0], LAYOUT.components[-1]))
    (line,) = differences(LAYOUT, to_json(dense))
    assert line == "components: kv, mamba, swa, aux here, kv, aux at the peer"
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
    empty = (Component("kv", (0,)), LAYOUT.components[-1])
    with pytest.raises(ValueError, match="row of 0 bytes"):
        check_layout(dataclasses.replace(LAYOUT, components=empty))
