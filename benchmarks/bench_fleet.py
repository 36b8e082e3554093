"""End to end with real SGLang: prefill and decode workers on the two sides of a 40 ms link.

The prfaas backend and SGLang's stock mooncake_tcp, both running, asked in turn with the same random prompts
(no prefix is ever cached). A tiny hybrid model on CPU: what is compared is the way of the KV, not the model.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path

from benchmarks.fleet.pairs import Timing, Workers
from benchmarks.fleet.sides import WorkerFailed
from benchmarks.harness import Row, run
from benchmarks.transfer.ends import link
from tests.wan.link import missing

OURS, PEER = "prfaas", "mooncake_tcp"
LENGTHS = (64, 512, 2000)
NEW_TOKENS = 16
#: Token ids of the tiny model that are ordinary ones.
FIRST_ID, LAST_ID = 300, 2000


def measure(smoke: bool) -> list[Row]:
    """Rows of time to the first token and of the whole answer, by prompt length."""
    why = missing()
    if why is not None:
        return [Row("end to end", "ms", None, None, f"did not run: {why}")]
    lengths, rounds = (LENGTHS[:1], 1) if smoke else (LENGTHS, 7)
    backends: tuple[str, ...] = (OURS,) if smoke else (OURS, PEER)
    found: dict[tuple[str, int], list[Timing]] = {}
    reason = ""
    with tempfile.TemporaryDirectory() as folder, link() as wan:
        try:
            _measure(Workers(wan, Path(folder), backends), lengths, rounds, found)
        except WorkerFailed as error:
            if backends == (OURS,) or PEER not in str(error):
                raise
            reason = f" did not run: {error}"
            found.clear()
            with link() as other:
                _measure(Workers(other, Path(folder), (OURS,)), lengths, rounds, found)
    rows = []
    for length in lengths:
        last = None if smoke else length == lengths[-1]
        rows += _rows(found, length, reason, last)
    return rows


def _measure(
    workers: Workers, lengths: tuple[int, ...], rounds: int, found: dict[tuple[str, int], list[Timing]]
) -> None:
    rng = random.Random(11)
    with workers:
        for length in lengths:
            for number in range(rounds + 1):
                prompt = [rng.randint(FIRST_ID, LAST_ID) for _ in range(length)]
                for backend in workers.backends:
                    timing = workers.generate(backend, prompt, NEW_TOKENS)
                    if number:  # the first of each length warms up
                        found.setdefault((backend, length), []).append(timing)


def _rows(
    found: dict[tuple[str, int], list[Timing]], length: int, reason: str, last: bool | None
) -> list[Row]:
    ours, peer = found[(OURS, length)], found.get((PEER, length), [])
    equal = sum(a.tokens == b.tokens for a, b in zip(ours, peer, strict=False))
    rows = []
    for what, field in (("TTFT", "first_s"), ("total", "total_s")):
        a, b = ([getattr(t, field) * 1e3 for t in side] for side in (ours, peer))
        note = f"{NEW_TOKENS} tokens; ours {min(a):.0f} to {max(a):.0f}"
        if b:
            note += f"; peer {min(b):.0f} to {max(b):.0f}; same tokens in {equal} of {len(b)}"
        rows.append(
            Row(
                f"{what}, prompt of {length} tokens, 1 Gbit/s, 40 ms",
                "ms",
                statistics.median(a),
                statistics.median(b) if b else None,
                f"SGLang's {PEER}{reason}",
                None if last is None or not b else 0.999 if last else 1.0,
                lower_is_better=True,
                note=note,
            )
        )
    return rows


if __name__ == "__main__":
    run("fleet", measure, __doc__ or "")
