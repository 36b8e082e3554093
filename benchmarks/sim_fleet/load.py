"""The load: seeded arrivals, and a client that offers them to the router and writes down what it sees."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

#: Token ids of the tiny model that are ordinary ones.
FIRST_ID, LAST_ID = 300, 2000
REQUEST_S = 120.0
MAX_ANSWER = 8 << 20


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at_s: since the start of the run.
        tokens, output_tokens: of prompt and answer.
        shared: leading tokens that it has in common with all others of `group`; 0 for none.
    """

    at_s: float
    tokens: int
    output_tokens: int
    group: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the client saw of one request, seconds since the start of the run.

    Attributes:
        sent_s: when it was due; `late_s` is how much later the client sent it.
        site: of the prefill worker, as the router said.
        cached: prompt tokens that prefill had in its cache.
    """

    sent_s: float
    first_s: float
    done_s: float
    site: str
    tokens: int
    output_tokens: int
    cached: int = 0
    late_s: float = 0.0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.first_s - self.sent_s


@dataclass(frozen=True, slots=True)
class Mix:
    """Prompt lengths: log-normal around `median`, cut to `low`..`high`; `groups` shared prefixes, 0 for none.

    A prompt begins with one of the prefixes, `shared` tokens each, with probability `share`.
    """

    median: float
    sigma: float
    low: int
    high: int
    output_tokens: int
    groups: int = 0
    shared: int = 0
    share: float = 0.0

    def length(self, rng: random.Random) -> int:
        """Draw a prompt length."""
        while True:
            drawn = self.median * rng.lognormvariate(0.0, self.sigma)
            if self.low <= drawn <= self.high:
                return int(drawn)


def draw(mix: Mix, rate: float, count: int, seed: int) -> list[Arrival]:
    """Return `count` Poisson arrivals at `rate` a second. The lengths do not depend on the rate."""
    rng, gaps = random.Random(f"lengths-{seed}"), random.Random(f"arrivals-{seed}")
    arrivals, at_s = [], 0.0
    for _ in range(count):
        at_s += gaps.expovariate(rate)
        tokens = mix.length(rng)
        takes = mix.groups > 0 and rng.random() < mix.share
        shared = min(mix.shared, tokens - 1) if takes else 0
        group = rng.randrange(mix.groups) if takes else 0
        arrivals.append(Arrival(at_s, tokens, mix.output_tokens, group, shared))
    return arrivals


def prompts(arrivals: Sequence[Arrival], seed: int) -> list[list[int]]:
    """Return random token ids for each; no two share more than `shared` says (but by chance)."""
    rng = random.Random(f"prompts-{seed}")

    def ids(count: int) -> list[int]:
        return [rng.randint(FIRST_ID, LAST_ID) for _ in range(count)]

    longest = max((a.shared for a in arrivals), default=0)
    heads = [ids(longest) for _ in range(1 + max((a.group for a in arrivals), default=0))]
    return [heads[a.group][: a.shared] + ids(a.tokens - a.shared) for a in arrivals]


def body(prompt: list[int], output_tokens: int) -> bytes:
    """Return a streamed /generate request."""
    sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
    return msgspec.json.encode({"input_ids": prompt, "sampling_params": sampling, "stream": True})


def replay(url: str, arrivals: Sequence[Arrival], seed: int) -> list[Seen]:
    """Offer the arrivals to the router at `url`, each at its time; return what was seen of each, in order."""
    bodies = [
        body(prompt, a.output_tokens) for prompt, a in zip(prompts(arrivals, seed), arrivals, strict=True)
    ]
    return asyncio.run(_replay(url, arrivals, bodies))


async def _replay(url: str, arrivals: Sequence[Arrival], bodies: Sequence[bytes]) -> list[Seen]:
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin_s = time.perf_counter() + 0.05
        return list(
            await asyncio.gather(
                *(_one(session, url, a, b, begin_s) for a, b in zip(arrivals, bodies, strict=True))
            )
        )


async def _one(
    session: aiohttp.ClientSession, url: str, arrival: Arrival, raw: bytes, begin_s: float
) -> Seen:
    due_s = begin_s + arrival.at_s
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    late_s = time.perf_counter() - due_s
    first_s, site, last, tail = 0.0, "", b"", b""
    error = ""
    try:
        headers = {"Content-Type": "application/json"}
        async with session.post(url + "/generate", data=raw, headers=headers) as response:
            site = response.headers.get("x-prfaas-prefill-site", "")
            size = 0
            async for chunk in response.content.iter_any():
                if not first_s and b"data: {" in chunk:
                    first_s = time.perf_counter() - begin_s
                size += len(chunk)
                if size > MAX_ANSWER:
                    raise ValueError(f"an answer of more than {MAX_ANSWER} bytes")
                *events, tail = (tail + chunk).split(b"\n\n")
                last = next((e for e in reversed(events) if e.startswith(b"data: {")), last)
            if response.status != 200:
                error = f"status {response.status}"
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    done_s = time.perf_counter() - begin_s
    meta = _meta(last)
    tokens = int(meta.get("completion_tokens") or 0)
    if not error and tokens != arrival.output_tokens:
        error = f"{tokens} tokens of {arrival.output_tokens}"
    return Seen(
        arrival.at_s, first_s, done_s, site, arrival.tokens, tokens, int(meta.get("cached_tokens") or 0),
        late_s, error,
    )  # fmt: skip


def _meta(event: bytes) -> dict[str, Any]:
    """Return meta_info of a stream's event, {} when there is none."""
    try:
        found = msgspec.json.decode(event.removeprefix(b"data: "))["meta_info"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def one_by_one(url: str, lengths: Sequence[int], output_tokens: int, seed: int) -> list[Seen]:
    """Send prompts of these lengths one after the other, each when the last is answered."""
    found = []
    for number, tokens in enumerate(lengths):
        found += replay(url, [Arrival(0.0, tokens, output_tokens)], seed * 10_000 + number)
    return found
