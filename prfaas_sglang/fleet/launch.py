"""Starts a fleet, watches it, stops it. Leaves no process behind, whatever happens to the launcher.

Order: the fork server (its imports take longest); beside it model, ports, files, cache service and router;
then the workers, all at once; readiness of everything. A process that ends by itself ends the start, or later
the run, with its last lines.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType

from cache_service.core.errors import PrfaasError
from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet import specs
from prfaas_sglang.fleet.config import TINY, Fleet
from prfaas_sglang.fleet.ports import PortPlan
from prfaas_sglang.fleet.processes import (
    Forked,
    Process,
    Started,
    died,
    stop_all,
    wait_ready,
)
from prfaas_sglang.fleet.progress import Progress

IMPORTS_TIMEOUT_S = 300.0
#: SGLang drains within 5 s of SIGTERM.
STOP_GRACE_S = 8.0
WATCH_S = 0.25


def cache_dir() -> Path:
    """Return where tiny checkpoints are kept: $PRFAAS_CACHE_DIR, or ~/.cache/prfaas-sglang."""
    chosen = os.environ.get("PRFAAS_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "prfaas-sglang"


def resolve_model(fleet: Fleet) -> Path:
    """Return the checkpoint folder, building a tiny one when it is not in the cache."""
    if not fleet.model.path.startswith(TINY):
        return Path(fleet.model.path).expanduser().resolve()
    from prfaas_sglang.cpu import models  # torch: only when a checkpoint is to be built

    return models.cached(fleet.model.path.removeprefix(TINY), cache_dir() / "models")


def new_run_dir(root: Path = Path("runs")) -> Path:
    """Make and return runs/YYYYmmdd-HHMMSS[-n]."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = root / (stamp if not attempt else f"{stamp}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path.resolve()
    raise FileExistsError(root / stamp)


class Launcher:
    """One running fleet. Use as a context manager; leaving it stops everything.

    Args:
        fleet: checked fleet file.
        run_dir: gets one log per process, the generated configurations and pids.json.
        progress: where steps are shown.
    """

    def __init__(self, fleet: Fleet, run_dir: Path, progress: Progress) -> None:
        self.fleet = fleet
        self.run_dir = run_dir
        self.progress = progress
        self.plan: specs.Plan | None = None
        self.model: Path | None = None
        self._zygote: Zygote | None = None
        self._processes: list[Process] = []
        self._stopped = threading.Lock()

    def __enter__(self) -> Launcher:
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

    # --- start ---

    def start(self) -> None:
        """Start everything and wait until all of it is ready. Raises PrfaasError with what went wrong."""
        ports = PortPlan()
        try:
            if self.fleet.engine.device == "cpu":
                self._zygote = Zygote.start(self.run_dir / "zygote.log")
            with self.progress.step("model"):
                self.model = resolve_model(self.fleet)
            self.plan = specs.build(self.fleet, self.model, self.run_dir, ports)
        finally:
            ports.release()
        for spec in (*self.plan.services, *self.plan.engines):
            self._write_files(spec)
        services = [self._start_service(spec) for spec in self.plan.services]
        if self._zygote is not None:
            with self.progress.step("SGLang imported once"):
                self._zygote.wait_ready(IMPORTS_TIMEOUT_S)
        engines = [self._start_engine(spec) for spec in self.plan.engines]
        self._write_pids()
        with self.progress.step(f"{len(engines)} workers ready"):
            self._wait_all(list(zip(engines, self.plan.engines, strict=True)))
        with self.progress.step("cache service and router ready"):
            self._wait_all(list(zip(services, self.plan.services, strict=True)))

    def start_reference(self) -> str:
        """Start a plain single SGLang server of the same model; return its base URL."""
        assert self.model is not None
        ports = PortPlan()
        spec = specs.reference_engine(self.fleet, self.model, ports.claim("reference", specs.LOOPBACK, 0))
        ports.release()
        process = self._start_engine(spec)
        self._wait_all([(process, spec)])
        return spec.health_url.removesuffix("/health")

    def _write_files(self, spec: specs.ProcessSpec) -> None:
        for name, text in spec.files.items():
            (self.run_dir / name).write_text(text + "\n", encoding="utf-8")

    def _start_service(self, spec: specs.ProcessSpec) -> Process:
        process = Started(spec.name, spec.argv, spec.env, self.run_dir / f"{spec.name}.log")
        self._processes.append(process)
        return process

    def _start_engine(self, spec: specs.ProcessSpec) -> Process:
        log_path = self.run_dir / f"{spec.name}.log"
        process: Process
        if self._zygote is not None:
            pid = self._zygote.spawn(spec.name, list(spec.argv), spec.env, log_path)
            process = Forked(self._zygote, spec.name, pid, log_path)
        else:
            argv = [sys.executable, "-m", "sglang.launch_server", *spec.argv]
            env = {"SGLANG_PLUGINS": "prfaas", **spec.env, **self._gpu_of(spec.name)}
            process = Started(spec.name, argv, env, log_path)
        self._processes.append(process)
        return process

    def _gpu_of(self, name: str) -> dict[str, str]:
        """Give the n-th worker the n-th GPU, unless the launcher's environment already restricts them."""
        if "CUDA_VISIBLE_DEVICES" in os.environ or self.plan is None:
            return {}
        names = [spec.name for spec in self.plan.engines]
        return {"CUDA_VISIBLE_DEVICES": str(names.index(name))} if name in names else {}

    def _wait_all(self, waiting: list[tuple[Process, specs.ProcessSpec]]) -> None:
        with ThreadPoolExecutor(max_workers=max(1, len(waiting))) as pool:
            futures = [
                pool.submit(wait_ready, process, spec.health_url, spec.ready_timeout_s)
                for process, spec in waiting
            ]
            errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _write_pids(self) -> None:
        pids = {process.name: process.pid for process in self._processes}
        if self._zygote is not None:
            pids["zygote"] = self._zygote.pid
        (self.run_dir / "pids.json").write_text(json.dumps(pids, indent=1) + "\n", encoding="utf-8")

    # --- run ---

    def check(self) -> None:
        """Raise ProcessDied when a process of the fleet has ended."""
        for process in self._processes:
            status = process.poll()
            if status is not None:
                raise died(process, status)

    def watch(self, stop: threading.Event) -> None:
        """Block until `stop` is set. Raises ProcessDied when a process ends before."""
        while not stop.wait(WATCH_S):
            self.check()

    # --- stop ---

    def stop(self) -> None:
        """Stop everything that was started. Idempotent."""
        with self._stopped:
            stop_all(self._processes, STOP_GRACE_S)
            self._processes.clear()
            if self._zygote is not None:
                self._zygote.stop(0.0)
                self._zygote = None


def stop_on_signals(stop: threading.Event) -> Callable[[], None]:
    """Set `stop` on SIGINT and SIGTERM; return a function that restores the handlers."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # the second one does not wait for a clean end
        stop.set()
        raise StopRequested(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


class StopRequested(PrfaasError):
    """The operator asked the launcher to stop."""

    reason = "stop_requested"
