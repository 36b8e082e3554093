"""The cases of bench_simulate: each gives rows, all on the same engine model and the router's own lines."""

from __future__ import annotations

import atexit
import json
import math
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.simulate import peer
from benchmarks.transfer.peers import Missing
from router.core.optimum import by_grid
from router.core.profiles import case_study
from router.core.throughput import Remote, System
from router.core.workload import PAPER
from router.simulate.report import Records
from router.simulate.run import simulate
from router.simulate.spec import parse

Spec = dict[str, Any]
WORKERS, BLOCKS = 4, 8192
#: Two-sided 95 % of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 9: 2.26, 19: 2.09}


def _trace_like(requests: int) -> Path:
    """Write a small made-up trace of conversations, for --smoke and for machines without a public one."""
    rng = random.Random(11)
    folder = Path(tempfile.mkdtemp(prefix="bench-simulate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "made-up.jsonl"
    open_ones: list[list[int]] = []
    at_ms, fresh = 0.0, 1
    with path.open("w") as out:
        for _ in range(requests):
            at_ms += rng.expovariate(1 / 300.0)
            ids = open_ones.pop(rng.randrange(len(open_ones))) if open_ones and rng.random() < 0.6 else [0]
            grown = rng.randrange(2, 25)
            ids = [*ids, *range(fresh, fresh + grown)]
            fresh += grown
            row = {
                "timestamp": int(at_ms),
                "input_length": len(ids) * 512,
                "output_length": rng.randrange(1, 700),
            }
            out.write(json.dumps({**row, "hash_ids": ids}) + "\n")
            if len(ids) < 200:
                open_ones.append(ids)
    return path


def _one_site(trace: Path, policy: str) -> Spec:
    return {
        "sites": [{"name": "A", "prefill": WORKERS, "profile": "dynamo"}],
        "engine": {"kind": "mixed", "cache_blocks": BLOCKS},
        "workload": {"kind": "trace", "trace": str(trace), "requests": 0},
        "policy": {"name": policy},
        "index_delay_s": 0.0,
    }


def trace(smoke: bool, path: Path | None) -> list[Row]:
    """Hit ratio, TTFT and speed on a trace, one site, against Dynamo's replay in the same run, in turn."""
    found = _trace_like(300 if smoke else 5000) if path is None or smoke else path
    what = "made-up trace" if path is None or smoke else path.stem
    setting = f"{what}, {WORKERS} workers x {BLOCKS} blocks"
    walls: list[float] = []
    cpus: list[float] = []
    theirs: list[dict[str, Any]] = []
    records: Records | None = None
    why = ""
    for _ in range(1 if smoke else 3):
        wall, cpu = time.perf_counter(), time.process_time()
        records = simulate(parse(_one_site(found, "ttft")))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        try:
            theirs.append(peer.replay(found, WORKERS, BLOCKS, "kv_router"))
        except Missing as error:
            why = f"did not run: {error}"
    assert records is not None
    turn = simulate(parse(_one_site(found, "round_robin"))).summary(10.0)
    try:
        their_turn = peer.replay(found, WORKERS, BLOCKS, "round_robin")
    except Missing:
        their_turn = {}

    def median(key: str) -> float | None:
        return statistics.median(t[key] for t in theirs) if theirs else None

    ours = records.summary(10.0)
    name = why or f"{peer.NAME}, kv router"
    asked = ours["requests"]
    note = f"{asked['rejected']} rejected, {asked['failed']} failed of {asked['asked']}"
    hit, their_hit = ours["tokens"]["hit_ratio"], median("prefix_cache_reused_ratio")
    rows = [
        Row(f"{setting}: hit ratio", "", hit, their_hit, name, 1.0, kind="simulated", note=note),
        _less(f"{setting}: mean TTFT", "ms", ours["ttft_s"]["mean"] * 1e3, median("mean_ttft_ms"), name),
        _less(f"{setting}: p99 TTFT", "ms", ours["ttft_s"]["p99"] * 1e3, median("p99_ttft_ms"), name),
        _less(
            f"{what}: replay, wall time", "s", statistics.median(walls), median("wall_s"), name,
            kind="measured",
            note=f"processor {statistics.median(cpus):.2f} s against {median('cpu_s') or math.nan:.2f} s",
        ),
    ]  # fmt: skip
    same = why or f"{peer.NAME}, round robin: the same engine model"
    for label, unit, value, key in (
        ("hit ratio", "", turn["tokens"]["hit_ratio"], "prefix_cache_reused_ratio"),
        ("mean TTFT", "ms", turn["ttft_s"]["mean"] * 1e3, "mean_ttft_ms"),
        ("p99 TTFT", "ms", turn["ttft_s"]["p99"] * 1e3, "p99_ttft_ms"),
    ):
        rows.append(
            Row(
                f"round_robin of both, {label}",
                unit,
                value,
                their_turn.get(key),
                same,
                within=0.05,
                kind="simulated",
            )
        )
    return rows


def _less(
    name: str, unit: str, ours: float, theirs: float | None, who: str, bar: float = 1.0,
    kind: str = "simulated", note: str = "",
) -> Row:  # fmt: skip
    return Row(name, unit, ours, theirs, who, bar, lower_is_better=True, kind=kind, note=note)


# --- two sites, the paper's fleet ----------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    """Return mean and 95 % interval of paired ratios, as text."""
    n = len(values)
    if n < 2:
        return "one seed"
    half = T95.get(n - 1, 2.0) * statistics.stdev(values) / math.sqrt(n)
    return f"{n} seeds, paired ratio {statistics.mean(values):.3f} +- {half:.3f} (95 %)"


def goodput(smoke: bool) -> list[Row]:
    """`ttft` against `prfaas` on the paper's fleet: bursty, 85 % of what the model says it sustains.

    As shipped, and the rules alone: without admission and without a limit on a link's backlog.
    """
    best = by_grid([System(case_study.H20, 3, 5, 1024, (Remote(4, case_study.H200, 12.5e9),))], PAPER)
    rate = 0.85 * best.requests_per_s
    paper = {"name": "prfaas", "threshold_tokens": round(best.at.threshold)}
    alone: Spec = {"admission": False}
    ways: dict[str, Spec] = {
        "ttft": {"policy": {"name": "ttft"}},
        "prfaas": {"policy": paper},
        "ttft alone": {"policy": {"name": "ttft", "max_link_wait_s": 1e6}, **alone},
        "prfaas alone": {"policy": {**paper, "max_link_wait_s": 1e6}, **alone},
    }
    pairs = (("ttft", "prfaas"), ("ttft alone", "prfaas alone"), ("ttft", "prfaas alone"))
    rows: list[Row] = []
    for fluctuates in (False, True):
        for shared in (0.0, 0.5):
            spec = _paper_fleet(200 if smoke else 2000, rate, shared, fluctuates)
            found = {name: _seeds(spec | way, 2 if smoke else 20) for name, way in ways.items()}
            setting = "link 20-100" if fluctuates else "link 100"
            setting += " Gbit/s, shared prefixes" if shared else " Gbit/s, no prefixes"
            for a, b in pairs:
                rows += _compared(f"{setting}, {a}", b, found[a], found[b], tail=bool(shared) or fluctuates)
    return rows


def _paper_fleet(requests: int, rate: float, shared: float, fluctuates: bool) -> Spec:
    link: Spec = {"src": "A", "dst": "B", "gbps": 100}
    if fluctuates:
        link |= {"low_gbps": 20, "high_gbps": 100}
    work = {"kind": "bursty", "rate": rate, "requests": requests, "burst_ratio": 2.0}
    return {
        "sites": [
            {"name": "A", "prefill": 4, "profile": "h200"},
            {"name": "B", "prefill": 3, "decode": 5, "profile": "h20"},
        ],
        "links": [link],
        "workload": {**work, "shared": shared, "prefix_share": 0.5},
    }


def _seeds(spec: Spec, count: int) -> list[dict[str, Any]]:
    return [simulate(parse({**spec, "seed": seed})).summary(10.0) for seed in range(count)]


def _compared(
    setting: str, rival: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], *, tail: bool
) -> list[Row]:
    good = [(a["slo"]["share"], b["slo"]["share"]) for a, b in zip(ours, theirs, strict=True)]
    p99 = [(a["ttft_s"]["p99"], b["ttft_s"]["p99"]) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean
    lost = sum(s["requests"]["rejected"] + s["requests"]["failed"] for s in ours)
    note = interval([a / b for a, b in good if b]) + f"; {lost} of ours rejected or failed"
    return [
        Row(
            f"{setting}: TTFT <= 10 s", "share", mean(a for a, _ in good), mean(b for _, b in good), rival,
            1.0,
            kind="simulated", note=note,
        ),
        Row(
            f"{setting}: p99 TTFT", "s", mean(a for a, _ in p99), mean(b for _, b in p99), rival,
            0.9 if tail else None, lower_is_better=True, kind="simulated",
            note=interval([a / b for a, b in p99]),
        ),
    ]  # fmt: skip


# --- agents over four sites ----------------------------------------------------------------------------


def agents(smoke: bool) -> list[Row]:
    """Coding agents over four sites: `ttft` over all of them against `cache_aware` inside each."""
    names = "ABCD"
    spec: Spec = {
        "sites": [{"name": n, "prefill": 4, "decode": 6, "profile": "h20"} for n in names],
        "links": [{"src": a, "dst": b, "gbps": 100} for a in names for b in names if a != b],
        "engine": {"hybrid": True, "state_slots": 1024},
        "workload": {
            "kind": "agents", "requests": 300 if smoke else 6000, "rate": 0.06, "output_tokens": 400,
            "systems": 16,
        },
    }  # fmt: skip
    rivals = {"ttft": {"name": "ttft"}, "ttft with cache transfer": {"name": "ttft", "can_pull": True}}
    seeds = range(1 if smoke else 5)
    base = [simulate(parse({**spec, "policy": {"name": "cache_aware"}, "seed": s})) for s in seeds]
    rows: list[Row] = []
    for name, policy in rivals.items():
        found = [simulate(parse({**spec, "policy": policy, "seed": s})) for s in seeds]
        who = "cache_aware in one site"
        pairs = list(zip(found, base, strict=True))
        figures: tuple[tuple[str, str, Any, float | None], ...] = (
            ("prefill instance-seconds", "s", lambda r: r.prefill_busy_s, 1.0),
            ("uncached tokens", "", lambda r: r.uncached_tokens, None),
            ("mean TTFT", "s", lambda r: statistics.mean(r.ttft_s), None),
        )
        for label, unit, of, bar in figures:
            ratios = [of(a) / of(b) for a, b in pairs]
            ours, theirs = statistics.mean(of(a) for a in found), statistics.mean(of(b) for b in base)
            rows.append(
                Row(f"agents, 4 sites, {name}: {label}", unit, ours, theirs, who, bar, lower_is_better=True,
                    kind="simulated", note=interval(ratios))
            )  # fmt: skip
        gigabytes = statistics.mean((r.wire_bytes + r.pulled_bytes) / 1e9 for r in found)
        rows.append(
            Row(f"agents, 4 sites, {name}: between sites", "GB", gigabytes, None, who, kind="simulated")
        )
    return rows


# --- scale ---------------------------------------------------------------------------------------------


def scale(smoke: bool) -> list[Row]:
    """16 sites of 64 workers and a million requests, in a process of its own."""
    requests = 2000 if smoke else 1_000_000
    command = [sys.executable, "-c", f"from benchmarks.simulate.cases import big; big({requests})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    what = f"16 sites x 64 workers, {requests:,} requests"
    note = f"{found['events']:,} events; rejected {found['rejected']}, failed {found['failed']}"
    note += f"; {found['remote']:,} prefilled in another site"
    return [
        _less(f"{what}: wall time", "s", found["wall_s"], 900.0, "budget", kind="measured", note=note),
        _less(f"{what}: memory", "MiB", found["mib"], 8192.0, "budget", kind="measured"),
    ]


def big(requests: int) -> None:
    """Run the large scenario; print one JSON line."""
    names = [f"s{i:02}" for i in range(16)]
    spec: Spec = {
        "sites": [{"name": n, "prefill": 40, "decode": 24, "profile": "h20"} for n in names],
        "links": [{"src": a, "dst": b, "gbps": 100} for a in names for b in names if a != b],
        "engine": {"cache_blocks": 2048},
        "workload": {"rate": 0.85 * 16 * 40 / 4.3, "requests": requests, "shared": 0.5, "prefixes": 1000},
    }
    wall = time.perf_counter()
    records = simulate(parse(spec))
    found = {**records.outcomes, "remote": records.remote, "events": records.events}
    found["wall_s"] = time.perf_counter() - wall
    found["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))
