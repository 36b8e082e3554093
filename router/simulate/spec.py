"""The scenario file of `prfaas simulate`, checked: sites, links, workload, policy (docs/simulation.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from cache_service.core.errors import ConfigError
from router.core.decision import Policy, PolicyName
from router.core.profile import DecodeRate, KvShape, ModelProfile, Quadratic, from_dict
from router.core.profiles import case_study, table3

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0)]
AtLeastOne = Annotated[float, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all: unknown keys are refused."""


class EngineSpec(Spec, frozen=True):
    """How workers compute.

    Attributes:
        kind: `disaggregated`: prefill and decode workers; `mixed`: each worker does both, with the pass times
            of NVIDIA Dynamo's simulated engine.
        block_tokens: tokens of a block of the prefix cache.
        cache_blocks: blocks that fit a worker, those of running requests included.
        chunk_tokens: of chunked prefill.
        max_batch: answers at once (`mixed`; a decode worker's comes from its profile).
        hybrid: prefixes are usable only where the linear state was kept, at ends of chunks and prompts.
        state_slots: how many such states a worker keeps.
    """

    kind: Literal["disaggregated", "mixed"] = "disaggregated"
    block_tokens: Count = 512
    cache_blocks: Count = 8192
    chunk_tokens: Count = 8192
    max_batch: Count = 256
    hybrid: bool = False
    state_slots: Count = 1024


