"""What comes in: Poisson, bursty, a trace, or agents; seeded, one request at a time.

Block ids are integers that stand for whole prefixes; two prompts share one only where they share everything
before it.
"""

from __future__ import annotations

import bisect
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from cache_service.core.errors import ConfigError
from cache_service.core.ids import SiteId
from router.simulate.job import Job
from router.simulate.spec import WorkloadSpec

#: Longest line of a trace that is read, and most blocks of one request.
MAX_LINE = 1 << 20


class Workload(Protocol):
    """A source of requests."""

    def arrivals(self) -> Iterator[Job]:
        """Yield the requests that come whatever happens, in the order of time."""
        ...

    def after(self, job: Job, now_s: float) -> Sequence[Job]:
        """Return the requests that the end of `job` (answered, rejected or failed) brings about."""
        ...


def make(spec: WorkloadSpec, homes: Sequence[SiteId], block_tokens: int, seed: int) -> Workload:
    """Return the workload of `spec`. Raises ConfigError when a trace cannot be read."""
    rng = random.Random(f"workload-{seed}")
    if spec.kind == "trace":
        return Trace(spec, homes, block_tokens)
    if spec.kind == "agents":
        return Agents(spec, homes, block_tokens, rng)
    return Open(spec, homes, block_tokens, rng)


class Ids:
    """Hands out block ids."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0

    def fresh(self, count: int) -> list[int]:
        """Return `count` ids that nobody has."""
        first = self._next
        self._next += count
        return list(range(first, first + count))


class Open:
    """Poisson or bursty arrivals that do not wait for answers."""

    def __init__(
        self, spec: WorkloadSpec, homes: Sequence[SiteId], block_tokens: int, rng: random.Random
    ) -> None:
        self.spec = spec
        self._homes = homes
        self._block = block_tokens
        self._rng = rng
        self._ids = Ids()
        weights = [1.0 / (n + 1) for n in range(spec.prefixes)]
        self._zipf = list(accumulate(weights))
        self._prefixes: list[list[int]] = [[] for _ in weights]

    def after(self, job: Job, now_s: float) -> Sequence[Job]:
        """Return nothing."""
        return ()

    def _gaps(self) -> Iterator[float]:
        """Yield the times of arrival."""
        spec, rng = self.spec, self._rng
        now_s = 0.0
        if spec.kind == "poisson":
            while True:
                now_s += rng.expovariate(spec.rate)
                yield now_s
        period = spec.burst_s + spec.calm_s
        calm = spec.rate * period / (spec.calm_s + spec.burst_ratio * spec.burst_s)
        burst = False
        until_s = rng.expovariate(1.0 / spec.calm_s)
        while True:
            step_s = rng.expovariate(calm * (spec.burst_ratio if burst else 1.0))
            if now_s + step_s < until_s:
                now_s += step_s
                yield now_s
            else:  # memoryless: what was drawn for the old state is thrown away
                now_s = until_s
                burst = not burst
                until_s += rng.expovariate(1.0 / (spec.burst_s if burst else spec.calm_s))

    def _length(self) -> int:
        spec = self.spec
        while True:
            length = self._rng.lognormvariate(spec.mu, spec.sigma)
            if spec.low <= length <= spec.high:
                return int(length)

    def _blocks(self, tokens: int) -> list[int]:
        spec, rng = self.spec, self._rng
        count = tokens // self._block
        if not spec.shared or rng.random() >= spec.shared:
            return self._ids.fresh(count)
        which = bisect.bisect(self._zipf, rng.random() * self._zipf[-1])
        want = int(count * spec.prefix_share)
        prefix = self._prefixes[which]
        if len(prefix) < want:
            prefix += self._ids.fresh(want - len(prefix))
        return prefix[:want] + self._ids.fresh(count - want)

    def arrivals(self) -> Iterator[Job]:
        """Yield `requests` of them."""
        spec, rng = self.spec, self._rng
        for number, at_s in zip(range(spec.requests), self._gaps(), strict=False):
            tokens = self._length()
            home = self._homes[int(rng.random() * len(self._homes))]
            yield Job(number, at_s, tokens, spec.output_tokens, home, self._blocks(tokens))


class Trace:
    """Mooncake's JSONL: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of its blocks."""

    def __init__(self, spec: WorkloadSpec, homes: Sequence[SiteId], block_tokens: int) -> None:
        self.spec = spec
        self._homes = homes
        self._block = block_tokens
        try:
            size = Path(spec.trace).stat().st_size
        except OSError as error:
            raise ConfigError(f"workload.trace: {spec.trace}: {error.strerror}") from None
        if not size:
            raise ConfigError(f"workload.trace: {spec.trace} is empty")

    def after(self, job: Job, now_s: float) -> Sequence[Job]:
        """Return nothing."""
        return ()

    def arrivals(self) -> Iterator[Job]:
        """Yield the requests in the order of time. Raises ConfigError naming a line that is not one."""
        for number, (at_s, tokens, answer, ids) in enumerate(sorted(self._rows(), key=lambda row: row[0])):
            # The first block is often the same system prompt for all; the second tells sessions apart.
            key = ids[min(1, len(ids) - 1)] if ids else number
            home = self._homes[random.Random(key).randrange(len(self._homes))]
            yield Job(number, at_s, tokens, answer, home, ids[: tokens // self._block])

    def _rows(self) -> Iterator[tuple[float, int, int, list[int]]]:
        """Yield (seconds, prompt tokens, answer tokens, block ids) of each line."""
        with Path(self.spec.trace).open(encoding="utf-8") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), "")):
                if self.spec.requests and number >= self.spec.requests:
                    return
                try:
                    row = json.loads(line)
                    at_s = float(row["timestamp"]) / 1000.0 / self.spec.speed
                    tokens, answer, ids = int(row["input_length"]), int(row["output_length"]), row["hash_ids"]
                    if not (0 <= at_s < math.inf and tokens > 0 and answer >= 0):
                        raise ValueError("timestamp and output_length must be >= 0, input_length > 0")
                    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                        raise ValueError("hash_ids: not a list of whole numbers")
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(f"workload.trace: line {number + 1}: {error!r}") from None
                yield at_s, tokens, answer, ids


