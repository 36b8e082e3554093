"""How long decode still waits for KV when prefill has ended, by how soon prefill sends what it has."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness import Row
from benchmarks.transfer.case_wan import no_link
from benchmarks.transfer.compare import open_pair
from benchmarks.transfer.ends import EndFailed, link
from benchmarks.transfer.workload import Workload
from tests.wan.settings import TCP_SHARE

RTT_S = 0.040
#: A prompt of 32 chunks of 2 MiB of KV, one computed every 50 ms: 42 MB/s of KV.
CHUNKS, CHUNK_PAGES, CHUNK_S = 32, 4, 0.05
WORK = Workload(64 << 10, CHUNKS * CHUNK_PAGES)
RATES = (1e8, 3e8, 1e9, 3e9)
HOWS = {"after": "after prefill", "chunk": "chunk by chunk", "layer": "layer by layer"}


def model_ms(rate_bps: float, how: str, work: Workload, chunk_s: float) -> float:
    """The fluid limit: parts leave the link one after the other at its goodput limit, RTT / 2 later."""
    goodput = rate_bps * TCP_SHARE / 8
    per_chunk = work.tensors if how == "layer" else 1
    parts = work.pages // CHUNK_PAGES * per_chunk
    ends = work.pages // CHUNK_PAGES * chunk_s
    clock = 0.0
    for number in range(parts):
        ready = ends if how == "after" else (number + 1) / per_chunk * chunk_s
        clock = max(clock, ready) + work.bytes / parts / goodput
    return (clock + RTT_S / 2 - ends) * 1e3


def exposed(smoke: bool) -> list[Row]:
    """Milliseconds from the end of prefill to decode's last byte, by link rate and way of sending."""
    if rows := no_link("exposed transfer time"):
        return rows
    rows = []
    work = Workload(WORK.row_bytes, WORK.pages // 8) if smoke else WORK
    for rate_bps in RATES[2:3] if smoke else RATES:
        rows += _at(rate_bps, work, 1 if smoke else 3)
    return rows


def _at(rate_bps: float, work: Workload, rounds: int) -> list[Row]:
    measured: dict[str, list[float]] = {how: [] for how in HOWS}
    shape = link(rate_bps=rate_bps, rtt_s=RTT_S, queue_bytes=max(5e5, rate_bps / 8 * RTT_S))
    with shape as wan, open_pair(wan, "ours", work) as pair:
        pair.round()
        pair.verify()
        for _ in range(rounds):
            for how in HOWS:
                room = pair.next_room()
                pair.receiver.call("expect", room=room)
                stream: dict[str, Any] = {
                    "source": work.source(),
                    "chunk_pages": CHUNK_PAGES,
                    "chunk_s": CHUNK_S,
                }
                sent = pair.sender.call("stream", room=room, how=how, **stream)
                done_s = pair.receiver.call("finish", room=room)["done_s"]
                measured[how].append((done_s - sent["ended_s"]) * 1e3)
        if pair.receiver.call("arrived") != work.pages * work.tensors:
            raise EndFailed("rows are wrong")
    rows = []
    after = statistics.median(measured["after"])
    for how, values in measured.items():
        name = f"exposed transfer, {rate_bps / 1e6:.0f} Mbit/s, sent {HOWS[how]}"
        ours, note = statistics.median(values), " ".join(f"{v:.0f}" for v in values)
        floor = model_ms(rate_bps, how, work, CHUNK_S)
        rows.append(Row(name, "ms", ours, floor, "fluid model of the link", lower_is_better=True, note=note))
        if how != "after":
            rows.append(Row(name, "ms", ours, after, "sent after prefill", lower_is_better=True))
    return rows
