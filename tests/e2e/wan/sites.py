"""Two sites: a fork server in each of a link's namespaces, and the SGLang workers forked from it.

The host cannot reach a namespace, so every request is sent by a thread that has entered the worker's side.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from prfaas_sglang.cpu.environment import cpu_arguments, worker_environment
from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet.ports import free_port
from tests.e2e.wan.inside import PROBE_VARIABLE
from tests.wan.link import Wan

ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 120.0
#: Short, so that a test of a request that never gets its KV ends; longer than any cut that must be survived.
BOOTSTRAP_TIMEOUT_S, WAITING_TIMEOUT_S = 20, 30
PAGE, CHUNK = 64, 256
#: Of the transfer's telemetry; all are 0 when no request is there.
GAUGES = ("open_count", "staging_used_bytes")
FLAGS: dict[str, Any] = {
    "page_size": PAGE,
    "max_total_tokens": 16384,
    "context_length": 4096,
    "max_running_requests": 8,
    "chunked_prefill_size": CHUNK,
    "disaggregation_transfer_backend": "prfaas",
    "enable_cache_report": True,
    "served_model_name": "tiny",
}


def until(what: str, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Poll what has no event to wait for: the state of another process. Fails naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s} s")
        time.sleep(0.02)


@dataclass
class Worker:
    """One SGLang server on a side of the link."""

    site: Site
    mode: str
    pid: int
    port: int
    bootstrap_port: int
    telemetry_port: int
    probe: Path
    log_path: Path

    def request(self, method: str, path: str, body: object = None, timeout_s: float = 90.0) -> Any:
        """Send one HTTP request from the worker's own side; return the decoded answer, or its text."""
        with self.site.wan.entered(self.site.side):
            answer = requests.request(
                method, f"http://127.0.0.1:{self.port}{path}", json=body, timeout=timeout_s
            )
        try:
            return answer.json()
        except requests.JSONDecodeError:
            return answer.text

    def telemetry(self, path: str) -> str:
        """Return what the transfer's telemetry endpoint says."""
        with self.site.wan.entered(self.site.side):
            return requests.get(f"http://127.0.0.1:{self.telemetry_port}{path}", timeout=10).text

    def transfers(self, room: int) -> list[dict[str, Any]]:
        """Return what this worker recorded of a room."""
        records: list[dict[str, Any]] = json.loads(self.telemetry(f"/transfers?room={room}"))["transfers"]
        return records

    def abort(self, rid: str) -> None:
        """Abort a request."""
        self.request("POST", "/abort_request", {"rid": rid}, 10)

    def counts(self) -> dict[str, Any]:
        """Return what the scheduler process holds (see inside.counts)."""
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(10)
                probe.connect(str(self.probe))
                text = b"".join(iter(lambda: probe.recv(65536), b""))
            answer: dict[str, Any] = json.loads(text)
            if "again" not in answer:
                return {"worker": self.mode, **answer, **self._counts_from_outside()}

    def _counts_from_outside(self) -> dict[str, Any]:
        gauges = dict(re.findall(r"^prfaas_transfer_(\w+) ([0-9.e+]+)$", self.telemetry("/metrics"), re.M))
        return {
            "used_by_transfer": {name: float(gauges[name]) for name in GAUGES if name in gauges},
            "connections": float(gauges["connections_count"]),
            "server_files": len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
        }

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self.site.zygote.poll(self.pid) is None

    def kill(self) -> None:
        """kill -9 the whole process group and wait for its end."""
        self.site.zygote.kill(self.pid)
        assert self.site.zygote.wait(self.pid, 10) is not None

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait for /health; fail with the log when the server ends or time runs out."""
        deadline = time.monotonic() + timeout_s
        while self.site.zygote.wait(self.pid, 0.05) is None:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                with self.site.wan.entered(self.site.side):
                    answer = requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5)
                if answer.status_code == 200:
                    return
            if time.monotonic() > deadline:
                pytest.fail(f"not healthy within {timeout_s} s\n{self.log_tail()}")
        pytest.fail(f"ended\n{self.log_tail()}")

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the server's log."""
        text = self.log_path.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(line[:300] for line in text)


