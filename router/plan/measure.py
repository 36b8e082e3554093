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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError, RemoteProtocolError, Unavailable
from router.core.profile import DecodeRate, ModelProfile
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
#: Decode: tokens of every prompt, and of its answer at least.
DECODE_TOKENS, STEPS = 256, 64


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        url, telemetry_url: of the prefill worker.
        decode_url: of a decode worker of the same model.
        bootstrap: host:port at which decode reaches prefill, "" for the host of `url` and prefill's own port.
        tokens: prompt lengths; () for LENGTHS of them up to what the worker takes.
        repeats: timed prompts of each length, after one that is not counted.
        step_s: objective of a decode step; 0 leaves the decode rate out.
    """

    url: str
    telemetry_url: str
    decode_url: str
    bootstrap: str
    out: Path
    name: str
    tokens: tuple[int, ...]
    repeats: int
    step_s: float = 0.0


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
    if not 0 <= options.step_s <= 60:
        raise ConfigError(f"--step-ms: {options.step_s * 1e3:g} is not in 0..60000")


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
    max_running_requests: int | None = None
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
    if (rate := profile.decode) is not None:
        lines.append(
            f"decode: {rate.max_batch:g} requests in steps of {rate.step_s * 1e3:.3g} ms, "
            f"{rate.tokens_per_s:,.0f} tokens/s ({profile.facts['decode_steps_s']} s)"
        )
    return "\n".join(lines) + "\n"


async def measure(options: Options) -> tuple[ModelProfile, Fit]:
    """Ask and time a worker. Raises Unavailable, RemoteProtocolError or ConfigError saying what is wrong."""
    timeout = aiohttp.ClientTimeout(total=PREFILL_S, connect=CONNECT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        described = pools.parse(await _get(session, options.telemetry_url + "/layout"))
        info = await _info(session, options.url, "--url", "prefill")
        decoder = await _info(session, options.decode_url, "--decode", "decode")
        if info.page_size != described.layout.page_size:
            raise ConfigError(
                f"--telemetry: describes pages of {described.layout.page_size} tokens and --url has "
                f"{info.page_size}; give both addresses of one worker"
            )
        chosen = _lengths(options, info)
        pair = _Pair(session, options, info)
        fitted = fit([(n, s) for n, s in await _time_all(pair, options.repeats, chosen)])
        steps = await _decode_steps(pair, decoder, fitted.curve.at(DECODE_TOKENS)) if options.step_s else {}
    decode = decode_rate(steps, options.step_s)
    profile = ModelProfile(
        name=options.name or f"{described.layout.model} on {info.device or 'unknown device'}",
        kv=pools.kv_shape(described),
        curve=fitted.curve,
        decode=decode,
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
            **({"decode_steps_s": ", ".join(f"{n}: {s:.5f}" for n, s in steps.items())} if steps else {}),
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

    def body(self, tokens: int, new_tokens: int) -> dict[str, Any]:
        """Return a request of a random prompt that both workers can be sent."""
        if self.options.bootstrap:
            host, port = split_address(self.options.bootstrap, field="--bootstrap")
        else:
            host = urlsplit(self.options.url).hostname or ""
            port = self.info.disaggregation_bootstrap_port
        return {
            "input_ids": [random.randint(FIRST_ID, LAST_ID) for _ in range(tokens)],
            "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
            "bootstrap_host": host,
            "bootstrap_port": port,
            "bootstrap_room": secrets.randbits(62),
        }

    async def prefill_s(self, tokens: int) -> float:
        """Return the seconds until prefill has answered a random prompt. Raises as `measure`."""
        body = self.body(tokens, 1)
        async with asyncio.TaskGroup() as both:
            both.create_task(self.generate(self.options.decode_url, body))
            prefill = both.create_task(self.generate(self.options.url, body))
        answer, seconds = prefill.result()
        _check_answer(self.options.url, answer, tokens)
        return seconds

    async def step_s(self, batch: int, new_tokens: int) -> float | None:
        """Return the median seconds of a decode step of `batch` requests of `new_tokens`, all of them in it.

        None when they never were in it all at once. Raises as `measure`.
        """
        bodies = [{**self.body(DECODE_TOKENS, new_tokens), "stream": True} for _ in range(batch)]
        async with asyncio.TaskGroup() as all_:
            for body in bodies:
                all_.create_task(self.generate(self.options.url, {**body, "stream": False}))
            streams = [all_.create_task(self._token_times(body)) for body in bodies]
        times = [stream.result() for stream in streams]
        if any(len(each) < 2 for each in times):
            raise RemoteProtocolError(f"{self.options.decode_url}/generate: streams no tokens")
        return step_seconds(times)

    async def _token_times(self, body: dict[str, Any]) -> list[float]:
        """Return when each token of a stream came."""
        times: list[float] = []

        def count(part: bytes) -> None:
            times.extend([time.perf_counter()] * part.count(b"data: {"))

        await _ask(self.session, "POST", self.options.decode_url + "/generate", json=body, heard=count)
        return times

    async def generate(self, url: str, body: dict[str, Any]) -> tuple[bytes, float]:
        """Return an answer and the seconds it took."""
        begin_s = time.perf_counter()
        answer = await _ask(self.session, "POST", url + "/generate", json=body)
        return answer, time.perf_counter() - begin_s


def step_seconds(times: Sequence[Sequence[float]]) -> float | None:
    """Return the median seconds of a step while all streams are in the batch; None when that was no time.

    `times` are when each stream's tokens came, two or more a stream. Several may come in one read, so a
    stream's steps are counted over all of that time.
    """
    begin_s, end_s = max(each[1] for each in times), min(each[-1] for each in times)
    steps = []
    for each in times:
        inside = [at for at in each if begin_s <= at <= end_s]
        if len(inside) < 2 or inside[-1] == inside[0]:
            return None
        steps.append((inside[-1] - inside[0]) / (len(inside) - 1))
    return statistics.median(steps)


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


async def _decode_steps(pair: _Pair, decoder: _Info, prompt_s: float) -> dict[int, float]:
    """Return batch -> seconds of a step, for 1, 2, 4, ... until the objective is missed or the worker full.

    Answers are long enough for all prompts of a batch (`prompt_s` each, one after the other) to be prefilled
    while the first is still decoded; where the worker has no room for such, the batches end.
    """
    steps: dict[int, float] = {}
    batch, new_tokens = 1, STEPS
    limit = min((n for n in (decoder.context_length, decoder.max_req_input_len) if n), default=0)
    while batch <= (decoder.max_running_requests or batch):
        tokens = DECODE_TOKENS + new_tokens
        if tokens + 8 > limit or batch * (tokens + decoder.page_size) > decoder.max_total_num_tokens:
            break
        await pair.flush()
        try:
            seconds = await pair.step_s(batch, new_tokens)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        if seconds is None:
            break
        steps[batch] = seconds
        if seconds > pair.options.step_s:
            break
        batch *= 2
        new_tokens = STEPS + math.ceil(batch * prompt_s / seconds)
    return steps


def decode_rate(steps: Mapping[int, float], step_s: float) -> DecodeRate | None:
    """Return the largest batch within the objective and its step; between two batches time is a line.

    None when nothing was measured, or one request alone misses the objective.
    """
    within = [batch for batch, seconds in sorted(steps.items()) if seconds <= step_s]
    if not within:
        return None
    batch = within[-1]
    beyond = [(n, s) for n, s in sorted(steps.items()) if n > batch]
    if beyond:
        n, s = beyond[0]
        batch += math.floor((n - batch) * (step_s - steps[batch]) / (s - steps[batch]))
        return DecodeRate(batch, step_s)
    return DecodeRate(batch, steps[batch])


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    return await _ask(session, "GET", url, timeout_s=ASK_S)


async def _ask(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    *,
    timeout_s: float = PREFILL_S,
    json: Any = None,
    heard: Callable[[bytes], None] | None = None,
) -> bytes:
    """Return a bounded body, telling `heard` each part. Raises Unavailable with the status or the reason."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.request(method, url, json=json, allow_redirects=False) as response,
        ):
            body = b""
            async for chunk in response.content.iter_any():
                body += chunk
                if heard is not None:
                    heard(chunk)
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
