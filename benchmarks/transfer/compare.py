"""Ours and the peers in one run: opens what can be opened, runs in turn, makes rows of medians."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Row
from benchmarks.transfer import peers
from benchmarks.transfer.ends import EndFailed, Pair, Place, Round, settle
from benchmarks.transfer.workload import Workload
from tests.wan.link import Wan

NAMES = {
    "nixl": "NIXL 1.5.1, UCX over TCP",
    "mooncake": "Mooncake 0.3.13 TCP",
    "plain": "Python sockets, 4 threads",
    "iperf3": "iperf3, 4 connections",
    "without": "ours without it",
}
_FINDERS: dict[str, Callable[[], peers.Found]] = {
    "ours": peers.ours,
    "plain": peers.ours,
    "nixl": lambda: peers.python_peer("nixl._api"),
    "mooncake": lambda: peers.python_peer("mooncake.engine"),
}


@dataclass
class Contest:
    """Rounds by kind, and why a kind has none.

    Attributes:
        rounds: measured rounds, the warm-up left out.
        missing: why a kind did not run.
        late: rounds of a kind in which the link's emulator did not keep up.
    """

    rounds: dict[str, list[Round]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)

    def median(self, kind: str, what: Callable[[Round], float]) -> float | None:
        """Return the median of `what` over a kind's rounds, None without any."""
        values = [what(r) for r in self.rounds.get(kind, [])]
        return statistics.median(values) if values else None

    def note(self, kind: str, what: Callable[[Round], float], form: str = ".1f") -> str:
        """Return the rounds' values as text."""
        values = " ".join(f"{what(r):{form}}" for r in self.rounds.get(kind, []))
        late = self.late.get(kind, 0)
        return values + (f", emulator late in {late}" if late else "")

    def peer_name(self, kind: str) -> str:
        """Return the peer's name, or why it did not run."""
        return NAMES[kind] + (f" did not run: {self.missing[kind]}" if kind in self.missing else "")


@contextlib.contextmanager
def open_pair(
    place: Place, kind: str, workload: Workload, *, cc: str = "", **arguments: Any
) -> Iterator[Pair]:
    """Open a pair of a kind on hosts whose default congestion control is `cc` ("": this host's).

    Raises peers.Missing, EndFailed, TimeoutError.
    """
    found = _FINDERS[kind]()
    if cc:
        found = peers.Found(found.argv, {**found.env, **peers.default_cc(cc)})
    with Pair(place, kind, workload, found, **arguments) as pair:
        yield pair


def contest(
    place: Place,
    workloads: Mapping[str, Workload],
    rounds: int,
    *,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
    others: Mapping[str, Callable[[], Round]] | None = None,
) -> Contest:
    """Run the kinds in turn, each with its own workload; "ours" must run, a peer may fail.

    The first round of each is the warm-up: it opens connections, and what arrived is compared byte for byte.

    Args:
        place: where the ends run.
        workloads: by kind.
        rounds: measured ones.
        arguments: of open_pair, by kind.
        others: what has no ends of its own: a function that measures one round, by kind.
    """
    found = Contest()
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for kind, workload in workloads.items():
            try:
                pair = stack.enter_context(
                    open_pair(place, kind, workload, **(arguments or {}).get(kind, {}))
                )
                pair.round()
                if kind != "plain":
                    pair.verify()
                pair.pause()
                pairs[kind] = pair
            except (peers.Missing, EndFailed, TimeoutError) as error:
                if kind == "ours":
                    raise
                found.missing[kind] = str(error)
        for _ in range(rounds):
            for kind, pair in list(pairs.items()):
                settle()
                try:
                    with pair.turn():
                        if isinstance(place, Wan):
                            place.reset()
                        found.rounds.setdefault(kind, []).append(pair.round())
                        if isinstance(place, Wan) and not place.stats().reliable:
                            found.late[kind] = found.late.get(kind, 0) + 1
                except (EndFailed, TimeoutError) as error:
                    if kind == "ours":
                        raise
                    found.missing[kind] = str(error)
                    del pairs[kind]
            for kind, measure in (others or {}).items():
                settle()
                found.rounds.setdefault(kind, []).append(measure())
    return found


def mb_per_s(measured: Round) -> float:
    """Goodput in MB/s."""
    return measured.bytes_per_s / 1e6


def cpu(measured: Round) -> float:
    """Processor seconds per GB, both ends."""
    return measured.cpu_s_per_gb


def goodput_row(found: Contest, name: str, kind: str, bar: float | None) -> Row:
    """Ours against a peer, MB/s."""
    return Row(
        name,
        "MB/s",
        found.median("ours", mb_per_s),
        found.median(kind, mb_per_s),
        found.peer_name(kind),
        bar,
        note=f"ours {found.note('ours', mb_per_s)}; peer {found.note(kind, mb_per_s)}",
    )


def cpu_row(found: Contest, name: str, kind: str, bar: float | None) -> Row:
    """Ours against a peer, processor seconds per GB."""
    return Row(
        name,
        "s/GB",
        found.median("ours", cpu),
        found.median(kind, cpu),
        found.peer_name(kind),
        bar,
        lower_is_better=True,
        note=f"send + receive; ours {found.note('ours', cpu, '.2f')}; peer {found.note(kind, cpu, '.2f')}",
    )
