"""What every benchmark shares: one row shape, one command line, one JSON file.

A row is {name, unit, ours, peer, peer_name, ratio, bar, holds, kind}: `ratio` is ours / peer, `bar` the ratio
we want (None when the row only reports), `kind` is measured, simulated or model. Exit status 0 when every row
ran, whatever it shows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        name: what was measured.
        unit: unit of ours and peer.
        ours, peer: medians.
        peer_name: what the peer is, or why it could not run.
        bar: wanted ratio (at least, or at most when `lower_is_better`), None to report only.
        kind: measured, simulated or model.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    bar: float | None = None
    lower_is_better: bool = False
    kind: str = "measured"

    @property
    def ratio(self) -> float | None:
        """ours / peer."""
        return self.ours / self.peer if self.peer else None

    @property
    def holds(self) -> bool | None:
        """Whether the ratio meets the bar; None without one."""
        if self.bar is None or self.ratio is None:
            return None
        return self.ratio <= self.bar if self.lower_is_better else self.ratio >= self.bar

    def to_json(self) -> dict[str, object]:
        """Return the row as JSON values, ratio and verdict included."""
        return {**asdict(self), "ratio": self.ratio, "holds": self.holds}


def alternate(ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Run A B A B ...; return both medians."""
    a: list[float] = []
    b: list[float] = []
    for _ in range(rounds):
        a.append(ours())
        b.append(peer())
    return statistics.median(a), statistics.median(b)


def run(subject: str, measure: Callable[[bool], list[Row]], description: str) -> None:
    """Parse the command line of a benchmark, run it, print its table, write its JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{subject}", description=description)
    parser.add_argument("--smoke", action="store_true", help="a few seconds; numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    arguments = parser.parse_args()
    started = time.time()
    load_before = os.getloadavg()[0]
    rows = measure(arguments.smoke)
    for row in rows:
        peer = "-" if row.peer is None else f"{row.peer:.4g}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        verdict = {None: "", True: "  holds", False: "  MISSED"}[row.holds]
        bar = "" if row.bar is None else f"  bar {'<=' if row.lower_is_better else '>='} {row.bar}"
        print(
            f"{row.name:<52} {row.ours:>9.4g} {row.unit:<8} "
            f"{row.peer_name}: {peer}  ratio {ratio}{bar}{verdict}"
        )
    if arguments.json:
        document = {
            "subject": subject,
            "command": f"python -m benchmarks.bench_{subject}" + (" --smoke" if arguments.smoke else ""),
            "commit": _commit(),
            "started_unix_s": int(started),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.processor(),
                "python": platform.python_version(),
            },
            "rows": [row.to_json() for row in rows],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
