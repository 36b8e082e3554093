"""`prfaas up`: start a fleet and keep it running until it is told to stop or a process dies."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from rich.console import Console

from cache_service.core.errors import ConfigError
from prfaas_sglang.fleet import config
from prfaas_sglang.fleet.launch import Launcher, new_run_dir
from prfaas_sglang.fleet.progress import Progress
from prfaas_sglang.fleet.signals import StopRequested, stop_on_signals


def example(name: str = "demo") -> str:
    """Return a fleet file of prfaas_sglang/fleet/examples: demo (commented) or minimal."""
    folder = resources.files("prfaas_sglang.fleet") / "examples"
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")


def run(file: Path, run_dir: Path | None, *, check_only: bool = False) -> int:
    """Start the fleet of `file`; return 0 after a requested stop. Raises PrfaasError otherwise."""
    console = Console()
    fleet = config.load(file)
    progress = Progress(console)
    if check_only:
        progress.note(f"{file}: {len(fleet.workers())} workers in {len(fleet.sites)} sites, no mistake found")
        return 0
    directory = prepare(run_dir)
    progress.note(f"fleet {file}, logs in {directory}")
    with stop_on_signals() as stop:
        try:
            with Launcher(fleet, directory, progress) as launcher:
                assert launcher.plan is not None
                url = launcher.plan.router_url
                progress.note(f"router: {url}   stop with Ctrl-C")
                progress.note(f"try:    {curl(url, fleet.model.served_name)}")
                launcher.watch(stop)
        except StopRequested as request:
            progress.note(f"{request}: stopped everything")
    return 0


def prepare(run_dir: Path | None) -> Path:
    """Make the run directory; return it. Raises ConfigError when it cannot be written."""
    try:
        if run_dir is None:
            return new_run_dir()
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = run_dir or "runs"
        raise ConfigError(f"--run-dir: cannot make the folder {where}: {error.strerror}") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"--run-dir: cannot write in {run_dir}")
    return run_dir.resolve()


def curl(url: str, model: str) -> str:
    """Return a command line that asks the fleet something."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 16}}'
    return f"curl -i {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
