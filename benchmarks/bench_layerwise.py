"""Exposed transfer time of a prompt of one chunk: layer-wise sending against chunk-wise.

From the end of prefill until decode has the last byte, over an emulated link (docs/wan-bench.md). Exporter,
staging, sockets and importer are the real ones, each side a process; computing is simulated: each of LAYERS
layers takes COMPUTE_S / LAYERS, then its KV is final.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Row, run
from prfaas_sglang.core.layout import Component, Layout
from prfaas_sglang.transfer.channel import Identity
from prfaas_sglang.transfer.exporter import Exporter
from prfaas_sglang.transfer.importer import Importer
from prfaas_sglang.transfer.memory import RowMemory
from prfaas_sglang.transfer.telemetry import Telemetry
from tests.wan.link import Wan, missing
from tests.wan.profiles import profile

LAYERS, PAGES, PAGE_BYTES = 16, 64, 16 << 10
CHUNK_BYTES = 2 * LAYERS * PAGES * PAGE_BYTES  # K and V: 32 MiB, as 4096 tokens of 8 KiB
COMPUTE_S = 1.0
RTT_S = 0.04
PORT = 7001
LAYOUT = Layout(
    "bench",
    "bench",
    64,
    "bfloat16",
    1,
    (Component("kv", (PAGE_BYTES,) * 2 * LAYERS), Component("aux", (64,))),
)
WAIT_S = 120.0
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def pools() -> RowMemory:
    """Return pools of one chunk."""
    tensors = [memoryview(bytearray(PAGE_BYTES * PAGES)) for _ in range(2 * LAYERS)]
    return RowMemory(LAYOUT, [tensors, [memoryview(bytearray(64))]])


class Heard:
    """Callbacks by room that a thread can wait for."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._rooms: dict[int, float] = {}

    def __call__(self, room: int, *_: object) -> None:
        with self._condition:
            self._rooms.setdefault(room, time.monotonic())
            self._condition.notify_all()

    def wait(self, room: int) -> float:
        """Return when the room was heard of, monotonic seconds."""
        with self._condition:
            if not self._condition.wait_for(lambda: room in self._rooms, WAIT_S):
                sys.exit(f"room {room}: nothing within {WAIT_S:.0f} s")
            return self._rooms[room]


def fail(room: int, reason: str) -> None:
    """Say why a room failed; its wait runs out."""
    print(f"room {room} failed: {reason}", file=sys.stderr)


def send(rooms: int, compute_s: float) -> None:
    """Prefill's process: odd rooms layer-wise, even ones chunk-wise; a line of JSON for each."""
    granted = Heard()
    exporter = Exporter(
        Identity("prefill", "A", "a", 0, LAYOUT),
        pools(),
        Telemetry("A"),
        on_grant=granted,
        on_done=lambda room: None,
        on_failed=fail,
        staging_bytes=4 * CHUNK_BYTES,
    )
    exporter.listen("0.0.0.0", PORT)
    print("listening", flush=True)
    pages = list(range(PAGES))
    for room in range(rooms):
        exporter.open(room, PAGES)
        granted.wait(room)
        calls: list[float] = []
        begin_s = time.monotonic()
        for layer in range(LAYERS):
            time.sleep(max(0.0, begin_s + compute_s * (layer + 1) / LAYERS - time.monotonic()))
            if room % 2:
                call_s = time.perf_counter()
                exporter.send_ahead(room, pages, [layer, LAYERS + layer])
                calls.append(time.perf_counter() - call_s)
        exporter.send(room, pages, states=[], aux_row=0, last=True)
        print(json.dumps({"room": room, "end_s": time.monotonic(), "calls": calls}), flush=True)
    sys.stdin.read()  # until the other side has everything
    exporter.close()


def receive(rooms: int, host: str) -> None:
    """Decode's process: one room after the other; a line of JSON for each."""
    done = Heard()
    importer = Importer(
        Identity("decode", "B", "b", 0, LAYOUT),
        pools(),
        Telemetry("B"),
        on_progress=lambda room: None,
        on_done=done,
        on_failed=fail,
    )
    for room in range(rooms):
        importer.begin(room, (host, PORT), list(range(PAGES)), states=[], aux_row=0, prefix_tokens=0)
        print(json.dumps({"room": room, "done_s": done.wait(room)}), flush=True)
    importer.close()


Start = Callable[[str, list[str]], "subprocess.Popen[Any]"]


def exposed(start: Start, host: str, rooms: int, compute_s: float) -> tuple[float, float, list[float]]:
    """Return median exposed seconds layer-wise and chunk-wise, and the seconds of each call for a layer."""
    me = [sys.executable, "-m", "benchmarks.bench_layerwise"]
    sender = start("a", [*me, "send", str(rooms), str(compute_s)])
    try:
        assert sender.stdout is not None
        sender.stdout.readline()  # listening
        receiver = start("b", [*me, "receive", str(rooms), host])
        received, _ = receiver.communicate(timeout=WAIT_S)
        sent, _ = sender.communicate(timeout=WAIT_S)
    finally:
        sender.kill()
        sender.wait()
    ends = [json.loads(line) for line in sent.splitlines()]
    arrivals = [json.loads(line)["done_s"] for line in received.splitlines()]
    late = [arrival - end["end_s"] for arrival, end in zip(arrivals, ends, strict=True)]
    warm = 2 if rooms > 4 else 0  # the connection's rate is not known before
    calls = [call for end in ends[warm:] for call in end["calls"]]
    return statistics.median(late[warm + 1 :: 2]), statistics.median(late[warm::2]), calls


def start_here(_: str, argv: list[str]) -> subprocess.Popen[Any]:
    """Start a process without a link."""
    return subprocess.Popen(argv, **PIPES)


def measure(smoke: bool) -> list[Row]:
    """Return one row per link rate."""
    if smoke:
        ours, peer, _ = exposed(start_here, "127.0.0.1", 4, 0.1)
        return [Row("exposed after prefill, loopback", "s", ours, peer, "chunk-wise", lower_is_better=True)]
    reason = missing()
    if reason:
        sys.exit(f"no emulated link here: {reason}")
    rows, calls = [], []
    for mbps in (100, 300, 1000, 3000):
        rate = mbps * 1e6
        shape = profile("continental").with_(
            rate_bps=rate, delay_s=RTT_S / 2, queue_bytes=max(1e6, rate * RTT_S / 8)
        )
        with Wan(shape) as link:
            ours, peer, took = exposed(
                lambda side, argv, link=link: link.start(side, argv, **PIPES),
                link.address("a"),
                12,
                COMPUTE_S,
            )
            if not link.stats().reliable:
                print(f"{mbps} Mbit/s: the emulator was late; do not believe the row")
        calls += took
        name = f"exposed after prefill, {CHUNK_BYTES >> 20} MiB in {COMPUTE_S:.0f} s, {mbps} Mbit/s"
        rows.append(Row(name, "s", ours, peer, "chunk-wise", lower_is_better=True, kind="simulated"))
    calls.sort()
    rows.append(Row("p99 of a layer's call", "us", calls[len(calls) * 99 // 100] * 1e6, None, "-"))
    return rows


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["send", rooms, compute_s]:
            send(int(rooms), float(compute_s))
        case ["receive", rooms, host]:
            receive(int(rooms), host)
        case _:
            run("layerwise", measure, __doc__ or "")
