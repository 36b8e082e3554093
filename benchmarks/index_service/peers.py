"""The peer: Dynamo's standalone indexer, installed on first use below .cache/peers."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.transfer.peers import HOME, Missing

#: Without the runtime's other requirements: the standalone indexer imports only these.
PACKAGES = ("ai-dynamo-runtime==1.6.1", "ai-dynamo==1.6.1", "uvloop==0.22.1")
WITH_REQUIREMENTS = ("pydantic<=2.13.5,>=2.10.6",)


def dynamo() -> list[str]:
    """Return the command of Dynamo's standalone indexer. Raises Missing."""
    home = HOME / "dynamo"
    python = home / "bin" / "python"
    stamp = home / "installed"
    wanted = " ".join((*PACKAGES, *WITH_REQUIREMENTS))
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        _command(sys.executable, "-m", "venv", "--without-pip", str(home))
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python))
        _command(*pip, "install", "--quiet", "--no-deps", *PACKAGES)
        _command(*pip, "install", "--quiet", *WITH_REQUIREMENTS)
        stamp.write_text(wanted)
    _command(str(python), "-m", "dynamo.indexer", "--help")
    return [str(python), "-m", "dynamo.indexer"]


def _command(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise Missing(f"{' '.join(argv[:4])}: {(done.stderr or done.stdout).strip()[-300:]}")
