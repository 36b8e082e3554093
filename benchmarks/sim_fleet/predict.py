"""The simulator's answer to a load, and how far it is from what was measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from benchmarks.sim_fleet.load import Arrival
from cache_service.core.ids import SiteId
from router.core.profile import DecodeRate, ModelProfile, to_dict
from router.simulate.job import Job
from router.simulate.report import Records, spread
from router.simulate.run import simulate
from router.simulate.spec import Scenario, SharedCores, parse

#: Decimals of token counts never matter; block ids of one shared prefix start here.
_GROUP = 1 << 20
HOME = "B"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the simulator is told, all of it measured before.

    Attributes:
        profiles: by site that prefills; that of the home site has the decode rate.
        rate_bytes_per_s, rtt_s: of the link, as TCP payload and as a connection's first round trip.
        request_s: what a request takes beside the prefill of its prompt, on the idle fleet, in one site.
        shared_cores: what workers that compute at the same time do to each other on this machine.
    """

    profiles: Mapping[str, ModelProfile]
    rate_bytes_per_s: float
    rtt_s: float
    request_s: float = 0.0
    shared_cores: SharedCores = field(default_factory=SharedCores)


@dataclass(frozen=True, slots=True)
class Engine:
    """How the workers were started: pages and chunks in tokens, size of the caches."""

    page_tokens: int
    chunk_tokens: int
    cache_tokens: int
    state_slots: int


@dataclass(frozen=True, slots=True)
class Figures:
    """A run: TTFT in seconds, throughput from the first arrival to the last answer."""

    mean_s: float
    p50_s: float
    p90_s: float
    requests_per_s: float
    tokens_per_s: float
    hit_ratio: float
    remote: float


class Replay:
    """A workload of the simulator: exactly these arrivals."""

    def __init__(self, arrivals: Sequence[Arrival], page_tokens: int) -> None:
        self._given, self._page = arrivals, page_tokens

    def arrivals(self) -> Iterator[Job]:
        """Yield them."""
        fresh = _GROUP * (1 + max((a.group for a in self._given), default=0) + 1)
        for number, arrival in enumerate(self._given):
            count, common = arrival.tokens // self._page, arrival.shared // self._page
            own = count - common
            first = _GROUP * (arrival.group + 1)
            blocks = [*range(first, first + common), *range(fresh, fresh + own)]
            fresh += own
            yield Job(number, arrival.at_s, arrival.tokens, arrival.output_tokens, SiteId(HOME), blocks)

    def after(self, job: Job, now_s: float) -> Sequence[Job]:
        """Return nothing."""
        return ()


def scenario(told: Measured, engine: Engine, policy: Mapping[str, Any], seed: int) -> Scenario:
    """Return the fleet as the simulator knows it. Raises ConfigError."""
    sites = [
        {
            "name": site,
            "prefill": 1,
            "decode": int(site == HOME),
            "profile": to_dict(profile),
        }
        for site, profile in told.profiles.items()
    ]
    links = [
        {"src": site, "dst": HOME, "gbps": told.rate_bytes_per_s / 1.25e8, "rtt_s": told.rtt_s}
        for site in told.profiles
        if site != HOME
    ]
    return parse(
        {
            "sites": sites,
            "links": links,
            "engine": {
                "block_tokens": engine.page_tokens,
                "cache_blocks": engine.cache_tokens // engine.page_tokens,
                "chunk_tokens": engine.chunk_tokens,
                "hybrid": True,
                "state_slots": engine.state_slots,
            },
            "policy": dict(policy),
            "request_s": told.request_s,
            "shared_cores": msgspec.to_builtins(told.shared_cores),
            "seed": seed,
        }
    )


def run(
    told: Measured, engine: Engine, policy: Mapping[str, Any], arrivals: Sequence[Arrival], seed: int
) -> Records:
    """Simulate the arrivals."""
    return simulate(scenario(told, engine, policy, seed), Replay(arrivals, engine.page_tokens))


def figures(
    ttfts: Sequence[float],
    arrived: Sequence[float],
    done: Sequence[float],
    *,
    output_tokens: int,
    hit_ratio: float,
    remote: int,
) -> Figures:
    """Return the figures of a run's answered requests; `output_tokens` are all of theirs."""
    if not ttfts:
        return Figures(math.nan, math.nan, math.nan, 0.0, 0.0, 0.0, 0.0)
    spans, span_s = spread(ttfts), max(done) - min(arrived)
    return Figures(
        spans["mean"], spans["p50"], spans["p90"], len(ttfts) / span_s, output_tokens / span_s, hit_ratio,
        remote / len(ttfts),
    )  # fmt: skip


def simulated(records: Records) -> Figures:
    """Return a simulated run's figures."""
    return figures(
        records.ttft_s,
        records.arrived_s,
        records.done_s,
        output_tokens=records.output_tokens,
        hit_ratio=records.hit_tokens / records.prompt_tokens if records.prompt_tokens else 0.0,
        remote=records.remote,
    )


def offered(told: Measured, lengths: Sequence[int], load: float) -> float:
    """Return the requests per second that are `load` of what the prefill workers do of these lengths.

    All of them at once, so that what sharing the cores costs is taken off; one prompt at a time each.
    """
    per_s = sum(
        len(lengths) / sum(profile.prefill_s(tokens) for tokens in lengths)
        for profile in told.profiles.values()
    )
    return load * per_s / told.shared_cores.prefill


def step_at(steps: Mapping[int, float], tokens_per_s: float) -> float:
    """Return the step of the smallest batch measured that keeps up with `tokens_per_s`, else the largest.

    Args:
        steps: batch -> seconds of a step.
    """
    for batch, seconds in sorted(steps.items()):
        if tokens_per_s * seconds <= batch:
            return seconds
    return steps[max(steps)]


def told_decode(told: Measured, tokens_per_s: float) -> Measured:
    """Return what is told, decode's step being that of the batch that such a load makes."""
    profile = told.profiles[HOME]
    assert profile.decode is not None
    steps = {int(n): float(s) for n, _, s in (p.partition(":") for p in _steps(profile))}
    rate = DecodeRate(profile.decode.max_batch, step_at(steps, tokens_per_s))
    return replace(told, profiles={**told.profiles, HOME: replace(profile, decode=rate)})


def _steps(profile: ModelProfile) -> list[str]:
    return profile.facts["decode_steps_s"].split(",")
