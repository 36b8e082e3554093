"""The pure parts of bench_sim_fleet: what is offered, what the simulator is told, how both are compared."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.sim_fleet import load, predict
from benchmarks.sim_fleet.load import Arrival, Mix
from benchmarks.sim_fleet.predict import Engine, Measured
from router.core.profile import DecodeRate, KvShape, ModelProfile, Quadratic
from router.simulate.spec import SharedCores

MIX = Mix(1000, 0.5, 64, 3500, 16)
ENGINE = Engine(64, 512, 65536, 96)
RATE, RTT_S = 12.5e6, 0.040


def profile(fixed_s: float = 0.02, per_token_s: float = 2e-4) -> ModelProfile:
    return ModelProfile("m", KvShape(1000.0), Quadratic(fixed_s, per_token_s), DecodeRate(16, 0.01))


def told(**changes: Any) -> Measured:
    return Measured({"A": profile(), "B": profile()}, RATE, RTT_S, **changes)


def test_a_seed_gives_the_same_arrivals_and_lengths_do_not_depend_on_the_rate() -> None:
    slow, fast = load.draw(MIX, 1.0, 400, 7), load.draw(MIX, 4.0, 400, 7)
    assert slow == load.draw(MIX, 1.0, 400, 7)
    assert [a.tokens for a in slow] == [a.tokens for a in fast]
    assert slow[-1].at_s == pytest.approx(4 * fast[-1].at_s)
    assert all(a.at_s < b.at_s for a, b in pairwise(slow))
    assert statistics.median(a.tokens for a in slow) == pytest.approx(1000, rel=0.15)
    assert all(64 <= a.tokens <= 3500 for a in slow)


def test_prompts_share_what_their_arrivals_say_and_so_do_the_simulators_blocks() -> None:
    mix = Mix(1000, 0.5, 64, 3500, 16, groups=2, shared=512, share=0.7)
    arrivals = load.draw(mix, 1.0, 40, 3)
    texts = load.prompts(arrivals, 3)
    jobs = list(predict.Replay(arrivals, 64).arrivals())
    assert [len(text) for text in texts] == [a.tokens for a in arrivals] == [j.total_tokens for j in jobs]
    assert {a.group for a in arrivals if a.shared} == {0, 1}
    rng = random.Random(1)
    for _ in range(200):
        i, j = rng.sample(range(40), 2)
        a, b = arrivals[i], arrivals[j]
        common = min(a.shared, b.shared) if a.group == b.group else 0
        assert common_start(texts[i], texts[j]) in range(common, common + 3)  # the next ones by chance
        assert common_start(jobs[i].blocks, jobs[j].blocks) == common // 64


def common_start(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("policy", ["local", "remote"])
def test_one_request_takes_what_was_measured(policy: str) -> None:
    records = predict.run(told(request_s=0.015), ENGINE, {"name": policy}, [Arrival(0.5, 500, 4)], 1)
    wire_s = 500 * 1000.0 / RATE + RTT_S if policy == "remote" else 0.0
    found = predict.simulated(records)
    assert found.mean_s == pytest.approx(0.02 + 500 * 2e-4 + 0.015 + wire_s)
    assert found.remote == (policy == "remote")
    assert found.requests_per_s == pytest.approx(1 / (found.mean_s + 4 * 0.01))
    assert found.tokens_per_s == pytest.approx(4 * found.requests_per_s)


def test_the_offered_rate_is_a_share_of_what_both_workers_do_at_once() -> None:
    both = 2 / (0.02 + 1000 * 2e-4)
    assert predict.offered(told(), [1000], 0.5) == pytest.approx(both / 2)
    slow = replace(told(), shared_cores=SharedCores(prefill=1.6))
    assert predict.offered(slow, [1000], 0.5) == pytest.approx(both / 2 / 1.6)


def test_decode_is_told_with_the_step_of_the_batch_that_the_load_makes() -> None:
    steps = {1: 0.005, 2: 0.006, 4: 0.01}
    assert predict.step_at(steps, 30.0) == 0.005
    assert predict.step_at(steps, 300.0) == 0.006
    assert predict.step_at(steps, 1e6) == 0.01
    home = replace(profile(), facts={"decode_steps_s": "1: 0.005, 2: 0.006"})
    given = predict.told_decode(replace(told(), profiles={"A": profile(), "B": home}), 300.0)
    assert given.profiles["B"].decode == DecodeRate(16, 0.006)


def test_nothing_answered_is_no_figure() -> None:
    found = predict.figures([], [], [], output_tokens=0, hit_ratio=0.0, remote=0)
    assert found.mean_s != found.mean_s
    assert found.requests_per_s == 0
