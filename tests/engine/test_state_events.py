"""The recorder on SGLang's own tree, both cores: what is said of windows is what the tree then matches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prfaas_sglang.cpu.environment import worker_environment

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("core", ["rust", "python"])
def test_windows_are_claimed_exactly(core: str) -> None:
    """Salted and plain prompts, evictions and resets: no claim is ever off, where blocks alone often are."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.window_tree", core, "200"],
        cwd=ROOT,
        env={**os.environ, **worker_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["over"], found["under"], found["dump_differs"]) == (0, 0, False)
    assert found["window_blocks"] == 3, "ten tokens in pages of four"
    assert found["group_events"] > 100
    assert found["blocks_over"] > found["asked"] // 10, "windows were never missing: this proves nothing"
