"""The demo's verdict: what must have been seen, and what is said when it was not."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from prfaas_sglang.fleet.report import Row, Verdict, size, table

REMOTE = Row("research", 1, 700, 576, 512, "remote", "a-p", "A", 1 << 20, 0, 0.25, True)
LOCAL = Row("helpdesk", 2, 160, 64, 64, "local", "b-p", "B", 0, 2048, 0.05, True)


def test_a_good_run_has_no_problems() -> None:
    """Both routes, a hit in each site, every output identical."""
    verdict = Verdict((REMOTE, LOCAL), ("A", "B"))
    assert verdict.ok
    assert verdict.to_json()["identical"] == 2


def test_each_missing_thing_is_a_problem() -> None:
    """One differing output, one missing route or one missing hit is enough to fail."""
    differs = dataclasses.replace(LOCAL, identical=False)
    cold = dataclasses.replace(LOCAL, hit_tokens=0)
    for rows, problem in (
        ((REMOTE, differs), "1 outputs differ"),
        ((REMOTE, REMOTE), "no request took a local route"),
        ((LOCAL, LOCAL), "no request took a remote route"),
        ((REMOTE, cold), "no cached-prefix hit in site B"),
    ):
        verdict = Verdict(rows, ("A", "B"))
        assert not verdict.ok
        assert any(problem in text for text in verdict.problems())


def test_the_table_fits_eighty_columns() -> None:
    """Nothing is cut on a narrow terminal."""
    console = Console(width=80, record=True, force_terminal=False)
    console.print(table((REMOTE, LOCAL)))
    text = console.export_text()
    assert "…" not in text
    for word in ("research #1", "1.00 MiB link", "2 KiB site", "250 ms", "same", "matched"):
        assert word in text


def test_unknown_sizes_are_a_dash() -> None:
    """A backend that does not tell is not shown as zero."""
    assert size(None) == "-"
    assert size(0) == "0 KiB"
