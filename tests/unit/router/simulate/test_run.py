"""Whole runs: repeatable, complete, and each part of the time to first token where it belongs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cache_service.core.errors import ConfigError
from prfaas_sglang.cli import main
from router.core.profiles import case_study
from router.simulate import cli
from router.simulate.run import simulate
from router.simulate.spec import parse
from router.simulate.workload import make

TWO_SITES: dict[str, Any] = {
    "sites": [
        {"name": "A", "prefill": 4, "profile": "h200"},
        {"name": "B", "prefill": 3, "decode": 5, "profile": "h20"},
    ],
    "links": [{"src": "A", "dst": "B", "gbps": 100, "low_gbps": 20, "high_gbps": 100, "jitter_s": 0.01}],
    "workload": {"kind": "bursty", "rate": 2.5, "requests": 400, "shared": 0.5},
}
POLICIES = ("ttft", "prfaas", "local", "remote", "round_robin", "cache_aware")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_is_the_same_run_and_every_request_ends(policy: str) -> None:
    """To the last digit; another seed is another run."""
    spec = {**TWO_SITES, "policy": {"name": policy, "threshold_tokens": 19_400}}
    first, second = (simulate(parse(spec)).summary(10.0) for _ in range(2))
    other = simulate(parse({**spec, "seed": 1})).summary(10.0)
    assert first == second != other
    assert first["requests"]["asked"] == 400
    assert first["requests"]["failed"] == 0


def test_one_request_alone_has_the_figures_of_its_profile_and_link() -> None:
    """Prefill from the profile, the last chunk's bytes over the link, the round trip, no waiting."""
    spec = {
        **TWO_SITES,
        "links": [{"src": "A", "dst": "B", "gbps": 10, "rtt_s": 0.05}],
        "workload": {"requests": 1, "low": 30_000, "high": 30_010, "mu": 10.309},
        "policy": {"name": "remote"},
    }
    records = simulate(parse(spec))
    tokens = records.prompt_tokens
    size = case_study.KV.bytes_at(tokens)
    assert records.parts["queue_s"][0] == 0.0
    assert records.parts["prefill_s"][0] == pytest.approx(case_study.H200.prefill_s(tokens))
    assert records.wire_bytes == pytest.approx(size)
    tail_s = size * 8192 / tokens / 1.25e9
    assert records.parts["transfer_s"][0] == pytest.approx(tail_s + 0.05, rel=1e-3)
    assert sum(part[0] for part in records.parts.values()) == pytest.approx(records.ttft_s[0])


@pytest.mark.parametrize("policy", ["local", "remote"])
def test_what_a_request_takes_beside_is_added_once_to_every_first_token(policy: str) -> None:
    """Wherever it is prefilled, it is part of the way to decode; workers and link are no busier."""
    spec = {**TWO_SITES, "workload": {"requests": 20, "rate": 0.001}, "policy": {"name": policy}}
    plain, longer = (simulate(parse({**spec, "request_s": seconds})) for seconds in (0.0, 0.25))
    assert list(longer.ttft_s) == pytest.approx([ttft_s + 0.25 for ttft_s in plain.ttft_s])
    assert list(longer.parts["transfer_s"]) == pytest.approx([s + 0.25 for s in plain.parts["transfer_s"]])
    assert longer.busy_s == plain.busy_s


def test_busy_seconds_and_tokens_add_up() -> None:
    """Prefill work is that of the computed tokens; decode work that of the answers."""
    spec = {**TWO_SITES, "workload": {"rate": 0.02, "requests": 100}, "policy": {"name": "local"}}
    records = simulate(parse(spec))
    assert records.busy_s["B"]["prefill"] == pytest.approx(sum(records.parts["prefill_s"]))
    assert records.hit_tokens == 0
    assert records.wire_bytes == 0.0


def test_hybrid_caches_hit_less() -> None:
    """A state only at chunk ends: the same run reuses fewer tokens, never more."""
    spec = {**TWO_SITES, "workload": {**TWO_SITES["workload"], "rate": 0.3}, "policy": {"name": "local"}}
    plain = simulate(parse(spec))
    hybrid = simulate(parse({**spec, "engine": {"hybrid": True}}))
    assert 0 < hybrid.hit_tokens < plain.hit_tokens


def test_an_outage_longer_than_the_timeout_sends_requests_home() -> None:
    """They are retried where they are decoded, and answered."""
    link = {**TWO_SITES["links"][0], "outages": [[60.0, 60.0]]}
    spec = {**TWO_SITES, "links": [link], "policy": {"name": "remote"}, "transfer_timeout_s": 5.0}
    records = simulate(parse({**spec, "workload": {"rate": 1.0, "requests": 200}}))
    assert records.retries > 0
    assert records.outcomes == {"answered": 200, "rejected": 0, "failed": 0}


def test_workers_change_roles() -> None:
    """Two decode workers drain, are down, and come back as prefill workers with empty caches."""
    change = {"at_s": 50.0, "site": "B", "to": "prefill", "count": 2, "cost_s": 20.0}
    spec = {**TWO_SITES, "policy": {"name": "local"}, "workload": {"rate": 0.8, "requests": 400}}
    without = simulate(parse(spec)).summary(10.0)
    changed = simulate(parse({**spec, "role_changes": [change]})).summary(10.0)
    assert changed["requests"]["answered"] == 400
    assert changed["queue_s"]["mean"] < 0.8 * without["queue_s"]["mean"]


