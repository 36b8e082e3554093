"""Dynamo's offline trace replay, installed on first use below .cache/peers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.transfer.peers import HOME, Missing

#: Without their own requirements, some of which do not install without a GPU driver.
PACKAGES = ("ai-dynamo-runtime==1.6.1", "ai-dynamo==1.6.1", "uvloop==0.22.1")
WITH_REQUIREMENTS = ("pydantic<=2.13.5,>=2.10.6", "pyyaml", "packaging", "aiohttp", "msgspec", "zstandard")
NAME = "Dynamo offline replay 1.6.1"


@cache
def python() -> str:
    """Return the interpreter that has it. Raises Missing."""
    home = HOME / "dynamo-replay"
    found = home / "bin" / "python"
    stamp = home / "installed"
    wanted = " ".join((*PACKAGES, *WITH_REQUIREMENTS))
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        _command(sys.executable, "-m", "venv", "--without-pip", str(home))
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(found))
        _command(*pip, "install", "--quiet", "--no-deps", *PACKAGES)
        _command(*pip, "install", "--quiet", *WITH_REQUIREMENTS)
        stamp.write_text(wanted)
    _command(str(found), "-c", "import dynamo.replay.api")
    return str(found)


def replay(trace: Path, workers: int, blocks: int, mode: str) -> dict[str, Any]:
    """Return what the peer's replay gave. Raises Missing when it cannot run."""
    end = Path(__file__).with_name("dynamo_end.py")
    out = _command(python(), str(end), str(trace), str(workers), str(blocks), mode)
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def _command(*argv: str) -> str:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=600, env={**os.environ, "DYN_LOG": "error"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise Missing(f"{' '.join(argv[1:4])}: {(done.stderr or done.stdout).strip()[-200:]}")
    return done.stdout
