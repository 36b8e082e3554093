"""The slow loop finds the optimum of the throughput model, by and by, and never converts the prefill site."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from router.core.long_loop import BOUNDS, LongLoop, LoopLimits, Utilisation
from router.core.optimum import by_grid
from router.core.profile import DecodeRate, KvShape, ModelProfile, Quadratic
from router.core.throughput import Remote, System, split, throughput
from router.core.workload import LogNormal

KV = KvShape(17_280.0, 180e6)
HOME = ModelProfile("home", KV, Quadratic(0.5, 1.3e-4), DecodeRate(20, 0.025))
AWAY = ModelProfile("away", KV, Quadratic(0.35, 5e-5))
SYSTEM = System(HOME, 3, 5, 1024.0, (Remote(4, AWAY, 12.5e9),))
EVEN = Utilisation(0.5, 0.5)
LENGTHS = LogNormal(9.9, 1.0, 128.0, 131072.0)


def fed(loop: LongLoop, count: int = 4000, seed: int = 1) -> LongLoop:
    rng = random.Random(seed)
    for _ in range(count):
        loop.observe(round(LENGTHS.quantile(rng.random())))
    return loop


def test_the_threshold_walks_to_the_optimum_and_stays() -> None:
    """From 2,000 tokens, by damped steps, to within the gain not worth a change; then nothing."""
    loop, threshold = LongLoop(), 2000
    gains = []
    for step in range(12):
        fed(loop, seed=step)
        proposal = loop.propose(SYSTEM, threshold, EVEN, 60.0 * step)
        if proposal is not None and not proposal.convert:
            assert proposal.gain_ratio > 0
            gains.append(proposal.gain_ratio)
            threshold = proposal.threshold_tokens
    best = by_grid([SYSTEM], LENGTHS)
    assert throughput(SYSTEM, split(LENGTHS, threshold)).requests_per_s > 0.95 * best.requests_per_s
    assert 2 <= len(gains) <= 8


def test_little_is_seen_little_is_changed() -> None:
    """No proposal before enough prompts, nor twice from the same ones."""
    loop = LongLoop(LoopLimits(min_requests=100))
    assert loop.propose(SYSTEM, 10, EVEN, 0.0) is None
    fed(loop, 99)
    assert loop.propose(SYSTEM, 10, EVEN, 0.0) is None
    fed(loop, 1)
    assert loop.propose(SYSTEM, 10, EVEN, 0.0) is not None
    assert loop.propose(SYSTEM, 10, EVEN, 0.0) is None


def test_a_worker_is_converted_only_when_wanted_repeatedly_and_after_the_cool_down() -> None:
    """Seven decode workers for one that prefills: one is converted at the third wish, the next much later."""
    loop, system, threshold = LongLoop(), replace(SYSTEM, prefill=1, decode=7), 19_000
    busy, converted = Utilisation(0.99, 0.3), []
    for step in range(12):
        fed(loop, 1000, seed=step)
        proposal = loop.propose(system, threshold, busy, 100.0 * step)
        if proposal is None:
            continue
        threshold = proposal.threshold_tokens
        assert proposal.prefill + proposal.decode == 8
        if proposal.convert:
            converted.append(step)
            assert proposal.prefill == system.prefill + 1
            assert proposal.gain_ratio >= 0.05
            system = replace(system, prefill=proposal.prefill, decode=proposal.decode)
    assert converted == [2, 11]


def test_the_busy_stage_must_agree() -> None:
    """Decode is what is busy: no worker is taken from it, whatever the model says."""
    loop = LongLoop()
    for step in range(6):
        fed(loop, 1000, seed=step)
        proposal = loop.propose(
            replace(SYSTEM, prefill=1, decode=7), 19_000, Utilisation(0.2, 0.9), 1e4 * step
        )
        assert proposal is None or not proposal.convert


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 4096, 1 << 22, 1 << 40])
def test_every_length_has_its_bucket(tokens: int) -> None:
    """The bucket contains the length, or is the last."""
    loop = LongLoop()
    loop.observe(tokens)
    (place,) = [i for i, (_, n) in enumerate(loop.cumulative()) if n][:1]
    assert tokens <= BOUNDS[place + 1] * (1 + 1e-9) or place == len(BOUNDS) - 2
    assert tokens >= BOUNDS[place] * (1 - 1e-9)
