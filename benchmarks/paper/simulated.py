"""Table 6 in the simulator: the router's decisions, request by request, instead of the steady-state model.

Lambda_max: prompts arrive at 1.3 times the model's rate; counted is what comes out per second between the
first fifth and the end of the arrivals. TTFT: at a twentieth of the rate, since the paper's has no queues.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Row
from benchmarks.paper import systems
from router.core.throughput import Throughput
from router.simulate.report import Records
from router.simulate.run import simulate
from router.simulate.spec import parse

OVERLOAD, IDLE = 1.3, 0.05
REQUESTS = 6000


def _run(found: Throughput, policy: dict[str, Any], rate: float, requests: int) -> Records:
    system = found.system
    home = {"name": "B", "profile": "h20", "prefill": round(system.prefill), "decode": round(system.decode)}
    remote = {"name": "A", "profile": "h200", "prefill": 4}
    scenario = {
        "sites": [home, *([remote] if system.remotes else [])],
        "links": [{"src": "A", "dst": "B", "gbps": 100}] if system.remotes else [],
        "workload": {"kind": "poisson", "rate": rate, "requests": requests, "output_tokens": 1024},
        "policy": {"max_link_wait_s": 1e6, **policy},
        "admission": False,
    }
    return simulate(parse(scenario))


def _per_s(records: Records) -> float:
    """Return first tokens per second while prompts arrive, without the time in which the queues fill."""
    last_s = max(records.arrived_s)
    since_s = last_s / 5
    ended = (a + t for a, t in zip(records.arrived_s, records.ttft_s, strict=True))
    return sum(since_s < end_s <= last_s for end_s in ended) / (last_s - since_s)


def tables_6(smoke: bool) -> list[Row]:
    """Lambda_max, mean and P90 TTFT of the three systems."""
    requests = 300 if smoke else REQUESTS
    best = systems.prfaas()
    rows: list[Row] = []
    rates: dict[str, float] = {}
    for name, found, policy, printed in (
        (
            "PrfaaS-PD",
            best,
            {"name": "prfaas", "threshold_tokens": round(best.at.threshold)},
            (3.24, 2.22, 3.51),
        ),
        ("homogeneous PD", systems.homogeneous(), {"name": "local"}, (2.11, 4.44, 9.73)),
        ("naive heterogeneous", systems.naive(), {"name": "remote"}, (2.45, 1.74, 3.51)),
    ):
        rates[name] = _per_s(_run(found, policy, OVERLOAD * found.requests_per_s, requests))
        times = _run(found, policy, IDLE * found.requests_per_s, requests).summary(10.0)["ttft_s"]
        for what, unit, ours, paper in (
            ("Lambda_max", "req/s", rates[name], printed[0]),
            ("mean TTFT", "s", times["mean"], printed[1]),
            ("P90 TTFT", "s", times["p90"], printed[2]),
        ):
            rows.append(_row(f"Table 6: {name}, {what}", unit, ours, paper))
    base = rates["homogeneous PD"]
    for name, ratio in (("PrfaaS-PD", 1.54), ("naive heterogeneous", 1.16)):
        rows.append(_row(f"Table 6: {name} to homogeneous", "x", rates[name] / base, ratio))
    return rows


def _row(name: str, unit: str, ours: float, paper: float) -> Row:
    return Row(name, unit, ours, paper, "paper", within=0.05, kind="simulated")
