"""Builds the emulator with gcc at first use.

The executable lies in the user's cache directory under the hash of its source, flags and machine, so parallel
runs and several checkouts share it and the source tree stays clean.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("emulator.c")
COMMAND = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
LIBRARIES = ("-lm",)


def cache_directory() -> Path:
    """Where executables are kept; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prfaas-wan"


def build() -> Path:
    """Return the path of the executable, built if it is not there. Raises RuntimeError with gcc's words."""
    text = SOURCE.read_bytes()
    about = " ".join((*COMMAND, *LIBRARIES, platform.machine())).encode()
    key = hashlib.sha256(about + text).hexdigest()[:16]
    target = cache_directory() / f"emulator-{key}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    try:
        argv = [*COMMAND, "-o", temporary, str(SOURCE), *LIBRARIES]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"the WAN emulator does not build:\n{done.stderr}")
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target
