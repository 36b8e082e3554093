"""How the sending rate follows a link that becomes slow, fast again, and breaks."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.harness import Row
from benchmarks.transfer.case_wan import LIMIT_MB, no_link
from benchmarks.transfer.compare import open_pair
from benchmarks.transfer.ends import link
from benchmarks.transfer.workload import of_bytes
from tests.wan.link import Wan

MIB = 1 << 20
SLOW_BPS, FAST_BPS = 1e8, 1e9
POLL_S = 0.05
#: IP bytes that the link delivers per byte of TCP payload.
IP_SHARE = 1500 / 1448


class Watch:
    """What the link delivered and when, from the emulator's counters."""

    def __init__(self, wan: Wan) -> None:
        self._wan = wan
        self.seen: list[tuple[float, int]] = []

    def until(self, moment_s: float) -> None:
        """Poll until a moment (monotonic)."""
        while (now_s := time.monotonic()) < moment_s:
            self.seen.append((now_s, self._wan.stats().a2b.out_bytes))
            time.sleep(POLL_S)

    def mb_per_s(self, start_s: float, end_s: float) -> float:
        """Payload rate between two moments."""
        inside = [s for s in self.seen if start_s <= s[0] <= end_s]
        if len(inside) < 2:
            return 0.0
        (t0, b0), (t1, b1) = inside[0], inside[-1]
        return (b1 - b0) / IP_SHARE / (t1 - t0) / 1e6

    def first(self, after_s: float, rate_mb: float, window_s: float) -> float | None:
        """Seconds after a moment until a window of at least that rate begins, None when there is none."""
        for moment_s, _ in self.seen:
            if moment_s >= after_s and self.mb_per_s(moment_s, moment_s + window_s) >= rate_mb:
                return moment_s - after_s
        return None

    def first_bytes(self, after_s: float) -> float | None:
        """Seconds after a moment until a burst of data (64 KiB between two polls) has arrived."""
        for (t0, b0), (t1, b1) in zip(self.seen, self.seen[1:], strict=False):
            if t0 >= after_s and b1 - b0 > 64 << 10:
                return t1 - after_s
        return None


def _once(wan: Wan, pair: Any, work: Any, smoke: bool) -> dict[str, float | None]:
    """Send for as long as it takes; change the link under way."""
    watch, room = Watch(wan), pair.next_room()
    pages = list(range(work.pages)) * 200  # the same rows again and again: it only has to last
    pair.sender.call("send_when_granted", room=room, source=pages)
    pair.receiver.call("expect", room=room, target=pages)
    unit = 0.15 if smoke else 1.0
    start_s = time.monotonic()
    drop_s = start_s + 3 * unit
    rise_s = drop_s + 5 * unit
    cut_s = rise_s + 4 * unit
    heal_s = cut_s + 3 * unit
    watch.until(drop_s)
    pair.sender.call("samples")
    drop_s = time.monotonic()
    wan.set("both", rate_bps=SLOW_BPS)
    watch.until(rise_s)
    samples = pair.sender.call("samples")
    rise_s = time.monotonic()
    wan.set("both", rate_bps=FAST_BPS)
    watch.until(cut_s)
    wan.partition()
    watch.until(heal_s)
    heal_s = time.monotonic()
    wan.heal()
    watch.until(heal_s + 6 * unit)
    failed = pair.sender.call("failed", room=room)
    pair.sender.call("abort", room=room)
    calm = None
    for sample in samples:
        short = sample["srtt_s"] <= 1.5 * sample["min_rtt_s"]
        if not short:
            calm = None
        elif calm is None and sample["at_s"] > drop_s + 0.05:
            calm = sample["at_s"] - drop_s
    return {
        "calm": calm,
        "slow": watch.mb_per_s(rise_s - 2 * unit, rise_s),
        "full": watch.first(rise_s, 0.95 * LIMIT_MB, 0.3),
        "resume": watch.first_bytes(heal_s),
        "healed": watch.first(heal_s, 0.95 * LIMIT_MB, 0.3),
        "last": watch.mb_per_s(heal_s + 5 * unit, heal_s + 6 * unit),
        "failed": float(failed),
    }


def follow(smoke: bool) -> list[Row]:
    """Seconds until the queue is gone after a drop, until the full rate is back, until data flows again."""
    if rows := no_link("rate control"):
        return rows
    work = of_bytes((16 if smoke else 64) * MIB, 64 << 10)
    runs = []
    for _ in range(1 if smoke else 3):
        with link() as wan, open_pair(wan, "ours", work) as pair:
            pair.round()
            runs.append(_once(wan, pair, work, smoke))

    def row(key: str, name: str, budget_s: float) -> Row:
        values = [r[key] for r in runs]
        seen = [v for v in values if v is not None]
        note = " ".join("never" if v is None else f"{v:.2f}" for v in values)
        if key == "healed":
            note += "; MB/s in the sixth second: " + " ".join(f"{r['last']:.0f}" for r in runs)
            note += f"; transfers that failed: {sum(r['failed'] or 0 for r in runs):.0f}"
        ours = statistics.median(seen) if len(seen) == len(values) else None
        return Row(name, "s", ours, budget_s, "budget", 1.0, lower_is_better=True, note=note)

    slow = [r["slow"] or 0.0 for r in runs]
    return [
        row("calm", "1 Gbit/s to 100 Mbit/s: srtt stays <= 1.5 x min_rtt after", 2.0),
        Row(
            "goodput at 100 Mbit/s after the drop",
            "MB/s",
            statistics.median(slow),
            LIMIT_MB / 10,
            "goodput limit",
            note="counts retransmitted bytes too",
        ),
        row("full", "back to 1 Gbit/s: 95 % of the limit after", 2.0),
        row("resume", "3 s partition: data flows again, after healing", 1.0),
        row("healed", "3 s partition: 95 % of the limit, after healing", 2.0),
    ]
