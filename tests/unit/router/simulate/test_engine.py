"""Simulated engines against closed forms and a pass-by-pass engine."""

from __future__ import annotations

import random

import pytest

from cache_service.core.ids import SiteId
from router.core.profile import KvShape, ModelProfile, Quadratic
from router.core.profiles import case_study
from router.simulate.cache import PrefixCache
from router.simulate.clock import Clock
from router.simulate.engine import DecodeEngine, MixedEngine, PassTime, PrefillEngine
from router.simulate.job import Job
from router.simulate.run import DYNAMO_TIMES

PROFILE = ModelProfile("test", KvShape(1000.0), Quadratic(0.1, 1e-4, 1e-9))


def job(number: int, tokens: int, out: int = 1, at_s: float = 0.0) -> Job:
    """Return a request with blocks of its own."""
    return Job(number, at_s, tokens, out, SiteId("A"), range(number * 1000, number * 1000 + tokens // 512))


def prefill_engine(clock: Clock, profile: ModelProfile = PROFILE) -> tuple[PrefillEngine, list[Job]]:
    """Return an engine that releases what it has computed, and the list of it."""
    done: list[Job] = []

    def over(j: Job) -> None:
        done.append(j)
        engine.release(j)

    engine = PrefillEngine(clock, PrefixCache(10_000), profile, 512, 8192, lambda j: None, over)
    return engine, done


@pytest.mark.parametrize("profile", [PROFILE, case_study.H20])
@pytest.mark.parametrize("tokens", [1, 511, 8192, 8193, 50_000, 131_072])
def test_a_prompt_alone_takes_what_its_profile_says(profile: ModelProfile, tokens: int) -> None:
    """However many chunks it is cut into."""
    clock = Clock()
    engine, (done) = prefill_engine(clock, profile)
    engine.submit(job(1, tokens))
    clock.run()
    assert done[0].prefilled_s == pytest.approx(profile.prefill_s(tokens), rel=1e-9)
    assert engine.busy_s == pytest.approx(done[0].prefilled_s)


def test_a_cached_prefix_is_not_computed_again() -> None:
    """The second prompt takes the profile's time after its prefix."""
    clock = Clock()
    engine, _ = prefill_engine(clock)
    first = Job(1, 0.0, 10 * 512, 1, SiteId("A"), list(range(10)))
    second = Job(2, 0.0, 14 * 512 + 7, 1, SiteId("A"), list(range(14)))
    clock.at(0.0, engine.submit, first)
    clock.at(100.0, engine.submit, second)
    clock.run()
    assert second.hit == 10
    assert second.prefilled_s - 100.0 == pytest.approx(PROFILE.prefill_s(4 * 512 + 7, 10 * 512))


def test_short_prompts_share_a_pass() -> None:
    """Four prompts of 1,000 tokens are one pass with one fixed cost."""
    clock = Clock()
    engine, done = prefill_engine(clock)
    clock.at(0.0, engine.submit, job(0, 8192))
    for n in range(1, 5):
        clock.at(0.1, engine.submit, job(n, 1000))
    clock.run()
    assert len({j.prefilled_s for j in done[1:]}) == 1
    assert done[4].prefilled_s - done[0].prefilled_s == pytest.approx(0.1 + 4 * (0.1 + 1e-3))


def test_waiting_is_that_of_an_m_d_1_queue() -> None:
    """Poisson arrivals, equal prompts of one whole chunk: the mean wait is rho S / (2 (1 - rho))."""
    clock, rng = Clock(), random.Random(3)
    engine, done = prefill_engine(clock)
    service_s = PROFILE.prefill_s(8192)
    rho, now_s = 0.7, 0.0
    for n in range(40_000):
        now_s += rng.expovariate(rho / service_s)
        clock.at(now_s, engine.submit, Job(n, now_s, 8192, 1, SiteId("A"), ()))
    clock.run()
    wait_s = sum(j.started_s - j.arrived_s for j in done) / len(done)
    assert wait_s == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.05)


def test_decode_has_places() -> None:
    """The third answer of two places begins when the first ends."""
    clock = Clock()
    begun: list[float] = []
    engine = DecodeEngine(clock, 2, 0.01, lambda j: begun.append(clock.now_s), lambda j: None)
    for n, out in enumerate((100, 200, 50)):
        engine.submit(job(n, 512, out))
    clock.run()
    assert begun == pytest.approx([0.0, 0.0, 1.0])
    assert engine.busy_s == pytest.approx(2.0)


def slowly(times: PassTime, jobs: list[Job], capacity_tokens: int) -> dict[int, tuple[float, float]]:
    """Return number -> (first token, end) of prompts that each fit one pass, one pass after the other."""
    now_s, used, waiting = 0.0, 0, list(jobs)
    running: list[list[int]] = []
    found: dict[int, tuple[float, float]] = {}
    while waiting or running:
        if not running and waiting[0].arrived_s > now_s:
            now_s = waiting[0].arrived_s
        budget, batch = 8192 - len(running), []
        while waiting and waiting[0].arrived_s <= now_s and waiting[0].total_tokens <= budget:
            batch.append(waiting.pop(0))
            budget -= batch[-1].total_tokens
        tokens = sum(j.total_tokens for j in batch)
        now_s += times.prefill_s(tokens) + times.steps_s(1, (used + tokens) / capacity_tokens, 0.0)
        used += tokens + len(running) + len(batch)
        for entry in running:
            entry[1] -= 1
        running += [[j.number, j.output_tokens - 1, j.total_tokens + j.output_tokens] for j in batch]
        for j in batch:
            found[j.number] = (now_s, now_s)
        for number, left, size in [e for e in running if e[1] <= 0]:
            found[number] = (found[number][0], now_s)
            used -= size
            assert left == 0
        running = [e for e in running if e[1] > 0]
    return found


def test_stretches_equal_single_passes() -> None:
    """A mixed engine that advances many decode passes at once agrees with one that does each."""
    clock, rng = Clock(), random.Random(5)
    jobs, now_s = [], 0.0
    for n in range(300):
        now_s += rng.expovariate(8.0)
        jobs.append(job(n, rng.randrange(100, 900), rng.randrange(1, 60), now_s))
    expected = slowly(DYNAMO_TIMES, list(jobs), 4000 * 512)
    engine = MixedEngine(
        clock, PrefixCache(4000), DYNAMO_TIMES, 512, 8192, 256, lambda j: None,
        lambda j: setattr(j, "done_s", clock.now_s),
    )  # fmt: skip
    for j in jobs:
        clock.at(j.arrived_s, engine.submit, j)
    clock.run()
    for j in jobs:
        assert (j.prefilled_s, j.done_s) == pytest.approx(expected[j.number], rel=1e-6)
