"""Layers ahead of their chunk in the export session: every page of every layer once, or a clear failure."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import LocalProtocolError
from prfaas_sglang.core.layout import KV, Component, Layout
from prfaas_sglang.core.session import ExportSession, Part

TENSORS = 4
LAYOUT = Layout("test 1", "tiny", 64, "f", 1, (Component("kv", (8,) * TENSORS), Component("aux", (8,))))


def finish(session: ExportSession, pages: list[int], *, copied: bool = False) -> list[Part]:
    """Offer the last chunk."""
    return session.chunk(pages, states=[], aux_row=0, last=True, ahead_copied=copied)


@given(st.data())
def test_every_page_of_every_layer_goes_once(data: st.DataObject) -> None:
    """Chunks of any size; layers of any pages of them ahead, one chunk early too, whose pages then move.

    Brute force: count each (tensor, prompt page) over all parts.
    """
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    session = ExportSession(LAYOUT, prompt_pages=sum(sizes))
    parts: list[Part] = []
    pending: tuple[int, list[int], list[int]] | None = None  # prompt page, pages, tensors still possible
    begin = 0
    for i, size in enumerate(sizes):
        here = list(range(100 + begin, 100 + begin + size))
        choices = [(begin, here)]
        if i + 1 < len(sizes):  # overlapped: the next chunk is computed before this one is offered
            after = begin + size
            choices.append((after, list(range(100 + after, 100 + after + sizes[i + 1]))))
        if pending is None:
            at, pages = data.draw(st.sampled_from(choices))
            if pages:
                low = data.draw(st.integers(0, len(pages) - 1))
                high = data.draw(st.integers(low + 1, len(pages)))
                pending = (at + low, pages[low:high], data.draw(st.permutations(range(TENSORS))))
        if pending is not None:
            for _ in range(data.draw(st.integers(0, len(pending[2])))):
                parts.append(session.ahead(pending[1], [pending[2].pop()], first=pending[0]))
        moved = data.draw(st.booleans())
        offered = [page + 1000 for page in here] if moved else here
        if begin + size < sum(sizes) or i + 1 < len(sizes):
            parts += session.chunk(offered, ahead_copied=moved)
        else:
            parts += finish(session, offered, copied=moved)
        begin += size
        if pending is not None and pending[0] < begin:
            pending = None
    went = Counter(
        (tensor, part.first + row)
        for part in parts
        if part.component == KV
        for row in range(len(part.rows))
        for tensor in part.tensors
    )
    assert went == {(tensor, page): 1 for tensor in range(TENSORS) for page in range(sum(sizes))}
    for part in parts:
        if part.component == KV:
            assert [row % 1000 - 100 for row in part.rows] == list(
                range(part.first, part.first + len(part.rows))
            )


def test_pages_that_moved_are_refused_unless_they_were_copied() -> None:
    """Straight from the pool, the old pages may hold something else by now."""
    session = ExportSession(LAYOUT, prompt_pages=4)
    session.ahead([5, 6], [0])
    assert session.moved([5, 7, 8, 9])
    with pytest.raises(LocalProtocolError, match="pages changed"):
        finish(session, [5, 7, 8, 9])
    parts = finish(session, [5, 7, 8, 9], copied=True)
    assert [(p.tensors, p.first, p.rows) for p in parts if p.component == KV] == [
        ((1, 2, 3), 0, (5, 7)),
        ((0, 1, 2, 3), 2, (8, 9)),
    ]


@pytest.mark.parametrize(
    ("pages", "tensors", "first", "message"),
    [
        ([1], [0], 1, "offered before"),
        ([], [0], None, "offered before"),
        ([3, 4], [1], 2, "other pages"),
        ([3], [1], 3, "other pages"),
        ([3], [0], 2, "twice"),
        ([3, 4, 5], [1], 2, "other pages"),
    ],
)
def test_what_cannot_go_ahead_is_refused(
    pages: list[int], tensors: list[int], first: int | None, message: str
) -> None:
    """A recomputed chunk, other pages than before, a layer again: the request fails, none is sent twice."""
    session = ExportSession(LAYOUT, prompt_pages=4)
    session.chunk([1, 2])
    session.ahead([3], [0], first=2)
    with pytest.raises(LocalProtocolError, match=message):
        session.ahead(pages, tensors, first=first)


def test_more_pages_than_the_prompt_has_are_refused() -> None:
    """The engine and the session disagree about the prompt."""
    with pytest.raises(LocalProtocolError, match="prompt of 2"):
        ExportSession(LAYOUT, prompt_pages=2).ahead([1, 2, 3], [0])


@pytest.mark.parametrize("chunk", [[1], [1, 2, 3]])
def test_a_chunk_that_ends_inside_what_went_ahead_is_refused(chunk: list[int]) -> None:
    """The last chunk too must cover it."""
    session = ExportSession(LAYOUT)
    session.ahead([2, 3, 4], [0], first=1)
    with pytest.raises(LocalProtocolError, match="ends inside"):
        finish(session, chunk)