def test_a_prompt_larger_than_a_worker_is_rejected_not_failed() -> None:
    """The two outcomes are told apart."""
    spec = {**TWO_SITES, "engine": {"cache_blocks": 40}, "workload": {"rate": 0.1, "requests": 100}}
    outcomes = simulate(parse(spec)).outcomes
    assert outcomes["rejected"] > 0
    assert outcomes["failed"] == 0


def test_without_a_worker_requests_fail() -> None:
    """No prefill worker at home, and no link to another site."""
    sites = [{"name": "A", "prefill": 1, "profile": "h200"}, {"name": "B", "decode": 1}]
    records = simulate(parse({"sites": sites, "workload": {"requests": 10}}))
    assert records.outcomes == {"answered": 0, "rejected": 0, "failed": 10}


def test_pulls_cross_their_link() -> None:
    """With cache transfer between sites some prefixes are fetched, and their bytes are told."""
    sites = [{"name": n, "prefill": 2, "decode": 3, "profile": "h20"} for n in ("A", "B")]
    spec = {
        "sites": sites,
        "links": [{"src": "A", "dst": "B", "gbps": 100, "both": True}],
        "workload": {"rate": 0.6, "requests": 300, "shared": 1.0, "prefixes": 4, "prefix_share": 0.8},
        "policy": {"name": "ttft", "can_pull": True},
    }
    records = simulate(parse(spec))
    assert records.pulled_bytes > 0
    assert sum(link["bytes"] for link in records.links) == pytest.approx(
        records.wire_bytes + records.pulled_bytes, rel=1e-6
    )


def test_agents_look_like_the_published_aggregates() -> None:
    """Calls of a session, prompt tokens of a call, and the cached share if nothing were ever evicted."""
    spec = parse(
        {
            "sites": [{"name": "A", "prefill": 1, "decode": 1}],
            "workload": {"kind": "agents", "requests": 20_000},
        }
    )
    workload = make(spec.workload, ["A"], 512, 0)  # type: ignore[list-item]
    calls = tokens = fresh = 0
    seen: set[int] = set()
    sessions = set()
    todo = [job for job, _ in zip(workload.arrivals(), range(1500), strict=False)]
    while todo:
        job = todo.pop()
        calls, tokens = calls + 1, tokens + job.total_tokens
        fresh += 512 * sum(1 for block in job.blocks if block not in seen)
        seen.update(job.blocks)
        sessions.add(job.session)
        todo.extend(workload.after(job, 0.0))
    assert 40_000 < tokens / calls < 100_000
    assert 0.80 < 1 - fresh / tokens < 0.97


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sites": []}, "sites"),
        ({"wrong": 1}, "wrong"),
        ({"links": [{"src": "A", "dst": "X", "gbps": 1}]}, r"links\[0\]"),
        ({"workload": {"rate": -1}}, "rate"),
        ({"workload": {"kind": "trace"}}, "workload.trace"),
        ({"workload": {"kind": "trace", "trace": "/nonexistent"}}, "workload.trace"),
        ({"workload": {"homes": ["A"]}}, "workload.homes"),
        ({"policy": {"name": "best"}}, "policy"),
        ({"policy": {"nome": "ttft"}}, "policy.nome"),
        ({"sites": [{"name": "A", "prefill": 1, "profile": "abacus"}]}, r"sites\[0\].profile"),
        ({"role_changes": [{"at_s": 1, "site": "Z", "to": "prefill"}]}, "role_changes"),
    ],
)
def test_wrong_scenarios_name_the_field(change: dict[str, Any], field: str) -> None:
    """And say what is accepted."""
    with pytest.raises(ConfigError, match=field):
        simulate(parse({**TWO_SITES, **change}))


def test_a_broken_trace_names_its_line(tmp_path: Path) -> None:
    """The second line lacks its lengths."""
    trace = tmp_path / "trace.jsonl"
    good = {"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [0, 1]}
    trace.write_text(json.dumps(good) + "\n" + '{"timestamp": 5}\n')
    with pytest.raises(ConfigError, match="line 2"):
        simulate(parse({**TWO_SITES, "workload": {"kind": "trace", "trace": str(trace), "requests": 0}}))


def test_a_trace_out_of_order_is_put_in_order(tmp_path: Path) -> None:
    """By time; equal prefixes hit."""
    trace = tmp_path / "trace.jsonl"
    rows = [(9000, [0, 1, 2]), (1000, [0, 1])]
    lines = [
        {"timestamp": t, "input_length": 512 * len(ids) + 5, "output_length": 3, "hash_ids": ids}
        for t, ids in rows
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workload = {"kind": "trace", "trace": str(trace), "requests": 0}
    records = simulate(parse({**TWO_SITES, "workload": workload, "policy": {"name": "local"}}))
    assert list(records.arrived_s) == [1.0, 9.0]
    assert records.hit_tokens == 2 * 512


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON with the scenario that really ran; a wrong file is exit status 2 and one line."""
    scenario = tmp_path / "s.yaml"
    scenario.write_text(json.dumps(TWO_SITES))
    out = tmp_path / "o.json"
    assert main(["simulate", str(scenario), "--policy", "prfaas", "--seed", "7", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["scenario"]["policy"]["name"] == "prfaas"
    assert document["scenario"]["seed"] == 7
    assert "400 requests" in capsys.readouterr().out
    assert main(["simulate", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--json"):
        cli.run(scenario, io.StringIO(), json_file=tmp_path / "no" / "such" / "o.json")
