"""The prfaas backend between real SGLang servers: every family token-exact, failures fail one request."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine.conftest import References, Serve, Server, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

#: Small, so that a prompt of a few hundred tokens leaves in several chunks.
CHUNK = 256


@dataclass
class Pair:
    """One prefill and one decode server of the same model."""

    prefill: Server
    decode: Server
    bootstrap_port: int
    telemetry: str

    def generate(self, prompt: list[int], new_tokens: int = 32, **body: Any) -> dict[str, Any]:
        """Send the same request with one room to both; return decode's JSON.

        As the router does, prefill's half is aborted when decode's has failed.
        """
        room = secrets.randbits(62)
        full = {
            "rid": secrets.token_hex(8),
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": room,
            **body,
        }

        def post(server: Server) -> dict[str, Any]:
            answer = requests.post(f"{server.url}/generate", json=full, timeout=60)
            value: dict[str, Any] = answer.json()
            return value

        with ThreadPoolExecutor(2) as pool:
            pool.submit(post, self.prefill)
            answer = pool.submit(post, self.decode).result()
            if "output_ids" not in answer:
                abort(self.prefill, str(full["rid"]))
        return {"room": room, **answer}

    def transfers(self, room: int) -> list[dict[str, Any]]:
        """Return what the prefill server recorded of a room."""
        answer = requests.get(f"{self.telemetry}/transfers?room={room}", timeout=10)
        records: list[dict[str, Any]] = answer.json()["transfers"]
        return records


def abort(server: Server, rid: str) -> None:
    """Abort a request on one server."""
    requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=10).raise_for_status()


@contextlib.contextmanager
def pair(serve: Serve, model: Path, family: str, **flags: Any) -> Iterator[Pair]:
    """Start both servers."""
    bootstrap_port, telemetry_port = free_port(), free_port()
    config = {"worker_id": "a-p", "site": "A", "listen_host": "127.0.0.1"}
    shared: dict[str, Any] = {
        "disaggregation_transfer_backend": "prfaas",
        "chunked_prefill_size": CHUNK,
        "enable_cache_report": True,
        "served_model_name": "tiny",
    }
    if family.startswith("gdn"):
        shared["mamba_radix_cache_strategy"] = "extra_buffer"
    prefill_config = {**config, "telemetry_listen": f"127.0.0.1:{telemetry_port}"}
    decode_config = {**config, "worker_id": "b-d", "site": "B"}
    with (
        serve(
            model,
            {"PRFAAS_CONFIG": json.dumps(prefill_config)},
            disaggregation_mode="prefill",
            disaggregation_bootstrap_port=bootstrap_port,
            **shared,
        ) as prefill,
        serve(
            model,
            {"PRFAAS_CONFIG": json.dumps(decode_config)},
            disaggregation_mode="decode",
            **{**shared, **flags},
        ) as decode,
    ):
        yield Pair(prefill, decode, bootstrap_port, f"http://127.0.0.1:{telemetry_port}")


@pytest.mark.parametrize("family", ["gdn", "dense", "gdn-moe", "swa"])
def test_every_family_is_token_exact(serve: Serve, references: References, family: str) -> None:
    """Alone, from a cached prefix, and many at once: decode's tokens are those of transformers."""
    model, cases = references.get(family)
    with pair(serve, model, family) as servers:
        for _ in range(2):
            for case in cases:
                answer = servers.generate(case.prompt)
                assert answer["output_ids"] == case.output, f"{len(case.prompt)} tokens"
        assert answer["meta_info"]["cached_tokens"] >= 512  # the second round came from prefill's cache
        (record,) = servers.transfers(answer["room"])
        assert record["outcome"] == "done"
        assert record["pages"] == -(-len(cases[-1].prompt) // 64)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda case: servers.generate(case.prompt), cases * 2))
        assert [a["output_ids"] for a in answers] == [case.output for case in cases * 2]


def test_another_page_size_is_refused_with_the_field(serve: Serve, references: References) -> None:
    """A decode server of another layout gets a failed request that names the difference, and both live on."""
    model, cases = references.get("dense")
    with pair(serve, model, "dense", page_size=32) as servers:
        for _ in range(2):
            answer = servers.generate(cases[0].prompt)
            assert "page_size" in json.dumps(answer), answer
        for server in (servers.prefill, servers.decode):
            assert requests.get(f"{server.url}/health", timeout=10).status_code == 200


def test_aborts_and_dead_peers_fail_only_their_requests(serve: Serve, references: References) -> None:
    """Aborted halves and a room that nobody serves end with a reason; the next request is exact."""
    model, cases = references.get("gdn")
    case = cases[-1]
    with pair(serve, model, "gdn") as servers:
        unreachable = servers.generate(case.prompt, bootstrap_port=free_port())
        assert "cannot reach prefill worker" in json.dumps(unreachable)
        for side in (servers.prefill, servers.decode):
            with ThreadPoolExecutor(1) as pool:
                rid = secrets.token_hex(8)
                running = pool.submit(servers.generate, case.prompt, 2000, rid=rid)
                while not running.done():  # until the abort finds the request there
                    abort(side, rid)
                    if side is servers.prefill:
                        abort(servers.decode, rid)
                answer = running.result(60)
            assert "abort" in json.dumps(answer).lower(), answer
            assert len(answer.get("output_ids", [])) < 2000
        assert servers.generate(case.prompt)["output_ids"] == case.output
