"""Cheap stand-ins for the processes of a fleet, and a launcher of them in a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

#: Serves 200 on the port that is its argument.
SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("serving", flush=True)
server.serve_forever()
"""
SLEEPER = "import time; print('sleeping', flush=True); time.sleep(600)"

#: What `prfaas up` does, for processes given as JSON: [name, script, port, timeout_s].
LAUNCHER = """
import json, sys
from pathlib import Path
from cache_service.core.errors import PrfaasError
from prfaas_sglang.fleet.processes import wait_ready
from prfaas_sglang.fleet.signals import StopRequested, stop_on_signals
from prfaas_sglang.fleet.specs import ProcessSpec
from prfaas_sglang.fleet.supervise import Supervisor

class Cheap(Supervisor):
    def start(self):
        started = []
        for name, script, port, timeout_s in json.loads(sys.argv[2]):
            argv = (sys.executable, "-c", script, str(port))
            url = f"http://127.0.0.1:{port}/"
            started.append(self.start_service(ProcessSpec(name, "service", argv, url, timeout_s)))
        print("started", flush=True)
        wait_ready(started, self.check)

with stop_on_signals() as stop:
    try:
        with Cheap(Path(sys.argv[1])) as fleet:
            print("ready", flush=True)
            fleet.watch(stop)
    except StopRequested as request:
        print(f"{request}: stopped", flush=True)
    except PrfaasError as error:
        print(error, flush=True)
        sys.exit(1)
"""


@dataclass
class Launched:
    """A launcher of cheap processes.

    Attributes:
        process: the launcher.
        run_dir: its logs and pids.json.
    """

    process: subprocess.Popen[str]
    run_dir: Path

    def until(self, line: str) -> None:
        """Read its output up to a line."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            if text.strip() == line:
                return
        raise AssertionError(f"the launcher ended without printing {line!r}")

    def children(self) -> dict[str, psutil.Process]:
        """Return the running processes by name, as pids.json has them."""
        pids = json.loads((self.run_dir / "pids.json").read_text())
        return {name: psutil.Process(pid) for name, pid in pids.items()}

    def end(self, number: signal.Signals | None = None, timeout_s: float = 20) -> str:
        """Send a signal, wait for the launcher's end, return the rest of its output."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.communicate(timeout=timeout_s)[0]


@contextlib.contextmanager
def launched(run_dir: Path, *processes: tuple[str, str, int, float]) -> Iterator[Launched]:
    """Start a launcher of (name, script, port, ready timeout in s)."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run_dir), json.dumps(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with launcher:
        try:
            yield Launched(launcher, run_dir)
        finally:
            launcher.kill()


def ended(processes: dict[str, psutil.Process], timeout_s: float = 10) -> bool:
    """True when every process is gone (or a zombie that nobody has reaped yet) in time."""
    _, alive = psutil.wait_procs(list(processes.values()), timeout_s)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
