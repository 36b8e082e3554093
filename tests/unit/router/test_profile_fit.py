"""The fit of prefill times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.profile import Quadratic
from router.core.profile_fit import fit

LENGTHS = (128, 512, 2048, 8192, 32768)


@given(st.floats(0.001, 1), st.floats(1e-6, 1e-3), st.floats(0, 1e-8))
def test_what_is_quadratic_is_found_again(a: float, b: float, c: float) -> None:
    """Measured without noise, the curve comes back."""
    true = Quadratic(a, b, c)
    found = fit([(n, true.at(n)) for n in LENGTHS])
    assert found.worst < 1e-5
    assert found.curve.at(100_000) == pytest.approx(true.at(100_000), rel=1e-2)


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(1e-3, 100)), min_size=2, max_size=20))
def test_any_measurement_gives_a_curve_that_does_not_fall(points: list[tuple[int, float]]) -> None:
    """Whatever noise there is."""
    if len({n for n, _ in points}) < 2:
        with pytest.raises(ValueError, match="two lengths"):
            fit(points)
        return
    curve = fit(points).curve
    assert min(curve.fixed_s, curve.per_token_s, curve.per_token2_s) >= 0
    assert 0 < curve.at(1) <= curve.at(1000) <= curve.at(1_000_000)


def test_impossible_times_are_refused() -> None:
    """A clock that stood still."""
    with pytest.raises(ValueError, match="must be finite"):
        fit([(1, 0.0), (2, 1.0)])
