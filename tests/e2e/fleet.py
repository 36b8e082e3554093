"""The command line as a user runs it, and a look at the processes it leaves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 40


@dataclass
class Up:
    """A running `prfaas up`.

    Attributes:
        process: the launcher.
        run_dir: its logs.
        url: the router.
        output: what it has printed until it was ready.
    """

    process: subprocess.Popen[str]
    run_dir: Path
    url: str
    output: str

    def pids(self) -> list[int]:
        """Return the launcher's whole process tree and the recorded processes."""
        import json

        recorded = json.loads((self.run_dir / "pids.json").read_text()).values()
        found = set(recorded)
        for pid in [self.process.pid, *recorded]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        return sorted(found)

    def interrupt(self) -> str:
        """Press Ctrl-C; return the rest of the output."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=STOP_TIMEOUT_S)
        return output


@contextlib.contextmanager
def up(file: Path, run_dir: Path) -> Iterator[Up]:
    """Start `prfaas up -f file` and wait for its router line."""
    process = start_cli("up", "-f", str(file), "--run-dir", str(run_dir))
    lines: list[str] = []
    watchdog = _kill_after(process, START_TIMEOUT_S)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            found = re.match(r"router: (http://\S+)", line)
            if found:
                watchdog.cancel()
                yield Up(process, run_dir, found[1], "".join(lines))
                break
        else:
            raise AssertionError("the fleet did not start:\n" + "".join(lines))
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if process.stdout is not None:
            process.stdout.close()


def start_cli(*arguments: str) -> subprocess.Popen[str]:
    """Start `prfaas`; its output, errors included, is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "prfaas_sglang", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_cli(*arguments: str, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run `prfaas` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "prfaas_sglang", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "100"},
    )


def gone(pids: list[int], timeout_s: float = 20) -> list[int]:
    """Wait until the processes have ended; return those that have not."""
    deadline = time.monotonic() + timeout_s
    left = pids
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _runs(pid)]
        if left:
            with contextlib.suppress(psutil.Error):
                psutil.Process(left[0]).wait(0.2)
    return left


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_after(process: subprocess.Popen[str], seconds: float):  # type: ignore[no-untyped-def]
    import threading

    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer
