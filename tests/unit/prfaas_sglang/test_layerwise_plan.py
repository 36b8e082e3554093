"""Which pages and layers may go ahead: against brute-force models, and every way a batch can go wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_sglang.engine.layerwise_plan import Watch, final_pages, tensors_by_layer


@given(st.integers(0, 400), st.integers(0, 500), st.integers(1, 400), st.sampled_from([1, 4, 16, 64]))
def test_final_pages_are_those_whose_tokens_are_all_computed(
    begin_page: int, end: int, prompt: int, page_size: int
) -> None:
    """Brute force: a page is final when no token of the prompt that lies in it is computed later."""
    begin = min(begin_page * page_size, prompt)
    begin -= begin % page_size
    pages = final_pages(begin, end, prompt, page_size)
    last_page = (prompt - 1) // page_size
    model = [
        page
        for page in range(begin // page_size, last_page + 1)
        if all(token < end for token in range(page * page_size, min((page + 1) * page_size, prompt)))
    ]
    assert list(pages) == model


@given(
    st.integers(1, 300), st.lists(st.integers(1, 90), min_size=1, max_size=8), st.sampled_from([1, 16, 64])
)
def test_the_batches_of_a_prompt_cover_every_page_once(prompt: int, steps: list[int], page_size: int) -> None:
    """Chunk after chunk, offered as SGLang does (floored to a page until the last): each page goes once."""
    end, offered, pages = 0, 0, []
    while end < prompt:
        end = min(end + steps[len(pages) % len(steps)], prompt)
        pages.append(final_pages(offered, end, prompt, page_size))
        offered = end if end == prompt else max(offered, end - end % page_size)
    assert [page for span in pages for page in span] == list(range(-(-prompt // page_size)))


def test_tensors_belong_to_the_layer_that_has_their_buffer() -> None:
    """K and V lie anywhere in the layout; what is nobody's or two layers' switches it off."""
    buffers = {0: (10, 20), 3: (11, 21), 5: (90, 91)}
    assert tensors_by_layer([10, 11, 20, 21], buffers) == {0: (0, 2), 3: (1, 3)}
    assert tensors_by_layer([10, 10, 11], {0: (10,), 1: (11, 12)}) == {0: (0, 1), 1: (2,)}
    assert tensors_by_layer([10, 99], buffers) is None
    assert tensors_by_layer([10, 20], {0: (10, 20), 1: (10, 20)}) is None  # shared by two layers
    assert tensors_by_layer([], buffers) is None


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8), max_size=6))
def test_a_layer_goes_ahead_only_once_in_a_batch_and_after_a_whole_batch(
    batches: list[list[tuple[int, bool]]],
) -> None:
    """Brute force over any callbacks: sent means trusted before, first in its batch, nothing wrong yet."""
    layers = frozenset({0, 2, 3})
    watch = Watch(layers)
    trusted = wrong = False
    for callbacks in batches:
        watch.begin()
        reported: list[int] = []
        for layer, whole in callbacks:
            mine = layer in layers
            wrong |= mine and (layer in reported or not whole)
            assert watch.seen(layer, whole=whole) == (mine and trusted and not wrong)
            reported += [layer] * mine
        complaint = watch.end()
        assert bool(complaint) == (wrong or set(reported) != layers)
        trusted |= not complaint
        assert watch.trusted == trusted


@pytest.mark.parametrize(
    ("callbacks", "complaint"),
    [
        ([0, 1, 1, 2], "layer 1 was computed twice in one batch"),
        ([0, 2], "1 of 3 layers did not report"),
        ([], "3 of 3 layers did not report"),
        ([7, 0, 1, 2, 7], ""),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(callbacks: list[int], complaint: str) -> None:
    """Layers without KV tensors do not count."""
    watch = Watch(frozenset({0, 1, 2}))
    watch.begin()
    for layer in callbacks:
        assert not watch.seen(layer, whole=True)
    assert watch.end() == complaint
