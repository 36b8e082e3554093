"""What the fault tests stand on: one link, both sites, a pair of workers per model, and the right answers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.wan.sites import ROOT, Answer, Pair, Site, Worker, until
from tests.wan.link import Wan
from tests.wan.settings import Direction

#: One bandwidth-delay product of queue. A prompt of LONG tokens takes about 2 s, so that a fault can hit it.
NORMAL = Direction(rate_bps=16e6, delay_s=0.02, queue_bytes=80e3)
LONG, MEDIUM, SHORT = 3000, 600, 150
NEW_TOKENS = 8
#: Least distance, in nats, of the two best tokens. Another order of adding moves a logit by some 1e-5.
MIN_MARGIN = 1e-3
CONNECTIONS = 2
#: What `settled` looks at, and the name.
PARTS = ("worker", "used", "used_by_transfer")
#: Seconds in which a failed request must have said so: 15 s of silence find a dead peer, and some grace.
DEADLINE_S = 22.0
#: How long prefill keeps what a decode worker that is gone might come back for.
KEPT_S = 40.0


@dataclass(frozen=True)
class Case:
    """A prompt and what a single stock server continues it with, greedily."""

    prompt: list[int]
    output: list[int]


@dataclass(frozen=True)
class Oracle:
    """Right answers for one model, for prompts that share nothing."""

    long: Case
    medium: list[Case]
    short: Case


def build_models(folder: Path, families: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Start building the tiny checkpoints in a process of their own; `FAMILY.built` ends each."""
    code = (
        "import sys, pathlib; from prfaas_sglang.cpu import models; root = pathlib.Path(sys.argv[1])\n"
        "for f in sys.argv[2:]: models.build(f, root / f); (root / (f + '.built')).touch()"
    )
    with (folder / "models.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), *families], cwd=ROOT, stdout=log, stderr=log
        )


class Bench:
    """Both sites and what runs there. Workers are started when first asked for and again when they died."""

    def __init__(self, wan: Wan, a: Site, b: Site, models: Path) -> None:
        self.wan, self.a, self.b, self.models = wan, a, b, models
        self._pairs: dict[str, Pair] = {}
        self._oracles: dict[str, Oracle] = {}

    def model(self, family: str) -> Path:
        """Return the checkpoint's folder; waits until it is built."""
        until(f"model {family}", (self.models / f"{family}.built").exists, 60)
        return self.models / family

    def pair(self, family: str) -> Pair:
        """Return a running pair; what died is started again, prefill at its old address."""
        old = self._pairs.get(family)
        if old and old.prefill.alive and old.decode.alive:
            return old
        prefill = old.prefill if old and old.prefill.alive else None
        decode = old.decode if old and old.decode.alive else None
        model = self.model(family)
        address = old.prefill.bootstrap_port if old else None
        prefill = prefill or self.a.serve(model, "prefill", bootstrap_port=address)
        decode = decode or self.b.serve(model, "decode")
        self._pairs[family] = Pair(prefill, decode)
        self._pairs[family].wait_healthy()
        return self._pairs[family]

    @contextlib.contextmanager
    def special(
        self, family: str, *, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
    ) -> Iterator[Pair]:
        """Run a pair for one test; the arguments are those of Site.serve."""
        model = self.model(family)
        pair = Pair(
            self.a.serve(model, "prefill", **(prefill or {})), self.b.serve(model, "decode", **(decode or {}))
        )
        try:
            pair.wait_healthy()
            yield pair
        finally:
            for worker in pair.workers:
                worker.kill()

    def oracle(self, family: str) -> Oracle:
        """Return the right answers, from a stock server that lives only for this."""
        if family not in self._oracles:
            stock = self.a.serve(self.model(family), "null")
            stock.wait_healthy()
            try:
                self._oracles[family] = self._ask_all(stock, self._ids(family))
            finally:
                stock.kill()
        return self._oracles[family]

    def _ask_all(self, stock: Worker, ids: list[int]) -> Oracle:
        def good(length: int, wanted: int) -> list[Case]:
            cases: list[Case] = []
            while len(cases) < wanted:
                assert len(ids) >= length, "too many near-ties"
                case = _ask_stock(stock, ids[:length])
                del ids[:length]
                if case:
                    cases.append(case)
            return cases

        return Oracle(good(LONG, 1)[0], good(MEDIUM, 4), good(SHORT, 1)[0])

    def _ids(self, family: str) -> list[int]:
        from tokenizers import Tokenizer

        from prfaas_sglang.cpu.models import corpus

        tokenizer = Tokenizer.from_file(str(self.model(family) / "tokenizer.json"))
        ids: list[int] = tokenizer.encode("".join(corpus(1500))).ids
        return ids


def _ask_stock(stock: Worker, prompt: list[int]) -> Case | None:
    """Return the case, None when a token was nearly another one."""
    answer: dict[str, Any] = stock.request(
        "POST",
        "/generate",
        {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": 2,
        },
    )
    tops = answer["meta_info"]["output_top_logprobs"]
    if min(first[0] - second[0] for first, second in tops) < MIN_MARGIN:
        return None
    return Case(prompt, answer["output_ids"])


