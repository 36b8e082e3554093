"""The plan file: sites, chips, counts, links, prices and the workload. Every mistake names its field."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import yaml

from cache_service.core.errors import ConfigError
from cache_service.core.ids import parse_name
from router.core.profile import DecodeRate
from router.core.workload import Lengths, LogNormal
from router.plan import lengths_file, profile_file
from router.plan.planner import Home, Offer, Question

MAX_BYTES = 1 << 20


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section: unknown keys are errors."""


class DecodeSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Decode of one instance under its latency objective: requests in a step, seconds of a step."""

    max_batch: float
    step_s: float


class HomeSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The site that decodes.

    Attributes:
        name: of the site.
        profile: a profile file, or a built-in one (paper:1T/H20, ...).
        instances: SGLang servers, all of one chip; the plan splits them into prefill and decode.
        dollars_per_hour: of one instance.
        decode: replaces or adds the decode rate of the profile.
        can_grow: whether more of the same could be had instead of a second site.
    """

    name: str
    profile: str
    instances: int
    dollars_per_hour: float = 0.0
    decode: DecodeSection | None = None
    can_grow: bool = True


class LinkSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From a remote site to home.

    Attributes:
        gbps: 10^9 bit/s that KV may use.
        rtt_ms: round trip, for the time to the first token.
        dollars_per_gb: egress price of 10^9 bytes.
        dollars_per_hour: of the line itself.
        wire_ratio: bytes on the wire per byte of KV; 1 without compression.
    """

    gbps: float
    rtt_ms: float = 0.0
    dollars_per_gb: float = 0.0
    dollars_per_hour: float = 0.0
    wire_ratio: float = 1.0


class RemoteSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A site that only prefills, as HomeSection."""

    name: str
    profile: str
    instances: int
    link: LinkSection
    dollars_per_hour: float = 0.0


class LogNormalSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """exp(N(mu, sigma)) tokens, truncated to low..high."""

    mu: float
    sigma: float
    low: float = 1.0
    high: float = 1_048_576.0


class TraceSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A JSON-lines file with one prompt length a line, under the key `field`."""

    file: str
    field: str = "input_length"


class HistogramSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Buckets, given here or as a Prometheus histogram `metric` in a file (a saved GET /metrics)."""

    bounds: list[float] = []
    counts: list[float] = []
    file: str = ""
    metric: str = ""


class WorkloadSection(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long prompts and answers are; exactly one of the three distributions.

    Attributes:
        hit_ratio: share (0..1) of a prompt's tokens that is found cached. The lengths given are whole
            prompts; 0 when they are uncached tokens already.
        output_tokens: mean tokens of an answer.
    """

    output_tokens: float
    lognormal: LogNormalSection | None = None
    trace: TraceSection | None = None
    histogram: HistogramSection | None = None
    hit_ratio: float = 0.0


class PlanFile(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    home: HomeSection
    workload: WorkloadSection
    remotes: list[RemoteSection] = []


def load(path: Path) -> Question:
    """Read a plan file and everything it names. Raises ConfigError with the path of the field."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: is longer than {MAX_BYTES} bytes, so no plan file")
    try:
        value = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    return parse(value, path.parent)


def parse(value: object, folder: Path) -> Question:
    """Turn plain data into a question; files are relative to `folder`. Raises ConfigError."""
    try:
        file = msgspec.convert(value, PlanFile)
    except msgspec.ValidationError as error:
        raise ConfigError(_with_path(str(error))) from error
    _check(file)
    home = file.home
    profile = profile_file.load(home.profile, folder, field="home.profile")
    if home.decode is not None:
        profile = replace(profile, decode=DecodeRate(home.decode.max_batch, home.decode.step_s))
    if profile.decode is None:
        raise ConfigError(f"home.decode: is missing, and profile {home.profile!r} has no decode rate")
    return Question(
        home=Home(home.name, profile, home.instances, home.dollars_per_hour, home.can_grow),
        offers=tuple(_offer(remote, i, folder) for i, remote in enumerate(file.remotes)),
        lengths=_lengths(file.workload, folder),
        output_tokens=file.workload.output_tokens,
        hit_ratio=file.workload.hit_ratio,
    )


def _offer(remote: RemoteSection, index: int, folder: Path) -> Offer:
    link = remote.link
    return Offer(
        name=remote.name,
        profile=profile_file.load(remote.profile, folder, field=f"remotes[{index}].profile"),
        instances=remote.instances,
        dollars_per_hour=remote.dollars_per_hour,
        link_bytes_per_s=link.gbps * 1e9 / 8,
        rtt_s=link.rtt_ms / 1e3,
        dollars_per_byte=link.dollars_per_gb / 1e9,
        link_dollars_per_hour=link.dollars_per_hour,
        wire_ratio=link.wire_ratio,
    )


def _lengths(workload: WorkloadSection, folder: Path) -> Lengths:
    given = [n for n in ("lognormal", "trace", "histogram") if getattr(workload, n) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"workload: {len(given)} of lognormal, trace, histogram are given; give exactly one"
        )
    field = f"workload.{given[0]}"
    try:
        if (normal := workload.lognormal) is not None:
            return LogNormal(normal.mu, normal.sigma, normal.low, normal.high)
        if (trace := workload.trace) is not None:
            return lengths_file.trace(folder / trace.file, trace.field, field=field)
        histogram = workload.histogram or HistogramSection()
        if histogram.file:
            return lengths_file.histogram(folder / histogram.file, histogram.metric, field=field)
        return lengths_file.buckets(histogram.bounds, histogram.counts)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None


def _with_path(message: str) -> str:
    """Turn msgspec's "Expected `int` - at `$.a[0].b`" into "a[0].b: expected `int`"."""
    found = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", message, re.DOTALL)
    what, path = (found[1], found[2]) if found else (message, "")
    return f"{path or 'plan file'}: {what[:1].lower()}{what[1:]}"


def _check(file: PlanFile) -> None:
    sites: Sequence[HomeSection | RemoteSection] = (file.home, *file.remotes)
    fields = ("home", *(f"remotes[{i}]" for i in range(len(file.remotes))))
    for field, site in zip(fields, sites, strict=True):
        parse_name(site.name, field=f"{field}.name")
        _in_range(f"{field}.instances", site.instances, 1, 100_000)
        _in_range(f"{field}.dollars_per_hour", site.dollars_per_hour, 0, 1e6)
    names = [site.name for site in sites]
    for field, name in zip(fields, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"{field}.name: {name!r} is given twice; every site has its own name")
    for i, remote in enumerate(file.remotes):
        link = remote.link
        _in_range(f"remotes[{i}].link.gbps", link.gbps, 0, 1e6)
        _in_range(f"remotes[{i}].link.rtt_ms", link.rtt_ms, 0, 1e5)
        _in_range(f"remotes[{i}].link.dollars_per_gb", link.dollars_per_gb, 0, 1e3)
        _in_range(f"remotes[{i}].link.dollars_per_hour", link.dollars_per_hour, 0, 1e6)
        _in_range(f"remotes[{i}].link.wire_ratio", link.wire_ratio, 1e-3, 10)
    if file.home.decode is not None:
        _in_range("home.decode.max_batch", file.home.decode.max_batch, 1e-3, 1e6)
        _in_range("home.decode.step_s", file.home.decode.step_s, 1e-6, 1e3)
    _in_range("workload.output_tokens", file.workload.output_tokens, 1, 1e7)
    _in_range("workload.hit_ratio", file.workload.hit_ratio, 0, 0.999)


def _in_range(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{field}: {value:g} is not in {low:g}..{high:g}")
