"""The fleet file: one YAML document that describes sites, workers, links, model, routing and transfer.

Decides what a fleet may look like; starts nothing. Every mistake is a ConfigError that names the field by its
path and says what is accepted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from cache_service.core.errors import ConfigError
from cache_service.core.ids import parse_name

#: What `model.path: tiny:FAMILY` builds; the families themselves are in prfaas_sglang/cpu/models.py.
TINY = "tiny:"
TINY_FAMILIES = ("dense", "gdn", "gdn-moe", "swa")

Role = Literal["prefill", "decode"]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section: unknown keys are errors."""


class Model(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model that every worker serves.

    Attributes:
        path: checkpoint folder, or tiny:{dense,gdn,gdn-moe,swa} to build a tiny one.
        name: served name; by default the folder's name.
    """

    path: str
    name: str = ""

    @property
    def served_name(self) -> str:
        """Name that clients use."""
        return self.name or self.path.removeprefix(TINY).rstrip("/").rpartition("/")[2] or "model"


class Engine(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How SGLang is started on every worker.

    Attributes:
        device: cpu (forked from one import, torch kernels) or cuda.
        page_size: tokens per KV page.
        context_length: longest prompt plus answer, tokens.
        max_total_tokens: KV pool size, tokens.
        chunked_prefill_size: tokens computed, and sent, at a time; also the spacing of state snapshots.
        max_running_requests: requests decoded together.
        ready_timeout_s: how long a worker may take to start.
        args: more SGLang flags, verbatim.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    page_size: int = 64
    context_length: int = 4096
    max_total_tokens: int = 16384
    chunked_prefill_size: int = 512
    max_running_requests: int = 8
    ready_timeout_s: float = 300.0
    args: list[str] = []


class Transfer(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How KV moves: our backend, or SGLang's stock TCP one for comparison."""

    backend: Literal["prfaas", "mooncake_tcp"] = "prfaas"


class Routing(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prompts whose uncached part is longer than `threshold_tokens` are prefilled in another site."""

    policy: Literal["prfaas", "local", "remote"] = "prfaas"
    threshold_tokens: int = 512


class Worker(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One SGLang server. Ports are chosen when they are 0.

    Attributes:
        name: unique in the fleet.
        role: prefill or decode.
        host: address it listens on and is reached at.
        port: HTTP port.
        bootstrap_port: where a prefill worker accepts decode workers.
        args: more SGLang flags for this worker.
    """

    name: str
    role: Role
    host: str = "127.0.0.1"
    port: int = 0
    bootstrap_port: int = 0
    args: list[str] = []


class Site(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A datacenter and its workers."""

    name: str
    workers: list[Worker]


class Link(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A directed link; KV flows from the prefill site to the decode site. `gbps` is 10^9 bit/s."""

    src: str
    dst: str
    gbps: float


class Router(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The router: its site's decode workers answer the clients. By default the first site that has some."""

    site: str = ""
    host: str = "127.0.0.1"
    port: int = 0


class CacheService(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The cache service, which stands in the router's site."""

    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0


class Fleet(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    model: Model
    sites: list[Site]
    engine: Engine = Engine()
    transfer: Transfer = Transfer()
    routing: Routing = Routing()
    links: list[Link] = []
    router: Router = Router()
    cache_service: CacheService = CacheService()

    def router_site(self) -> str:
        """The site whose decode workers answer."""
        if self.router.site:
            return self.router.site
        return next(s.name for s in self.sites if any(w.role == "decode" for w in s.workers))

    def workers(self) -> list[tuple[Site, Worker]]:
        """Every worker with its site, in file order."""
        return [(site, worker) for site in self.sites for worker in site.workers]


def load(path: Path) -> Fleet:
    """Read and check a fleet file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, where=str(path))


def parse(text: str, *, where: str = "fleet file") -> Fleet:
    """Check the text of a fleet file. Raises ConfigError naming `where` and the field."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: is empty or not a mapping; it needs at least model and sites")
    try:
        fleet = msgspec.convert(data, Fleet)
        _check(fleet)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_with_path(str(error))}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return fleet


def _with_path(message: str) -> str:
    """Turn msgspec's "Expected `int` - at `$.a[0].b`" into "a[0].b: expected `int`"."""
    found = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", message, re.DOTALL)
    what, path = (found[1], found[2]) if found else (message, "")
    return f"{path or 'fleet'}: {what[:1].lower()}{what[1:]}"


def _check(fleet: Fleet) -> None:
    _check_engine(fleet)
    _check_model(fleet.model)
    sites = _unique([(f"sites[{i}].name", site.name) for i, site in enumerate(fleet.sites)])
    _unique(
        [
            (f"sites[{i}].workers[{j}].name", worker.name)
            for i, site in enumerate(fleet.sites)
            for j, worker in enumerate(site.workers)
        ]
    )
    _check_ports(fleet)
    if not any(w.role == "decode" for _, w in fleet.workers()):
        raise ConfigError("sites: no worker has role decode; at least one site must decode")
    if not any(w.role == "prefill" for _, w in fleet.workers()):
        raise ConfigError("sites: no worker has role prefill; at least one site must prefill")
    for i, link in enumerate(fleet.links):
        for side in ("src", "dst"):
            if getattr(link, side) not in sites:
                raise ConfigError(
                    f"links[{i}].{side}: no site is named {getattr(link, side)!r}; sites: {', '.join(sites)}"
                )
        if not 0 < link.gbps <= 100_000:
            raise ConfigError(f"links[{i}].gbps: {link.gbps:g} is not in 0..100000")
    site = fleet.router.site
    if site and site not in sites:
        raise ConfigError(f"router.site: no site is named {site!r}; sites: {', '.join(sites)}")
    if not any(w.role == "decode" for s, w in fleet.workers() if s.name == fleet.router_site()):
        raise ConfigError(f"router.site: site {fleet.router_site()!r} has no decode worker")


def _check_engine(fleet: Fleet) -> None:
    engine = fleet.engine
    for name, low, high in (
        ("page_size", 1, 65536),
        ("context_length", 2, 1 << 30),
        ("max_total_tokens", 2, 1 << 40),
        ("chunked_prefill_size", 1, 1 << 30),
        ("max_running_requests", 1, 1 << 20),
        ("ready_timeout_s", 1, 86400),
    ):
        value = getattr(engine, name)
        if not low <= value <= high:
            raise ConfigError(f"engine.{name}: {value} is not in {low}..{high}")
    if engine.chunked_prefill_size % engine.page_size:
        raise ConfigError(
            f"engine.chunked_prefill_size: {engine.chunked_prefill_size} is not a multiple of "
            f"page_size {engine.page_size}"
        )
    if fleet.routing.threshold_tokens < 0:
        raise ConfigError(f"routing.threshold_tokens: {fleet.routing.threshold_tokens} is below 0")


def _check_model(model: Model) -> None:
    if model.path.startswith(TINY):
        family = model.path.removeprefix(TINY)
        if family not in TINY_FAMILIES:
            raise ConfigError(
                f"model.path: {family!r} is not a tiny family; accepted: "
                + ", ".join(TINY + name for name in TINY_FAMILIES)
            )
        return
    folder = Path(model.path).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path: {model.path} has no config.json; give a checkpoint folder, or {TINY}FAMILY"
        )


def _check_ports(fleet: Fleet) -> None:
    taken: dict[tuple[str, int], str] = {}
    fixed = [
        ("router.port", fleet.router.host, fleet.router.port),
        ("cache_service.port", fleet.cache_service.host, fleet.cache_service.port),
        ("cache_service.metrics_port", fleet.cache_service.host, fleet.cache_service.metrics_port),
    ]
    for i, site in enumerate(fleet.sites):
        for j, worker in enumerate(site.workers):
            field = f"sites[{i}].workers[{j}]"
            fixed.append((f"{field}.port", worker.host, worker.port))
            fixed.append((f"{field}.bootstrap_port", worker.host, worker.bootstrap_port))
    for field, host, port in fixed:
        if not 0 <= port <= 65535:
            raise ConfigError(f"{field}: {port} is not a port; accepted: 1..65535, 0 to choose a free one")
        if port and (host, port) in taken:
            raise ConfigError(f"{field}: {host}:{port} is also {taken[host, port]}")
        if port:
            taken[host, port] = field


def _unique(names: list[tuple[str, str]]) -> list[str]:
    """Check that the names are names and differ; return them."""
    seen: dict[str, str] = {}
    for field, name in names:
        parse_name(name, field=field)
        if name in seen:
            raise ConfigError(f"{field}: {name!r} is also {seen[name]}")
        seen[name] = field
    return list(seen)