class SiteSpec(Spec, frozen=True):
    """A site: `profile` is h200, h20, dynamo, a model of Table 3, or the profile itself (mapping)."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    prefill: CountOrNone = 0
    decode: CountOrNone = 0
    profile: str | dict[str, Any] = "h20"


class LinkSpec(Spec, frozen=True):
    """One directed link.

    Attributes:
        gbps: configured capacity, 10^9 bits a second.
        low_gbps, high_gbps: what it really carries moves between these, a reflected random walk with a step
            every `period_s`; both 0: it carries `gbps`.
        rtt_s, jitter_s: round trip, and the mean of what is added to it, exponentially distributed.
        loss: share of the bytes that has to be sent again.
        outages: (start_s, seconds) in which nothing gets through.
        both: the same link the other way round as well.
    """

    src: str
    dst: str
    gbps: Positive
    low_gbps: NotNegative = 0.0
    high_gbps: NotNegative = 0.0
    period_s: Positive = 1.0
    rtt_s: NotNegative = 0.03
    jitter_s: NotNegative = 0.0
    loss: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    outages: tuple[tuple[float, float], ...] = ()
    price_per_gb: NotNegative = 0.0
    both: bool = False


class SharedCores(Spec, frozen=True):
    """Workers that run on the same cores, as a test fleet on one machine does.

    Attributes:
        prefill, decode, both: how many times as long a prefill takes beside another prefill, beside decoding,
            beside both. A decode step and `request_s` are slowed alike.
    """

    prefill: AtLeastOne = 1.0
    decode: AtLeastOne = 1.0
    both: AtLeastOne = 1.0


class RoleChange(Spec, frozen=True):
    """At `at_s`, `count` workers of a site drain, are down for `cost_s` with empty caches, and do `to`."""

    at_s: NotNegative
    site: str
    to: Literal["prefill", "decode"]
    count: Count = 1
    cost_s: NotNegative = 30.0


class WorkloadSpec(Spec, frozen=True):
    """What comes in.

    Attributes:
        kind: `poisson`, `bursty` (two-state modulated Poisson), `trace` (Mooncake's JSONL), `agents`.
        requests: how many in all; for a trace 0 is all of it; agents come until that many calls are planned.
        rate: requests a second over all homes (`agents`: sessions a second).
        trace: path of the JSONL file; `speed` divides its times.
        homes: sites that clients come in at, in equal shares; empty: every site with decode workers. Poisson
            and bursty requests draw theirs; a session keeps its own; a trace's request takes the one that
            its first own block falls on, since no public trace names one.
        mu, sigma, low, high: log-normal prompt length (the paper's workload).
        output_tokens: of every answer (traces have their own).
        burst_ratio, burst_s, calm_s: bursty: rate in a burst over that in the calm, mean lengths of both.
        shared: share of the prompts that begin with a shared prefix; `prefixes` of them, Zipf-distributed,
            `prefix_share` of the prompt's length.
        calls, think_s, tool_s, system_tokens, systems, first_tokens, grown_tokens: agents: mean calls of a
            session, mean pauses (one in `turn_calls` calls waits for a person), shared system prompts, and
            what the first and every other call add; above `compact_tokens` a session begins anew after its
            system prompt.
        subagents: share of calls that send off an agent of their own, with the same system prompt.
    """

    kind: Literal["poisson", "bursty", "trace", "agents"] = "poisson"
    requests: CountOrNone = 10_000
    rate: Positive = 1.0
    trace: str = ""
    speed: Positive = 1.0
    homes: tuple[str, ...] = ()
    mu: float = 9.90
    sigma: Positive = 1.0
    low: Count = 128
    high: Count = 131_072
    output_tokens: Count = 1024
    burst_ratio: Annotated[float, msgspec.Meta(ge=1)] = 4.0
    burst_s: Positive = 20.0
    calm_s: Positive = 60.0
    shared: Share = 0.0
    prefixes: Count = 64
    prefix_share: Share = 0.5
    calls: Annotated[float, msgspec.Meta(ge=1)] = 31.0
    think_s: NotNegative = 60.0
    tool_s: NotNegative = 4.0
    turn_calls: Count = 10
    system_tokens: Count = 12_288
    systems: Count = 8
    first_tokens: Count = 16_384
    grown_tokens: Count = 6000
    compact_tokens: Count = 112_000
    subagents: Share = 0.03


class Scenario(Spec, frozen=True):
    """A whole run.

    Attributes:
        index_delay_s: how far the router's index is behind the caches.
        admission: requests pass the router's admission queue; `link_horizon_s` of a link may be under way.
        slo_ttft_s: what counts as good.
        transfer_timeout_s: a transfer that takes longer is given up; the request is prefilled at home.
        request_s: what every request takes beside queues, prefill and link: HTTP, tokenising, scheduling.
        shared_cores: all workers run on one machine; without it each has cores of its own.
    """

    sites: tuple[SiteSpec, ...]
    links: tuple[LinkSpec, ...] = ()
    engine: EngineSpec = EngineSpec()
    workload: WorkloadSpec = WorkloadSpec()
    policy: dict[str, Any] = {}
    role_changes: tuple[RoleChange, ...] = ()
    index_delay_s: NotNegative = 0.05
    admission: bool = True
    link_horizon_s: Positive = 4.0
    slo_ttft_s: Positive = 10.0
    transfer_timeout_s: Positive = 60.0
    request_s: NotNegative = 0.0
    shared_cores: SharedCores | None = None
    seed: int = 0


#: Dynamo's simulated engine over a chunk of 8,192 tokens: its quadratic is inside one pass, so over whole
#: prompts it is a straight line.
DYNAMO = ModelProfile(
    "Dynamo's simulated engine",
    KvShape(131_072.0),
    Quadratic(0.0165, 1.518344e-5 + 4.209989e-10 * 8192 + 0.0165 / 8192),
    DecodeRate(256, 0.01),
)


def profile_of(value: str | dict[str, Any], where: str) -> ModelProfile:
    """Return a site's profile. Raises ConfigError naming the accepted values."""
    if isinstance(value, dict):
        return from_dict(value, where)
    known = {"h200": case_study.H200, "h20": case_study.H20, "dynamo": DYNAMO}
    if value in known:
        return known[value]
    if value in table3.PHI_GBPS:
        return table3.profile(value)
    names = ", ".join([*known, *table3.PHI_GBPS])
    raise ConfigError(f"{where}: {value!r}; accepted are {names}, or a profile as a mapping")


def policy_of(values: dict[str, Any]) -> Policy:
    """Return the policy. Raises ConfigError."""
    unknown = [key for key in values if key not in Policy.__dataclass_fields__]
    if unknown:
        accepted = ", ".join(Policy.__dataclass_fields__)
        raise ConfigError(f"policy.{unknown[0]}: unknown; accepted are {accepted}")
    try:
        return msgspec.convert({**values, "name": values.get("name", "ttft")}, Policy, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(p.value for p in PolicyName)
        raise ConfigError(f"policy: {error}; names are {names}") from None


def check(scenario: Scenario) -> Scenario:
    """Return the scenario if its parts fit each other. Raises ConfigError."""
    names = [site.name for site in scenario.sites]
    if not names or len(set(names)) != len(names):
        raise ConfigError("sites: at least one, each with a name of its own")
    mixed = scenario.engine.kind == "mixed"
    for i, site in enumerate(scenario.sites):
        profile = profile_of(site.profile, f"sites[{i}].profile")
        if mixed and site.decode:
            raise ConfigError(f"sites[{i}].decode: mixed workers do both; give them as prefill")
        if site.decode and profile.decode is None:
            raise ConfigError(f"sites[{i}].profile: {profile.name} says nothing of decode")
    if not any(site.prefill for site in scenario.sites):
        raise ConfigError("sites: none has prefill workers")
    if mixed and scenario.shared_cores is not None:
        raise ConfigError("shared_cores: accepted with engine.kind disaggregated only")
    _check_links(scenario.links, names)
    decoding = {s.name for s in scenario.sites if s.decode or (mixed and s.prefill)}
    for home in scenario.workload.homes:
        if home not in decoding:
            raise ConfigError(
                f"workload.homes: {home!r} does not decode; accepted: {', '.join(sorted(decoding))}"
            )
    if not decoding:
        raise ConfigError("sites: none has decode workers")
    if scenario.workload.kind == "trace" and not scenario.workload.trace:
        raise ConfigError("workload.trace: missing; the path of a JSONL file")
    for i, change in enumerate(scenario.role_changes):
        if change.site not in names or mixed:
            raise ConfigError(f"role_changes[{i}].site: accepted are disaggregated sites: {', '.join(names)}")
    policy_of(scenario.policy)
    return scenario


def _check_links(links: tuple[LinkSpec, ...], names: list[str]) -> None:
    for i, link in enumerate(links):
        if link.src not in names or link.dst not in names or link.src == link.dst:
            raise ConfigError(f"links[{i}]: src and dst must be two of {', '.join(names)}")
        if link.low_gbps > link.high_gbps:
            raise ConfigError(f"links[{i}].low_gbps: more than high_gbps")


def load(path: Path, **changes: Any) -> Scenario:
    """Read a scenario file; `changes` replace top-level keys. Raises ConfigError naming the field."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a mapping")
    return parse({**value, **changes})


def parse(value: dict[str, Any]) -> Scenario:
    """Return the scenario that plain values describe. Raises ConfigError naming the field."""
    try:
        return check(msgspec.convert(value, Scenario))
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
