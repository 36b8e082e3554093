"""What we compare with, installed on first use below .cache/peers: Mooncake, NIXL, iperf3.

The two Python peers live in a virtual environment of their own that also sees this interpreter's packages
(NIXL imports torch and numpy). iperf3 is taken from the system, else unpacked from Debian's packages without
installing them. What cannot be had is a reason, not an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".cache" / "peers"
PACKAGES = ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "nixl==1.5.1", "nixl-cu12==1.5.1")
COMMAND_S = 600.0
DEBIAN = ("iperf3", "libiperf0", "libsctp1")


@dataclass(frozen=True)
class Found:
    """A peer that can run: its command's begin and the variables that it needs."""

    argv: list[str]
    env: dict[str, str]


class Missing(Exception):
    """The peer cannot run here; the text says why."""


def ours() -> Found:
    """The interpreter of our own ends."""
    return Found([sys.executable], {"OMP_NUM_THREADS": "1"})


def environment(
    name: str, packages: Sequence[str], requirements: Sequence[str] = (), *, sees_ours: bool = False
) -> Path:
    """Return the interpreter of a virtual environment below .cache/peers, made when it is not as wanted.

    Args:
        packages: installed without their own requirements, some of which need a GPU driver or a CUDA torch.
        requirements: installed with theirs.
        sees_ours: this interpreter's packages can be imported there too.

    Raises Missing when it cannot be made.
    """
    home = HOME / name
    python, stamp = home / "bin" / "python", home / "installed"
    wanted = " ".join((*packages, *requirements))
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        command(sys.executable, "-m", "venv", "--without-pip", str(home))
        if sees_ours:
            (site,) = (home / "lib").glob("python*/site-packages")
            (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python))
        command(*pip, "install", "--quiet", "--no-deps", *packages)
        if requirements:
            command(*pip, "install", "--quiet", *requirements)
        stamp.write_text(wanted)
    return python


def python_peer(module: str) -> Found:
    """Return the interpreter with Mooncake and NIXL. Raises Missing."""
    python = environment("venv", PACKAGES, sees_ours=True)
    found = Found([str(python)], {"UCX_TLS": "tcp,self", "OMP_NUM_THREADS": "1", "MC_LOG_LEVEL": "ERROR"})
    command(*found.argv, "-c", f"import {module}", env=found.env)
    return found


def default_cc(name: str) -> dict[str, str]:
    """Return the variables under which a process's TCP sockets start with a congestion control; needs root.

    Raises Missing when the library cannot be built.
    """
    library = HOME / "default_cc.so"
    source = Path(__file__).with_name("default_cc.c")
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        HOME.mkdir(parents=True, exist_ok=True)
        command("gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return {"LD_PRELOAD": str(library), "BENCH_DEFAULT_CC": name}


def iperf3() -> Found:
    """Return iperf3. Raises Missing."""
    system = shutil.which("iperf3")
    if system:
        return Found([system], {})
    folder = HOME / "iperf3"
    program = folder / "usr" / "bin" / "iperf3"
    if not program.exists():
        if not shutil.which("apt-get"):
            raise Missing("iperf3 is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        command("apt-get", "download", "-qq", *DEBIAN, cwd=folder)
        for package in folder.glob("*.deb"):
            command("dpkg-deb", "-x", str(package), str(folder))
    libraries = ":".join(str(p) for p in (folder / "usr" / "lib").glob("*-linux-gnu"))
    found = Found([str(program)], {"LD_LIBRARY_PATH": libraries})
    command(*found.argv, "--version", env=found.env)
    return found


def command(*argv: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command; return what it printed. Raises Missing when it fails or takes longer than COMMAND_S."""
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"{argv[0]}: {error}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Missing(f"{Path(argv[0]).name}: {words[-1][:160]}")
    return done.stdout
