"""`prfaas profile`: a model profile of a live SGLang prefill worker, none of it typed by hand.

KV sizes come from the worker's description of its own pools. The prefill curve is fitted to the medians of
prompts of several lengths, sent one at a time, the caches flushed before each and the engine's own count of
cached tokens checked. Each prompt goes to a decode worker as well, as the router would send it: a prefill
worker alone waits for one, and SGLang's fake bootstrap host, which stands in for one, makes 0.5.21 prefill a
prompt of more than one chunk for ever.

Times are until prefill's answer, as a client on this machine sees it, HTTP included. The answer waits for the
link unless the worker has staging memory (`transfer.staging_bytes`) for the KV of the longest prompt.
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
from urllib.parse import urlsplit

import aiohttp
import msgspec

from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError, RemoteProtocolError, Unavailable
from router.core.profile import ModelProfile
from router.core.profile_fit import Fit, fit
from router.plan import pools, profile_file

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
        url, telemetry_url: of the prefill worker.
        decode_url: of a decode worker of the same model.
        bootstrap: host:port at which decode reaches prefill, "" for the host of `url` and prefill's own port.
        tokens: prompt lengths; () for LENGTHS of them up to what the worker takes.
        repeats: timed prompts of each length, after one that is not counted.
    """

    url: str
    telemetry_url: str
    decode_url: str
    bootstrap: str
    out: Path
    name: str
    tokens: tuple[int, ...]
    repeats: int


def check(options: Options) -> None:
    """Raise ConfigError naming the first option that is wrong."""
    for flag, value in (
        ("--url", options.url),
        ("--telemetry", options.telemetry_url),
        ("--decode", options.decode_url),
    ):
        if not value.startswith(("http://", "https://")):
            raise ConfigError(f"{flag}: {value!r} is not http(s)://host:port")
    if options.bootstrap:
        split_address(options.bootstrap, field="--bootstrap")
    if options.tokens and (len(options.tokens) < 2 or options.tokens[0] < 1):
        raise ConfigError("--tokens: give at least two different lengths, each > 0")
    if not 1 <= options.repeats <= 100:
        raise ConfigError(f"--repeats: {options.repeats} is not in 1..100")


def lengths(text: str) -> tuple[int, ...]:
    """Return the different lengths of a list like "512,2048", growing. Raises ConfigError."""
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise ConfigError(f"--tokens: {text!r} is not a list of whole numbers") from None


class _Info(msgspec.Struct, frozen=True):
    """What of GET /server_info is needed."""

    page_size: int
    disaggregation_mode: str = "null"
    disaggregation_bootstrap_port: int = 0
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
    check(options)
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
        info = await _info(session, options.url, "--url", "prefill")
        await _info(session, options.decode_url, "--decode", "decode")
        if info.page_size != described.layout.page_size:
            raise ConfigError(
                f"--telemetry: describes pages of {described.layout.page_size} tokens and --url has "
                f"{info.page_size}; give both addresses of one worker"
            )
        chosen = _lengths(options, info)
        pair = _Pair(session, options, info)
        fitted = fit([(n, s) for n, s in await _time_all(pair, options.repeats, chosen)])
    profile = ModelProfile(
        name=options.name or f"{described.layout.model} on {info.device or 'unknown device'}",
        kv=pools.kv_shape(described),
        curve=fitted.curve,
        measured_tokens=(chosen[0], chosen[-1]),
        source=f"measured, median of {options.repeats} prompts of each of {len(chosen)} lengths",
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


async def _info(session: aiohttp.ClientSession, url: str, flag: str, mode: str) -> _Info:
    try:
        info = msgspec.json.decode(await _get(session, url + "/server_info"), type=_Info)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RemoteProtocolError(f"{url}/server_info: {error}") from None
    if info.disaggregation_mode != mode:
        raise ConfigError(
            f"{flag}: its disaggregation mode is {info.disaggregation_mode!r}; wanted is {mode!r}"
        )
    return info


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two workers that serve a prompt together."""

    session: aiohttp.ClientSession
    options: Options
    info: _Info

    async def flush(self) -> None:
        """Empty both caches; each worker first waits until it is idle."""
        for url in (self.options.url, self.options.decode_url):
            path = f"{url}/flush_cache?timeout={math.ceil(FLUSH_S)}"
            await _ask(self.session, "POST", path, timeout_s=FLUSH_S + ASK_S)

    async def prefill_s(self, tokens: int) -> float:
        """Return the seconds until prefill has answered a random prompt. Raises as `measure`."""
        if self.options.bootstrap:
            host, port = split_address(self.options.bootstrap, field="--bootstrap")
        else:
            host = urlsplit(self.options.url).hostname or ""
            port = self.info.disaggregation_bootstrap_port
        body = {
            "input_ids": [random.randint(FIRST_ID, LAST_ID) for _ in range(tokens)],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "bootstrap_host": host,
            "bootstrap_port": port,
            "bootstrap_room": secrets.randbits(62),
        }
        async with asyncio.TaskGroup() as both:
            both.create_task(self._generate(self.options.decode_url, body))
            prefill = both.create_task(self._generate(self.options.url, body))
        answer, seconds = prefill.result()
        _check_answer(self.options.url, answer, tokens)
        return seconds

    async def _generate(self, url: str, body: dict[str, Any]) -> tuple[bytes, float]:
        begin_s = time.perf_counter()
        answer = await _ask(self.session, "POST", url + "/generate", json=body)
        return answer, time.perf_counter() - begin_s


def _check_answer(url: str, answer: bytes, tokens: int) -> None:
    """Raise RemoteProtocolError unless all `tokens` were computed."""
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


async def _time_all(pair: _Pair, repeats: int, lengths: Sequence[int]) -> list[tuple[int, float]]:
    """Return the median seconds of each length, in turns so that a drift meets all alike."""
    taken: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    for turn in range(repeats + 1):
        for tokens in lengths:
            await pair.flush()
            try:
                seconds = await pair.prefill_s(tokens)
            except ExceptionGroup as group:  # of the two requests; the first failure ended the other
                raise group.exceptions[0] from None
            if turn:  # the first one compiles and warms
                taken[tokens].append(seconds)
    return [(tokens, statistics.median(seconds)) for tokens, seconds in taken.items()]


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
