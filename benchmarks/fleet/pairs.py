"""A prefill worker on side a of an emulated link and a decode worker on side b, real SGLang on CPU.

Two workers per backend.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from benchmarks.fleet.sides import START_S, Sides, WorkerFailed
from prfaas_sglang.cpu.environment import cpu_arguments
from tests.wan.link import Wan

REQUEST_S = 60.0
CONTEXT = 4096
#: Ports of the first backend's workers; the namespaces are empty, so they are free.
HTTP_PORT, BOOTSTRAP_PORT, STEP = 31000, 32000, 10


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first token and to the last, and the tokens."""

    first_s: float
    total_s: float
    tokens: list[int]


class Workers(Sides):
    """The pairs of several backends on one link. Use as a context manager."""

    def __init__(self, wan: Wan, folder: Path, backends: tuple[str, ...]) -> None:
        super().__init__(wan, folder)
        self.backends = backends
        self._clients: dict[str, tuple[requests.Session, requests.Session]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def _start_workers(self) -> None:
        self._pool = self._stack.enter_context(ThreadPoolExecutor(4))
        pids = {}
        for number, backend in enumerate(self.backends):
            for side, role in (("a", "prefill"), ("b", "decode")):
                pids[backend, side, role] = self._spawn(backend, number, side, role)
            self._clients[backend] = (requests.Session(), requests.Session())
        deadline_s = time.monotonic() + START_S
        for (backend, side, role), pid in pids.items():
            self._until_started(side, pid, self._url(backend, side), f"{backend}-{role}", deadline_s)

    def _spawn(self, backend: str, number: int, side: str, role: str) -> int:
        address = self.wan.address(side)
        argv = [
            *("--model-path", str(self._model), "--served-model-name", "tiny"),
            *("--host", address, "--port", str(HTTP_PORT + STEP * number)),
            *("--page-size", "64", "--context-length", str(CONTEXT), "--max-total-tokens", "8192"),
            *("--chunked-prefill-size", "512", "--max-running-requests", "8"),
            *("--mamba-radix-cache-strategy", "extra_buffer"),
            *cpu_arguments(disaggregation_mode=role),
            *("--disaggregation-mode", role, "--disaggregation-transfer-backend", backend),
            *("--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT + STEP * number)),
        ]
        env = {"SGLANG_HOST_IP": address, "SGLANG_LOCAL_IP_NIC": self.wan.name, "MC_LOG_LEVEL": "ERROR"}
        if backend == "prfaas":
            config = {"worker_id": role, "site": side.upper(), "listen_host": address, "insecure": True}
            env["PRFAAS_CONFIG"] = json.dumps(config)
        name = f"{backend}-{role}"
        return self._zygotes[side].spawn(name, argv, env, self._folder / f"{name}.log")

    def _url(self, backend: str, side: str) -> str:
        port = HTTP_PORT + STEP * self.backends.index(backend)
        return f"http://{self.wan.address(side)}:{port}"

    def generate(self, backend: str, prompt: list[int], new_tokens: int) -> Timing:
        """Send one request to both workers of a pair, as the router does, and time decode's stream."""
        body: dict[str, Any] = {
            "rid": secrets.token_hex(8),
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "bootstrap_host": self.wan.address("a"),
            "bootstrap_port": BOOTSTRAP_PORT + STEP * self.backends.index(backend),
            "bootstrap_room": secrets.randbits(62),
        }
        to_prefill, to_decode = self._clients[backend]
        assert self._pool is not None
        started_s = time.perf_counter()
        url = self._url(backend, "a") + "/generate"
        prefilled = self._pool.submit(to_prefill.post, url, json=body, timeout=REQUEST_S)
        first_s, last = self._read_stream(to_decode, backend, body, started_s)
        total_s = time.perf_counter() - started_s
        if prefilled.result(REQUEST_S).status_code != 200:
            raise WorkerFailed(f"{backend} prefill: {prefilled.result().text[:160]}")
        return Timing(first_s, total_s, last["output_ids"])

    def _read_stream(
        self, session: requests.Session, backend: str, body: dict[str, Any], started_s: float
    ) -> tuple[float, dict[str, Any]]:
        first_s, last = 0.0, {}
        for event in self._events(session, self._url(backend, "b"), {**body, "stream": True}):
            first_s = first_s or time.perf_counter() - started_s
            last = event
        if "output_ids" not in last:
            raise WorkerFailed(f"{backend} decode: {json.dumps(last)[:160]}")
        return first_s, last

    @staticmethod
    def _events(session: requests.Session, url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with session.post(url + "/generate", json=body, stream=True, timeout=REQUEST_S) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield json.loads(line[6:])
