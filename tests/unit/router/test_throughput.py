"""The throughput model against the paper's case study, and its two optima against each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.optimum import best, by_crossing, by_crossings, by_grid, ratios, thresholds
from router.core.profile import DecodeRate, KvShape, ModelProfile, Quadratic
from router.core.profiles import case_study, table3
from router.core.throughput import (
    Remote,
    Stage,
    System,
    egress_needed_bytes_per_s,
    split,
    throughput,
    ttft,
)
from router.core.workload import (
    PAPER,
    Histogram,
    Lengths,
    LogNormal,
    Sample,
    expected,
    mean,
    mean_above,
    mean_below,
)

GBPS = 1e9 / 8
CASE = System(case_study.H20, 3, 5, 1024, (Remote(4, case_study.H200, 100 * GBPS),))
HOME = replace(CASE, prefill=9, decode=3, remotes=())
TRACE = Sample(tuple(PAPER.quantile((i + 0.5) / 5000) for i in range(5000)))
BUCKETS = Histogram(tuple(PAPER.quantile(i / 500) for i in range(501)), (1.0,) * 500)


def test_the_papers_workload() -> None:
    """Section 5.1 and Table 6: mean about 27K, 49.6 % above 19.4K, 44K the mean above."""
    assert mean(PAPER) == pytest.approx(27_486, rel=1e-3)
    assert PAPER.above(19_400) == pytest.approx(0.496, abs=0.001)
    assert mean_above(PAPER, 19_400) / 1024 == pytest.approx(44, rel=0.01)
    assert mean_below(PAPER, 19_400) / 1024 == pytest.approx(9.98, rel=0.01)


def test_table_6() -> None:
    """Throughput within 2 %, TTFT within 3 %, of all three systems (H20 curve fitted)."""
    ours, homogeneous = by_grid(ratios(CASE), PAPER), by_grid(ratios(HOME), PAPER)
    naive = throughput(replace(CASE, prefill=0, decode=8), split(PAPER, 0))
    for found, rate, mean_s, p90_s in (
        (ours, 3.24, 2.22, 3.51),
        (homogeneous, 2.11, 4.44, 9.73),
        (naive, 2.45, 1.74, 3.51),
    ):
        assert found.requests_per_s == pytest.approx(rate, rel=0.02)
        assert ttft(found, PAPER).mean_s == pytest.approx(mean_s, rel=0.03)
        assert ttft(found, PAPER).p90_s == pytest.approx(p90_s, rel=0.03)
    assert ours.requests_per_s / homogeneous.requests_per_s == pytest.approx(1.54, rel=0.02)
    assert naive.requests_per_s / homogeneous.requests_per_s == pytest.approx(1.16, rel=0.02)
    assert (ours.system.prefill, ours.system.decode) == (3, 5)
    assert (homogeneous.system.prefill, homogeneous.system.decode) == (9, 3)
    assert ours.at.threshold == pytest.approx(19_400, rel=0.02)
    assert ours.at.p == pytest.approx(0.496, rel=0.02)
    assert ours.egress_bytes_per_s[0] / GBPS == pytest.approx(12, rel=0.02)


@pytest.mark.parametrize("lengths", [TRACE, BUCKETS], ids=["trace", "histogram"])
def test_other_workloads_of_the_same_shape_agree(lengths: Lengths) -> None:
    """A trace and a histogram of the paper's workload lead to the same plan."""
    ours, theirs = by_grid(ratios(CASE), lengths), by_grid(ratios(CASE), PAPER)
    assert ours.system == theirs.system
    assert ours.requests_per_s == pytest.approx(theirs.requests_per_s, rel=0.005)
    assert ours.at.threshold == pytest.approx(theirs.at.threshold, rel=0.02)


def test_sections_2_3() -> None:
    """Egress of 512 GPUs, 64 instances: 3.8 Tbps, 2.1 Tbps, 170 Gbps (equation 2)."""
    for model, gbps in (("MiniMax-M2.5", 3836), ("Qwen3-235B", 2134), ("Ring-2.5-1T", 165.8)):
        found = egress_needed_bytes_per_s(64, table3.profile(model), 32 * 1024) / GBPS
        assert found == pytest.approx(gbps, rel=0.001)


def test_bottleneck_moves_with_the_link() -> None:
    """A thin link binds where a wide one does not, and a dead one carries nothing."""
    thin = replace(CASE, remotes=(Remote(4, case_study.H200, 1 * GBPS),))
    assert throughput(thin, split(PAPER, 19_400)).bottleneck is Stage.LINK
    assert throughput(CASE, split(PAPER, 15_000)).bottleneck is Stage.REMOTE_PREFILL
    dead = replace(CASE, remotes=(Remote(4, case_study.H200, 0.0),))
    found = by_grid(ratios(dead), PAPER)
    alone = by_grid(ratios(replace(CASE, remotes=())), PAPER)
    assert found.at.p == 0
    assert found.egress_bytes_per_s == (0.0,)
    assert found.requests_per_s == pytest.approx(alone.requests_per_s)


def test_utilisation_is_one_at_the_bottleneck() -> None:
    """And at most one elsewhere."""
    for t in (0, 5_000, 19_400, 60_000, 131_072):
        found = throughput(CASE, split(PAPER, t))
        busy = found.utilisation()
        assert busy[found.bottleneck] == pytest.approx(1)
        assert all(share <= 1 + 1e-9 for share in busy.values())


