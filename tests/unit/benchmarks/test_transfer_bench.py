"""The pure parts of the transfer benchmark: rows, workloads, the fluid model of a link."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness import Row, format_row
from benchmarks.transfer.case_exposed import CHUNK_PAGES, CHUNK_S, model_ms
from benchmarks.transfer.workload import Workload, arrived_rows, new_pool, of_bytes


def test_a_row_without_a_peer_has_no_verdict_and_says_why() -> None:
    row = Row("goodput", "MB/s", 100.0, None, "NIXL did not run: no wheel", bar=1.0)
    assert (row.ratio, row.holds) == (None, None)
    assert "no wheel" in format_row(row)


@pytest.mark.parametrize(
    ("ours", "lower", "holds"), [(2.0, False, True), (2.0, True, False), (0.5, True, True)]
)
def test_a_bar_is_a_floor_or_a_ceiling(ours: float, lower: bool, holds: bool) -> None:
    assert Row("x", "s", ours, 1.0, "peer", bar=1.0, lower_is_better=lower).holds is holds


def test_rows_that_arrived_are_counted_at_their_own_places() -> None:
    work = Workload(row_bytes=64, pages=16, tensors=2)
    source, target = new_pool(work, filled=True), new_pool(work, filled=False)
    assert arrived_rows(work, target, work.source(), work.target()) == 0
    pairs = list(zip(work.source(), work.target(), strict=True))
    for a, b in pairs[:5]:
        here, there = work.offset(1, a), work.offset(1, b)
        target[there : there + 64] = source[here : here + 64]
    assert arrived_rows(work, target, work.source(), work.target()) == 5
    assert np.frombuffer(source, np.uint8).any()


def test_a_workload_has_about_the_bytes_asked_for() -> None:
    assert of_bytes(256 << 20, 64 << 10).bytes == 256 << 20
    assert of_bytes(1, 64 << 10).pages == 1


def test_sooner_sending_never_exposes_more_and_a_slow_link_hides_nothing() -> None:
    work = Workload(64 << 10, 32 * CHUNK_PAGES)
    for rate in (1e8, 1e9, 3e9):
        after, chunk, layer = (model_ms(rate, how, work, CHUNK_S) for how in ("after", "chunk", "layer"))
        assert layer <= chunk <= after
    fast = model_ms(1e12, "chunk", work, CHUNK_S)
    assert fast == pytest.approx(20, abs=0.1)  # half a round trip
