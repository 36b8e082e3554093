"""Runs every benchmark with --smoke, so that none rots; prints what they print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Return the number of benchmarks that did not run through."""
    failed = []
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"--- {path.stem}", flush=True)
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.{path.stem}", "--smoke"], timeout=600
        ).returncode:
            failed.append(path.stem)
    if failed:
        print("did not run through: " + ", ".join(failed))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
