"""`prfaas profile`: a model profile of a live SGLang prefill worker, none of it typed by hand.

KV sizes come from the worker's description of its own pools. The prefill curve is fitted to the medians of
prompts of several lengths, sent one at a time, the cache flushed before each and the engine's own count of
cached tokens checked. A prefill worker computes without a decode worker when the
request names SGLang's fake bootstrap host (`disaggregation/utils.py`, FAKE_BOOTSTRAP_HOST, 0.5.21), which
SGLang itself warms up with; its KV is then sent nowhere.

Times are what a client on this machine sees, HTTP included, so a slow way to the worker shows in `fixed_s`.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from cache_service.core.errors import ConfigError, RemoteProtocolError, Unavailable
from router.core.profile import ModelProfile
from router.core.profile_fit import Fit, fit
from router.plan import pools, profile_file

FAKE_BOOTSTRAP_HOST = "2.2.2.2"
MAX_BYTES = 4 << 20
CONNECT_S = 5.0
ASK_S = 30.0
PREFILL_S = 600.0
#: How long a worker may still be busy with what it had before.
FLUSH_S = 30.0
#: Ordinary tokens in every vocabulary we know; the content does not matter, only that no two prompts agree.
FIRST_ID, LAST_ID = 100, 499
#: Lengths measured by default, evenly spaced in the logarithm.
LENGTHS, SHORTEST = 8, 64


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        tokens: prompt lengths; () for LENGTHS of them up to what the worker takes.
        repeats: timed prompts of each length, after one that is not counted.
    """

    url: str
    telemetry_url: str
    out: Path
    name: str
    tokens: tuple[int, ...]
    repeats: int


def options(*, url: str, telemetry_url: str, out: Path, name: str, tokens: str, repeats: int) -> Options:
    """Return checked options from a command line. Raises ConfigError naming the option."""
    for flag, value in (("--url", url), ("--telemetry", telemetry_url)):
        if not value.startswith(("http://", "https://")):
            raise ConfigError(f"{flag}: {value!r} is not http(s)://host:port")
    try:
        lengths = tuple(sorted({int(part) for part in tokens.split(",") if part.strip()}))
    except ValueError:
        raise ConfigError(f"--tokens: {tokens!r} is not a list of whole numbers") from None
    if lengths and (len(lengths) < 2 or lengths[0] < 1):
        raise ConfigError("--tokens: give at least two different lengths, each > 0")
    if not 1 <= repeats <= 100:
        raise ConfigError(f"--repeats: {repeats} is not in 1..100")
    return Options(url.rstrip("/"), telemetry_url.rstrip("/"), out, name, lengths, repeats)


class _Info(msgspec.Struct, frozen=True):
    """What of GET /server_info is needed."""

    page_size: int
    disaggregation_mode: str = "null"
    max_req_input_len: int = 0
    context_length: int | None = None
    max_total_num_tokens: int = 0
    chunked_prefill_size: int | None = None
    version: str = ""
    device: str = ""
    tp_size: int = 1
    dp_size: int = 1


def run(options: Options) -> int:
    """Measure, print, write the profile; return 0. Raises PrfaasError."""
    profile, fitted = asyncio.run(measure(options))
    profile_file.write(profile, options.out)
    sys.stdout.write(describe(profile, fitted) + f"written: {options.out}\n")
    return 0


def describe(profile: ModelProfile, fitted: Fit) -> str:
    """Return the measured and the fitted times as text."""
    curve = fitted.curve
    lines = [f"{profile.name}: {profile.source}"]
    lines += [f"{'tokens':>9}  {'measured':>10}  {'fitted':>10}  {'KV bytes':>13}  {'Gbps':>7}"]
    for tokens, seconds in fitted.points:
        size = profile.kv_bytes(tokens)
        lines.append(
            f"{tokens:>9,.0f}  {seconds:>8.4f} s  {curve.at(tokens):>8.4f} s  {size:>13,.0f}  "
            f"{size * 8e-9 / seconds:>7.3f}"
        )
    lines.append(
        f"T(l) = {curve.fixed_s:.4g} + {curve.per_token_s:.4g} l + {curve.per_token2_s:.4g} l^2 s, "
        f"off by {fitted.worst:.1%} at most"
    )
    return "\n".join(lines) + "\n"


