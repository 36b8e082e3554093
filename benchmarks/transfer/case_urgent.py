"""A small transfer that comes while a large one is under way, on one bundle of connections."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from benchmarks.harness import Row
from benchmarks.transfer.case_wan import LIMIT_MB, no_link
from benchmarks.transfer.compare import open_pair
from benchmarks.transfer.ends import Pair, link
from benchmarks.transfer.workload import Workload, of_bytes

MIB = 1 << 20
RTT_S = 0.040
URGENT_BYTES = MIB
URGENT = 5
GAP_S = 0.3


@dataclass(frozen=True)
class Outcome:
    """One round: the bulk's seconds, each urgent transfer's."""

    bulk_s: float
    urgent_s: list[float]


def _round(pair: Pair, work: Workload, urgent: int) -> Outcome:
    """Send the bulk and, while it is under way, `urgent` small ones; from send to the sender's DONE."""
    each = max(1, URGENT_BYTES // work.page_bytes)
    pages = list(range(work.pages))
    bulk_pages = pages[: work.pages - each * URGENT]
    bulk = pair.next_room()
    pair.sender.call("send_when_granted", room=bulk, source=bulk_pages)
    pair.receiver.call("expect", room=bulk, target=bulk_pages)
    rooms = []
    for number in range(urgent):
        time.sleep(0.5 if not number else GAP_S)
        first = len(bulk_pages) + number * each
        room, mine = pair.next_room(), pages[first : first + each]
        pair.sender.call("send_when_granted", room=room, source=mine)
        pair.receiver.call("expect", room=room, target=mine)
        rooms.append(room)
    times = []
    for room in [bulk, *rooms]:
        sent = pair.sender.call("sent", room=room)
        times.append(sent["done_s"] - sent["started_s"])
    return Outcome(times[0], times[1:])


def urgent(smoke: bool) -> list[Row]:
    """Latency of the urgent ones against the physical floor; the bulk against the bulk alone; FIFO."""
    if rows := no_link("urgent beside bulk"):
        return rows
    work = of_bytes((64 if smoke else 256) * MIB, 64 << 10)
    count = 1 if smoke else URGENT
    rounds = 1 if smoke else 3
    with link() as wan:
        with open_pair(wan, "ours", work) as pair:
            pair.round()
            pair.verify()
            alone, beside = [], []
            for _ in range(rounds):
                alone.append(_round(pair, work, 0))
                beside.append(_round(pair, work, count))
        with open_pair(wan, "ours", work, send={"fifo": True}) as pair:
            pair.round()
            fifo = [_round(pair, work, count) for _ in range(rounds)]
    bulk_bytes = work.bytes - URGENT * URGENT_BYTES
    floor_ms = (RTT_S + URGENT_BYTES / (LIMIT_MB * 1e6)) * 1e3
    taken_s = count * URGENT_BYTES / (LIMIT_MB * 1e6)
    times = sorted(t * 1e3 for r in beside for t in r.urgent_s)
    late = sorted(t * 1e3 for r in fifo for t in r.urgent_s)

    def rate(outcomes: list[Outcome], less_s: float = 0.0) -> float:
        return statistics.median(bulk_bytes / (o.bulk_s - less_s) / 1e6 for o in outcomes)

    name = f"beside {bulk_bytes >> 20} MiB of bulk"
    floor = "floor: RTT + 1 MiB at the limit"
    spread = f"n={len(times)}, {times[0]:.0f} to {times[-1]:.0f}"
    return [
        Row(
            f"urgent 1 MiB {name}: median",
            "ms",
            statistics.median(times),
            floor_ms,
            floor,
            1.3,
            lower_is_better=True,
            note=spread,
        ),
        Row(
            f"urgent 1 MiB {name}: worst", "ms", times[-1], floor_ms, floor, lower_is_better=True, note=spread
        ),
        Row(
            f"urgent 1 MiB {name}: against FIFO",
            "ms",
            statistics.median(times),
            statistics.median(late),
            "ours with equal deadlines",
            lower_is_better=True,
            note=f"FIFO {late[0]:.0f} to {late[-1]:.0f}",
        ),
        Row(
            f"bulk beside {count} urgent, net of their bytes",
            "MB/s",
            rate(beside, taken_s),
            rate(alone),
            "bulk alone",
            0.97,
            note="bulk seconds: alone "
            + " ".join(f"{o.bulk_s:.2f}" for o in alone)
            + "; beside "
            + " ".join(f"{o.bulk_s:.2f}" for o in beside),
        ),
        Row(f"bulk beside {count} urgent, gross", "MB/s", rate(beside), rate(alone), "bulk alone"),
    ]
