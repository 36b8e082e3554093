"""What every benchmark shares: one row shape, one command line, one JSON file.

A row is {name, unit, ours, peer, peer_name, ratio, bar, holds, kind}: `ratio` is ours / peer, `bar` the ratio
we want (None when the row only reports), `kind` is measured, simulated or model. Exit status 0 when every row
ran, whatever it shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        name: what was measured.
        unit: unit of ours and peer.
        ours, peer: medians; None when it did not run.
        peer_name: what the peer is, or why it could not run.
        bar: wanted ratio (at least, or at most when `lower_is_better`), None to report only.
        kind: measured, simulated or model.
        within: wanted distance of the ratio from 1, where the peer is to be met and not to be beaten.
        note: what else is worth knowing of this row: spread, processor time, why something did not run.
    """

    name: str
    unit: str
    ours: float | None
    peer: float | None
    peer_name: str
    bar: float | None = None
    lower_is_better: bool = False
    kind: str = "measured"
    note: str = ""
    within: float | None = None

    @property
    def ratio(self) -> float | None:
        """ours / peer."""
        return self.ours / self.peer if self.peer and self.ours is not None else None

    @property
    def holds(self) -> bool | None:
        """Whether the ratio meets the bar, or lies near enough to 1; None without either."""
        if self.within is not None and self.ratio is not None:
            return abs(self.ratio - 1) <= self.within
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


Measure = Callable[[bool], list[Row]]


def run(subject: str, measure: Measure | Mapping[str, Measure], description: str) -> None:
    """Parse the command line of a benchmark, run it, print its table, write its JSON.

    Args:
        subject: the module is bench_<subject>.
        measure: (smoke) -> rows; or several by name, which --only chooses among.
        description: of the command.
    """
    cases = measure if isinstance(measure, Mapping) else {subject: measure}
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{subject}", description=description)
    parser.add_argument("--smoke", action="store_true", help="a few seconds; numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(cases), metavar="NAME", help=f"of {', '.join(sorted(cases))}"
    )
    arguments = parser.parse_args()
    started = time.time()
    load_before = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load {load_before:.2f} before the run"
    )
    rows: list[Row] = []
    for name in arguments.only or cases:
        found = cases[name](arguments.smoke)
        for row in found:
            print(format_row(row), flush=True)
        rows += found
    print(f"load {os.getloadavg()[0]:.2f} after the run of {time.time() - started:.0f} s, its own included")
    if arguments.json:
        document = {
            "subject": subject,
            "command": " ".join(["python -m", f"benchmarks.bench_{subject}", *sys.argv[1:]]),
            "commit": _commit(),
            "started_unix_s": int(started),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "machine": {
                "cores": os.cpu_count(),
                "processor": processor(),
                "kernel": platform.release(),
                "python": platform.python_version(),
            },
            "rows": [row.to_json() for row in rows],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def format_row(row: Row) -> str:
    """Return a row of the printed table."""
    ours, peer, ratio = (
        "-" if value is None else f"{value:{form}}"
        for value, form in ((row.ours, ".4g"), (row.peer, ".4g"), (row.ratio, ".3g"))
    )
    verdict = {None: "", True: "  holds", False: "  MISSED"}[row.holds]
    bar = "" if row.bar is None else f"  bar {'<=' if row.lower_is_better else '>='} {row.bar}"
    if row.within is not None:
        bar = f"  within {row.within:.1%}"
    note = f"  ({row.note})" if row.note else ""
    note += f"  [{row.kind}]" if row.kind != "measured" else ""
    return (
        f"{row.name:<52} {ours:>9} {row.unit:<8} {row.peer_name}: {peer}  ratio {ratio}{bar}{verdict}{note}"
    )


def processor() -> str:
    """Return the processor's model as the kernel names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
