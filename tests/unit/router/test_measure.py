"""What a profile makes of the moments at which tokens came."""

from __future__ import annotations

import pytest

from router.plan.measure import step_seconds


def test_a_step_is_taken_while_all_streams_are_in_the_batch() -> None:
    """The second stream begins later and the first ends earlier; alone, steps are shorter."""
    first = [0.0, 0.1, 0.2, 0.5, 0.8, 1.1]
    second = [0.3, 0.5, 0.8, 1.1, 1.2, 1.3]
    assert step_seconds([first, second]) == pytest.approx(0.3)


def test_tokens_that_come_in_one_read_are_steps_all_the_same() -> None:
    """A busy client reads several at once: the gap between them is none."""
    assert step_seconds([[0.0, 0.0, 1.0, 1.0, 1.0, 2.0]]) == pytest.approx(0.4)


def test_streams_that_never_overlap_have_no_step() -> None:
    """Neither has one whose tokens all came at once."""
    assert step_seconds([[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]]) is None
    assert step_seconds([[0.5, 0.5, 0.5]]) is None
