"""`prfaas up`: start a fleet and keep it running until it is told to stop or a process dies."""

from __future__ import annotations

import threading
from importlib import resources
from pathlib import Path

from rich.console import Console

from prfaas_sglang.fleet import config
from prfaas_sglang.fleet.launch import Launcher, StopRequested, new_run_dir, stop_on_signals
from prfaas_sglang.fleet.progress import Progress


def example() -> str:
    """Return the commented example of a fleet file."""
    folder = resources.files("prfaas_sglang.fleet") / "examples"
    return (folder / "demo.yaml").read_text(encoding="utf-8")


def run(file: Path, run_dir: Path | None, *, check_only: bool = False) -> int:
    """Start the fleet of `file`; return 0 after a requested stop. Raises PrfaasError otherwise."""
    console = Console()
    fleet = config.load(file)
    if check_only:
        console.print(f"{file}: {len(fleet.workers())} workers in {len(fleet.sites)} sites, no mistake found")
        return 0
    directory = prepare(run_dir)
    stop = threading.Event()
    restore = stop_on_signals(stop)
    progress = Progress(console)
    progress.note(f"fleet {file}, logs in {directory}")
    try:
        with Launcher(fleet, directory, progress) as launcher:
            assert launcher.plan is not None
            url = launcher.plan.router_url
            progress.note(f"router: {url}   stop with Ctrl-C")
            progress.note(f"try:    {curl(url, fleet.model.served_name)}")
            launcher.watch(stop)
    except StopRequested as request:
        progress.note(f"{request}: stopped everything")
    finally:
        restore()
    return 0


def prepare(run_dir: Path | None) -> Path:
    """Make the run directory; return it."""
    if run_dir is None:
        return new_run_dir()
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir.resolve()


def curl(url: str, model: str) -> str:
    """Return a command line that asks the fleet something."""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 16}}'
    return f"curl -i {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
