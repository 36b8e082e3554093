"""Processes of a fleet: readiness, a death with its last lines, deadlines, what a death does to a wait."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from cache_service.core.errors import DeadlineExceeded
from prfaas_sglang.fleet.ports import free_port
from prfaas_sglang.fleet.processes import (
    Awaited,
    ProcessDied,
    Started,
    check_running,
    stop_all,
    tail,
    wait_ready,
)
from tests.integration.fleet_support import SERVER

NOWHERE = "http://127.0.0.1:9/"


def start(name: str, script: str, log: Path, *arguments: str) -> Started:
    return Started(name, [sys.executable, "-c", script, *arguments], {}, log)


def wait(process: Started, url: str, timeout_s: float) -> None:
    wait_ready([Awaited(process, url, timeout_s)], lambda: check_running([process]))


def test_ready_then_stopped(tmp_path: Path) -> None:
    """A server becomes ready and is gone after stop_all."""
    port = free_port()
    process = start("web", SERVER, tmp_path / "web.log", str(port))
    wait(process, f"http://127.0.0.1:{port}/", 20)
    assert process.poll() is None
    stop_all([process], 5)
    assert process.poll() == -signal.SIGTERM


def test_health_checks_pass_by_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment has no business between the launcher and its processes."""
    monkeypatch.setenv("http_proxy", NOWHERE)
    monkeypatch.delenv("no_proxy", raising=False)
    port = free_port()
    process = start("web", SERVER, tmp_path / "web.log", str(port))
    try:
        wait(process, f"http://127.0.0.1:{port}/", 20)
    finally:
        process.kill()


def test_a_death_is_reported_with_status_and_last_lines(tmp_path: Path) -> None:
    """The error has the name, how it ended, the log's path and its end."""
    script = "import sys; print('the reason is a bad flag'); sys.exit(3)"
    process = start("worker-7", script, tmp_path / "w.log")
    with pytest.raises(ProcessDied) as caught:
        wait(process, NOWHERE, 20)
    text = str(caught.value)
    assert "worker-7" in text
    assert "exited with status 3" in text
    assert "the reason is a bad flag" in text
    assert str(tmp_path / "w.log") in text


def test_a_signal_is_named(tmp_path: Path) -> None:
    """A killed process says by which signal."""
    process = start("sleeper", "import time; time.sleep(600)", tmp_path / "s.log")
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessDied, match="was killed by SIGKILL"):
        wait(process, NOWHERE, 20)


def test_a_death_ends_the_wait_for_the_others(tmp_path: Path) -> None:
    """Nobody waits out the deadline of a slow process when another has died already."""
    slow = start("slow", "import time; time.sleep(600)", tmp_path / "slow.log")
    dead = start("dead", "raise SystemExit(4)", tmp_path / "dead.log")
    started = time.monotonic()
    try:
        with pytest.raises(ProcessDied, match=r"dead .* exited with status 4"):
            wait_ready(
                [Awaited(slow, NOWHERE, 120), Awaited(dead, NOWHERE, 120)],
                lambda: check_running([slow, dead]),
            )
    finally:
        slow.kill()
    assert time.monotonic() - started < 20


def test_a_process_that_never_answers_runs_into_its_deadline(tmp_path: Path) -> None:
    """Readiness is bounded, and the log's end is shown."""
    script = "import time; print('still thinking', flush=True); time.sleep(600)"
    process = start("slow", script, tmp_path / "slow.log")
    try:
        with pytest.raises(DeadlineExceeded, match="slow was not ready within 1 s"):
            wait(process, NOWHERE, 1)
    finally:
        process.kill()
    assert process.poll() == -signal.SIGKILL


def test_a_server_that_accepts_and_says_nothing_is_not_ready(tmp_path: Path) -> None:
    """The health check itself is bounded, so the deadline holds."""
    process = start("mute", "import time; time.sleep(600)", tmp_path / "mute.log")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        try:
            with pytest.raises(DeadlineExceeded, match="mute was not ready within 1 s"):
                wait(process, f"http://127.0.0.1:{mute.getsockname()[1]}/", 1)
        finally:
            process.kill()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """With everything in its process group."""
    script = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); pid = os.fork();"
        "print('child', pid, flush=True) if pid else None; time.sleep(600)"
    )
    process = start("stubborn", script, tmp_path / "stubborn.log")
    deadline = time.monotonic() + 20
    while "child" not in tail(tmp_path / "stubborn.log"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = int(tail(tmp_path / "stubborn.log").split()[-1])
    stop_all([process], 0.3)
    assert process.poll() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _state(child) not in ("", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _state(pid: int) -> str:
    """Return the kernel's letter for a process's state, "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
