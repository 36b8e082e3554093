"""The fork server: exit statuses reach the launcher, no process outlives its parent, whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests

from cache_service.core.errors import DeadlineExceeded
from prfaas_sglang.cpu.environment import cpu_arguments
from prfaas_sglang.cpu.zygote import Zygote, ZygoteDied
from prfaas_sglang.fleet.ports import free_port
from tests.engine.conftest import ROOT, START_TIMEOUT_S, References, Serve

pytestmark = pytest.mark.engine

SERVER_PARTS = {"prfaas::", "sglang::scheduler", "sglang::detokenizer"}


def parts(pid: int) -> list[psutil.Process]:
    """Return a server's processes: itself, scheduler, detokenizer."""
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def named(processes: list[psutil.Process], title: str) -> psutil.Process:
    return next(p for p in processes if p.cmdline() and p.cmdline()[0].startswith(title))


def assert_all_end(processes: list[psutil.Process], timeout_s: float = 10.0) -> None:
    """Ended means gone, not even a zombie."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive


def test_status_and_log_of_a_worker_that_cannot_start(zygote: Zygote, tmp_path: Path) -> None:
    """A wrong flag ends the worker with SGLang's own exit status and words in its log."""
    zygote.wait_ready(START_TIMEOUT_S)
    log = tmp_path / "worker.log"
    pid = zygote.spawn("wrong", ["--model-path", "x", "--no-such-flag"], {}, log)
    assert zygote.wait(pid, 30) == 2
    assert zygote.poll(pid) == 2
    assert "--no-such-flag" in log.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_missing_model_ends_the_worker(zygote: Zygote, tmp_path: Path) -> None:
    """The launcher sees an exit status, and the log says what is missing."""
    zygote.wait_ready(START_TIMEOUT_S)
    log = tmp_path / "worker.log"
    pid = zygote.spawn("missing", ["--model-path", str(tmp_path / "nowhere"), "--device", "cpu"], {}, log)
    status = zygote.wait(pid, 60)
    assert status is not None
    assert status != 0
    assert "nowhere" in log.read_text()


@pytest.mark.parametrize("victim", ["sglang::scheduler", "sglang::detokenizer", "prfaas::"])
def test_a_server_ends_as_a_whole(victim: str, serve: Serve, references: References) -> None:
    """SIGKILL of any of its processes ends the others within seconds, and the launcher hears of it."""
    model, _ = references.get("dense")
    with serve(model) as server:
        processes = parts(server.pid)
        assert len(processes) == 3
        assert all(p.cmdline()[0].startswith(tuple(SERVER_PARTS)) for p in processes)
        named(processes, victim).kill()
        assert server.zygote.wait(server.pid, 20) is not None
        assert_all_end(processes)


def test_orderly_end(serve: Serve, references: References) -> None:
    """`terminate` lets SGLang drain: exit status 0, no crash handling, no child left."""
    model, _ = references.get("dense")
    with serve(model) as server:
        processes = parts(server.pid)
        server.zygote.terminate(server.pid)
        assert server.zygote.wait(server.pid, 20) == 0
        assert_all_end(processes)
        assert "crashed" not in server.log_path.read_text()


def test_each_worker_has_its_own_environment(zygote: Zygote, tmp_path: Path) -> None:
    """Variables reach SGLang in the one worker they were given to: here, the width of its help text."""
    zygote.wait_ready(START_TIMEOUT_S)
    lines = []
    for columns in ("60", "150"):
        log = tmp_path / f"{columns}.log"
        pid = zygote.spawn(f"help-{columns}", ["--help"], {"COLUMNS": columns}, log)
        assert zygote.wait(pid, 30) == 0
        lines.append(len(log.read_text().splitlines()))
    assert lines[0] > 1.2 * lines[1]


def test_metrics_work_beside_shared_imports(serve: Serve, references: References) -> None:
    """The scheduler's numbers appear at the server's /metrics: they cross processes through files."""
    model, _ = references.get("dense")
    with serve(model, enable_metrics=True) as server:
        server.generate([5, 6, 7, 8], 2)
        text = requests.get(f"{server.url}/metrics", timeout=10).text
        assert "sglang:prompt_tokens_total" in text


LAUNCHER = """
import sys
from pathlib import Path
from prfaas_sglang.cpu.environment import cpu_arguments
from prfaas_sglang.cpu.zygote import Zygote
folder = Path(sys.argv[1])
zygote = Zygote.start(folder / "zygote.log")
zygote.wait_ready(120)
pid = zygote.spawn("orphan", sys.argv[2:], {}, folder / "worker.log")
print(zygote.pid, pid, flush=True)
zygote.wait(pid, 3600)
"""


@pytest.mark.parametrize("victim", ["launcher", "zygote"])
def test_nothing_outlives_the_launcher(victim: str, references: References, tmp_path: Path) -> None:
    """SIGKILL of the launcher, or of the fork server, ends everything that came from it."""
    model, _ = references.get("dense")
    argv = ["--model-path", str(model), "--port", str(free_port()), *cpu_arguments()]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert launcher.stdout is not None
        zygote_pid, worker_pid = map(int, launcher.stdout.readline().split())
        deadline = time.monotonic() + 60
        while len(processes := parts(worker_pid)) < 3:
            assert time.monotonic() < deadline, (tmp_path / "worker.log").read_text()
            time.sleep(0.05)
        processes.append(psutil.Process(zygote_pid))
        if victim == "launcher":
            launcher.kill()
        else:
            os.kill(zygote_pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=10)
        # without the fork server nobody reaps its orphans here: dead is enough
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        launcher.kill()
        launcher.wait()
        if launcher.stdout is not None:
            launcher.stdout.close()


def test_errors_of_the_launchers_side(tmp_path: Path) -> None:
    """Waiting too briefly, and asking a fork server that has ended, say so; `stop` can be repeated."""
    zygote = Zygote.start(tmp_path / "zygote.log")
    try:
        with pytest.raises(DeadlineExceeded):
            zygote.wait_ready(0.01)
        os.kill(zygote.pid, signal.SIGKILL)
        with pytest.raises(ZygoteDied):
            zygote.wait_ready(30)
        with pytest.raises(ZygoteDied):
            zygote.spawn("late", [], {}, tmp_path / "late.log")
        assert zygote.poll(1) == -signal.SIGKILL
    finally:
        zygote.stop(0)
        zygote.stop(0)
