"""Processes that stand and fall together: started one by one, awaited, watched, stopped.

Knows nothing of sites or models: a subclass says in `start` what there is to start. Nothing outlives this
process: plain children die with it, the fork server and its workers notice its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet.processes import Awaited, Forked, Process, Started, check_running, stop_all
from prfaas_sglang.fleet.specs import ProcessSpec

#: SGLang drains within 5 s of SIGTERM.
STOP_GRACE_S = 8.0
WATCH_S = 0.25


class Supervisor:
    """Running processes. Use as a context manager: entering starts, leaving stops.

    Args:
        run_dir: gets one log per process and pids.json.
        grace_s: how long a process may take to end when it is asked to, before it is killed.
    """

    def __init__(self, run_dir: Path, grace_s: float = STOP_GRACE_S) -> None:
        self.run_dir = run_dir
        self.grace_s = grace_s
        self.zygote: Zygote | None = None
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until it is ready; called on entering. Raises PrfaasError."""

    def fresh_log(self, name: str) -> Path:
        """Return the path of a process's log, without what an earlier run left in the same directory."""
        path = self.run_dir / f"{name}.log"
        path.unlink(missing_ok=True)
        return path

    def start_zygote(self) -> None:
        """Start the fork server; its imports go on while other things are started."""
        self.zygote = Zygote.start(self.fresh_log("zygote"))
        self._write_pids()

    def start_service(self, spec: ProcessSpec) -> Awaited:
        """Start a plain child."""
        return self._keep(Started(spec.name, spec.argv, spec.env, self.fresh_log(spec.name)), spec)

    def start_engine(self, spec: ProcessSpec) -> Awaited:
        """Start an SGLang worker: forked where there is a zygote, else a plain child."""
        log_path = self.fresh_log(spec.name)
        if self.zygote is not None:
            pid = self.zygote.spawn(spec.name, list(spec.argv), spec.env, log_path)
            return self._keep(Forked(self.zygote, spec.name, pid, log_path), spec)
        argv = [sys.executable, "-m", "sglang.launch_server", *spec.argv]
        return self._keep(Started(spec.name, argv, {"SGLANG_PLUGINS": "prfaas", **spec.env}, log_path), spec)

    def _keep(self, process: Process, spec: ProcessSpec) -> Awaited:
        self._processes.append(process)
        self._write_pids()
        return Awaited(process, spec.health_url, spec.ready_timeout_s)

    def stop_one(self, process: Process) -> None:
        """Stop one process; the others go on."""
        stop_all([process], self.grace_s)
        self._processes.remove(process)
        self._write_pids()

    def check_running(self) -> None:
        """Raise ProcessDied when a process has ended."""
        check_running(self._processes)

    def _write_pids(self) -> None:
        pids = {process.name: process.pid for process in self._processes}
        if self.zygote is not None:
            pids["zygote"] = self.zygote.pid
        (self.run_dir / "pids.json").write_text(json.dumps(pids, indent=1) + "\n", encoding="utf-8")

    # --- run ---

    def check(self) -> None:
        """Raise ProcessDied, or ZygoteDied, when a process of the fleet has ended."""
        if self.zygote is not None:
            self.zygote.wait_ready(0)  # raises when it is dead; else its workers would be blamed
        check_running(self._processes)

    def watch(self, stop: threading.Event) -> None:
        """Block until `stop` is set. Raises ProcessDied when a process ends before."""
        while not stop.wait(WATCH_S):
            self.check()

    # --- stop ---

    def stop(self) -> None:
        """Stop everything that was started: ask, after `grace_s` kill. Idempotent.

        A signal meanwhile (Ctrl-C again) means: at once.
        """
        try:
            self._stop(self.grace_s)
        except KeyboardInterrupt:
            self._stop(0.0)

    def _stop(self, grace_s: float) -> None:
        forked = any(isinstance(process, Forked) for process in self._processes)
        stop_all(self._processes, grace_s)
        self._processes.clear()
        if self.zygote is not None:
            if not forked and self.zygote.poll(self.zygote.pid) is None:
                os.kill(self.zygote.pid, signal.SIGKILL)  # it would finish its imports first
            self.zygote.stop(0.0)
            self.zygote = None
