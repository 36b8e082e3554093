"""Running processes of a fleet, forked from the zygote or started plainly, behind one small interface.

Single-threaded on purpose: a signal must be able to end every wait at once, and the parent-death signal of a
plain child comes when the *thread* that started it ends (prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache_service.core.errors import DeadlineExceeded, PrfaasError, Unavailable
from prfaas_sglang.cpu.zygote import Zygote

TAIL_LINES = 15
POLL_S = 0.1
HEALTH_TIMEOUT_S = 2.0
_PR_SET_PDEATHSIG = 1


#: Straight to the process: a proxy from the environment has no business between us and it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ProcessDied(Unavailable):
    """A process of the fleet ended by itself; the message has its status and last lines."""

    reason = "process_died"


class Process(Protocol):
    """One running process."""

    name: str
    pid: int
    log_path: Path

    def poll(self) -> int | None:
        """Return the exit status (negative: that signal), None while it runs."""

    def terminate(self) -> None:
        """Ask it to end; returns at once."""

    def kill(self) -> None:
        """End it and its children now."""


class Forked:
    """An SGLang worker forked from the zygote."""

    def __init__(self, zygote: Zygote, name: str, pid: int, log_path: Path) -> None:
        self.name, self.pid, self.log_path = name, pid, log_path
        self._zygote = zygote

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._zygote.poll(self.pid)

    def terminate(self) -> None:
        """Ask it to end."""
        self._zygote.terminate(self.pid)

    def kill(self) -> None:
        """End its process group."""
        self._zygote.kill(self.pid)


class Started:
    """A plain child process, leader of its own process group, that dies with the launcher.

    Start it from the main thread.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> None:
        self.name, self.log_path = name, log_path
        launcher = os.getpid()
        libc = ctypes.CDLL(None)

        def die_with_launcher() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != launcher:
                os._exit(1)

        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=die_with_launcher,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def tail(path: Path, lines: int = TAIL_LINES, width: int = 300) -> str:
    """Return the last lines of a log, each cut to `width` characters."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"(no log: {error})"
    kept = [line[:width] for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"    {line}" for line in kept) or "    (its log is empty)"


def describe_end(status: int) -> str:
    """Say how a process ended."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


def died(process: Process, status: int) -> ProcessDied:
    """Return the error that says how a process ended, with its last lines."""
    return ProcessDied(
        f"{process.name} (pid {process.pid}) {describe_end(status)}; the end of {process.log_path}:\n"
        f"{tail(process.log_path)}"
    )


@dataclass(frozen=True, slots=True)
class Awaited:
    """A process that is starting: ready when `health_url` answers 200, late after `timeout_s`."""

    process: Process
    health_url: str
    timeout_s: float


def is_healthy(url: str, timeout_s: float = HEALTH_TIMEOUT_S) -> bool:
    """True when the URL answers 200."""
    try:
        with _DIRECT.open(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def check_running(processes: Sequence[Process]) -> None:
    """Raise ProcessDied when one has ended."""
    for process in processes:
        status = process.poll()
        if status is not None:
            raise died(process, status)


def wait_ready(awaited: Sequence[Awaited], check: Callable[[], None]) -> None:
    """Wait until every process is ready.

    Args:
        awaited: what is starting.
        check: called on every round; raises when a process that matters has ended.

    Raises DeadlineExceeded with the last lines of the first one that is late, and what `check` raises.
    """
    started = time.monotonic()
    left = list(awaited)
    while True:
        check()
        left = [one for one in left if not is_healthy(one.health_url)]
        if not left:
            return
        waited_s = time.monotonic() - started
        late = next((one for one in left if waited_s > one.timeout_s), None)
        if late:
            raise DeadlineExceeded(
                f"{late.process.name} was not ready within {late.timeout_s:.0f} s; the end of "
                f"{late.process.log_path}:\n{tail(late.process.log_path)}"
            )
        time.sleep(POLL_S)


def stop_all(processes: Sequence[Process], grace_s: float) -> None:
    """Ask every process to end, in reverse order; kill what is left after `grace_s`."""
    for process in reversed(processes):
        with contextlib.suppress(PrfaasError, OSError):
            process.terminate()
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(POLL_S / 2)
    for process in processes:
        if process.poll() is None:
            process.kill()
