"""Policy ttft and admission in a real fleet: where prompts go and why, a full decode worker, who leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from prfaas_sglang.fleet.ports import free_port
from tests.e2e.fleet import ROOT, Up, up

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

FILE = """
model: {{path: tiny:gdn}}
engine: {{context_length: 2048, max_total_tokens: 2048, chunked_prefill_size: 256}}
routing: {{policy: ttft, margin_s: 0}}
admission: {{waiting: 1}}
transfer: {{insecure: true}}
sites:
  - name: A
    workers: [{{name: a-p, role: prefill, profile: {folder}/away.yaml}}]
  - name: B
    workers: [{{name: b-p, role: prefill, profile: {folder}/home.yaml}}, {{name: b-d, role: decode}}]
links: [{{src: A, dst: B, gbps: 0.08, price_per_gb: 2}}]
"""
#: 1 ms a token at home; in the other site a tenth of that and 50 ms, over a link of 10 kB a millisecond.
PROFILE = "format: 1\nname: {}\nkv: {{bytes_per_token: 1000}}\nprefill: {{fixed_s: {}, per_token_s: {}}}\n"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One fleet for the whole file."""
    folder = tmp_path_factory.mktemp("decisions")
    (folder / "home.yaml").write_text(PROFILE.format("home", 0, 0.001))
    (folder / "away.yaml").write_text(PROFILE.format("away", 0.05, 0.0001))
    (folder / "fleet.yaml").write_text(FILE.format(folder=folder))
    with up(folder / "fleet.yaml", folder / "run") as running:
        yield running


def ask(url: str, first: int, tokens: int, **more: Any) -> requests.Response:
    """Complete `tokens` token ids from `first` on."""
    body = {"model": "gdn", "prompt": list(range(first, first + tokens)), "max_tokens": 4, "temperature": 0}
    stream = bool(more.get("stream"))
    return requests.post(
        f"{url}/v1/completions", json={**body, "ignore_eos": True, **more}, timeout=60, stream=stream
    )


def decisions(url: str) -> list[dict[str, Any]]:
    return requests.get(f"{url}/decisions", timeout=10).json()["decisions"]


def wait_metric(url: str, line: str) -> None:
    """Read the router's metrics until they have `line`."""
    deadline = time.monotonic() + 20
    while line not in requests.get(f"{url}/metrics", timeout=10).text:
        assert time.monotonic() < deadline, line


def test_long_prompts_cross_the_link_and_short_ones_do_not(fleet: Up) -> None:
    """50 tokens: 50 ms at home, more away; 600: 600 ms at home, some 170 ms away; terms, price are told."""
    assert ask(fleet.url, 10, 50).headers["x-prfaas-prefill-worker"] == "b-p"
    assert ask(fleet.url, 100, 600).headers["x-prfaas-prefill-worker"] == "a-p"
    short, long = decisions(fleet.url)[-2:]
    assert (short["route"], short["wire_bytes"]) == ("local", 0)
    assert (long["route"], long["reason"], long["wire_bytes"]) == ("remote", "least_ttft", 600_000)
    assert long["cost"] == pytest.approx(0.0012)
    assert long["predicted"]["prefill_s"] == pytest.approx(0.11)
    assert long["predicted"]["transfer_s"] > 0


def test_a_full_decode_worker_queues_refuses_and_is_freed_by_a_client_that_leaves(fleet: Up) -> None:
    """A long answer holds 24 of 32 pages: the next waits, one more gets 429; then the first leaves."""
    with ThreadPoolExecutor(1) as pool:
        with ask(fleet.url, 10, 500, max_tokens=1500, stream=True) as first:
            begun = first.iter_content(64)  # kept: its end would be that of the connection
            assert next(begun)
            second = pool.submit(ask, fleet.url, 1000, 600)
            wait_metric(fleet.url, 'prfaas_router_waiting_requests{class="standard"} 1.0')
            third = ask(fleet.url, 700, 50)
            assert third.status_code == 429
            assert int(third.headers["Retry-After"]) >= 1
            assert third.json()["error"]["code"] == "not_admitted"
            assert not second.done()
        assert second.result(60).status_code == 200
    wait_metric(fleet.url, 'prfaas_router_waiting_requests{class="standard"} 0.0')
    assert ask(fleet.url, 1300, 600).status_code == 200


def test_bytes_come_from_the_pools_where_there_is_no_profile(fleet: Up, tmp_path: Path) -> None:
    """A router that was told nothing knows what a prompt weighs from GET /layout of its prefill workers."""
    config = json.loads((fleet.run_dir / "router.json").read_text())
    for worker in config["workers"]:
        worker.pop("profile", None)
    config |= {"profiles": {}, "policy": {"name": "prfaas", "threshold_tokens": 256}}
    config["listen"] = f"127.0.0.1:{free_port()}"
    url = f"http://{config['listen']}"
    (tmp_path / "router.json").write_text(json.dumps(config))
    argv = [sys.executable, "-m", "router", "--config", str(tmp_path / "router.json")]
    with subprocess.Popen(argv, cwd=ROOT) as process:
        try:
            deadline, found = time.monotonic() + 30, 0
            while not found:
                assert process.poll() is None
                assert time.monotonic() < deadline
                if _answers(url):
                    assert ask(url, 400, 600).headers["x-prfaas-route"] == "remote"
                    found = decisions(url)[-1]["wire_bytes"]
        finally:
            process.terminate()
    assert found > 600  # KV of every token, and the state


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False
