"""`prfaas index` as an operator runs it, against a real service."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache_service.core.blocks import block_hashes
from tests.integration.cache_support import PAGE, ROOT, CacheProcess, Worker, stored

TOKENS = list(range(1, 13))
HASHES = block_hashes(TOKENS, PAGE)


def prfaas(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from prfaas_sglang.cli import main; sys.exit(main())"]
    return subprocess.run([*command, "index", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[CacheProcess]:
    """One service whose worker holds the first two of three blocks."""
    worker = Worker()
    worker.start()
    process = CacheProcess(tmp_path, [worker])
    await process.start()
    worker.publish(stored(HASHES[:2]))
    await process.matches(HASHES, {"a-prefill-0": 8})
    yield process
    await process.close()
    worker.stop()


async def test_match(service, tmp_path) -> None:
    """Tokens, hashes and text are three ways to say one prompt."""
    file = tmp_path / "hashes.txt"
    file.write_text("\n".join(map(str, HASHES)))
    for prompt in (("--tokens", ",".join(map(str, TOKENS))), ("--hashes", f"@{file}")):
        done = await asyncio.to_thread(prfaas, "match", *prompt, "--address", service.address)
        assert done.returncode == 0, done.stderr
        title, head, row = done.stdout.splitlines()
        assert title.startswith("3 blocks of 4 tokens")
        assert head.split() == ["worker", "site", "matched_tokens", "usable_tokens"]
        assert row.split() == ["a-prefill-0/0", "A", "8", "8"]
    done = await asyncio.to_thread(
        prfaas,
        "match",
        "--tokens",
        "1 2 3 4 5 6 7 8 9 10 11 12",
        "--explain",
        "--json",
        "--address",
        service.address,
    )
    (row,) = json.loads(done.stdout)["rows"]
    assert row["missing"] == "block 2 of 3 is not held"
    assert row["groups"] == "full 2 to 8 (gpu 2)"
    done = await asyncio.to_thread(prfaas, "match", "--tokens", "7 7 7 7", "--address", service.address)
    assert "nobody holds its first block" in done.stdout


async def test_the_rest(service) -> None:
    """stats, hot, dump and check print what the service has."""
    address = ("--address", service.address)
    stats = await asyncio.to_thread(prfaas, "stats", *address)
    assert "2 blocks, 2 entries" in stats.stdout
    assert "a-prefill-0/0  A     live" in stats.stdout
    hot = json.loads((await asyncio.to_thread(prfaas, "hot", "--json", *address)).stdout)
    assert hot["rows"][0]["last_block"] == HASHES[1]
    assert hot["rows"][0]["holders"] == "a-prefill-0/0"
    dump = await asyncio.to_thread(prfaas, "dump", *address)
    (line,) = map(json.loads, dump.stdout.splitlines())
    assert (line["hashes"], line["tier"], line["group"]) == (HASHES[:2], "gpu", "full")
    check = await asyncio.to_thread(prfaas, "check", *address)
    assert check.returncode == 0, check.stdout + check.stderr
    assert check.stdout.startswith("sound: 2 blocks, 2 entries")
    assert "1 answers compared" in check.stdout


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("stats", "--address", "127.0.0.1:9", "--timeout", "5"), 1, "is it running"),
        (("stats", "--address", "10.1.1.1:7001"), 2, "insecure"),
        (("stats", "--address", "nowhere"), 2, "host:port"),
        (("match", "--address", "ADDRESS", "--text", "x"), 2, "--tokenizer: is missing"),
        (("match", "--address", "ADDRESS", "--tokens", "1,b"), 2, "--tokens: "),
        (("match", "--address", "ADDRESS", "--tokens", "1"), 2, "less than one page of 4"),
        (("match", "--address", "ADDRESS", "--hashes", "@/nowhere"), 2, "cannot be read"),
        (("hot", "--address", "ADDRESS", "--top", "0"), 2, "--top: 0 is not in 1..1000"),
    ],
)
async def test_errors_name_the_fix(service, words, status, said) -> None:
    """One line on stderr, the status by kind, no traceback."""
    words = [service.address if word == "ADDRESS" else word for word in words]
    done = await asyncio.to_thread(prfaas, *words)
    assert done.returncode == status
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
