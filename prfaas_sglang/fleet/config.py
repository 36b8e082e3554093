"""The fleet file: one YAML document that describes sites, workers, links, model, routing and transfer.

Decides what a fleet may look like; starts nothing. Every mistake is a ConfigError that names the field by its
path and says what is accepted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from cache_service.core.addresses import is_loopback
from cache_service.core.errors import ConfigError
from cache_service.core.ids import parse_name
from prfaas_sglang.config import ENVIRONMENT_VARIABLE, WorkerConfig, check_encryption
from prfaas_sglang.fleet.explain import StrictLoader, explain
from prfaas_sglang.fleet.routing import Admission, Link, Routing, Tune, check_profile, check_ranges

#: What `model.path: tiny:FAMILY` builds; the families themselves are in prfaas_sglang/cpu/models.py.
TINY = "tiny:"
TINY_FAMILIES = ("dense", "gdn", "gdn-moe", "swa")

#: Keys of `transfer` that are passed on to every worker as they are.
OPTIONS = ("frame_bytes", "staging_bytes", "connections", "layerwise", "compression")
#: What `transfer.tls: auto` is.
AUTO = "auto"

Role = Literal["prefill", "decode"]

#: Names (and logs) of the processes beside the workers.
OTHER_PROCESSES = ("router", "cache-service", "zygote", "model", "reference")

#: SGLang flags that follow from other fields of the file: in `args` they would contradict the launcher.
OWN_FLAGS = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--served-model-name": "model.name",
    "--device": "engine.device",
    "--page-size": "engine.page_size",
    "--context-length": "engine.context_length",
    "--max-total-tokens": "engine.max_total_tokens",
    "--chunked-prefill-size": "engine.chunked_prefill_size",
    "--max-running-requests": "engine.max_running_requests",
    "--host": "sites[].workers[].host",
    "--port": "sites[].workers[].port",
    "--disaggregation-mode": "sites[].workers[].role",
    "--disaggregation-transfer-backend": "transfer.backend",
    "--disaggregation-bootstrap-port": "sites[].workers[].bootstrap_port",
    "--kv-events-config": "nothing: the launcher connects the cache service",
}


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


class TransferTls(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Mutual TLS between workers: PEM files, `{site}` in a path stands for the worker's site.

    A certificate must name its site as a DNS entry of its subject alternative names.
    """

    ca: str
    cert: str
    key: str

    def of_site(self, site: str) -> dict[str, str]:
        """The files of one site's workers."""
        paths = {"ca": self.ca, "cert": self.cert, "key": self.key}
        return {
            name: str(Path(p.replace("{site}", site)).expanduser().resolve()) for name, p in paths.items()
        }


