"""Fits T_prefill(l) = a + b l + c l^2 to measured times: least relative error, no coefficient negative.

Relative, because a prompt of 256 tokens matters as much to a threshold as one of 100,000; not negative,
because a curve that falls beyond what was measured would send every long prompt there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from router.core.profile import Quadratic


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted curve and how far it is from what was measured.

    Attributes:
        worst: the largest |fitted / measured - 1|.
        points: (tokens, measured seconds) that were fitted.
    """

    curve: Quadratic
    worst: float
    points: tuple[tuple[float, float], ...]


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Fit a curve to (tokens, seconds).

    Raises ValueError with fewer than two different lengths or a value that is not > 0.
    """
    if len({tokens for tokens, _ in points}) < 2:
        raise ValueError("a curve needs prompts of at least two lengths")
    if not all(math.isfinite(v) and v > 0 for point in points for v in point):
        raise ValueError("tokens and seconds must be finite and > 0")
    scale = max(tokens for tokens, _ in points)  # keeps the powers near 1
    rows = [[1 / s, tokens / scale / s, (tokens / scale) ** 2 / s] for tokens, s in points]
    best: tuple[float, tuple[float, float, float]] | None = None
    # three coefficients have seven subsets: try each, which finds the optimum for certain
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            solved = _least_squares([[row[i] for i in chosen] for row in rows])
            if solved is None or min(solved) < 0:
                continue
            full = [0.0, 0.0, 0.0]
            for i, value in zip(chosen, solved, strict=True):
                full[i] = value
            error = math.fsum((sum(x * y for x, y in zip(row, full, strict=True)) - 1) ** 2 for row in rows)
            if best is None or error < best[0]:
                best = (error, (full[0], full[1], full[2]))
    assert best is not None  # the constant alone always qualifies
    a, b, c = best[1]
    curve = Quadratic(a, b / scale, c / scale**2)
    worst = max(abs(curve.at(tokens) / s - 1) for tokens, s in points)
    return Fit(curve, worst, tuple(points))


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """Solve min |rows x - 1| by normal equations (at most 3 unknowns); None when they are singular."""
    n = len(rows[0])
    matrix = [
        [math.fsum(row[i] * row[j] for row in rows) for j in range(n)] + [math.fsum(row[i] for row in rows)]
        for i in range(n)
    ]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(matrix[k][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if abs(matrix[i][i]) < 1e-12 * max(1.0, abs(matrix[i][n])):
            return None
        for k in range(n):
            if k != i:
                factor = matrix[k][i] / matrix[i][i]
                matrix[k] = [x - factor * y for x, y in zip(matrix[k], matrix[i], strict=True)]
    return [matrix[i][n] / matrix[i][i] for i in range(n)]
