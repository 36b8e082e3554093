"""Launcher's side of the fork server: one process imports SGLang once and forks every CPU worker.

Protocol over an inherited socket pair, one JSON object a line. To the zygote: {"spawn": {...}}.
From it: {"ready": seconds}, {"spawned": name, "pid": n}, {"failed": name, "error": text},
{"exited": pid, "status": n}.
End of file on either side means: stop everything. Import-light; the other side is zygote_process.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_service.core.errors import DeadlineExceeded, Unavailable
from prfaas_sglang.cpu.environment import worker_environment

LOG_TAIL_LINES = 20
KILL_TIMEOUT_S = 5.0


class ZygoteDied(Unavailable):
    """The fork server ended; the message holds the tail of its log."""

    reason = "zygote_died"


class Zygote:
    """A running fork server. Thread-safe.

    Use `start`, then `wait_ready`, then `spawn` for each worker, then `stop`.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, log_path: Path) -> None:
        self._process = process
        self._control = control
        self._log_path = log_path
        self._changed = threading.Condition()
        self._ready_after_s: float | None = None
        self._spawned: dict[str, int | str] = {}
        self._running: set[int] = set()
        self._exited: dict[int, int] = {}
        self._dead = False
        threading.Thread(target=self._listen, name="zygote-listener", daemon=True).start()

    @classmethod
    def start(cls, log_path: Path) -> Zygote:
        """Start the fork server and return at once; its output goes to `log_path`."""
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **worker_environment()}
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prfaas_sglang.cpu.zygote_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        return cls(process, ours, log_path)

    @property
    def pid(self) -> int:
        """Process id of the fork server."""
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> float:
        """Wait until the imports are done; return how many seconds they took.

        Raises ZygoteDied, DeadlineExceeded.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._dead or self._ready_after_s is not None, timeout_s)
            if self._dead:
                raise self._died()
            if not done or self._ready_after_s is None:
                raise DeadlineExceeded(f"SGLang's imports took more than {timeout_s:.0f} s")
            return self._ready_after_s

    def spawn(self, name: str, argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> int:
        """Fork a worker that runs `sglang.launch_server` with `argv`; return its process id.

        The worker leads a process group of its own; its output goes to `log_path`. `wait_ready` comes first.
        Raises ZygoteDied, Unavailable when the fork failed.
        """
        request = {"name": name, "argv": list(argv), "env": dict(env), "log": str(log_path)}
        with self._changed:
            self._spawned.pop(name, None)
            self._send({"spawn": request})
            self._changed.wait_for(lambda: self._dead or name in self._spawned, 30)
            if self._dead:
                raise self._died()
            answer = self._spawned.get(name, "no answer within 30 s")
        if isinstance(answer, str):
            raise Unavailable(f"cannot fork {name}: {answer}")
        return answer

    def poll(self, pid: int) -> int | None:
        """Return a worker's exit status (negative: killed by that signal), None while it runs."""
        with self._changed:
            if pid in self._exited:
                return self._exited[pid]
            return -signal.SIGKILL if self._dead else None

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Wait for a worker's end; return its exit status, None when it still runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._dead or pid in self._exited, timeout_s)
        return self.poll(pid)

    def terminate(self, pid: int) -> None:
        """Ask a worker to drain and end, which SGLang does within 5 s; nothing happens when it has ended.

        The signal goes to the server process alone: SGLang takes a signalled scheduler for a crash.
        """
        if self.poll(pid) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self, pid: int) -> None:
        """End a worker's whole process group now; nothing happens when it has ended."""
        if self.poll(pid) is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop every worker (`terminate`, after `timeout_s` `kill`), then the fork server. Idempotent."""
        with self._changed:
            running = set(self._running)
        for pid in running if timeout_s > 0 else ():
            self.terminate(pid)
        with self._changed:
            self._changed.wait_for(lambda: self._dead or not self._running, timeout_s)
            running = set(self._running)
        for pid in running:
            self.kill(pid)
        with self._changed:
            self._changed.wait_for(lambda: self._dead or not self._running, KILL_TIMEOUT_S)
        with contextlib.suppress(OSError):  # it may be gone already
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Mapping[str, object]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self._dead = True
            raise self._died() from error

    def _died(self) -> ZygoteDied:
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError as error:
            lines = [f"(no log: {error})"]
        return ZygoteDied("the CPU fork server ended; its last lines:\n" + "\n".join(lines))

    def _listen(self) -> None:
        with self._control.makefile("rb") as lines:
            for line in lines:
                self._heard(json.loads(line))
        self._process.wait()
        with self._changed:
            self._dead = True
            self._changed.notify_all()

    def _heard(self, message: dict[str, object]) -> None:
        with self._changed:
            match message:
                case {"ready": float(seconds)}:
                    self._ready_after_s = seconds
                case {"spawned": str(name), "pid": int(pid)}:
                    self._spawned[name] = pid
                    self._running.add(pid)
                case {"failed": str(name), "error": str(error)}:
                    self._spawned[name] = error
                case {"exited": int(pid), "status": int(status)}:
                    self._running.discard(pid)
                    self._exited[pid] = status
            self._changed.notify_all()
