"""Real SGLang on CPU for the tests: one fork server for the whole run, a server per `serve(...)`.

The fork server imports SGLang once (about 5 s); a server forked from it answers about 2 s later.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from prfaas_sglang.cpu.environment import cpu_arguments, worker_environment
from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet.ports import free_port
from tests.engine.reference import NEW_TOKENS

ROOT = Path(__file__).resolve().parents[2]
#: Families in the order in which the tests need them.
FAMILIES = ("gdn", "dense", "gdn-moe", "swa")
PAGE = 64
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """One answer of `/generate`."""

    output: list[int]
    cached_tokens: int


@dataclass
class Server:
    """A running SGLang server."""

    url: str
    pid: int
    log_path: Path
    zygote: Zygote

    def generate(self, prompt: list[int], new_tokens: int = NEW_TOKENS, **body: Any) -> Answer:
        """Continue `prompt` greedily; extra keys go into the body (bootstrap_room, ...)."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        response = requests.post(
            f"{self.url}/generate",
            json={"input_ids": prompt, "sampling_params": sampling, **body},
            timeout=120,
        )
        assert response.status_code == 200, f"{response.text}\n{self.log_tail()}"
        answer = response.json()
        return Answer(answer["output_ids"], answer["meta_info"]["cached_tokens"])

    def generate_together(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Send all prompts at once; answers in the order of the prompts."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self.generate, prompts))

    def flush(self) -> None:
        """Empty the prefix cache."""
        response = requests.post(f"{self.url}/flush_cache", timeout=30)
        assert response.status_code == 200, response.text

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait for /health to answer 200; fail with the log when the server ends or time runs out."""
        deadline = time.monotonic() + timeout_s
        while self.zygote.wait(self.pid, 0.05) is None:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            if time.monotonic() > deadline:
                pytest.fail(f"not healthy within {timeout_s} s\n{self.log_tail()}")
        pytest.fail(f"ended with status {self.zygote.poll(self.pid)}\n{self.log_tail()}")


Serve = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The fork server; may still be importing (`serve` waits)."""
    running = Zygote.start(tmp_path_factory.mktemp("zygote") / "zygote.log")
    try:
        yield running
    finally:
        running.stop(0)


@pytest.fixture(scope="session")
def serve(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Servers forked from the run's fork server (see `server_of`)."""
    return server_of(zygote, tmp_path_factory.mktemp("servers"))


def server_of(zygote: Zygote, logs: Path) -> Serve:
    """serve(model_folder, flag=value, ...): a context manager around a healthy server.

    `page_size=64` is `--page-size 64`, `enable_cache_report=True` a bare flag; None leaves a flag out.
    `environment` adds variables. The server's process group is killed at the end.
    """

    @contextlib.contextmanager
    def start(model: Path, environment: Mapping[str, str] | None = None, **flags: Any) -> Iterator[Server]:
        zygote.wait_ready(START_TIMEOUT_S)
        port = free_port()
        defaults: dict[str, Any] = {
            "page_size": PAGE,
            "max_total_tokens": 8192,
            "context_length": 4096,
            "max_running_requests": 8,
            "chunked_prefill_size": 512,
        }
        argv = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
        argv += cpu_arguments(disaggregation_mode=flags.get("disaggregation_mode", "null"))
        for name, value in {**defaults, **flags}.items():
            if value is not None and value is not False:
                argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        name = f"{model.name}-{port}"
        log_path = logs / f"{name}.log"
        server = Server(
            f"http://127.0.0.1:{port}",
            zygote.spawn(name, argv, environment or {}, log_path),
            log_path,
            zygote,
        )
        try:
            server.wait_healthy()
            yield server
        finally:
            zygote.kill(server.pid)
            assert zygote.wait(server.pid, 10) is not None

    return start


@dataclass(frozen=True)
class Case:
    """A prompt and its greedy continuation by transformers in float32."""

    prompt: list[int]
    output: list[int]


class References:
    """Checkpoints and reference outputs, made by one background process in the order of FAMILIES."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "reference.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.reference", str(folder), *FAMILIES],
                cwd=ROOT,
                env={**os.environ, **worker_environment()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, family: str, timeout_s: float = 180.0) -> tuple[Path, list[Case]]:
        """Return the checkpoint's folder and its cases; waits for the background process."""
        path = self._folder / f"{family}.json"
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
                if not path.exists():
                    pytest.fail(f"no reference for {family}\n{self._log.read_text()[-3000:]}")
            if time.monotonic() > deadline:
                pytest.fail(f"reference for {family} takes more than {timeout_s} s")
        return self._folder / family, [Case(**case) for case in json.loads(path.read_text())]

    def stop(self) -> None:
        """End the background process."""
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[References]:
    """Reference outputs; asked for together with the fork server, so that both start at once."""
    made = References(tmp_path_factory.mktemp("references"))
    try:
        yield made
    finally:
        made.stop()