@dataclass
class Site:
    """One side of the link with its fork server."""

    wan: Wan
    side: str
    zygote: Zygote
    control: socket.socket
    folder: Path

    @classmethod
    def start(cls, wan: Wan, side: str, folder: Path) -> Site:
        """Start the fork server inside the namespace; returns while it still imports."""
        ours, theirs = socket.socketpair()
        log_path = folder / f"zygote-{side}.log"
        with log_path.open("ab") as log, wan.entered(side):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.wan.inside", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **worker_environment()},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        return cls(wan, side, Zygote(process, ours, log_path), ours, folder)

    def stop(self) -> None:
        """End the fork server and its workers."""
        self.zygote.stop(0)
        self.control.close()

    def free_port(self) -> int:
        """Return a port of this side that was free a moment ago."""
        with self.wan.entered(self.side):
            return free_port("0.0.0.0")

    def run(self, *argv: str) -> str:
        """Run a command on this side to its end; return its output."""
        with self.wan.entered(self.side):
            return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout

    def serve(
        self,
        model: Path,
        mode: str,
        config: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        bootstrap_port: int | None = None,
        **flags: Any,
    ) -> Worker:
        """Fork a worker of `mode` (null is a stock server); it is not healthy yet.

        bootstrap_port: of a prefill worker that takes a dead one's place. flags: what differs from FLAGS.
        """
        self.zygote.wait_ready(START_TIMEOUT_S)
        port, bootstrap, telemetry = self.free_port(), bootstrap_port or self.free_port(), self.free_port()
        name = f"{self.side}-{mode}-{model.name}-{port}"
        worker = {
            "worker_id": f"{self.side}-{mode}",
            "site": self.side.upper(),
            "telemetry_listen": f"127.0.0.1:{telemetry}",
            "insecure": True,
        }
        probe = self.folder / f"{port}-{secrets.token_hex(2)}.sock"
        chosen = {**FLAGS, **flags, "disaggregation_mode": mode}
        if mode == "null":
            del chosen["disaggregation_transfer_backend"]
        worker.update(config or {})
        if mode == "prefill":
            chosen["disaggregation_bootstrap_port"] = bootstrap
        if model.name.startswith("gdn"):
            chosen["mamba_radix_cache_strategy"] = "extra_buffer"
        argv = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
        argv += cpu_arguments(disaggregation_mode=mode)
        for flag, value in chosen.items():
            if value is not None and value is not False:
                argv += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
        variables = {
            "PRFAAS_CONFIG": json.dumps(worker),
            PROBE_VARIABLE: str(probe),
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(BOOTSTRAP_TIMEOUT_S),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(WAITING_TIMEOUT_S),
            **(environment or {}),
        }
        log_path = self.folder / f"{name}.log"
        pid = self.zygote.spawn(name, argv, variables, log_path)
        return Worker(self, mode, pid, port, bootstrap, telemetry, probe, log_path)


@dataclass
class Answer:
    """What became of one request, as decode answered. `output` is None unless it is complete."""

    rid: str
    room: int
    output: list[int] | None
    text: str
    seconds: float

    def error(self, *accepted: str) -> str:
        """Return the error; fails when the request succeeded or says none of `accepted` (lower case)."""
        assert self.output is None, f"room {self.room} succeeded"
        assert not accepted or any(word in self.text.lower() for word in accepted), self.text
        return self.text


@dataclass
class Pair:
    """A prefill worker on side a and a decode worker on side b."""

    prefill: Worker
    decode: Worker
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(80))

    @property
    def workers(self) -> tuple[Worker, Worker]:
        """Both."""
        return self.prefill, self.decode

    def wait_healthy(self) -> None:
        """Wait until both serve."""
        for worker in self.workers:
            worker.wait_healthy()

    def body(self, prompt: list[int], new_tokens: int, **body: Any) -> dict[str, Any]:
        """Return the request that both halves get; `body` adds or replaces fields."""
        return {
            "rid": secrets.token_hex(8),
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "bootstrap_host": self.prefill.site.wan.address("a"),
            "bootstrap_port": self.prefill.bootstrap_port,
            "bootstrap_room": secrets.randbits(62),
            **body,
        }

    def send(
        self, prompt: list[int], new_tokens: int = 8, *, abort_prefill: bool = True, **body: Any
    ) -> Future[Answer]:
        """Send the same request with one room to both, as the router does.

        abort_prefill: abort prefill's half when decode's has failed, as the router does where it can.
        """
        full = self.body(prompt, new_tokens, **body)

        def both() -> Answer:
            began = time.monotonic()
            self.pool.submit(self._post, self.prefill, full)
            value = self._post(self.decode, full)
            seconds = time.monotonic() - began
            reason = value.get("meta_info", {}).get("finish_reason") or {}
            complete = reason.get("type") == "length" and len(value["output_ids"]) == new_tokens
            if not complete and abort_prefill and self.prefill.alive:
                self.prefill.abort(full["rid"])
            output = value["output_ids"] if complete else None
            return Answer(full["rid"], full["bootstrap_room"], output, json.dumps(value), seconds)

        return self.pool.submit(both)

    @staticmethod
    def _post(worker: Worker, body: dict[str, Any]) -> dict[str, Any]:
        try:
            value = worker.request("POST", "/generate", body)
        except requests.RequestException as error:  # the worker was killed
            return {"error": str(error)}
        return value if isinstance(value, dict) else {"error": value}

    def ask(self, prompt: list[int], new_tokens: int = 8, **body: Any) -> Answer:
        """`send` and wait."""
        return self.send(prompt, new_tokens, **body).result(90)

    def holdings(self) -> list[dict[str, Any]]:
        """Return what both workers hold now."""
        return [worker.counts() for worker in self.workers]


@contextlib.contextmanager
def two_sites(wan: Wan, folder: Path) -> Iterator[tuple[Site, Site]]:
    """Start both fork servers at once; end them and all their workers."""
    with contextlib.ExitStack() as stack:
        sites = []
        for side in ("a", "b"):
            site = Site.start(wan, side, folder)
            stack.callback(site.stop)
            sites.append(site)
        yield sites[0], sites[1]
