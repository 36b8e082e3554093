"""Our block hashes are those of the installed SGLang, computed by SGLang."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_service.core import blocks
from prfaas_sglang.cpu.environment import worker_environment

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
TOKENS = [random.Random(7).randrange(2**32) for _ in range(330)]
PAGES = (1, 16, 64)
NAMESPACES: list[tuple[str | None, str | None]] = [(None, None), ("lora-7", None), (None, "t"), ("", "")]

#: Runs where SGLang may be imported: a process of its own with a CPU worker's environment.
SCRIPT = """
import json, sys
from types import SimpleNamespace
from prfaas_sglang.cpu import environment
environment.activate()
from sglang.srt.mem_cache import utils

asked = json.load(sys.stdin)
tokens, found = asked["tokens"], {"chains": [], "salted": None}
for extra_key, salt in asked["namespaces"]:
    seed = utils.storage_namespace_seed(extra_key, salt)
    for page in asked["pages"]:
        digests = utils.get_hash_str(tokens[: len(tokens) // page * page], seed, page_size=page)
        found["chains"].append([seed, digests, [utils.hash_str_to_int64(digest) for digest in digests]])

class Key(list):
    extra_key, cache_salt = None, "tenant-1"

root = SimpleNamespace(key=None, parent=None, event_hash_value=None)
node = SimpleNamespace(key=Key(tokens[:320]), parent=root, event_hash_value=None)
found["salted"] = utils.compute_node_event_hash_values(node, 64)
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def sglang() -> dict[str, Any]:
    """What SGLang says, from one process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps({"tokens": TOKENS, "pages": PAGES, "namespaces": NAMESPACES}),
        cwd=ROOT,
        env={**os.environ, **worker_environment()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_chains(sglang: dict[str, Any]) -> None:
    """Seeds, digests and event hashes agree for every page size and namespace."""
    ours = []
    for extra_key, salt in NAMESPACES:
        seed = blocks.storage_namespace_seed(extra_key, salt)
        for page in PAGES:
            digests = [digest.hex() for digest in blocks.block_digests(TOKENS, page, seed=seed)]
            hashes = blocks.block_hashes(TOKENS, page, seed=seed)
            ours.append([None if seed is None else seed.hex(), digests, hashes])
    assert sglang["chains"] == ours


def test_salt_of_events(sglang: dict[str, Any]) -> None:
    """Events of a salted request are seeded as SGLang's recorder seeds them."""
    seed = blocks.event_namespace_seed("tenant-1")
    ours = [digest.hex() for digest in blocks.block_digests(TOKENS[:320], 64, seed=seed)]
    assert sglang["salted"] == ours
