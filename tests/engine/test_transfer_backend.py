"""The prfaas backend between real SGLang servers: every family token-exact, failures fail one request."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from prfaas_sglang.fleet.ports import free_port
from tests.engine.conftest import References, Serve, Server

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
        full = self.body(prompt, new_tokens, **body)
        with ThreadPoolExecutor(2) as pool:
            pool.submit(post, self.prefill, full)
            answer = pool.submit(post, self.decode, full).result()
            if "output_ids" not in answer:
                abort(self.prefill, str(full["rid"]))
        return {"room": full["bootstrap_room"], **answer}

    def body(self, prompt: list[int], new_tokens: int = 32, **body: Any) -> dict[str, Any]:
        """Return a request that both servers can be sent, with a room of its own."""
        return {
            "rid": secrets.token_hex(8),
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": secrets.randbits(62),
            **body,
        }

    def transfer(self, room: int) -> dict[str, Any]:
        """Return what the prefill server recorded of a room; it may hear of the end after the client."""
        deadline = time.monotonic() + 20
        while True:
            answer = requests.get(f"{self.telemetry}/transfers?room={room}", timeout=10).json()
            if answer["transfers"]:
                (record,) = answer["transfers"]
                return dict(record)
            assert time.monotonic() < deadline, f"no record of room {room}"


def post(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request to one server; return its JSON."""
    answer: dict[str, Any] = requests.post(f"{server.url}/generate", json=body, timeout=60).json()
    return answer


def abort(server: Server, rid: str) -> None:
    """Abort a request on one server."""
    requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=10).raise_for_status()


@contextlib.contextmanager
def pair(serve: Serve, model: Path, family: str, **flags: Any) -> Iterator[Pair]:
    """Start both servers; `flags` are for decode, but `chunk` for both.

    `staging_bytes` and `layerwise` go into prefill's configuration, `compression` into both sides';
    `fault` names one of layer_faults.
    """
    bootstrap_port, telemetry_port = free_port(), free_port()
    config = {"worker_id": "a-p", "site": "A", "listen_host": "127.0.0.1", "insecure": True}
    config |= {key: flags.pop(key) for key in ("compression",) if key in flags}
    sending = {key: flags.pop(key) for key in ("staging_bytes", "layerwise") if key in flags}
    shared: dict[str, Any] = {
        "disaggregation_transfer_backend": "prfaas",
        "chunked_prefill_size": flags.pop("chunk", CHUNK),
        "enable_cache_report": True,
        "served_model_name": "tiny",
    }
    if family.startswith("gdn"):
        shared["mamba_radix_cache_strategy"] = "extra_buffer"
    fault = flags.pop("fault", None)
    faults = {"PRFAAS_TEST_FAULT": fault, "SGLANG_PLUGINS": "prfaas,layer_faults"} if fault else {}
    prefill_config = {**config, **sending, "telemetry_listen": f"127.0.0.1:{telemetry_port}"}
    decode_config = {**config, "worker_id": "b-d", "site": "B"}
    with (
        serve(
            model,
            {"PRFAAS_CONFIG": json.dumps(prefill_config), **faults},
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
        record = servers.transfer(answer["room"])
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


@pytest.mark.parametrize("family", ["gdn", "swa"])
def test_prefill_answers_and_frees_its_pages_before_decode_has_asked(
    serve: Serve, references: References, family: str
) -> None:
    """Store and forward: prefill is through with every prompt, its first token right; then decode comes."""
    model, cases = references.get(family)
    with pair(serve, model, family) as servers:
        bodies = [servers.body(case.prompt) for case in cases]
        for body, case in zip(bodies, cases, strict=True):
            assert post(servers.prefill, body)["output_ids"] == case.output[:1]
        servers.prefill.flush()  # refused while a request still has pages
        for body, case in zip(bodies, cases, strict=True):
            assert post(servers.decode, body)["output_ids"] == case.output, f"{len(case.prompt)} tokens"
            record = servers.transfer(body["bootstrap_room"])
            assert (record["outcome"], record["staged"]) == ("done", True)


def test_without_staging_memory_prefill_waits_for_decode(serve: Serve, references: References) -> None:
    """staging_bytes: 0 is the stock behaviour: pages are kept until decode has everything; exact."""
    model, cases = references.get("gdn")
    with pair(serve, model, "gdn", staging_bytes=0) as servers:
        for case in cases:
            answer = servers.generate(case.prompt)
            assert answer["output_ids"] == case.output
            record = servers.transfer(answer["room"])
            assert (record["outcome"], record["staged"]) == ("done", False)


@pytest.mark.parametrize("family", ["dense", "gdn", "swa"])
def test_only_pages_that_decode_lacks_travel(serve: Serve, references: References, family: str) -> None:
    """With decode's own prefix cache on, a conversation's next turn sends its new pages alone, exactly."""
    model, cases = references.get(family)
    case = max(cases, key=lambda c: len(c.prompt))
    with pair(serve, model, family, disaggregation_decode_enable_radix_cache=True) as servers:
        told = servers.generate(case.prompt, 400)["output_ids"]
        assert told[: len(case.output)] == case.output
        for said in (385, 395):  # greedy: a prompt that ends inside the answer is continued by its rest
            prompt = case.prompt + told[:said]
            answer = servers.generate(prompt, 400 - said)
            assert answer["output_ids"] == told[said:]
            record = servers.transfer(answer["room"])
            assert 0 < record["pages"] < (len(prompt) - 512) // 64, record
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda c: servers.generate(c.prompt), cases * 2))
        assert [a["output_ids"] for a in answers] == [c.output for c in cases * 2]
