"""Plots of a plan (PNG). Needs matplotlib, an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_service.core.errors import ConfigError
from router.core.optimum import thresholds
from router.core.throughput import split, throughput
from router.plan.planner import Plan, Sensitivity


def draw(plan: Plan, changed: Sequence[Sensitivity], folder: Path) -> list[Path]:
    """Draw throughput over the threshold, and throughput and cost over every sensitivity, into `folder`.

    Returns the files. Raises ConfigError when matplotlib is not installed or the folder cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plots: matplotlib is not installed; pip install 'prfaas-sglang[plots]'"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "threshold.png"]
        figure = Figure(figsize=(7, 4), layout="tight")
        _threshold(figure.subplots(), plan)
        figure.savefig(files[0], dpi=120)
        for what in dict.fromkeys(item.what for item in changed):
            figure = Figure(figsize=(7, 4), layout="tight")
            _sensitivity(figure.subplots(), [item for item in changed if item.what == what])
            files.append(folder / f"{what.replace(' ', '-')}.png")
            figure.savefig(files[-1], dpi=120)
    except OSError as error:
        raise ConfigError(f"--plots: {folder}: cannot be written: {error.strerror}") from error
    return files


def _threshold(axes: Any, plan: Plan) -> None:
    """Draw the three terms of eq. 6 over t, at the best ratio (the paper's Fig. 5b)."""
    found = plan.both.found
    points = [
        throughput(found.system, split(plan.question.uncached, t))
        for t in thresholds(plan.question.uncached, 128)[1:-1]
    ]
    t = [point.at.threshold for point in points]
    top = 2 * found.requests_per_s or 1.0
    for name, values, style in (
        ("remote prefill", [p.remote / p.at.p if p.at.p else top for p in points], "--"),
        ("local prefill", [p.local / (1 - p.at.p) if p.at.p < 1 else top for p in points], "--"),
        ("decode", [p.decode for p in points], "--"),
        ("sustained", [p.requests_per_s for p in points], "-"),
    ):
        axes.plot(t, values, style, label=name)
    axes.set(xlabel="threshold, uncached tokens", ylabel="requests/s", ylim=(0, top))
    axes.legend()


def _sensitivity(axes: Any, items: Sequence[Sensitivity]) -> None:
    """Draw throughput (left) and cost (right) over one input."""
    x = [item.value for item in items]
    axes.plot(x, [i.plan.both.requests_per_s for i in items], "o-")
    axes.set(xlabel=f"{items[0].what}, {items[0].unit}", ylabel="requests/s", ylim=(0, None))
    if items[0].what == "bandwidth":
        axes.set_xscale("log")
    if any(item.plan.both.dollars_per_mtok > 0 for item in items):
        right = axes.twinx()
        right.plot(x, [i.plan.both.dollars_per_mtok for i in items], "s--", color="tab:red")
        right.set(ylabel="$ per million tokens", ylim=(0, None))
