"""Model profiles: KV bytes, prefill seconds, and the plain values they are written as."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.core.errors import ConfigError
from router.core.profile import (
    DecodeRate,
    Knots,
    KvShape,
    KvTable,
    ModelProfile,
    Quadratic,
    from_dict,
    to_dict,
)
from router.core.profiles import case_study, table3

QUADRATIC = ModelProfile("q", KvShape(100.0, 5000.0), Quadratic(0.1, 1e-4, 1e-9), DecodeRate(20, 0.025))
PROFILES = (QUADRATIC, case_study.H200, case_study.H20, *(table3.profile(m) for m in table3.PHI_GBPS))


def test_kv_of_whole_pages_a_window_and_a_state() -> None:
    """Full-attention KV in whole pages, the window's trailing tokens, the state once."""
    kv = KvShape(10.0, 1000.0, 3.0, 128, page_tokens=64)
    assert kv.bytes_at(1) == 64 * 10 + 3 + 1000
    assert kv.bytes_at(200) == 256 * 10 + 128 * 3 + 1000
    assert kv.bytes_at(200, held=128) == 128 * 10 + 72 * 3 + 1000
    assert kv.bytes_at(128, held=128) == 1000


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_curves_go_through_what_was_measured(profile: ModelProfile) -> None:
    """A table gives its own points back."""
    for curve, at in ((profile.curve, profile.prefill_s), (profile.kv, profile.kv_bytes)):
        for tokens, value in getattr(curve, "points", ()):
            assert at(tokens) == pytest.approx(value)


@given(
    profile=st.sampled_from(PROFILES),
    a=st.integers(1, 300_000),
    b=st.integers(1, 300_000),
    cached=st.integers(0, 300_000),
)
def test_longer_costs_more(profile: ModelProfile, a: int, b: int, cached: int) -> None:
    """More uncached tokens never cost less; a cached prefix costs something, and less than computing it."""
    low, high = sorted((a, b))
    assert profile.prefill_s(low, cached) <= profile.prefill_s(high, cached) * (1 + 1e-9)
    assert profile.prefill_s(low) <= profile.prefill_s(low, cached) * (1 + 1e-9)
    assert profile.prefill_s(low, cached) <= profile.prefill_s(low + cached) * (1 + 1e-9)
    assert 0 < profile.kv_bytes(low) <= profile.kv_bytes(high)
    assert profile.kv_bytes(low + cached, cached) <= profile.kv_bytes(low + cached)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_written_and_read_back(profile: ModelProfile) -> None:
    """Plain values carry everything."""
    assert from_dict(to_dict(profile)) == profile


def test_negative_counts_are_refused() -> None:
    """So is holding more than there is."""
    with pytest.raises(ValueError, match="held"):
        QUADRATIC.kv_bytes(10, 11)
    with pytest.raises(ValueError, match="uncached"):
        QUADRATIC.prefill_s(-1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "profile.format: 2; accepted is 1"),
        ("name", "", "profile.name"),
        ("kv", {}, "profile.kv.bytes_per_token: missing"),
        ("kv", {"bytes_per_token": "9"}, "profile.kv.bytes_per_token: '9' is not a number"),
        ("kv", {"bytes_per_token": -9}, "profile.kv: "),
        ("kv", {"bytes_per_token": 9, "page_tokens": 1.5}, "profile.kv.page_tokens: 1.5 is not a whole"),
        ("kv", {"table": [[1, 2]]}, "profile.kv: a table needs at least two points"),
        ("kv", {"table": [[1, 2], [2, 1]]}, "bytes must not fall"),
        ("prefill", {"table": [[1, 2], "x"]}, r"profile.prefill.table\[1\]"),
        ("prefill", {"table": 5}, "profile.prefill.table: not a list"),
        ("prefill", {"table": [[1, 1], [2, 2]], "fixed_s": 1}, "not both"),
        ("prefill", {"table": [[2, 1], [1, 2]]}, "tokens must grow"),
        ("prefill", {"fixed_s": 1.0, "per_token_s": float("nan")}, "profile.prefill.per_token_s: nan"),
        ("prefill", {"fixed_s": 0, "per_token_s": 0}, "not all 0"),
        ("prefill", {"fixed": 0}, "profile.prefill.fixed: unknown; accepted are table, fixed_s"),
        ("decode", {"max_batch": 0, "step_s": 1}, "both must be > 0"),
        ("measured_tokens", [5, 1], "profile.measured_tokens"),
        ("facts", [], None),
        ("facts", [1], "profile.facts"),
        ("extra", 1, "profile.extra: unknown"),
    ],
)
def test_wrong_values_are_named(path: str, value: Any, message: str | None) -> None:
    """The field and what is accepted."""
    wrong = {**to_dict(QUADRATIC), path: value}
    if message is None:
        assert from_dict(wrong).name == "q"
        return
    with pytest.raises(ConfigError, match=message):
        from_dict(wrong)


def test_not_a_mapping() -> None:
    """A file that is empty, for instance."""
    with pytest.raises(ConfigError, match="profile: missing or not a mapping"):
        from_dict(None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Knots(((1.0, 1.0),)),
        lambda: Knots(((1.0, 0.0), (2.0, 1.0))),
        lambda: KvTable(((1.0, 0.0), (2.0, 1.0))),
        lambda: KvShape(0.0),
        lambda: Quadratic(-1.0, 1.0),
        lambda: DecodeRate(1.0, 0.0),
    ],
)
def test_parts_check_themselves(make: Any) -> None:
    """Nothing impossible can be built."""
    with pytest.raises(ValueError, match=r"."):
        make()
