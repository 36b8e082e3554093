"""Goodput over loopback: what the data plane costs when no link holds it back."""

from __future__ import annotations

import json
import os
import subprocess

from benchmarks.harness import Row
from benchmarks.transfer import peers
from benchmarks.transfer.compare import Contest, contest, cpu, cpu_row, mb_per_s
from benchmarks.transfer.ends import Loopback, Round
from benchmarks.transfer.workload import of_bytes
from prfaas_sglang.fleet.ports import free_port

MIB = 1 << 20
CONNECTIONS = 4
IPERF_S = 1.5


def iperf(found: peers.Found) -> Round:
    """Run iperf3 with as many connections as ours has; both ends' processor time as it reports it."""
    port = str(free_port())
    env = {**os.environ, **found.env}
    argv = [*found.argv, "-p", port]
    with subprocess.Popen(
        [*argv, "-s", "-1", "--forceflush"], stdout=subprocess.PIPE, text=True, env=env
    ) as server:
        try:
            assert server.stdout is not None
            while "listening" not in server.stdout.readline():
                if server.poll() is not None:
                    raise peers.Missing("iperf3 -s ended")
            done = subprocess.run(
                [*argv, "-c", "127.0.0.1", "-P", str(CONNECTIONS), "-t", str(IPERF_S), "-l", "1M", "-J"],
                capture_output=True,
                text=True,
                timeout=60,
                env=env,
            )
        finally:
            server.kill()
    end = json.loads(done.stdout)["end"]
    share, moved = end["cpu_utilization_percent"], end["sum_received"]
    seconds = moved["seconds"]
    return Round(
        moved["bytes"], seconds, share["host_total"] * seconds / 100, share["remote_total"] * seconds / 100
    )


def goodput(smoke: bool) -> list[Row]:
    """Rows of 1 MiB, 64 KiB and 16 KiB; bars at 1 MiB."""
    rows = []
    for row_bytes in (1 << 20,) if smoke else (1 << 20, 64 << 10, 16 << 10):
        work = of_bytes((32 if smoke else 256) * MIB, row_bytes)
        kinds = dict.fromkeys(("ours", "plain", "nixl", "mooncake"), work)
        others = {}
        why = ""
        try:
            found_iperf = peers.iperf3()
            others["iperf3"] = lambda found_iperf=found_iperf: iperf(found_iperf)
        except peers.Missing as error:
            why = f" did not run: {error}"
        found = contest(Loopback(), kinds, 1 if smoke else 5, others=others)
        large = row_bytes == 1 << 20
        name = f"loopback goodput, {work.bytes >> 20} MiB, {row_bytes >> 10} KiB rows"
        bars = {"iperf3": 0.9, "plain": None, "nixl": 1.8, "mooncake": 1.8} if large else {}
        for kind in ("iperf3", "plain", "nixl", "mooncake"):
            rows.append(_row(found, name, kind, bars.get(kind), why if kind == "iperf3" else ""))
        name = f"loopback processor time, {row_bytes >> 10} KiB rows"
        rows += [cpu_row(found, name, kind, None) for kind in ("iperf3", "plain", "nixl", "mooncake")]
    return rows


def _row(found: Contest, name: str, kind: str, bar: float | None, why: str) -> Row:
    peer = found.median(kind, mb_per_s)
    return Row(
        name,
        "GB/s",
        (found.median("ours", mb_per_s) or 0) / 1e3,
        None if peer is None else peer / 1e3,
        found.peer_name(kind) + why,
        bar,
        note=f"MB/s: ours {found.note('ours', mb_per_s, '.0f')}; peer {found.note(kind, mb_per_s, '.0f')}; "
        f"ours {found.median('ours', cpu):.2f} s/GB",
    )
