"""The parameters of the simulator, measured on the idle fleet before the run that is to be predicted."""

from __future__ import annotations

import asyncio
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.sim_fleet import load
from benchmarks.sim_fleet.fleet import SimFleet
from benchmarks.sim_fleet.predict import HOME, Measured
from router.core.profile import ModelProfile
from router.core.profile_fit import Fit, fit
from router.plan import measure
from router.simulate.spec import SharedCores
from tests.wan.link import Wan

#: Longest decode step that is looked at; the largest batch is what the worker takes.
STEP_S = 0.25
CONNECTS, BULK_S = 9, 1.5
#: Between two requests that are timed alone, from one's start to the next one's.
PAUSE_S = 0.7
#: A prompt meets answers that are being decoded this long after they were asked for, and their tokens.
BESIDE_S, DECODED = 0.5, 300
PREFILLS = {"A": "a-prefill", "B": "b-prefill"}


def parameters(fleet: SimFleet, lengths: tuple[int, ...], repeats: int) -> Measured:
    """Measure everything; the fleet must be idle. Raises PrfaasError, OSError."""
    rate, rtt_s = link(fleet.wan)
    profiles = _profiles(fleet, lengths, repeats)
    short = lengths[:3]  # where the prefill is short, so is the error of its fitted curve
    with fleet.routed({"name": "local"}) as url:
        request_s = _beyond_s(fleet, url, profiles[HOME], short, 3 * repeats)
    shared_cores = _shared_cores(fleet, lengths[len(lengths) // 2], 5 * repeats)
    return Measured(profiles, rate, rtt_s, request_s, shared_cores)


def by_worker(told: Measured) -> dict[str, ModelProfile]:
    """Return the profiles by the names of the prefill workers."""
    return {PREFILLS[site]: profile for site, profile in told.profiles.items()}


def link(wan: Wan) -> tuple[float, float]:
    """Return what the link from a to b carries, bytes of TCP payload per second, and its round trip."""
    with wan.entered("b"), socket.create_server((wan.address("b"), 0)) as server:
        server.settimeout(10)
        address = server.getsockname()
        with wan.entered("a"):
            trips = []
            for _ in range(CONNECTS):
                begin_s = time.perf_counter()
                with socket.create_connection(address, 10):
                    trips.append(time.perf_counter() - begin_s)
        for _ in range(CONNECTS):
            server.accept()[0].close()
        sender = threading.Thread(target=_send, args=(wan, address), daemon=True)
        sender.start()
        connection, _ = server.accept()
        with connection:
            arrived = list(_arrivals(connection))
        sender.join(10)
    half = [(at_s, size) for at_s, size in arrived if at_s > arrived[0][0] + BULK_S / 3]
    rate = sum(size for _, size in half[1:]) / (half[-1][0] - half[0][0])
    return rate, statistics.median(trips)


def _send(wan: Wan, address: tuple[str, int]) -> None:
    block = bytes(1 << 16)
    with wan.entered("a"), socket.create_connection(address, 10) as connection:
        until_s = time.perf_counter() + BULK_S
        while time.perf_counter() < until_s:
            connection.sendall(block)


def _arrivals(connection: socket.socket) -> Iterator[tuple[float, int]]:
    connection.settimeout(10)
    while size := len(connection.recv(1 << 18)):
        yield time.perf_counter(), size


def _profiles(fleet: SimFleet, lengths: tuple[int, ...], repeats: int) -> dict[str, ModelProfile]:
    """Return what `prfaas profile` says of each site's prefill worker, asked from beside it.

    It has staging memory, so its answer waits for neither the decode worker nor the link. Each is asked
    four times, in turn, and of every length the fastest median counts: what else runs here only adds time.
    """
    taken: dict[str, list[tuple[ModelProfile, Fit]]] = {site: [] for site in PREFILLS}
    for site in [*PREFILLS, *reversed(PREFILLS)] * 2:
        step_s = STEP_S if site == HOME and not taken[site] else 0.0
        with fleet.wan.entered(site.lower()):
            options = fleet.options(PREFILLS[site], lengths, repeats, step_s)
            taken[site].append(asyncio.run(measure.measure(options)))
    found = {}
    for site, turns in taken.items():
        profile = turns[0][0]  # of the home site, the turn that looked at decode
        points = [
            (same[0][0], min(seconds for _, seconds in same))
            for same in zip(*(each.points for _, each in turns), strict=True)
        ]
        fitted = fit(points)
        facts = {**profile.facts, "fit_off_by_at_most": f"{fitted.worst:.4f}"}
        found[site] = replace(profile, curve=fitted.curve, facts=facts)
    return found


def _beyond_s(
    fleet: SimFleet, url: str, profile: ModelProfile, lengths: tuple[int, ...], repeats: int
) -> float:
    """Return the seconds to the first token beyond the prefill's own: client, router, HTTP, decode.

    With pauses between the requests, as in the load to come: a machine that was idle wakes up slowly.
    """
    load.one_by_one(url, lengths, 2, 1)
    fleet.flush()
    spaced = [load.Arrival(n * PAUSE_S, tokens, 16) for n, tokens in enumerate(lengths * repeats)]
    seen = load.replay(url, spaced, 2)
    return max(0.0, statistics.median(s.ttft_s - profile.prefill_s(s.tokens) for s in seen))


def _shared_cores(fleet: SimFleet, tokens: int, repeats: int) -> SharedCores:
    """Return what a prefill at the home site suffers from others on this machine's cores."""
    prompt = load.Arrival(BESIDE_S, tokens, 1)
    decoding = [load.Arrival(0.0, 64, DECODED)] * 2
    with fleet.routed({"name": "local"}) as url:
        alone_s = _at_home_s(fleet, url, [prompt], repeats)
        decode_s = _at_home_s(fleet, url, [*decoding, prompt], repeats)
    with fleet.routed({"name": "round_robin"}) as url:
        prefill_s = _at_home_s(fleet, url, [prompt] * 2, repeats)
        both_s = _at_home_s(fleet, url, [*decoding, prompt, prompt], repeats)
    # company never helps: what comes out less is the machine's noise
    prefill, decode = (max(1.0, seconds / alone_s) for seconds in (prefill_s, decode_s))
    return SharedCores(prefill=prefill, decode=decode, both=max(prefill, decode, both_s / alone_s))


def _at_home_s(fleet: SimFleet, url: str, arrivals: list[load.Arrival], repeats: int) -> float:
    """Return the mean time to first token of the last kind of arrival where the home site prefilled it.

    The mean, because the load to come meets every state of the machine: two virtual cores may or may not be
    one real core's at the moment.
    """
    found = []
    for number in range(repeats + 1):
        fleet.flush()
        seen = load.replay(url, arrivals, number)
        last = arrivals[-1]
        if number:  # the first one opens connections
            found += [s.ttft_s for s in seen if s.site == HOME and s.tokens == last.tokens]
    return statistics.fmean(found)