class Transfer(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How KV moves. Exactly one of `tls` and `insecure` is given.

    Attributes:
        backend: prfaas, or mooncake_tcp: SGLang's stock TCP backend, for comparison.
        frame_bytes, staging_bytes, connections, layerwise, compression: passed on to every worker
            (prfaas_sglang/config.py has the defaults); prfaas only.
        tls: encrypts KV between the workers and has both sides show certificates; prfaas only. auto makes
            an authority and certificates for every start, in the run directory.
        insecure: true sends KV over plain TCP.
    """

    backend: Literal["prfaas", "mooncake_tcp"] = "prfaas"
    frame_bytes: int | None = None
    staging_bytes: int | None = None
    connections: int | None = None
    layerwise: bool | None = None
    compression: Literal["none", "lossless", "fp8"] | None = None
    tls: TransferTls | Literal["auto"] | None = None
    insecure: bool = False

    def tls_of(self, site: str, certificates: Path) -> dict[str, str] | None:
        """The PEM files of one site's workers; `certificates` is where auto puts them."""
        tls = self.tls
        if tls == AUTO:
            names = {"ca": "ca.pem", "cert": "{site}.pem", "key": "{site}.key"}
            tls = TransferTls(**{name: str(certificates / file) for name, file in names.items()})
        return tls and tls.of_site(site)

    def worker_options(self, site: str, certificates: Path) -> dict[str, Any]:
        """What is passed on to every worker of a site."""
        given: dict[str, Any] = {name: getattr(self, name) for name in OPTIONS}
        given |= {"tls": self.tls_of(site, certificates), "insecure": self.insecure or None}
        return {name: value for name, value in given.items() if value is not None}

    def over(self, backend: Literal["prfaas", "mooncake_tcp"]) -> Transfer:
        """The same over another backend; the stock one has no options and no encryption."""
        if backend == self.backend:
            return self
        if backend == "prfaas":
            return msgspec.structs.replace(self, backend=backend)
        return Transfer(backend=backend, insecure=True)


class Worker(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One SGLang server. Ports are chosen when they are 0.

    Attributes:
        name: unique in the fleet.
        role: prefill or decode.
        host: address it listens on and is reached at.
        port: HTTP port.
        bootstrap_port: where a prefill worker accepts decode workers.
        gpus: GPU indices of this worker (device cuda); by default the n-th worker has the n-th GPU.
        profile: file of its model profile (`prfaas profile`), "" when not known.
        args: more SGLang flags for this worker.
    """

    name: str
    role: Role
    host: str = "127.0.0.1"
    port: int = 0
    bootstrap_port: int = 0
    gpus: list[int] = []
    profile: str = ""
    args: list[str] = []


class Site(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A datacenter and its workers."""

    name: str
    workers: list[Worker]


class Router(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The router: its site's decode workers answer the clients. By default the first site that has some."""

    site: str = ""
    host: str = "127.0.0.1"
    port: int = 0


class CacheService(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The cache service, which stands in the router's site; `insecure` allows a host beyond loopback."""

    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    insecure: bool = False


class Fleet(_Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    model: Model
    sites: list[Site]
    engine: Engine = Engine()
    transfer: Transfer = Transfer()
    routing: Routing = Routing()
    admission: Admission = Admission()
    tune: Tune = Tune()
    links: list[Link] = []
    router: Router = Router()
    cache_service: CacheService = CacheService()

    def router_site(self) -> str:
        """The site whose decode workers answer."""
        if self.router.site:
            return self.router.site
        return next(s.name for s in self.sites if any(w.role == "decode" for w in s.workers))

    def fixed_ports(self) -> list[tuple[str, str, int]]:
        """Every port that the file gives, as (field, host, port)."""
        fields = [
            ("router.port", self.router.host, self.router.port),
            ("cache_service.port", self.cache_service.host, self.cache_service.port),
            ("cache_service.metrics_port", self.cache_service.host, self.cache_service.metrics_port),
        ]
        for i, site in enumerate(self.sites):
            for j, worker in enumerate(site.workers):
                field = f"sites[{i}].workers[{j}]"
                fields.append((f"{field}.port", worker.host, worker.port))
                fields.append((f"{field}.bootstrap_port", worker.host, worker.bootstrap_port))
        return [entry for entry in fields if entry[2]]

    def peer_sites(self, role: Role) -> list[str]:
        """The sites with which a worker of this role exchanges KV: those that have the other role."""
        return [s.name for s in self.sites if any(w.role != role for w in s.workers)]

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
        data = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: is empty or not a mapping; it needs at least model and sites")
    try:
        fleet = msgspec.convert(data, Fleet)
        _check(fleet)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, Fleet)}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return fleet


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
    if not (is_loopback(fleet.cache_service.host) or fleet.cache_service.insecure):
        raise ConfigError(
            f"cache_service.host: {fleet.cache_service.host!r} is not loopback; give cache_service.insecure: "
            "true, or run the service from a file of its own with tls"
        )
    if not any(w.role == "decode" for _, w in fleet.workers()):
        raise ConfigError("sites: no worker has role decode; at least one site must decode")
    if not any(w.role == "prefill" for _, w in fleet.workers()):
        raise ConfigError("sites: no worker has role prefill; at least one site must prefill")
    site = fleet.router.site
    if site and site not in sites:
        raise ConfigError(f"router.site: no site is named {site!r}; sites: {', '.join(sites)}")
    if not any(w.role == "decode" for s, w in fleet.workers() if s.name == fleet.router_site()):
        raise ConfigError(f"router.site: site {fleet.router_site()!r} has no decode worker")
    _check_links(fleet, sites)
    for i, owner in enumerate(fleet.sites):
        for j, worker in enumerate(owner.workers):
            _check_worker(f"sites[{i}].workers[{j}]", worker, fleet)
            _check_use(f"sites[{i}].workers[{j}]", owner, worker, fleet)


def _check_links(fleet: Fleet, sites: list[str]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for i, link in enumerate(fleet.links):
        for side in ("src", "dst"):
            if getattr(link, side) not in sites:
                raise ConfigError(
                    f"links[{i}].{side}: no site is named {getattr(link, side)!r}; sites: {', '.join(sites)}"
                )
        if link.src == link.dst:
            raise ConfigError(f"links[{i}].dst: is {link.dst!r} like src; a link joins two sites")
        if (link.src, link.dst) in seen:
            raise ConfigError(
                f"links[{i}]: {link.src} -> {link.dst} is also links[{seen[link.src, link.dst]}]"
            )
        seen[link.src, link.dst] = i
        check_ranges(f"links[{i}].", "", link.given())


def _check_use(field: str, site: Site, worker: Worker, fleet: Fleet) -> None:
    """Refuse a worker that could never get a request."""
    home = fleet.router_site()
    if site.name == home:
        return
    if worker.role == "decode":
        raise ConfigError(
            f"{field}.role: decode in site {site.name!r} would never be used; the router stands in {home!r} "
            "and sends to the decode workers there"
        )
    if not any(link.src == site.name and link.dst == home for link in fleet.links):
        raise ConfigError(
            f"{field}: would never be used, there is no link from {site.name!r} to {home!r}; add "
            f"{{src: {site.name}, dst: {home}, gbps: 10}} to links"
        )


def _check_worker(field: str, worker: Worker, fleet: Fleet) -> None:
    if worker.name in OTHER_PROCESSES:
        raise ConfigError(f"{field}.name: {worker.name!r} is the name of a process of the launcher's own")
    _check_args(f"{field}.args", worker.args)
    needed = fleet.routing.policy == "ttft" and worker.role == "prefill"
    check_profile(f"{field}.profile", worker.profile, needed=needed)
    if worker.bootstrap_port and worker.role != "prefill":
        raise ConfigError(f"{field}.bootstrap_port: only prefill workers have one")
    if worker.gpus and fleet.engine.device != "cuda":
        raise ConfigError(f"{field}.gpus: engine.device is {fleet.engine.device}; accepted with cuda only")
    if any(gpu < 0 for gpu in worker.gpus) or len(set(worker.gpus)) != len(worker.gpus):
        raise ConfigError(f"{field}.gpus: {worker.gpus} is not a list of different GPU indices from 0 on")


def _check_args(field: str, args: list[str]) -> None:
    for i, arg in enumerate(args):
        owner = OWN_FLAGS.get(arg.partition("=")[0])
        if owner:
            raise ConfigError(f"{field}[{i}]: {arg.partition('=')[0]} is set from {owner}")


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
    _check_args("engine.args", engine.args)
    _check_transfer(fleet)
    for name in ("routing", "admission", "tune"):
        check_ranges(f"{name}.", f"{name}.", getattr(fleet, name).given())


def _check_transfer(fleet: Fleet) -> None:
    transfer = fleet.transfer
    if transfer.backend != "prfaas":
        for name in (*OPTIONS, "tls"):
            if getattr(transfer, name) is not None:
                raise ConfigError(
                    f"transfer.{name}: backend is {transfer.backend}; accepted with prfaas only"
                )
        if not transfer.insecure:
            raise ConfigError(
                f"transfer.insecure: backend {transfer.backend} has no encryption; "
                "accepted with it: true, which sends KV over plain TCP"
            )
        return
    check_encryption(
        "transfer",
        "auto (or {ca, cert, key})",
        tls=transfer.tls is not None,
        insecure=transfer.insecure,
    )
    options = transfer.worker_options("any", Path())
    try:
        msgspec.structs.replace(WorkerConfig(worker_id="any", site="any"), **options).check()
    except ConfigError as error:
        raise ConfigError(str(error).replace(ENVIRONMENT_VARIABLE, "transfer")) from error
    if transfer.tls is not None:
        _check_certificates(fleet, transfer.tls)


def _check_certificates(fleet: Fleet, tls: TransferTls | Literal["auto"]) -> None:
    seen: dict[str, str] = {}
    for i, site in enumerate(fleet.sites):
        known = seen.setdefault(site.name.lower(), site.name)
        if known != site.name:
            raise ConfigError(f"sites[{i}].name: {site.name!r} and {known!r} are the same to a certificate")
        if tls == AUTO:
            continue
        for name, path in tls.of_site(site.name).items():
            if not Path(path).is_file():
                raise ConfigError(f"transfer.tls.{name}: no file {path} (for site {site.name})")


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
    for field, host, port in fleet.fixed_ports():
        if not 1 <= port <= 65535:
            raise ConfigError(f"{field}: {port} is not a port; accepted: 1..65535, 0 to choose a free one")
        if (host, port) in taken:
            raise ConfigError(f"{field}: {host}:{port} is also {taken[host, port]}")
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