def test_two_sites_of_half_the_size_are_one() -> None:
    """Remote sites add up, whatever way they are cut."""
    half = Remote(2, case_study.H200, 50 * GBPS)
    one, two = (by_grid(ratios(replace(CASE, remotes=r)), PAPER) for r in (CASE.remotes, (half, half)))
    assert two.requests_per_s == pytest.approx(one.requests_per_s)
    assert sum(two.egress_bytes_per_s) == pytest.approx(sum(one.egress_bytes_per_s))


def test_compression_is_a_wider_link() -> None:
    """Half the bytes on the wire are as good as twice the bandwidth."""
    half = by_grid([replace(CASE, remotes=(Remote(4, case_study.H200, 2 * GBPS, 0.5),))], PAPER)
    wide = by_grid([replace(CASE, remotes=(Remote(4, case_study.H200, 4 * GBPS),))], PAPER)
    assert half.requests_per_s == pytest.approx(wide.requests_per_s)
    assert half.egress_bytes_per_s[0] == pytest.approx(wide.egress_bytes_per_s[0] / 2)


def test_a_home_site_needs_a_decode_rate() -> None:
    """Otherwise equation 5 has nothing to count with."""
    with pytest.raises(ValueError, match="decode rate"):
        System(case_study.H200, 1, 1, 1024)
    with pytest.raises(ValueError, match="output_tokens"):
        System(case_study.H20, 1, 1, 0)
    with pytest.raises(ValueError, match="no candidates"):
        best([])


QUADRATICS = st.builds(
    Quadratic,
    fixed_s=st.floats(0.01, 1.0),
    per_token_s=st.floats(1e-6, 3e-4),
    per_token2_s=st.floats(0.0, 1e-9),
)


@st.composite
def systems(draw: st.DrawFn) -> System:
    """Draw a home site of a few instances and a remote one on a link of some width."""
    kv = KvShape(draw(st.floats(1e3, 3e5)), draw(st.floats(0, 3e8)))
    home = ModelProfile("home", kv, draw(QUADRATICS), DecodeRate(draw(st.floats(4, 60)), 0.025))
    remote = ModelProfile("remote", kv, draw(QUADRATICS))
    link = Remote(draw(st.integers(1, 12)), remote, draw(st.floats(0.1, 400)) * GBPS)
    total = draw(st.integers(2, 12))
    return System(home, 1, total - 1, 1024, (link,))


@settings(max_examples=60, deadline=None)
@given(systems(), st.floats(8.5, 10.5), st.floats(0.4, 1.3))
def test_grid_and_crossing_agree(system: System, mu: float, sigma: float) -> None:
    """Equations 7 and 8 find what an exhaustive search of thresholds and ratios finds."""
    lengths = LogNormal(mu, sigma, 128, 131_072)
    grid, crossing = by_grid([system], lengths), by_crossing(system, lengths)
    assert crossing.requests_per_s == pytest.approx(grid.requests_per_s, rel=0.01)
    grid, crossing = by_grid(ratios(system), lengths), by_crossings(system, lengths)
    assert crossing.requests_per_s == pytest.approx(grid.requests_per_s, rel=0.01)


@given(
    st.one_of(
        st.builds(LogNormal, st.floats(7, 11), st.floats(0.2, 2), st.just(100.0), st.just(100_000.0)),
        st.lists(st.integers(1, 9999), min_size=1, max_size=40).map(lambda v: Sample(tuple(map(float, v)))),
        st.lists(st.integers(0, 9), min_size=3, max_size=3)
        .filter(any)
        .map(lambda c: Histogram((0.0, 10.0, 500.0, 9000.0), tuple(map(float, c)))),
    ),
    st.floats(0, 120_000),
)
def test_distributions_are_whole(lengths: Lengths, t: float) -> None:
    """Parts above and below add up; quantiles turn tails round; scaling scales."""
    p = lengths.above(t)
    assert 0 <= p <= 1
    whole = p * mean_above(lengths, t) + (1 - p) * mean_below(lengths, t)
    assert whole == pytest.approx(mean(lengths), rel=1e-6)
    assert mean(lengths) == pytest.approx(expected(lengths, lambda tokens: tokens), rel=0.05)
    assert lengths.above(lengths.quantile(0.7)) <= 0.3 + 1e-9
    assert mean(lengths.scaled(0.25)) == pytest.approx(mean(lengths) / 4)
    assert lengths.scaled(0.25).above(t / 4) == pytest.approx(p, abs=1e-9)
    assert lengths.quantile(0) <= lengths.quantile(1) < math.inf


def test_distributions_check_themselves() -> None:
    """An impossible workload is refused where it is made."""
    for make in (
        lambda: LogNormal(9, 0, 1, 2),
        lambda: LogNormal(9, 1, 2, 1),
        lambda: LogNormal(50, 0.1, 1, 2),
        lambda: Sample(()),
        lambda: Sample((0.0,)),
        lambda: Histogram((0, 1), (1, 2)),
        lambda: Histogram((1, 0), (1,)),
        lambda: Histogram((0, 1), (0,)),
    ):
        with pytest.raises(ValueError, match=r"."):
            make()


def test_thresholds_reach_from_all_to_nothing() -> None:
    """The first offloads everything, the last nothing."""
    tried = thresholds(PAPER)
    assert PAPER.above(tried[0]) == 1
    assert PAPER.above(tried[-1]) == 0
