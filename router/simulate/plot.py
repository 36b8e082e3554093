"""Figures of a run (needs matplotlib: the `plots` extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cache_service.core.errors import ConfigError
from router.simulate.report import PARTS, Records


def check() -> None:
    """Raise ConfigError when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is missing; pip install 'prfaas-sglang[plots]'")


def draw(path: Path, records: Records, slo_ttft_s: float) -> None:
    """Write one picture: TTFT and its parts as distributions, and TTFT over time.

    Raises OSError when it cannot be written, ValueError for an ending that is not a picture's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, values in (("ttft_s", records.ttft_s), *((n, records.parts[n]) for n in PARTS)):
        ordered = sorted(values)
        if ordered:
            shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
            left.plot(ordered, shares, label=name.removesuffix("_s"))
    left.axvline(slo_ttft_s, color="grey", linestyle=":", label="objective")
    left.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1), xscale="symlog", title="distribution")
    left.legend()
    right.plot(records.arrived_s, records.ttft_s, ".", markersize=2)
    right.axhline(slo_ttft_s, color="grey", linestyle=":")
    right.set(xlabel="arrival, s", ylabel="TTFT, s", title="simulated time to first token")
    figure.savefig(path)
