"""What a run gave: a column for every figure of every request, and their summary.

Queueing, prefill and transfer are told apart; rejected (the router said no) apart from failed (nobody could).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from router.core.decision import RouteKind
from router.simulate.job import Job

if TYPE_CHECKING:
    from router.simulate.run import Simulation

#: Parts of the time to first token: admission and prefill queue, prefill, what of the transfer came after it,
#: waiting for a place in decode.
PARTS = ("queue_s", "prefill_s", "transfer_s", "decode_wait_s")


class Records:
    """Columns of the answered requests (in order of their end), and counts of the others."""

    def __init__(self, sites: Sequence[str], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.sites = tuple(sites)
        self.arrived_s = array("d")
        self.ttft_s = array("d")
        self.done_s = array("d")
        self.parts = {name: array("d") for name in PARTS}
        self.outcomes = {"answered": 0, "rejected": 0, "failed": 0}
        self.retries = 0
        self.remote = 0
        self.prompt_tokens = 0
        self.hit_tokens = 0
        self.expected_tokens = 0
        self.output_tokens = 0
        self.wire_bytes = 0.0
        self.pulled_bytes = 0.0
        self.reasons: dict[str, int] = {}
        self.busy_s: dict[str, dict[str, float]] = {}
        self.links: list[dict[str, Any]] = []
        self.last_s = 0.0
        self.events = 0

    def add(self, job: Job, outcome: str) -> None:
        """Take in a request that is over."""
        self.outcomes[outcome] += 1
        decided = job.decided
        if outcome != "answered" or decided is None:
            return
        self.arrived_s.append(job.arrived_s)
        self.ttft_s.append(job.first_s - job.arrived_s)
        self.done_s.append(job.done_s)
        parts = self.parts
        parts["queue_s"].append(job.started_s - job.arrived_s)
        parts["prefill_s"].append(job.prefilled_s - job.started_s)
        parts["transfer_s"].append(job.transferred_s - job.prefilled_s)
        parts["decode_wait_s"].append(job.first_s - job.transferred_s)
        self.prompt_tokens += job.total_tokens
        self.output_tokens += job.output_tokens
        self.hit_tokens += job.hit * self.block_tokens
        self.expected_tokens += decided.matched_tokens
        self.wire_bytes += job.wire_bytes
        self.remote += decided.kind is RouteKind.REMOTE
        self.reasons[decided.reason.value] = self.reasons.get(decided.reason.value, 0) + 1

    def close(self, run: Simulation) -> None:
        """Take in what the engines and links did."""
        self.last_s, self.events = run.clock.now_s, run.clock.handled
        for site in self.sites:
            self.busy_s[site] = {"prefill": 0.0, "decode": 0.0}
        for worker_id, engine in run.prefills.items():
            self.busy_s[run.fleet.workers[worker_id].site]["prefill"] += engine.busy_s
        for worker_id, decode in run.decodes.items():
            self.busy_s[run.fleet.workers[worker_id].site]["decode"] += decode.busy_s
        for site, retired in run.retired:
            role = "decode" if type(retired).__name__ == "DecodeEngine" else "prefill"
            self.busy_s[site][role] += retired.busy_s
        for (src, dst), link in run.links.items():
            self.links.append(
                {
                    "src": src,
                    "dst": dst,
                    "bytes": round(link.delivered_bytes),
                    "busy_s": round(link.busy_s, 6),
                }
            )

    # --- figures ---------------------------------------------------------------------------------------

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.hit_tokens

    @property
    def prefill_busy_s(self) -> float:
        """Seconds of prefill instances at work, all sites."""
        return sum(site["prefill"] for site in self.busy_s.values())

    def good(self, slo_ttft_s: float) -> int:
        """Return how many requests had their first token in time."""
        return sum(1 for ttft_s in self.ttft_s if ttft_s <= slo_ttft_s)

    def summary(self, slo_ttft_s: float) -> dict[str, Any]:
        """Return the figures of the run as plain values."""
        asked = sum(self.outcomes.values())
        span_s = max(self.done_s) - min(self.arrived_s) if self.ttft_s else 0.0
        good = self.good(slo_ttft_s)
        return {
            "requests": {**self.outcomes, "asked": asked, "retries": self.retries, "remote": self.remote},
            "ttft_s": spread(self.ttft_s),
            **{name: spread(values) for name, values in self.parts.items()},
            "slo": {
                "ttft_s": slo_ttft_s,
                "good": good,
                "share": good / asked if asked else 0.0,
                "goodput_per_s": good / span_s if span_s else 0.0,
            },
            "tokens": {
                "prompt": self.prompt_tokens,
                "output": self.output_tokens,
                "hit": self.hit_tokens,
                "expected_hit": self.expected_tokens,
                "uncached": self.uncached_tokens,
                "hit_ratio": self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0,
            },
            "wan_bytes": round(self.wire_bytes + self.pulled_bytes),
            "pulled_bytes": round(self.pulled_bytes),
            "busy_s": self.busy_s,
            "links": self.links,
            "reasons": dict(sorted(self.reasons.items())),
            "span_s": span_s,
            "events": self.events,
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the sorted values do not exceed; NaN of nothing."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, p50, p90, p99 and max; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": math.fsum(ordered) / len(ordered),
        "p50": quantile(ordered, 0.5),
        "p90": quantile(ordered, 0.9),
        "p99": quantile(ordered, 0.99),
        "max": ordered[-1],
    }
