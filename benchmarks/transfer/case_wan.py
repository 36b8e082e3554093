"""Goodput and processor time over the emulated link, against the link's limit and the peers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.transfer.compare import Contest, contest, cpu, cpu_row, goodput_row, mb_per_s, open_pair
from benchmarks.transfer.ends import EndFailed, link
from benchmarks.transfer.workload import of_bytes
from tests.integration.authority import Authority
from tests.wan.link import missing
from tests.wan.profiles import profile

MIB = 1 << 20
LIMIT_MB = profile("continental").a2b.tcp_limit_bps / 8e6
#: Share of the link's limit wanted, by loss.
BARS = {0.0: 0.95, 0.001: 0.95, 0.01: 0.90}
#: Times Mooncake's goodput wanted, by row size.
MOONCAKE = {64 << 10: 10.0, 1 << 20: 1.9}
#: Mooncake's rate does not depend on the bytes; at 64 KiB rows 256 MiB would take a minute.
MOONCAKE_BYTES = {64 << 10: 32 * MIB, 1 << 20: 256 * MIB}


def no_link(name: str) -> list[Row]:
    """Return the row that says why there is no emulated link, [] where there is."""
    why = missing()
    return [] if why is None else [Row(name, "MB/s", None, None, f"did not run: {why}")]


def goodput(loss: float, smoke: bool) -> list[Row]:
    """Rows of one loss rate: both row sizes; processor time too when nothing is lost."""
    if rows := no_link("WAN goodput"):
        return rows
    rows = []
    for row_bytes in (1 << 20,) if smoke else (64 << 10, 1 << 20):
        total = 16 * MIB if smoke else 256 * MIB
        work = of_bytes(total, row_bytes)
        moon = of_bytes(min(total, MOONCAKE_BYTES[row_bytes]), row_bytes)
        kinds = {"ours": work, "nixl": work, "mooncake": moon}
        if smoke and loss:
            kinds = {"ours": work}
        elif row_bytes == 1 << 20:
            kinds["plain"] = work
        with link(loss=loss) as wan:
            found = contest(wan, kinds, 1 if smoke else 3)
        where = f"{row_bytes >> 10} KiB rows, loss {loss:.1%}"
        name = f"WAN goodput, {total >> 20} MiB, {where}"
        rows.append(
            Row(
                name,
                "MB/s",
                found.median("ours", mb_per_s),
                LIMIT_MB,
                "goodput limit of the link",
                BARS[loss],
                note=found.note("ours", mb_per_s),
            )
        )
        bars = {"nixl": 1.0, "mooncake": MOONCAKE[row_bytes], "plain": None}
        rows += [goodput_row(found, name, kind, bar) for kind, bar in bars.items() if kind in kinds]
        if not loss:
            name = f"WAN processor time, {row_bytes >> 10} KiB rows"
            spread = found.note("ours", cpu, ".2f")
            rows.append(
                Row(
                    name,
                    "s/GB",
                    found.median("ours", cpu),
                    0.8,
                    "budget",
                    1.0,
                    lower_is_better=True,
                    note=f"send + receive; {spread}",
                )
            )
            rows += [cpu_row(found, name, kind, 0.1) for kind in ("nixl", "mooncake")]
    return rows


def options(smoke: bool) -> list[Row]:
    """With mutual TLS, and through staging memory, each against ours without."""
    if rows := no_link("WAN goodput with TLS"):
        return rows
    work = of_bytes((16 if smoke else 256) * MIB, 1 << 20)
    with tempfile.TemporaryDirectory() as folder, link() as wan:
        authority = Authority(Path(folder), "bench")
        files = {"send": authority.files("A"), "receive": authority.files("B")}
        variants: dict[str, dict[str, Any]] = {
            "mutual TLS": {side: {"tls": [f.ca, f.cert, f.key]} for side, f in files.items()},
            "store and forward": {"send": {"staging": work.bytes + MIB}},
        }
        rows = []
        for what, arguments in variants.items():
            with open_pair(wan, "ours", work) as plain, open_pair(wan, "ours", work, **arguments) as other:
                found = Contest()
                for _ in range(2 if smoke else 4):
                    found.rounds.setdefault("ours", []).append(other.round())
                    found.rounds.setdefault("without", []).append(plain.round())
                other.verify()
            for measured in found.rounds.values():
                measured.pop(0)  # the warm-up
            name = f"WAN, {work.bytes >> 20} MiB, 1024 KiB rows, {what}"
            rows += [
                goodput_row(found, f"{name}: goodput", "without", None),
                cpu_row(found, f"{name}: processor time", "without", None),
            ]
    return rows


def cubic(smoke: bool) -> list[Row]:
    """A host whose default is cubic, loss 0.1 %: ours with bbr per socket, ours refused it, the peers."""
    if rows := no_link("WAN goodput, cubic"):
        return rows
    work = of_bytes((8 if smoke else 64) * MIB, 1 << 20)
    bound_s = 1.0 if smoke else 40.0
    with link(loss=0.001) as wan:
        refused = {"send": {"bbr": False}, "receive": {"bbr": False, "connections": 16}}
        rates: dict[str, list[float]] = {"bbr": [], "cubic": []}
        with (
            open_pair(wan, "ours", work, cc="cubic") as ours,
            open_pair(wan, "ours", work, cc="cubic", **refused) as ours_cubic,
        ):
            for pair in (ours, ours_cubic):
                pair.round()
                pair.verify()
            for _ in range(1 if smoke else 3):
                rates["bbr"].append(mb_per_s(ours.round()))
                rates["cubic"].append(mb_per_s(ours_cubic.round()))
        bounded = {kind: _bounded(wan, kind, work, bound_s) for kind in ("nixl", "mooncake")}
    rows = []
    for what, values in rates.items():
        how = "bbr per socket" if what == "bbr" else "bbr refused, 16 connections"
        for kind, (rate, peer) in bounded.items():
            rows.append(
                Row(
                    f"WAN goodput, {work.bytes >> 20} MiB, host's default cubic, loss 0.1%, ours: {how}",
                    "MB/s",
                    sorted(values)[len(values) // 2],
                    rate,
                    peer,
                    20.0 if (what, kind) == ("bbr", "nixl") else None,
                    note="ours " + " ".join(f"{v:.1f}" for v in values),
                )
            )
    return rows


def _bounded(wan: Any, kind: str, work: Any, bound_s: float) -> tuple[float | None, str]:
    """One cold round of a peer within `bound_s`: MB/s of the rows that arrived, and the peer's name."""
    from benchmarks.transfer.compare import NAMES
    from benchmarks.transfer.peers import Missing

    try:
        with open_pair(wan, kind, work, cc="cubic") as pair:
            pair.receiver.call("expect", room=1)
            pair.sender.post("send", room=1)
            try:
                sent = pair.sender.result(bound_s)
                return work.bytes / (sent["done_s"] - sent["started_s"]) / 1e6, NAMES[kind]
            except TimeoutError:
                moved = pair.receiver.call("arrived") * work.row_bytes
                return (
                    moved / bound_s / 1e6,
                    f"{NAMES[kind]}, {moved >> 20} MiB in {bound_s:.0f} s, then stopped",
                )
    except (Missing, EndFailed, TimeoutError) as error:
        return None, f"{NAMES[kind]} did not run: {error}"