@dataclass(slots=True)
class _Session:
    name: str
    home: SiteId
    rng: random.Random
    system: int
    calls_left: int
    blocks: list[int]
    tokens: int
    children: int = 0


class Agents:
    """Coding agents: a shared system prompt, then calls that each add what the last tool or person said.

    Shaped after the aggregates published of GitHub's Copilot coding agents in 2026 (31 calls a session,
    68 thousand prompt tokens a call, 86 % of them cached); what it does not publish is chosen here. Every
    session has random numbers of its own, so that what it asks does not depend on how it is served.
    """

    def __init__(
        self, spec: WorkloadSpec, homes: Sequence[SiteId], block_tokens: int, rng: random.Random
    ) -> None:
        self.spec = spec
        self._homes = homes
        self._block = block_tokens
        self._rng = rng
        self._ids = Ids()
        self._systems = [self._ids.fresh(spec.system_tokens // block_tokens) for _ in range(spec.systems)]
        self._given = 0

    def arrivals(self) -> Iterator[Job]:
        """Yield the first call of every session."""
        now_s, planned, rng = 0.0, 0, self._rng
        while planned < self.spec.requests:
            now_s += rng.expovariate(self.spec.rate)
            home = self._homes[int(rng.random() * len(self._homes))]
            system = min(int(rng.expovariate(3.0 / len(self._systems))), len(self._systems) - 1)
            calls = 1 + int(rng.expovariate(1.0 / max(1e-9, self.spec.calls - 1)))
            planned += calls
            seed = rng.getrandbits(64)
            yield self._first(now_s, _Session(f"s{seed}", home, random.Random(seed), system, calls, [], 0))

    def _first(self, at_s: float, session: _Session) -> Job:
        self._anew(session)
        return self._call(session, at_s)

    def _anew(self, session: _Session) -> None:
        session.blocks = list(self._systems[session.system])
        session.tokens = len(session.blocks) * self._block
        self._grow(session, self.spec.first_tokens)

    def _grow(self, session: _Session, mean_tokens: float) -> None:
        sigma = 1.0
        grown = session.rng.lognormvariate(math.log(mean_tokens) - sigma * sigma / 2, sigma)
        session.tokens = min(self.spec.high, session.tokens + 1 + int(grown))
        session.blocks += self._ids.fresh(session.tokens // self._block - len(session.blocks))

    def _call(self, session: _Session, at_s: float) -> Job:
        self._given += 1
        session.calls_left -= 1
        answer = 1 + int(session.rng.expovariate(1.0 / self.spec.output_tokens))
        return Job(
            self._given, at_s, session.tokens, answer, session.home, tuple(session.blocks),
            session=session.name, state=session,
        )  # fmt: skip

    def after(self, job: Job, now_s: float) -> Sequence[Job]:
        """Return the session's next call, and the first of an agent that it sends off."""
        session, spec = job.state, self.spec
        rng, found = session.rng, []
        if "." not in session.name and rng.random() < spec.subagents:
            session.children += 1
            calls = 1 + int(rng.expovariate(4.0 / spec.calls))
            name, own = f"{session.name}.{session.children}", random.Random(rng.getrandbits(64))
            child = _Session(name, session.home, own, session.system, calls, [], 0)
            found.append(self._first(now_s + 0.1, child))
        if session.calls_left > 0:
            pause_s = spec.think_s if rng.randrange(spec.turn_calls) == 0 else spec.tool_s
            session.tokens += job.output_tokens
            if session.tokens > spec.compact_tokens:
                self._anew(session)
            else:
                self._grow(session, spec.grown_tokens)
            found.append(self._call(session, now_s + rng.expovariate(1.0 / pause_s) if pause_s else now_s))
        return found