async def measure(options: Options) -> tuple[ModelProfile, Fit]:
    """Ask and time a worker. Raises Unavailable, RemoteProtocolError or ConfigError saying what is wrong."""
    timeout = aiohttp.ClientTimeout(total=PREFILL_S, connect=CONNECT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        described = pools.parse(await _get(session, options.telemetry_url + "/layout"))
        try:
            info = msgspec.json.decode(await _get(session, options.url + "/server_info"), type=_Info)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise RemoteProtocolError(f"{options.url}/server_info: {error}") from None
        if info.disaggregation_mode == "decode":
            raise ConfigError("--url: is a decode worker, which prefills nothing; give a prefill worker")
        if info.page_size != described.layout.page_size:
            raise ConfigError(
                f"--telemetry: describes pages of {described.layout.page_size} tokens and --url has "
                f"{info.page_size}; give both addresses of one worker"
            )
        lengths = _lengths(options, info)
        fitted = fit([(n, s) for n, s in await _time_all(session, options, info, lengths)])
    profile = ModelProfile(
        name=options.name or f"{described.layout.model} on {info.device or 'unknown device'}",
        kv=pools.kv_shape(described),
        curve=fitted.curve,
        measured_tokens=(lengths[0], lengths[-1]),
        source=f"measured, median of {options.repeats} prompts of each of {len(lengths)} lengths",
        facts={
            "engine": described.layout.engine,
            "device": info.device,
            "kv_dtype": described.layout.kv_dtype,
            "layout": described.fingerprint,
            "tp_size": str(info.tp_size),
            "dp_size": str(info.dp_size),
            "chunked_prefill_size": str(info.chunked_prefill_size),
            "fit_off_by_at_most": f"{fitted.worst:.4f}",
            "measured_s": ", ".join(f"{tokens:.0f}: {seconds:.5f}" for tokens, seconds in fitted.points),
        },
    )
    return profile, fitted


def _lengths(options: Options, info: _Info) -> tuple[int, ...]:
    limits = (info.max_req_input_len, info.context_length, info.max_total_num_tokens)
    limit = min((n for n in limits if n), default=0) - 8  # room for the generated token and the engine's own
    if limit <= SHORTEST:
        raise RemoteProtocolError(f"--url: takes prompts of {limit} tokens, too short to fit a curve to")
    if not options.tokens:
        step = (limit / SHORTEST) ** (1 / (LENGTHS - 1))
        return tuple(sorted({min(limit, round(SHORTEST * step**i)) for i in range(LENGTHS)}))
    if options.tokens[-1] > limit:
        raise ConfigError(f"--tokens: {options.tokens[-1]} is more than the {limit} that the worker takes")
    return options.tokens


async def _time_all(
    session: aiohttp.ClientSession, options: Options, info: _Info, lengths: Sequence[int]
) -> list[tuple[int, float]]:
    """Return the median seconds of each length, in turns so that a drift meets all alike."""
    taken: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    for turn in range(options.repeats + 1):
        for tokens in lengths:
            seconds = await _time_one(session, options.url, info, tokens)
            if turn:  # the first one compiles and warms
                taken[tokens].append(seconds)
    return [(tokens, statistics.median(seconds)) for tokens, seconds in taken.items()]


async def _time_one(session: aiohttp.ClientSession, url: str, info: _Info, tokens: int) -> float:
    await _flush(session, url)
    body: dict[str, Any] = {
        "input_ids": [random.randint(FIRST_ID, LAST_ID) for _ in range(tokens)],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
    }
    if info.disaggregation_mode == "prefill":
        body |= {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": secrets.randbits(62)}
    begin_s = time.perf_counter()
    answer = await _ask(session, "POST", url + "/generate", json=body)
    seconds = time.perf_counter() - begin_s
    try:
        meta = msgspec.json.decode(answer)["meta_info"]
        prompt, cached = int(meta["prompt_tokens"]), int(meta.get("cached_tokens") or 0)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise RemoteProtocolError(f"{url}/generate: the answer has no meta_info.prompt_tokens") from None
    if prompt != tokens or cached:
        raise RemoteProtocolError(
            f"{url}/generate: computed {prompt} tokens less {cached} cached of {tokens}; "
            "is somebody else using this worker?"
        )
    return seconds


async def _flush(session: aiohttp.ClientSession, url: str) -> None:
    """Empty the cache; the worker waits until it is idle."""
    await _ask(session, "POST", f"{url}/flush_cache?timeout={math.ceil(FLUSH_S)}", timeout_s=FLUSH_S + ASK_S)


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    return await _ask(session, "GET", url, timeout_s=ASK_S)


async def _ask(
    session: aiohttp.ClientSession, method: str, url: str, *, timeout_s: float = PREFILL_S, json: Any = None
) -> bytes:
    """Return a bounded body. Raises Unavailable with the status or the reason."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.request(method, url, json=json, allow_redirects=False) as response,
        ):
            body = b""
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise RemoteProtocolError(f"{url}: answers more than {MAX_BYTES} bytes")
            if response.status != 200:
                text = body[:200].decode(errors="replace")
                raise Unavailable(f"{url}: answers {response.status}: {text}")
            return body
    except TimeoutError:
        raise Unavailable(f"{url}: no answer within {timeout_s:.0f} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Unavailable(f"{url}: {error}") from error
