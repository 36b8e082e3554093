"""`prfaas demo`, as a newcomer runs it: real SGLang in two sites, every output compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prfaas_sglang.fleet import up
from tests.e2e.fleet import run_cli

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_cli("demo", "--run-dir", str(folder / "run"), "--json", str(folder / "demo.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    value: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    value["output"] = done.stdout
    return value


def test_every_output_is_identical(result: dict[str, Any]) -> None:
    """The verdict, the exit status and the rows agree."""
    assert result["ok"]
    assert result["identical"] == result["requests"] == 21
    assert "21 of 21 outputs identical to a single SGLang server" in result["output"]


def test_long_prompts_cross_the_link_and_short_ones_stay(result: dict[str, Any]) -> None:
    """Routes follow the uncached length, and the bytes on the link are those of remote routes."""
    for row in result["rows"]:
        if row["agent"].startswith("research"):
            assert (row["route"], row["prefill_site"]) == ("remote", "A")
            assert row["link_bytes"] > 500_000
            assert row["site_bytes"] == 0
        else:
            assert (row["route"], row["prefill_site"]) == ("local", "B")
            assert row["link_bytes"] == 0
            assert row["site_bytes"] > 100_000


def test_a_second_agent_hits_the_shared_system_prompt(result: dict[str, Any]) -> None:
    """The first turn of a later agent finds the prefix that the first agent left, in either site.

    It may hit more than was matched when it was routed: the agents beside it snapshot their state meanwhile.
    """
    for kind, shared_tokens in (("research", 512), ("helpdesk", 64)):
        first, second = (
            next(r for r in result["rows"] if r["agent"] == f"{kind}-{i}" and r["turn"] == 1) for i in (0, 1)
        )
        assert first["hit_tokens"] == 0
        assert second["hit_tokens"] >= shared_tokens
        assert second["matched_tokens"] >= shared_tokens


def test_a_later_turn_hits_the_conversation(result: dict[str, Any]) -> None:
    """Turn 3 reuses more than turn 2 did."""
    rows = {(r["agent"], r["turn"]): r for r in result["rows"]}
    assert rows["research-0", 3]["hit_tokens"] > rows["research-0", 2]["hit_tokens"] > 0


def test_the_same_demo_runs_over_the_stock_backend(tmp_path: Path) -> None:
    """One option changes the backend to mooncake_tcp; the outputs stay identical."""
    pytest.importorskip("mooncake")
    done = run_cli("demo", "--backend", "mooncake_tcp", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 of 21 outputs identical" in done.stdout


def test_the_demo_runs_with_certificates_of_ones_own(tmp_path: Path) -> None:
    """With those of `prfaas certs` KV crosses under mutual TLS, and the outputs stay identical."""
    assert run_cli("certs", str(tmp_path / "pki"), "--sites", "A,B").returncode == 0
    pki = tmp_path / "pki"
    tls = f"{{ca: {pki}/ca.pem, cert: '{pki}/{{site}}.pem', key: '{pki}/{{site}}.key'}}"
    file = tmp_path / "demo.yaml"
    file.write_text(up.example().replace("tls: auto", f"tls: {tls}"))
    done = run_cli("demo", "-f", str(file), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 of 21 outputs identical" in done.stdout
    assert "kv_in_the_clear" not in (tmp_path / "run" / "a-prefill-0.log").read_text()
