"""Data plane in the scheduler's process (threads) or in one of its own: goodput, and what the loop loses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Row
from benchmarks.transfer import peers
from benchmarks.transfer.case_wan import LIMIT_MB, no_link
from benchmarks.transfer.ends import End, Loopback, Place, link
from benchmarks.transfer.workload import Workload, of_bytes

MIB = 1 << 20
PLANES: dict[str, dict[str, Any]] = {
    "threads": {"plane": "threads"},
    "threads, switch interval 0.5 ms": {"plane": "threads", "switch_s": 0.0005},
    "process": {"plane": "process"},
}


class _Busy:
    """A busy sender and our receiver."""

    def __init__(self, place: Place, work: Workload, **arguments: Any) -> None:
        self.work, self._room = work, 0
        self.sender = End(place, "a", "busy", peers.ours())
        self.receiver = End(place, "b", "ours", peers.ours())
        shape = work.to_json()
        mine = self.sender.call("open", role="send", host=place.address("a"), workload=shape, **arguments)
        self.receiver.call("open", role="receive", host=place.address("b"), workload=shape, peer=mine)

    def round(self) -> dict[str, float]:
        self._room += 1
        self.receiver.call("expect", room=self._room)
        sent: dict[str, float] = self.sender.call("send", room=self._room)
        self.receiver.call("finish", room=self._room)
        return {**sent, "mb_per_s": self.work.bytes / (sent["done_s"] - sent["started_s"]) / 1e6}

    def alone(self, seconds: float) -> dict[str, float]:
        found: dict[str, float] = self.sender.call("alone", seconds=seconds)
        return found

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def _median(found: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(f[key] for f in found)


def _at(place: Place, where: str, limit: float | None, work: Workload, smoke: bool) -> list[Row]:
    rows = []
    rounds = 1 if smoke else 3
    for scheduler in ("python",) if smoke else ("python", "mixed"):
        busy = {
            name: _Busy(place, work, scheduler=scheduler, **arguments) for name, arguments in PLANES.items()
        }
        try:
            alone: list[dict[str, float]] = []
            moved: dict[str, list[dict[str, float]]] = {name: [] for name in busy}
            for each in busy.values():
                each.round()
            for _ in range(rounds):
                alone.append(busy["threads"].alone(1.0))
                for name, each in busy.items():
                    moved[name].append(each.round())
        finally:
            for each in busy.values():
                each.close()
        base = _median(alone, "steps_per_s")
        for name, found in moved.items():
            which = f"{where}, {scheduler} scheduler, {name}"
            peer = "limit" if limit else "in a process of its own"
            other = limit or _median(moved["process"], "mb_per_s")
            rows.append(
                Row(f"goodput: {which}", "MB/s", _median(found, "mb_per_s"), other, peer, note=_spread(found))
            )
            loop = f"p99 step {_median(alone, 'p99_ms'):.1f} -> {_median(found, 'p99_ms'):.1f} ms"
            rows.append(
                Row(f"loop: {which}", "steps/s", _median(found, "steps_per_s"), base, "loop alone", note=loop)
            )
    return rows


def _spread(found: Sequence[dict[str, float]]) -> str:
    return " ".join(f"{f['mb_per_s']:.0f}" for f in found)


def wan(smoke: bool) -> list[Row]:
    """Over the emulated link, 1 Gbit/s."""
    if rows := no_link("threads or process"):
        return rows
    work = of_bytes((16 if smoke else 128) * MIB, 64 << 10)
    with link() as made:
        return _at(made, "1 Gbit/s, 64 KiB rows", LIMIT_MB, work, smoke)


def loopback(smoke: bool) -> list[Row]:
    """Over loopback: three busy processes on two cores say who gets the processor."""
    work = of_bytes((16 if smoke else 256) * MIB, 64 << 10)
    return _at(Loopback(), "loopback, 64 KiB rows", None, work, smoke)
