"""The router's configuration file: JSON or YAML, strict, every mistake named with its path.

Decides nothing at run time. Unknown keys, wrong types, duplicate or dangling names and impossible values are
refused before a socket is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
import yaml

from cache_service.core.addresses import check_plain, split_address
from cache_service.core.errors import ConfigError
from cache_service.core.ids import parse_name
from router.core.decision import PolicyName, RequestClass
from router.core.profile import ModelProfile, from_dict

T = TypeVar("T")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section: unknown keys are errors."""


class ModelConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The one model that this router serves.

    Attributes:
        name: served model name, also the index namespace.
        path: directory with tokenizer.json and tokenizer_config.json.
        context_length: as the workers were started with, tokens.
        page_size: tokens per KV page of the workers.
    """

    name: str
    path: str
    context_length: int
    page_size: int


class PolicyConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Routing rule and its parameters (docs/routing.md); a rule reads its own only."""

    name: str = "prfaas"
    threshold_tokens: int = 0
    max_link_wait_s: float = 2.0
    margin_ratio: float = 0.05
    margin_s: float = 0.01
    recompute_weight: float = 4.0
    crowd_weight: float = 0.3
    cost_weight_s: float = 0.0
    balance_abs: int = 8
    balance_rel: float = 1.5


class ClassSeconds(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds for each class of requests."""

    interactive: float
    standard: float
    batch: float


class AdmissionConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Admission queue (docs/routing.md).

    `link_horizon_s`: bytes under way on a link are at most what it carries in this time.
    """

    waiting: int = 1024
    waiting_per_tenant: int = 256
    ttft_s: ClassSeconds = ClassSeconds(interactive=2.0, standard=10.0, batch=120.0)
    max_wait_s: ClassSeconds = ClassSeconds(interactive=10.0, standard=60.0, batch=300.0)
    link_horizon_s: float = 4.0


class TuneConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Long loop (docs/routing.md): needs profiles, with a decode rate for the home site's decode workers."""

    enabled: bool = False
    apply: bool = True
    period_s: float = 60.0
    min_requests: int = 200
    min_gain: float = 0.02
    damping: float = 0.5
    cooldown_s: float = 900.0


class WorkerConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One SGLang server. Prefill workers need the bootstrap address as decode workers reach it.

    Attributes:
        telemetry_url: where its KV transfers say how the links are (GET /links), "" when nobody asks.
        profile: key of `profiles`, what the model costs on it; "" when not known.
        kv_tokens: decode: tokens that its KV memory holds, the budget of admission; 0 for no budget.
    """

    worker_id: str
    site: str
    role: Literal["prefill", "decode"]
    url: str
    bootstrap_host: str = ""
    bootstrap_port: int = 0
    telemetry_url: str = ""
    profile: str = ""
    kv_tokens: int = 0


class LinkConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Directed link between sites, in 10^9 bit/s, and the price of 10^9 bytes leaving `src`."""

    src: str
    dst: str
    gbps: float
    ceiling_gbps: float | None = None
    price_per_gb: float = 0.0


class TimeoutConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds. `first_byte_s` and `total_s` count from the arrival of the request."""

    connect_s: float = 5.0
    first_byte_s: float = 300.0
    total_s: float = 600.0
    index_s: float = 0.25
    abort_s: float = 5.0
    drain_s: float = 30.0


class LimitConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds on memory: request body, non-streamed answer, prompts being tokenised at once."""

    body_bytes: int = 32 << 20
    answer_bytes: int = 256 << 20
    tokenizer_threads: int = 2


class HealthConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Breaker of one worker: failures in a row that open it, cool-down in seconds."""

    failures: int = 3
    cooldown_s: float = 2.0
    max_cooldown_s: float = 30.0


class IndexTlsConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Mutual TLS to the cache services: PEM files of the authority, our certificate and its key.

    `server_name` is the name in their certificates, such as the site's, when it is not the host dialed.
    """

    ca: str
    cert: str
    key: str
    server_name: str = ""


class RouterConfig(_Strict, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file.

    Attributes:
        listen: host:port of the HTTP API.
        site: the site whose decode workers this router serves.
        index: host:port of the cache service, or of several (a name may stand for several too); None to
            route without an index.
        index_tls, index_insecure: one of them is needed for an index beyond loopback.
        early_first_token: send the first token of a stream when the prefill worker has it, without waiting
            for the KV transfer, wherever decode's own stream is sure to begin with it.
    """

    listen: str
    site: str
    model: ModelConfig
    workers: list[WorkerConfig]
    policy: PolicyConfig = PolicyConfig()
    admission: AdmissionConfig = AdmissionConfig()
    tune: TuneConfig = TuneConfig()
    profiles: dict[str, str | dict[str, Any]] = {}
    decisions: int = 256
    index: str | list[str] | None = None
    index_tls: IndexTlsConfig | None = None
    index_insecure: bool = False
    early_first_token: bool = True
    links: list[LinkConfig] = []
    timeouts: TimeoutConfig = TimeoutConfig()
    limits: LimitConfig = LimitConfig()
    health: HealthConfig = HealthConfig()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


def load(path: Path) -> RouterConfig:
    """Read and check a configuration file (.json, .yaml or .yml). Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: is not valid JSON or YAML: {error}") from error
    return parse(data)


def parse(data: object) -> RouterConfig:
    """Convert plain data to a checked configuration. Raises ConfigError with the path of the field."""
    try:
        config = msgspec.convert(data, RouterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_with_path(str(error))) from error
    _check_values(config)
    _check_workers(config)
    _check_links(config)
    _check_profiles(config)
    return config


def profiles_of(config: RouterConfig) -> dict[str, ModelProfile]:
    """Return the model profiles by name, those in files read. Raises ConfigError naming the field."""
    found = {}
    for name, value in config.profiles.items():
        field = f"profiles.{name}"
        if isinstance(value, str):
            try:
                value = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ConfigError(f"{field}: cannot be read: {error}") from error
        found[name] = from_dict(value, field)
    return found


def _with_path(message: str) -> str:
    """Turn msgspec's "Expected `int` - at `$.a[0].b`" into "a[0].b: expected `int`"."""
    found = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", message, re.DOTALL)
    what, path = (found[1], found[2]) if found else (message, "")
    return f"{path or 'configuration'}: {what[:1].lower()}{what[1:]}"


def _check_values(config: RouterConfig) -> None:
    split_address(config.listen, field="listen")
    if config.index is not None:
        addresses = [config.index] if isinstance(config.index, str) else config.index
        if not 1 <= len(addresses) <= 64:
            raise ConfigError(f"index: {len(addresses)} addresses; give 1 to 64, or leave it out")
        for address in addresses:
            check_plain("index", address, tls=config.index_tls is not None, insecure=config.index_insecure)
    parse_name(config.site, field="site")
    if not config.model.name:
        raise ConfigError("model.name: is empty; give the served model name")
    if config.policy.name not in list(PolicyName):
        raise ConfigError(f"policy.name: {config.policy.name!r} is not one of {', '.join(PolicyName)}")
    if config.policy.threshold_tokens < 0:
        raise ConfigError(f"policy.threshold_tokens: {config.policy.threshold_tokens} is below 0")
    _in_range("policy.max_link_wait_s", config.policy.max_link_wait_s, 1e-3, 3600)
    _in_range("policy.margin_ratio", config.policy.margin_ratio, 0, 1)
    weights = ("recompute_weight", "crowd_weight", "cost_weight_s")
    for name in ("margin_s", *weights, "balance_abs", "balance_rel"):
        _in_range(f"policy.{name}", getattr(config.policy, name), 0, 1e6)
    _in_range("admission.waiting", config.admission.waiting, 1, 1 << 20)
    _in_range("admission.waiting_per_tenant", config.admission.waiting_per_tenant, 1, 1 << 20)
    _in_range("admission.link_horizon_s", config.admission.link_horizon_s, 1e-3, 3600)
    for field in ("ttft_s", "max_wait_s"):
        for name in RequestClass:
            seconds = getattr(getattr(config.admission, field), name)
            _in_range(f"admission.{field}.{name}", seconds, 1e-3, 86400)
    _in_range("tune.period_s", config.tune.period_s, 0.1, 86400)
    _in_range("tune.min_requests", config.tune.min_requests, 1, 1 << 30)
    _in_range("tune.min_gain", config.tune.min_gain, 0, 10)
    _in_range("tune.damping", config.tune.damping, 0.01, 1)
    _in_range("tune.cooldown_s", config.tune.cooldown_s, 0, 1e6)
    _in_range("decisions", config.decisions, 0, 1 << 20)
    _in_range("model.context_length", config.model.context_length, 2, 1 << 30)
    _in_range("model.page_size", config.model.page_size, 1, 65536)
    for name in ("connect_s", "first_byte_s", "total_s", "index_s", "abort_s"):
        _in_range(f"timeouts.{name}", getattr(config.timeouts, name), 1e-3, 86400)
    _in_range("timeouts.drain_s", config.timeouts.drain_s, 0, 86400)
    _in_range("limits.body_bytes", config.limits.body_bytes, 1024, 1 << 30)
    _in_range("limits.answer_bytes", config.limits.answer_bytes, 1024, 1 << 32)
    _in_range("limits.tokenizer_threads", config.limits.tokenizer_threads, 1, 64)
    _in_range("health.failures", config.health.failures, 1, 1000)
    _in_range("health.cooldown_s", config.health.cooldown_s, 1e-3, 3600)
    _in_range("health.max_cooldown_s", config.health.max_cooldown_s, config.health.cooldown_s, 3600)


def _in_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        shown = [f"{number:g}" if isinstance(number, float) else str(number) for number in (value, low, high)]
        raise ConfigError(f"{field}: {shown[0]} is not in {shown[1]}..{shown[2]}")


def _check_workers(config: RouterConfig) -> None:
    for index, worker in enumerate(config.workers):
        field = f"workers[{index}]"
        parse_name(worker.worker_id, field=f"{field}.worker_id")
        parse_name(worker.site, field=f"{field}.site")
        _check_url(worker.url, field=f"{field}.url")
        if worker.role == "prefill":
            if not worker.bootstrap_host:
                raise ConfigError(f"{field}.bootstrap_host: is missing; decode workers dial it")
            _in_range(f"{field}.bootstrap_port", worker.bootstrap_port, 1, 65535)
    _refuse_duplicates("worker_id", ((f"workers[{i}]", w.worker_id) for i, w in enumerate(config.workers)))
    _refuse_duplicates("url", ((f"workers[{i}]", w.url.rstrip("/")) for i, w in enumerate(config.workers)))
    if not any(w.role == "decode" and w.site == config.site for w in config.workers):
        raise ConfigError(f"workers: none with role decode in site {config.site!r}, which this router serves")
    if not any(w.role == "prefill" for w in config.workers):
        raise ConfigError("workers: none with role prefill; prefill and decode run on separate workers")


def _check_url(url: str, *, field: str) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{field}: {url!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"{field}: {url!r} is not http(s)://host:port")
    if parts.query or parts.fragment or parts.username or parts.path not in ("", "/"):
        raise ConfigError(f"{field}: {url!r} must be http(s)://host:port and nothing else")


def _refuse_duplicates(key: str, entries: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for field, value in entries:
        if value in seen:
            raise ConfigError(f"{field}.{key}: {value!r} is already used by {seen[value]}")
        seen[value] = field


def _check_links(config: RouterConfig) -> None:
    sites = {worker.site for worker in config.workers} | {config.site}
    for index, link in enumerate(config.links):
        field = f"links[{index}]"
        for end in ("src", "dst"):
            site = getattr(link, end)
            if site not in sites:
                raise ConfigError(f"{field}.{end}: no site {site!r}; sites are {', '.join(sorted(sites))}")
        if link.src == link.dst:
            raise ConfigError(f"{field}: src and dst are both {link.src!r}")
        _in_range(f"{field}.gbps", link.gbps, 1e-6, 1e6)
        if link.ceiling_gbps is not None:
            _in_range(f"{field}.ceiling_gbps", link.ceiling_gbps, 1e-6, 1e6)
        _in_range(f"{field}.price_per_gb", link.price_per_gb, 0, 1e6)
    _refuse_duplicates("src", ((f"links[{i}]", f"{x.src}->{x.dst}") for i, x in enumerate(config.links)))
    reachable = {link.src for link in config.links if link.dst == config.site} | {config.site}
    for index, worker in enumerate(config.workers):
        if worker.role == "prefill" and worker.site not in reachable:
            raise ConfigError(
                f"workers[{index}].site: there is no link from {worker.site!r} to {config.site!r}, so this "
                "worker could never be used; add it to links"
            )


def _check_profiles(config: RouterConfig) -> None:
    known = profiles_of(config)
    for index, worker in enumerate(config.workers):
        field = f"workers[{index}]"
        _in_range(f"{field}.kv_tokens", worker.kv_tokens, 0, 1 << 40)
        if worker.profile and worker.profile not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"{field}.profile: no profile {worker.profile!r}; profiles are {names}")
        if config.policy.name == PolicyName.TTFT and worker.role == "prefill" and not worker.profile:
            raise ConfigError(f"{field}.profile: is missing; policy ttft predicts times from it")
