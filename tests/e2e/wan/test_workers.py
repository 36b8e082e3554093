"""Workers and clients that go away in the middle of a transfer, and workers that do not fit each other."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket

import pytest

from tests.e2e.wan.bench import Bench, Oracle, connect, settled
from tests.e2e.wan.conftest import Try
from tests.e2e.wan.sites import Pair, Worker, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

FAMILIES = ["gdn", "swa"]
PROMPT_S = 8.0
#: Prefill keeps a transfer whose connection broke for 30 s, and one that nobody asks for for its timeout.
KEPT_S = 40.0


def test_a_killed_prefill_worker(attempt: Try) -> None:
    """kill -9: decode's client hears it; a new worker at the same address is dialed without a restart."""
    with attempt("gdn") as trial:
        running = trial.underway(abort_prefill=False)
        trial.pair.prefill.kill()
        trial.failed(running.result(60), "connection", within_s=PROMPT_S)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_decode_worker(attempt: Try, family: str) -> None:
    """kill -9: prefill gives back pages and state at once, and serves the next decode worker."""
    with attempt(family) as trial:
        running = trial.underway(abort_prefill=False)
        trial.pair.decode.kill()
        assert running.result(60).output is None
        prefill = trial.pair.prefill
        until("prefill idle", lambda: not any(prefill.counts()["used"].values()), 5)
        trial.staged_is_kept = True  # for a decode worker that might come back


@pytest.mark.parametrize("where", ["prefill", "decode", "both"])
def test_an_abort_in_the_middle(attempt: Try, where: str) -> None:
    """POST /abort_request: decode's client gets an answer; neither side holds anything a moment later."""
    with attempt("gdn") as trial:
        trial.exact(trial.pair.ask(trial.case.prompt))  # cached: prefill has computed it before KV is sent
        rid = secrets.token_hex(8)
        running = trial.underway(rid=rid, abort_prefill=False)
        for worker in trial.pair.workers:
            if where in (worker.mode, "both"):
                worker.abort(rid)
        answer = running.result(60)
        if where == "prefill" and answer.output is not None:
            # its half had ended: what was computed waits in staging memory and is delivered
            trial.exact(answer)
        else:
            trial.failed(answer, "abort", within_s=PROMPT_S)
        trial.idle(PROMPT_S)


def test_an_abort_while_the_prompt_is_computed(attempt: Try) -> None:
    """After the first chunks of many."""
    with attempt("gdn") as trial:
        trial.pair.prefill.request("POST", "/flush_cache")
        rid = secrets.token_hex(8)
        running = trial.underway(20_000, rid=rid, abort_prefill=False)
        trial.pair.prefill.abort(rid)
        trial.failed(running.result(60), "abort", within_s=PROMPT_S)
        trial.idle(PROMPT_S)


def test_a_client_that_hangs_up(attempt: Try) -> None:
    """Both halves' connections close in the middle of the transfer: all is given back."""
    with attempt("gdn") as trial, contextlib.ExitStack() as stack:
        start = trial.wan.stats().a2b.out_bytes
        body = trial.pair.body(trial.case.prompt, 8)
        clients = [stack.enter_context(hung_up(worker, body)) for worker in trial.pair.workers]
        until("KV on the link", lambda: trial.wan.stats().a2b.out_bytes - start > 300_000)
        for client in clients:
            client.close()
        trial.idle(20)


def hung_up(worker: Worker, body: dict[str, object]) -> socket.socket:
    """Send a request and return its connection, nothing read."""
    with worker.site.wan.entered(worker.site.side):
        client = socket.create_connection(("127.0.0.1", worker.port), 10)
    text = json.dumps(body).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: w\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    )
    client.sendall(head.encode() + b"\r\n\r\n" + text)
    return client


def test_another_page_size_is_refused(attempt: Try, bench: Bench) -> None:
    """Decode with other pages gets an error that names the field; the pair beside it is not disturbed."""
    with attempt("swa") as trial:
        other = bench.b.serve(bench.model("swa"), "decode", page_size=32)
        try:
            other.wait_healthy()
            odd = Pair(trial.pair.prefill, other)
            for _ in range(2):
                answer = odd.ask(trial.oracle.medium[1].prompt, abort_prefill=False)
                trial.failed(answer, "page_size", within_s=PROMPT_S)
        finally:
            other.kill()
        trial.staged_is_kept = True  # nobody tells prefill that no grant will come


def test_another_model_is_refused(attempt: Try, bench: Bench) -> None:
    """Prefill of one model, decode of another, both called `tiny`: refused by layout, no page is written."""
    with attempt("gdn") as trial:
        odd = Pair(trial.pair.prefill, bench.pair("swa").decode)
        answer = odd.ask(trial.oracle.medium[1].prompt, abort_prefill=False)
        trial.failed(answer, "layouts differ", within_s=PROMPT_S)
        trial.staged_is_kept = True  # nobody tells prefill that no grant will come


def check_all(pair: Pair, oracle: Oracle, count: int) -> None:
    """Send `count` medium prompts at once; each must be exact, and nothing held afterwards."""
    cases = [oracle.medium[i % len(oracle.medium)] for i in range(count)]
    running = [pair.send(case.prompt) for case in cases]
    answers = [future.result(90) for future in running]
    wrong = [a.text[:300] for a, case in zip(answers, cases, strict=True) if a.output != case.output]
    assert not wrong, f"{len(wrong)} of {count}: {wrong[0]}"
    until("idle", lambda: settled(pair))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_in_the_end(bench: Bench, family: str) -> None:
    """Staging memory and rooms of the faults above are given back: 30 s after the connection broke."""
    pair = bench.pair(family)
    until("everything given back", lambda: settled(pair), KEPT_S)


@pytest.mark.parametrize("staging_bytes", [0, 1 << 20], ids=["none", "full"])
def test_staging_memory_that_is_full_or_absent(bench: Bench, staging_bytes: int) -> None:
    """8 requests at once, each of which takes most of the staging memory: all exact, none of it kept."""
    with bench.special("gdn", prefill={"config": {"staging_bytes": staging_bytes}}) as pair:
        connect(pair, bench.oracle("gdn"))
        check_all(pair, bench.oracle("gdn"), 8)


def test_many_transfers_over_little_memory(bench: Bench) -> None:
    """32 at once, staging memory for 8 pages and a decode pool for two prompts: all exact."""
    page_bytes = 64 << 10
    with bench.special(
        "gdn",
        prefill={"config": {"staging_bytes": 8 * page_bytes}},
        decode={"max_total_tokens": 1536, "num_reserved_decode_tokens": 64},
    ) as pair:
        connect(pair, bench.oracle("gdn"))
        bench.wan.set("both", rate_bps=100e6, queue_bytes=500e3)
        check_all(pair, bench.oracle("gdn"), 32)
