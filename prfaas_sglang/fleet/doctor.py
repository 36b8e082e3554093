"""`prfaas doctor`: what this machine has, what is missing, and how to get it. Changes nothing."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape

from prfaas_sglang.engine.compat import SUPPORTED, engine_version

State = Literal["ok", "warn", "fail"]
GIB = 1 << 30
#: A tiny-model server takes about 0.5 GiB of its own beside the shared imports (measured).
MIN_MEMORY = 4 * GIB
MIN_DISK = 4 * GIB
LOCKED_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: ok, warn (something optional is missing) or fail (the fleet will not work).
        found: what there is.
        fix: what to do, "" when nothing.
    """

    name: str
    state: State
    found: str
    fix: str = ""


def check_python() -> Check:
    """The interpreter that the lock was made with."""
    version = platform.python_version()
    if sys.version_info[:2] != LOCKED_PYTHON:
        wanted = ".".join(map(str, LOCKED_PYTHON))
        return Check(
            "Python", "warn", version, f"the lock was made with {wanted}; other versions are untested"
        )
    return Check("Python", "ok", version)


def check_engine() -> Check:
    """The pinned SGLang."""
    found = engine_version()
    if found not in SUPPORTED:
        return Check(
            "SGLang", "fail", found or "not installed", f"make setup, or pip install sglang=={SUPPORTED[-1]}"
        )
    return Check("SGLang", "ok", found)


def check_plugin() -> Check:
    """SGLang finds our plugin through its entry point."""
    points = importlib.metadata.entry_points(group="sglang.srt.plugins")
    if not any(point.name == "prfaas" for point in points):
        return Check("SGLang plugin", "fail", "entry point `prfaas` is not registered", "pip install -e .")
    whitelist = os.environ.get("SGLANG_PLUGINS")
    if whitelist is not None and "prfaas" not in whitelist.split(","):
        return Check(
            "SGLang plugin",
            "fail",
            f"SGLANG_PLUGINS={whitelist}",
            "add prfaas to SGLANG_PLUGINS, or unset it",
        )
    return Check("SGLang plugin", "ok", "entry point `prfaas` is registered")


def check_torch() -> Check:
    """torch, and whether it is a CPU or a CUDA build."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Check("torch", "fail", "not installed", "make setup, or pip install torch==2.13.0")
    if not version.startswith("2.13.0"):
        return Check("torch", "fail", version, "SGLang 0.5.21 pins torch 2.13.0: pip install torch==2.13.0")
    return Check("torch", "ok", version)


def check_stand_in() -> Check:
    """No stand-in for sgl_kernel is importable outside a CPU worker."""
    spec = importlib.util.find_spec("sgl_kernel")
    if spec is None:
        return Check("sgl_kernel", "ok", "none installed; CPU workers use torch stand-ins")
    if spec.origin and "stand_ins" in spec.origin:
        return Check(
            "sgl_kernel", "fail", f"stand-in on sys.path: {spec.origin}", "take its folder out of PYTHONPATH"
        )
    return Check("sgl_kernel", "ok", f"installed: {spec.origin}")


def check_mooncake() -> Check:
    """The stock TCP peer: its package and its Debian library."""
    if importlib.util.find_spec("mooncake") is None:
        return Check(
            "mooncake_tcp peer",
            "warn",
            "the mooncake package is not installed",
            "pip install --no-deps mooncake-transfer-engine-non-cuda==0.3.13.post1 (only to compare)",
        )
    if ctypes.util.find_library("ibverbs") is None:
        return Check(
            "mooncake_tcp peer", "warn", "libibverbs.so.1 is missing", "as root: apt-get install libibverbs1"
        )
    return Check("mooncake_tcp peer", "ok", "package and libibverbs are there")


def check_memory() -> Check:
    """Free memory for a small fleet."""
    free = psutil.virtual_memory().available
    text = f"{free / GIB:.1f} GiB available, {psutil.cpu_count() or 1} cores"
    if free < MIN_MEMORY:
        return Check("memory", "warn", text, f"the demo wants {MIN_MEMORY // GIB} GiB")
    return Check("memory", "ok", text)


def check_disk() -> Check:
    """Free disk for logs and tiny checkpoints."""
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / GIB:.1f} GiB free here"
    if free < MIN_DISK:
        return Check("disk", "warn", text, f"an installation takes about {MIN_DISK // GIB} GiB")
    return Check("disk", "ok", text)


def check_loopback() -> Check:
    """Processes can listen on loopback."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        return Check("loopback", "fail", str(error), "bring the loopback interface up: ip link set lo up")
    return Check("loopback", "ok", f"can listen (tried port {port})")


def check_processor() -> Check:
    """The CPU engine's lock is for Linux x86-64."""
    text = f"{platform.system()} {platform.machine()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return Check("platform", "fail", text, "the CPU engine is locked for Linux x86-64")
    return Check("platform", "ok", text)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_processor,
    check_python,
    check_engine,
    check_torch,
    check_plugin,
    check_stand_in,
    check_mooncake,
    check_memory,
    check_disk,
    check_loopback,
)


def run(*, as_json: bool = False) -> int:
    """Run every check and print it; return 1 when one failed."""
    results = [check() for check in CHECKS]
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=1))  # noqa: T201
    else:
        console = Console(highlight=False, soft_wrap=True)
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for result in results:
            state = f"[{colours[result.state]}]{result.state:<4}[/]"
            console.print(f"{state} {result.name:<18} {escape(result.found)}")
            if result.fix:
                console.print(f"     {'':<18} -> {escape(result.fix)}")
    return int(any(result.state == "fail" for result in results))
