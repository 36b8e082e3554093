"""The KV transfer side by side with its peers and with what the link allows.

Over an emulated link (docs/wan-bench.md; needs root) and over loopback. docs/benchmarks.md says what each row
means. Cases: see --only; each is at most about three minutes.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Measure, run
from benchmarks.transfer import case_exposed, case_loopback, case_rate, case_threads, case_urgent, case_wan

CASES: dict[str, Measure] = {
    "wan-0": partial(case_wan.goodput, 0.0),
    "wan-0.1": partial(case_wan.goodput, 0.001),
    "wan-1": partial(case_wan.goodput, 0.01),
    "options": case_wan.options,
    "cubic": case_wan.cubic,
    "loopback": case_loopback.goodput,
    "urgent": case_urgent.urgent,
    "rate": case_rate.follow,
    "exposed": case_exposed.exposed,
    "threads-wan": case_threads.wan,
    "threads-loopback": case_threads.loopback,
}

if __name__ == "__main__":
    run("transfer", CASES, __doc__ or "")
