"""Faults of the link in the middle of a transfer between two real workers: exact, or a clean error in time.

`attempt` asserts before and after each: idle, connected, nothing leaked, and the next request exact.
"""

from __future__ import annotations

import re

import pytest

from tests.e2e.wan.bench import CONNECTIONS, NORMAL, Trial
from tests.e2e.wan.conftest import Try
from tests.e2e.wan.proxy import flipping
from tests.e2e.wan.sites import WAITING_TIMEOUT_S, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

FAMILIES = ["gdn", "swa"]
#: Seconds until an error that a peer announces, or the kernel, must be with the client.
PROMPT_S = 8.0
#: Seconds until a transfer that cannot be made good has failed at the latest.
GIVE_UP_S = WAITING_TIMEOUT_S + 4.0
#: Seconds until a peer that does not answer is given up (15 s of silence, or three attempts) and one knows.
SILENCE_S = 25.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_of_two_seconds_is_survived(attempt: Try, family: str) -> None:
    with attempt(family) as trial:
        running = trial.underway()
        trial.wan.partition()
        with pytest.raises(TimeoutError):
            running.result(2.0)
        trial.wan.heal()
        trial.exact(running.result(60))


def test_a_long_cut_fails_in_time_and_heals_without_a_restart(attempt: Try) -> None:
    """60 s: the transfer, and a request that starts in the cut, end with a reason while it lasts."""
    with attempt("gdn") as trial:
        running = trial.underway(abort_prefill=False)
        trial.wan.partition()
        trial.failed(running.result(60), "connection", "timed out", within_s=GIVE_UP_S)
        started = trial.pair.send(trial.oracle.short.prompt, abort_prefill=False)
        trial.failed(started.result(60), "cannot reach prefill worker", within_s=SILENCE_S)
        trial.idle(60)
        trial.wan.heal()


@pytest.mark.parametrize("how_many", ["one", "all"])
def test_reset_connections_are_made_good(attempt: Try, how_many: str) -> None:
    """The kernel resets one connection or all: the transfer goes on over new ones."""
    with attempt("gdn") as trial:
        running = trial.underway()
        ports = [port for port, _ in connections(trial)]
        for port in ports[:1] if how_many == "one" else ports:
            trial.bench.a.run("ss", "-K", "dport", "=", f":{port}")
        trial.exact(running.result(60))


def test_one_stalled_connection_of_several(attempt: Try) -> None:
    """Packets of one connection vanish: it is noticed and replaced."""
    with attempt("gdn") as trial:
        running = trial.underway()
        port = max(connections(trial), key=lambda found: found[1])[0]
        trial.wan.set("both", drop_port=port)
        answer = running.result(60)
        trial.exact(answer)
        assert answer.seconds < SILENCE_S
        assert trial.wan.stats().a2b.port_dropped > 0


def test_a_drop_to_five_percent_of_the_rate(attempt: Try) -> None:
    with attempt("gdn") as trial:
        running = trial.underway(2_000_000)
        trial.wan.set("both", rate_bps=0.05 * NORMAL.rate_bps)
        trial.exact(running.result(80))


def test_five_percent_loss_in_bursts(attempt: Try) -> None:
    with attempt("gdn") as trial:
        running = trial.underway()
        trial.wan.set("a2b", loss=0.05, loss_burst=3)
        trial.exact(running.result(60))
        assert trial.wan.stats().a2b.lost > 10


def test_bits_flipped_by_the_link(attempt: Try) -> None:
    """The emulator flips bits that TCP does not notice; whatever they hit, no wrong token comes out."""
    with attempt("gdn") as trial:
        running = trial.underway(abort_prefill=False)
        trial.wan.set("a2b", corrupt=0.02)
        trial.failed(running.result(60), "checksum", "header", "connection", within_s=PROMPT_S)
        assert trial.wan.stats().a2b.corrupted > 0


@pytest.mark.parametrize("place", ["row", "position", "header"])
def test_one_flipped_bit_in_the_stream(attempt: Try, place: str) -> None:
    """A wrong row fails its transfer only; a frame that cannot be trusted ends the connections."""
    with attempt("gdn") as trial:
        prefill = trial.pair.prefill
        with flipping(trial.wan, prefill.bootstrap_port, place, after=5) as proxy:
            answer = trial.pair.ask(trial.case.prompt, bootstrap_port=proxy.port, abort_prefill=False)
            assert proxy.flipped.is_set()
            trial.failed(answer, "checksum", "crc", "frame", "data:", within_s=PROMPT_S)
            trial.idle(5, transfers=place == "row")  # what is staged is kept for a while
            until("all connections", lambda: proxy.connections % CONNECTIONS == 0)
            before = proxy.connections
            trial.exact(trial.pair.ask(trial.case.prompt, bootstrap_port=proxy.port))
            if place != "position":  # that one may pass for a row that came twice
                assert (proxy.connections == before) == (place == "row")


def connections(trial: Trial) -> list[tuple[int, int]]:
    """Return decode's port and the bytes it has received, of each connection to the prefill worker."""
    address = f"{trial.wan.address('a')}:{trial.pair.prefill.bootstrap_port}"
    lines = trial.bench.b.run("ss", "-HtinO", "dst", address).splitlines()
    found = [
        (int(port[1]), int(count[1]))
        for line in lines
        if (port := re.search(r"\S+:(\d+)\s+\S+:\d+", line))
        and (count := re.search(r"bytes_received:(\d+)", line))
    ]
    assert found, lines
    return found
