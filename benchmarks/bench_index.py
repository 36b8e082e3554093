"""The prefix index: match, store, remove, memory, and a trace; Python and C++ against Dynamo's RadixTree.

Everything runs in one process, in turn, on the same blocks (memory: a process each). Before a point is timed
the answers are compared. `--trace FILE` adds the replay of a Mooncake trace (conversation_trace.jsonl).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Row, run
from benchmarks.index.memory import RUN
from benchmarks.index.streams import CORES, FORMATS, blocks_per_s
from benchmarks.index.subjects import Dynamo, Native, Python, Subject
from benchmarks.transfer.peers import Missing
from cache_service.native.index import missing

DEPTHS = (16, 64, 512)
WORKERS = (1, 16, 128)
MATCH_BAR, STORE_BAR, MEMORY_BAR_BYTES = 0.333, 0.5, 50
#: Published for the radix tree of smg, at 256 holders: github.com/smg-project/smg/pull/2357.
SMG_BYTES = 26.9
#: Hit ratio of conversation_trace.jsonl at unlimited capacity, as Mooncake and Dynamo publish it.
IDEAL_HIT_RATIO = 0.3664


class Field:
    """Who takes part: ours (native where it was compiled, and Python) and the peer, or why it does not."""

    def __init__(self) -> None:
        self.peer: Dynamo | None = None
        self.native: Native | None = None
        self.python = Python()
        self.why = Dynamo.name
        try:
            self.peer = Dynamo()
        except Missing as reason:
            self.why = f"{Dynamo.name}: {reason}"
        try:
            self.native = Native()
        except Missing as reason:
            self.why = f"{self.why}; {reason}"

    @property
    def all(self) -> list[Subject]:
        """Everyone, in turn."""
        return [one for one in (self.native, self.python, self.peer) if one is not None]

    def row(self, name: str, unit: str, figures: dict[str, float], bar: float, note: str = "") -> Row:
        """Return our best core's row; the other core's figure goes into the note."""
        ours = self.native or self.python
        notes = [f"python {figures['python']:.3g}"] if self.native is not None else []
        return Row(
            name,
            unit,
            figures[ours.name],
            figures.get(Dynamo.name),
            self.why,
            bar,
            lower_is_better=True,
            note="; ".join([*notes, note] if note else notes),
        )


def match(smoke: bool) -> list[Row]:
    """Time one match: hot (all workers hold the query), cold (one does), depths (each to another depth)."""
    with _one_core():
        field = Field()
        return [
            _match_point(field, depth, workers, shape, 2 if smoke else 7)
            for depth in DEPTHS
            for workers in WORKERS
            for shape in ("hot", "cold", "depths")
        ]


@contextmanager
def _one_core() -> Iterator[None]:
    """Stay on one core: the peer works in a thread of its own; to wake another core takes it 50 us."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _match_point(field: Field, depth: int, workers: int, shape: str, rounds: int) -> Row:
    sequences = 8 if depth * workers > 10_000 else 32
    starts = [number * 1000 for number in range(sequences)]
    queries: dict[str, list[Sequence[int]]] = {}
    for subject in field.all:
        subject.clear(workers)
        for number, start in enumerate(starts):
            for worker in range(workers) if shape != "cold" else [number % workers]:
                held = max(1, depth * (worker + 1) // workers) if shape == "depths" else depth
                subject.feed(worker, subject.stored(range(start, start + held)))
        queries[subject.name] = [subject.query(range(start, start + depth)) for start in starts]
    answers = [subject.depths(subject.match(queries[subject.name][3])) for subject in field.all]
    assert all(answer == answers[0] for answer in answers), "the indexes do not agree"
    calls: dict[str, Callable[[Sequence[int]], Any]] = {one.name: one.match for one in field.all}
    if field.peer is not None:
        calls["find"] = field.peer.find
        queries["find"] = queries[Dynamo.name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_p50_us(call, queries[name], 200 if rounds > 2 else 20))
    figures = {name: median(values) for name, values in times.items()}
    note = f"RadixTree without reading the scores {figures['find']:.3g}" if "find" in figures else ""
    return field.row(
        f"match, {depth} blocks, {workers} workers, {shape}, p50", "us", figures, MATCH_BAR, note
    )


def _p50_us(call: Callable[[Sequence[int]], Any], queries: list[Sequence[int]], count: int) -> float:
    clock = time.perf_counter_ns
    taken = []
    for number in range(count):
        query = queries[number % len(queries)]
        begun = clock()
        call(query)
        taken.append(clock() - begun)
    return median(taken) / 1000


def store(smoke: bool) -> list[Row]:
    """Time store and remove per block, from the event's bytes."""
    rounds, entries = (1, 10_000) if smoke else (5, 100_000)
    with _one_core():
        field = Field()
        points = [
            _store_point(field, depth, workers, rounds, entries) for depth in DEPTHS for workers in WORKERS
        ]
    return [row for point in points for row in point]


def _store_point(field: Field, depth: int, workers: int, rounds: int, entries: int) -> list[Row]:
    starts = [number * 1000 for number in range(max(1, entries // (depth * workers)))]
    events = {
        one.name: (
            [one.stored(range(start, start + depth)) for start in starts],
            [one.removed(range(start, start + depth)) for start in starts],
        )
        for one in field.all
    }
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for subject in field.all:
            subject.clear(workers)
            query = subject.query(range(depth))
            for kind, payloads in enumerate(events[subject.name]):
                gc.collect()
                begun = time.perf_counter_ns()
                for payload in payloads:
                    for worker in range(workers):
                        subject.feed(worker, payload)
                answer = subject.match(query)  # also waits for what the peer does in a thread of its own
                taken = time.perf_counter_ns() - begun
                assert len(subject.depths(answer)) == (0 if kind else workers), "the events did not arrive"
                times.setdefault((subject.name, kind), []).append(taken / (len(starts) * depth * workers))
    return [
        field.row(
            f"{name}, {depth} blocks, {workers} workers, per block",
            "ns",
            {one.name: median(times[one.name, kind]) for one in field.all},
            STORE_BAR,
        )
        for kind, name in enumerate(("store", "remove"))
    ]


def streams(smoke: bool) -> list[Row]:
    """Measure blocks a second, decoded and applied, of each format; the peer is our Python."""
    with _one_core():
        cores = [core for core in CORES if core != "native" or not missing]
        rows = []
        for format in FORMATS:
            found = {core: blocks_per_s(format, core, *((4, 1) if smoke else (195, 5))) for core in cores}
            for kind, name in enumerate(("store", "remove")):
                ours = found.get("native", found["python"])[kind]
                rows.append(
                    Row(
                        f"stream {format}, {name}, 512 blocks",
                        "blocks/s",
                        ours,
                        found["python"][kind],
                        "python",
                    )
                )
    return rows


def memory(smoke: bool) -> list[Row]:
    """Measure resident memory per holder-block: each block with one holder, and with 16 of 128.

    Once more with an event for every block: so SGLang publishes what it stores.
    """
    most = 20_000 if smoke else 2_000_000
    rows = []
    for entries, holders, together in ((most, 1, RUN), (most, 16, RUN), (most // 4, 1, 1)):
        figures = {}
        notes = [f"smg publishes {SMG_BYTES} B"]
        for kind in (Native, Python, Dynamo):
            try:
                figures[kind], said = _resident(kind.__name__, entries // holders, holders, together)
                says = "" if math.isnan(said) else f", says {said:.3g}"
                notes.append(f"{kind.name} {figures[kind]:.3g}{says}")
            except Missing as reason:
                notes.append(f"{kind.name}: {reason}")
        name = f"memory, {entries:,} holder-blocks, {holders} holders a block, {together} blocks an event"
        ours = figures.get(Native, figures.get(Python))
        rows.append(Row(name, "B", ours, MEMORY_BAR_BYTES, "wanted", 1, True, note="; ".join(notes)))
    return rows


def _resident(kind: str, *sizes: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.index.memory", kind, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise Missing((done.stderr.strip().splitlines() or ["no message"])[-1][:160])
    resident, said = map(float, done.stdout.split())
    return resident, said


def trace(smoke: bool, path: Path | None) -> list[Row]:
    """Replay a trace at unlimited capacity: match each request, then store its prompt."""
    if path is None:
        note = "give --trace conversation_trace.jsonl"
        return [Row("trace", "", None, None, "published ideal", note=note)]
    with _one_core():
        return _replay(Field(), path, smoke)


def _replay(field: Field, path: Path, smoke: bool) -> list[Row]:
    lines = path.read_text().splitlines()
    prompts = [json.loads(line)["hash_ids"] for line in lines[: 500 if smoke else None]]
    total = sum(map(len, prompts))
    hits: dict[str, int] = {}
    figures: dict[str, float] = {}
    for subject in field.all:
        subject.clear(1)
        found, taken = 0, []
        for prompt in prompts:
            query = subject.query(prompt)
            begun = time.perf_counter_ns()
            answer = subject.match(query)
            taken.append((time.perf_counter_ns() - begun) / 1000)
            found += subject.depths(answer).get(0, 0)
            subject.feed(0, subject.stored(prompt))
        hits[subject.name], figures[subject.name] = found, median(taken)
    assert len(set(hits.values())) == 1, f"the indexes do not agree: {hits}"
    name = f"trace, {len(prompts):,} requests, hit ratio"
    peer = None if smoke else IDEAL_HIT_RATIO
    note = f"{found:,} of {total:,} blocks"
    return [
        Row(name, "", round(found / total, 4), peer, "published ideal", 1, note=note),
        field.row("trace, match, p50", "us", figures, MATCH_BAR),
    ]


def main() -> None:
    """Take --trace off the command line; the rest is every benchmark's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--trace", type=Path)
    arguments, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    cases = {
        "match": match,
        "store": store,
        "streams": streams,
        "memory": memory,
        "trace": partial(trace, path=arguments.trace),
    }
    run("index", cases, __doc__ or "")


if __name__ == "__main__":
    main()
