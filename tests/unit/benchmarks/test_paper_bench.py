"""bench_paper: what it prints is what it promises."""

from __future__ import annotations

import pytest

from benchmarks.harness import Row, format_row
from benchmarks.paper import claims, simulated, tables

CASES = (
    tables.tables_3,
    tables.egress,
    tables.tables_5,
    tables.tables_6,
    tables.figures_5,
    tables.costs,
    tables.bandwidth,
    claims.claims,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_bar_holds(case: object) -> None:
    """Printed digits, 2 % for throughput, 3 % for TTFT; every row says that it is model output."""
    rows: list[Row] = case(False)  # type: ignore[operator]
    assert rows
    assert [row.name for row in rows if row.holds is False] == []
    assert {row.kind for row in rows} <= {"model", "text"}
    assert all("[model]" in format_row(row) or row.kind == "text" for row in rows)


def test_the_simulator_reproduces_table_6() -> None:
    """Throughput, TTFT and both ratios within 5 % of the printed ones, by the router's own decisions."""
    rows = simulated.tables_6(False)
    assert [row.name for row in rows if row.holds is not True] == []
    assert {row.kind for row in rows} == {"simulated"}


def test_near_is_not_better() -> None:
    """`within` counts both ways."""
    for ours, holds in ((0.97, False), (0.99, True), (1.01, True), (1.03, False)):
        row = Row("x", "s", ours, 1.0, "paper", within=0.02)
        assert row.holds is holds
        assert "within 2.0%" in format_row(row)
