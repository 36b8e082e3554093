"""Starts a fleet, watches it, stops it. Leaves no process behind, whatever happens to the launcher.

Order: ports; the fork server (its imports take longest); beside it model, files, cache service and router;
then the workers, all at once; readiness of everything. A process that ends by itself ends the start, or later
the run, with its last lines.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from cache_service.core.errors import ConfigError, DeadlineExceeded
from prfaas_sglang.cpu.zygote import Zygote
from prfaas_sglang.fleet import certs, specs
from prfaas_sglang.fleet.config import AUTO, TINY, Fleet
from prfaas_sglang.fleet.ports import PortPlan
from prfaas_sglang.fleet.processes import Process, Started, died, wait_ready
from prfaas_sglang.fleet.progress import Progress
from prfaas_sglang.fleet.supervise import WATCH_S, Supervisor

IMPORTS_TIMEOUT_S = 300.0
BUILD_TIMEOUT_S = 300.0

#: In a process of its own: torch and transformers (450 MB) stay out of the launcher.
_BUILD = """
import pathlib, sys
from cache_service.core.errors import ConfigError
from prfaas_sglang.cpu import models
answer = pathlib.Path(sys.argv[3])
try:
    answer.write_text(str(models.cached(sys.argv[1], pathlib.Path(sys.argv[2]))), encoding="utf-8")
except ConfigError as error:
    answer.write_text(str(error), encoding="utf-8")
    sys.exit(2)
"""


def cache_dir() -> Path:
    """Return where tiny checkpoints are kept: $PRFAAS_CACHE_DIR, or ~/.cache/prfaas-sglang."""
    chosen = os.environ.get("PRFAAS_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "prfaas-sglang"


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


class Launcher(Supervisor):
    """One running fleet. Use as a context manager; leaving it stops everything.

    Args:
        fleet: checked fleet file.
        run_dir: gets one log per process, the generated configurations and pids.json.
        progress: where steps are shown.
    """

    def __init__(self, fleet: Fleet, run_dir: Path, progress: Progress) -> None:
        super().__init__(run_dir)
        self.fleet = fleet
        self.progress = progress
        self.plan: specs.Plan | None = None
        self.model: Path | None = None
        self._reference: Process | None = None

    # --- start ---

    def start(self) -> None:
        """Start everything and wait until all of it is ready. Raises PrfaasError with what went wrong."""
        ports = PortPlan(reserved=[port for _, _, port in self.fleet.fixed_ports()])
        try:
            claimed = specs.claim_ports(self.fleet, ports)
            if self.fleet.engine.device == "cpu":
                self.start_zygote()
            with self.progress.step("model"):
                self.model = self._resolve_model()
            if self.fleet.transfer.tls == AUTO:
                self._make_certificates()
            self.plan = plan = specs.build(self.fleet, self.model, self.run_dir, claimed)
            for spec in (*plan.services, *plan.engines):
                self._write_files(spec)
            ports.release("router.")
            ports.release("cache_service.")
            services = [self.start_service(spec) for spec in plan.services]
            if self.zygote is not None:
                with self.progress.step("SGLang imported once"):
                    self._wait_imports(self.zygote)
            ports.release("sites")
            engines = [self.start_engine(spec) for spec in plan.engines]
        finally:
            ports.release()
        with self.progress.step(f"{len(engines)} workers ready"):
            wait_ready(engines, self.check)
        with self.progress.step("cache service and router ready"):
            wait_ready(services, self.check)

    def start_reference(self) -> str:
        """Start a plain single SGLang server of the same model and wait for it; return its base URL."""
        assert self.model is not None
        ports = PortPlan()
        spec = specs.reference_engine(self.fleet, self.model, ports.claim("reference", specs.LOOPBACK, 0))
        ports.release()
        awaited = self.start_engine(spec)
        wait_ready([awaited], self.check)
        self._reference = awaited.process
        return spec.health_url.removesuffix("/health")

    def stop_reference(self) -> None:
        """Stop what `start_reference` started; the fleet goes on."""
        if self._reference is not None:
            self.stop_one(self._reference)
            self._reference = None

    def _resolve_model(self) -> Path:
        """Return the checkpoint folder, building a tiny one when it is not in the cache."""
        path = self.fleet.model.path
        if not path.startswith(TINY):
            return Path(path).expanduser().resolve()
        answer = self.run_dir / "model.path"
        answer.unlink(missing_ok=True)
        arguments = [path.removeprefix(TINY), str(cache_dir() / "models"), str(answer)]
        argv = [sys.executable, "-c", _BUILD, *arguments]
        builder = Started("model", argv, {}, self.fresh_log("model"))
        try:
            deadline = time.monotonic() + BUILD_TIMEOUT_S
            while (status := builder.poll()) is None:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"building {path} took more than {BUILD_TIMEOUT_S:.0f} s")
                time.sleep(0.02)
        finally:
            builder.kill()
        if status not in (0, 2) or not answer.exists():
            raise died(builder, status)
        text = answer.read_text(encoding="utf-8")
        if status == 2:
            raise ConfigError(f"model.path: {text}")
        return Path(text)

    def _make_certificates(self) -> None:
        """Make an authority that can sign nothing more, and each site's certificate."""
        folder, sites = self.run_dir / specs.CERTIFICATES, [site.name for site in self.fleet.sites]
        certs.remove(folder, sites)  # a run directory may be used again
        certs.make(folder, sites, keep_ca_key=False)

    def _wait_imports(self, zygote: Zygote) -> None:
        """Wait for the fork server, looking after the processes that run already."""
        deadline = time.monotonic() + IMPORTS_TIMEOUT_S
        while True:
            self.check_running()
            try:
                zygote.wait_ready(WATCH_S)
            except DeadlineExceeded:
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def _write_files(self, spec: specs.ProcessSpec) -> None:
        for name, text in spec.files.items():
            (self.run_dir / name).write_text(text + "\n", encoding="utf-8")
