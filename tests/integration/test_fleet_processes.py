"""Processes of a fleet: readiness, a death with its last lines, deadlines, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cache_service.core.errors import DeadlineExceeded
from prfaas_sglang.fleet.processes import ProcessDied, Started, stop_all, wait_ready

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("serving", flush=True)
server.serve_forever()
"""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ready_then_stopped(tmp_path: Path) -> None:
    """A server becomes ready and is gone after stop_all."""
    port = free_port()
    process = Started("web", [sys.executable, "-c", SERVER, str(port)], {}, tmp_path / "web.log")
    wait_ready(process, f"http://127.0.0.1:{port}/", 20)
    assert process.poll() is None
    stop_all([process], 5)
    assert process.poll() == -signal.SIGTERM


def test_a_death_is_reported_with_status_and_last_lines(tmp_path: Path) -> None:
    """The error has the name, how it ended, the log's path and its end."""
    script = "import sys; print('the reason is a bad flag'); sys.exit(3)"
    process = Started("worker-7", [sys.executable, "-c", script], {}, tmp_path / "w.log")
    with pytest.raises(ProcessDied) as caught:
        wait_ready(process, "http://127.0.0.1:9/", 20)
    text = str(caught.value)
    assert "worker-7" in text
    assert "exited with status 3" in text
    assert "the reason is a bad flag" in text
    assert str(tmp_path / "w.log") in text


def test_a_signal_is_named(tmp_path: Path) -> None:
    """A killed process says by which signal."""

    script = "import time; time.sleep(600)"
    process = Started("sleeper", [sys.executable, "-c", script], {}, tmp_path / "s.log")
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessDied, match="was killed by SIGKILL"):
        wait_ready(process, "http://127.0.0.1:9/", 20)


def test_a_process_that_never_answers_runs_into_its_deadline(tmp_path: Path) -> None:
    """Readiness is bounded, and the log's end is shown."""
    script = "import time; print('still thinking', flush=True); time.sleep(600)"
    process = Started("slow", [sys.executable, "-c", script], {}, tmp_path / "slow.log")
    try:
        with pytest.raises(DeadlineExceeded, match="slow was not ready within 1 s"):
            wait_ready(process, "http://127.0.0.1:9/", 1)
    finally:
        process.kill()
    assert process.poll() == -signal.SIGKILL


def test_children_of_a_killed_launcher_die(tmp_path: Path) -> None:
    """SIGKILL of the launcher takes its plain children along."""
    script = f"""
import sys, time
from pathlib import Path
from prfaas_sglang.fleet.processes import Started
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
child = Started("c", sleeper, {{}}, Path({str(tmp_path)!r}) / "c.log")
print(child.pid, flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    child.wait(10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
