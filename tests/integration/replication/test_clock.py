"""The wall clock of a service jumps by an hour, forth and back: nothing here goes by it."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest

from tests.integration.cache_support import PAGE, Worker, stored
from tests.integration.etcd_support import EtcdCluster
from tests.integration.replication.test_processes import Sites


def build(source: Path, library: Path) -> None:
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc to build the clock with")
async def test_clock_steps(shared_etcd: EtcdCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sites' services step at once: segments flow on, both sites stay alive, nothing is rebuilt."""
    library, step = tmp_path / "clock.so", tmp_path / "step"
    source = Path(__file__).with_name("clock.c")
    build(source, library)
    step.write_bytes(struct.pack("l", 0))
    worker = Worker()
    worker.start()
    sites = Sites(tmp_path, shared_etcd.endpoints, worker)
    with monkeypatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(library))
        environment.setenv("CLOCK_STEP_FILE", str(step))
        await sites.a.start()
        await sites.b.start()
    try:
        sites.work()
        await sites.converged()
        slowest_s = 0.0
        for number, seconds in enumerate((3600, -3600, 30, 0)):
            with step.open("r+b") as file:
                file.write(struct.pack("l", seconds))
            started_s = time.monotonic()
            blocks = [10_000_000 + 10 * number, 10_000_001 + 10 * number]
            worker.publish(stored(blocks))
            await sites.b.matches(blocks, {worker.worker_id: 2 * PAGE})
            sites.work()
            await sites.converged()
            slowest_s = max(slowest_s, time.monotonic() - started_s)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{sites.b.metrics_port}/health") as answer,
        ):
            (about,) = [s for s in (await answer.json())["replication"]["sites"] if s["site"] == "A"]
        assert about["withheld"] == []
        assert about["rebuilds"] == 1
        print(f"converged at most {slowest_s:.2f} s after a step")
    finally:
        await sites.a.close()
        await sites.b.close()
        worker.stop()
