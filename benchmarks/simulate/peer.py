"""Dynamo's offline trace replay, installed on first use below .cache/peers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.index_service.peers import PACKAGES
from benchmarks.transfer.peers import command, environment

#: Of the replay, besides those of the runtime.
WITH_REQUIREMENTS = ("pydantic<=2.13.5,>=2.10.6", "pyyaml", "packaging", "aiohttp", "msgspec", "zstandard")
NAME = "Dynamo offline replay 1.6.1"
_QUIET = {"DYN_LOG": "error"}


@cache
def python() -> str:
    """Return the interpreter that has it. Raises Missing."""
    found = str(environment("dynamo-replay", PACKAGES, WITH_REQUIREMENTS))
    command(found, "-c", "import dynamo.replay.api", env=_QUIET)
    return found


def replay(trace: Path, workers: int, blocks: int, mode: str) -> dict[str, Any]:
    """Return what the peer's replay gave. Raises Missing when it cannot run."""
    end = Path(__file__).with_name("dynamo_end.py")
    out = command(python(), str(end), str(trace), str(workers), str(blocks), mode, env=_QUIET)
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found