@dataclass
class Trial:
    """One fault on one pair: see `Bench` and `trial`."""

    bench: Bench
    family: str
    pair: Pair
    oracle: Oracle
    staged_is_kept: bool = False

    @property
    def wan(self) -> Wan:
        return self.bench.wan

    @property
    def case(self) -> Case:
        """The long prompt that the fault hits."""
        return self.oracle.long

    def underway(self, moved_bytes: int = 300_000, **send: Any) -> Any:
        """Send the long prompt; return its future once `moved_bytes` have come out of the link."""
        start = self.wan.stats().a2b.out_bytes
        future = self.pair.send(self.case.prompt, **send)
        until("KV on the link", lambda: self.wan.stats().a2b.out_bytes - start > moved_bytes)
        assert not future.done(), future.result()
        return future

    def idle(self, within_s: float, *, transfers: bool = True) -> None:
        """Wait until neither worker holds anything for a request.

        transfers: open rooms and staging memory count, here and after the test.
        """
        self.staged_is_kept = not transfers
        _await_settled(self.pair, within_s, transfers)

    def exact(self, answer: Answer, case: Case | None = None) -> None:
        """Assert that an answer is the stock server's."""
        case = case or self.case
        assert answer.output == case.output, f"{answer.text[:600]}\n{self.pair.decode.log_tail(8)}"

    def failed(self, answer: Answer, *accepted: str, within_s: float = DEADLINE_S) -> None:
        """Assert that an answer is an error that says one of `accepted`, in time."""
        answer.error(*accepted)
        assert answer.seconds < within_s, answer


def connect(pair: Pair, oracle: Oracle) -> None:
    """Run a short request and wait until all connections of the bundle are there."""
    answer = pair.ask(oracle.short.prompt)
    assert answer.output == oracle.short.output, answer.text[:600]
    line = f"prfaas_transfer_connections_count {CONNECTIONS}.0"
    until("all connections", lambda: line in pair.decode.telemetry("/metrics"))


def settled(pair: Pair, transfers: bool = True) -> bool:
    """Whether neither worker holds anything for a request, open transfers and staging memory included."""
    return not any(held_by_requests(pair, transfers))


def held_by_requests(pair: Pair, transfers: bool = True) -> list[dict[str, float]]:
    """Return, for each worker, the counts that are not 0."""
    return [
        {
            name: n
            for name, n in {**held["used"], **(held["used_by_transfer"] if transfers else {})}.items()
            if n
        }
        for held in pair.holdings()
    ]


def _await_settled(pair: Pair, within_s: float, transfers: bool = True) -> None:
    try:
        until("nothing held by requests", lambda: settled(pair, transfers), within_s)
    except pytest.fail.Exception as error:
        pytest.fail(f"{error}: {json.dumps(held_by_requests(pair, transfers))}")


def grown(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Say what there is more of, '' when nothing."""
    return "; ".join(
        f"{old['worker']}.{key}: {old[key]} -> {new[key]}"
        for old, new in zip(before, now, strict=True)
        for key in old
        if (len(new[key]) > len(old[key]) if key == "threads" else key not in PARTS and new[key] > old[key])
    )


@contextlib.contextmanager
def trial(bench: Bench, family: str) -> Iterator[Trial]:
    """Around a fault: connected and counted before; whole, exact and nothing leaked afterwards.

    A worker that the test killed is started again, and what the dead one held does not count.
    """
    bench.wan.set("both", **asdict(NORMAL))
    oracle, pair = bench.oracle(family), bench.pair(family)
    connect(pair, oracle)
    until("idle before the fault", lambda: settled(pair), KEPT_S)  # what an earlier one left staged is kept
    before = pair.holdings()
    this = Trial(bench, family, pair, oracle)
    try:
        yield this
        bench.wan.set("both", **asdict(NORMAL))
        _whole(this, before)
    except BaseException:
        for worker in bench.pair(family).workers:
            worker.kill()  # the next test starts with new ones
        raise


def _whole(this: Trial, before: list[dict[str, Any]]) -> None:
    """Assert what `trial` promises of the time after the fault."""
    again = this.bench.pair(this.family)
    assert all(worker.alive for worker in again.workers)
    _await_settled(again, 20, not this.staged_is_kept)
    connect(again, this.oracle)
    this.exact(again.ask(this.oracle.medium[0].prompt), this.oracle.medium[0])
    kept = [i for i in (0, 1) if again.workers[i] is this.pair.workers[i]]

    def leaked() -> str:
        now = again.holdings()
        return grown([before[i] for i in kept], [now[i] for i in kept])

    try:
        until("as before", lambda: not leaked())
    except pytest.fail.Exception:
        pytest.fail(f"leaked: {leaked()}")
