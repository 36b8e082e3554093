"""From a fleet file to processes: command lines, environments, configuration files. Starts nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cache_service.core.errors import ConfigError
from prfaas_sglang.cpu.environment import cpu_arguments
from prfaas_sglang.fleet.config import Fleet, Site, Worker
from prfaas_sglang.fleet.ports import PortPlan

LOOPBACK = "127.0.0.1"
#: Folder of `transfer.tls: auto` in the run directory.
CERTIFICATES = "certificates"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of the fleet.

    Attributes:
        name: unique in the fleet; also its log's name.
        kind: engine (SGLang worker) or service (cache service, router).
        argv: SGLang's arguments for an engine, the whole command line for a service.
        env: variables beside the launcher's own.
        health_url: answers 200 when the process is ready.
        ready_timeout_s: how long it may take to.
        files: configuration files to write into the run directory first, by name.
    """

    name: str
    kind: Literal["engine", "service"]
    argv: tuple[str, ...]
    health_url: str
    ready_timeout_s: float
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerPorts:
    """The ports of one worker; 0 where it has none."""

    http: int
    bootstrap: int
    events: int
    replay: int
    telemetry: int
    state_events: int = 0
    state_replay: int = 0


@dataclass(frozen=True, slots=True)
class FleetPorts:
    """Every port: of the workers by name, of the cache service (API, metrics) and of the router."""

    workers: dict[str, WorkerPorts]
    cache: int
    metrics: int
    router: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every process of a fleet, and where the parts are reached.

    Attributes:
        engines, services: process specifications, in start order.
        router_url: base URL of the router.
        worker_urls: HTTP base URL by worker name.
        telemetry_urls: transfer telemetry base URL by worker name (prfaas backend only).
        sites: site by worker name.
    """

    engines: tuple[ProcessSpec, ...]
    services: tuple[ProcessSpec, ...]
    router_url: str
    worker_urls: dict[str, str]
    telemetry_urls: dict[str, str]
    sites: dict[str, str]


def engine_arguments(fleet: Fleet, model: Path, *, mode: str) -> list[str]:
    """Return the SGLang flags that all workers of one mode (null, prefill, decode) share."""
    engine = fleet.engine
    arguments = [
        "--model-path", str(model),
        "--served-model-name", fleet.model.served_name,
        "--page-size", str(engine.page_size),
        "--context-length", str(engine.context_length),
        "--max-total-tokens", str(engine.max_total_tokens),
        "--chunked-prefill-size", str(engine.chunked_prefill_size),
        "--max-running-requests", str(engine.max_running_requests),
        "--enable-cache-report",
    ]  # fmt: skip
    if has_linear_state(model):
        arguments += ["--mamba-radix-cache-strategy", "extra_buffer" if engine.page_size > 1 else "no_buffer"]
    if engine.device == "cpu":
        arguments += cpu_arguments(disaggregation_mode=mode)
    return [*arguments, *engine.args]


def has_linear_state(model: Path) -> bool:
    """True when the checkpoint's config speaks of linear-attention layers.

    Either it lists them (layer_types), or says how often a full-attention layer comes (Qwen3-Next), or has a
    section for them (Kimi Linear). Raises ConfigError for a config.json that is not one.
    """
    with _text_config(model) as text:
        return (
            "linear_attention" in (text.get("layer_types") or [])
            or (text.get("full_attention_interval") or 1) > 1
            or bool(text.get("linear_attn_config"))
        )


def sliding_window(model: Path) -> int:
    """Return the tokens of the window of a model with sliding-window layers, 0 for one without.

    Raises ConfigError for a config.json that is not one.
    """
    with _text_config(model) as text:
        if "sliding_attention" not in (text.get("layer_types") or []):
            return 0
        return int(text["sliding_window"])


@contextlib.contextmanager
def _text_config(model: Path) -> Iterator[dict[str, Any]]:
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        yield config.get("text_config") or config
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"model.path: {path} is not a model's configuration: {error}") from error


def visible_gpus(fleet: Fleet, restricted: str | None) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES by worker, {} when the device is not cuda.

    Args:
        fleet: checked fleet file; `gpus` of a worker, else the n-th worker has the n-th GPU.
        restricted: the launcher's own CUDA_VISIBLE_DEVICES, which then is what indices count in.
    """
    if fleet.engine.device != "cuda":
        return {}
    names = [name.strip() for name in restricted.split(",")] if restricted else None
    chosen = {}
    for n, (_, worker) in enumerate(fleet.workers()):
        gpus = worker.gpus or [n]
        if names and max(gpus) >= len(names):
            raise ConfigError(
                f"worker {worker.name}: GPU {max(gpus)} is not visible; CUDA_VISIBLE_DEVICES is {restricted}"
            )
        chosen[worker.name] = ",".join(names[gpu] if names else str(gpu) for gpu in gpus)
    return chosen


def claim_ports(fleet: Fleet, ports: PortPlan) -> FleetPorts:
    """Claim every port of the fleet. Raises ConfigError for one that is taken."""
    workers = {}
    for i, site in enumerate(fleet.sites):
        for j, worker in enumerate(site.workers):
            path = f"sites[{i}].workers[{j}]"
            prefill = worker.role == "prefill"
            stateful = prefill and fleet.transfer.backend == "prfaas"
            workers[worker.name] = WorkerPorts(
                http=ports.claim(f"{path}.port", worker.host, worker.port),
                bootstrap=ports.claim(f"{path}.bootstrap_port", worker.host, worker.bootstrap_port),
                # SGLang binds these two to every address
                events=ports.claim(path, "0.0.0.0", 0) if prefill else 0,
                replay=ports.claim(path, "0.0.0.0", 0) if prefill else 0,
                telemetry=ports.claim(path, LOOPBACK, 0),
                state_events=ports.claim(path, worker.host, 0) if stateful else 0,
                state_replay=ports.claim(path, worker.host, 0) if stateful else 0,
            )
    cache, router = fleet.cache_service, fleet.router
    return FleetPorts(
        workers,
        cache=ports.claim("cache_service.port", cache.host, cache.port),
        metrics=ports.claim("cache_service.metrics_port", cache.host, cache.metrics_port),
        router=ports.claim("router.port", router.host, router.port),
    )


def build(fleet: Fleet, model: Path, run_dir: Path, ports: FleetPorts) -> Plan:
    """Describe every process. Raises ConfigError for a model folder that holds none."""
    pairs = fleet.workers()
    services = (
        _cache_service(fleet, model, pairs, ports, run_dir),
        _router(fleet, model, pairs, ports, run_dir),
    )
    return Plan(
        engines=tuple(_engine(fleet, model, s, w, ports.workers[w.name], run_dir) for s, w in pairs),
        services=services,
        router_url=f"http://{fleet.router.host}:{ports.router}",
        worker_urls={w.name: f"http://{w.host}:{ports.workers[w.name].http}" for _, w in pairs},
        telemetry_urls={w.name: f"http://{LOOPBACK}:{ports.workers[w.name].telemetry}" for _, w in pairs}
        if fleet.transfer.backend == "prfaas"
        else {},
        sites={w.name: s.name for s, w in pairs},
    )


def reference_engine(fleet: Fleet, model: Path, port: int) -> ProcessSpec:
    """Describe one plain SGLang server of the same model: what the fleet's output is compared with."""
    argv = engine_arguments(fleet, model, mode="null")
    argv += ["--host", LOOPBACK, "--port", str(port)]
    url = f"http://{LOOPBACK}:{port}/health"
    return ProcessSpec("reference", "engine", tuple(argv), url, fleet.engine.ready_timeout_s)


def _engine(
    fleet: Fleet, model: Path, site: Site, worker: Worker, ports: WorkerPorts, run_dir: Path
) -> ProcessSpec:
    backend = fleet.transfer.backend
    argv = engine_arguments(fleet, model, mode=worker.role)
    gpus = visible_gpus(fleet, os.environ.get("CUDA_VISIBLE_DEVICES"))
    argv += [
        "--host", worker.host,
        "--port", str(ports.http),
        "--disaggregation-mode", worker.role,
        "--disaggregation-transfer-backend", backend,
        "--disaggregation-bootstrap-port", str(ports.bootstrap),
    ]  # fmt: skip
    if worker.role == "prefill":
        events = {
            "publisher": "zmq",
            # a wildcard makes SGLang bind; any other host makes it connect
            "endpoint": f"tcp://*:{ports.events}",
            "replay_endpoint": f"tcp://*:{ports.replay}",
            "topic": "kv",
        }
        argv += ["--kv-events-config", json.dumps(events)]
    env = {"CUDA_VISIBLE_DEVICES": gpus[worker.name]} if gpus else {}
    files = {}
    if backend == "prfaas":
        config = {
            "worker_id": worker.name,
            "site": site.name,
            "listen_host": worker.host,
            "telemetry_listen": f"{LOOPBACK}:{ports.telemetry}",
            "peer_sites": fleet.peer_sites(worker.role),
            **fleet.transfer.worker_options(site.name, run_dir / CERTIFICATES),
        }
        if worker.role == "prefill":
            config["state_events"] = {
                "endpoint": f"tcp://{worker.host}:{ports.state_events}",
                "replay_endpoint": f"tcp://{worker.host}:{ports.state_replay}",
            }
        name = f"{worker.name}.transfer.json"
        files[name] = json.dumps(config, indent=1)
        env["PRFAAS_CONFIG"] = f"@{run_dir / name}"
    url = f"http://{worker.host}:{ports.http}/health"
    return ProcessSpec(
        worker.name,
        "engine",
        (*argv, *worker.args),
        url,
        fleet.engine.ready_timeout_s,
        env=env,
        files=files,
    )


def _streams(fleet: Fleet, model: Path, worker: Worker, ports: FleetPorts) -> dict[str, Any]:
    """Say where the cache service reads a worker's events; stock ones do not tell what the model needs."""
    mine = ports.workers[worker.name]
    if fleet.transfer.backend == "prfaas":
        events, replay, more = mine.state_events, mine.state_replay, {"format": "prfaas"}
    else:
        window = sliding_window(model)
        events, replay = mine.events, mine.replay
        more = {
            "topic": "kv",
            "needs_state": has_linear_state(model),
            "swa_window_blocks": -(-window // fleet.engine.page_size),
        }
    return {"events": f"tcp://{worker.host}:{events}", "replay": f"tcp://{worker.host}:{replay}", **more}


def _cache_service(
    fleet: Fleet,
    model: Path,
    pairs: list[tuple[Site, Worker]],
    ports: FleetPorts,
    run_dir: Path,
) -> ProcessSpec:
    host = fleet.cache_service.host
    config = {
        "site": fleet.router_site(),
        "listen": f"{host}:{ports.cache}",
        "insecure": fleet.cache_service.insecure,
        "metrics_listen": f"{host}:{ports.metrics}",
        "namespace": {"model": fleet.model.served_name, "page_size": fleet.engine.page_size},
        "workers": [
            {
                "worker_id": worker.name,
                "site": site.name,
                "dp_rank": 0,
                **_streams(fleet, model, worker, ports),
            }
            for site, worker in pairs
            if worker.role == "prefill"
        ],
    }
    return _service("cache_service", config, f"http://{host}:{ports.metrics}/health", run_dir)


def _router(
    fleet: Fleet,
    model: Path,
    pairs: list[tuple[Site, Worker]],
    ports: FleetPorts,
    run_dir: Path,
) -> ProcessSpec:
    workers: list[dict[str, Any]] = []
    profiles: dict[str, str] = {}
    for site, worker in pairs:
        entry: dict[str, Any] = {
            "worker_id": worker.name,
            "site": site.name,
            "role": worker.role,
            "url": f"http://{worker.host}:{ports.workers[worker.name].http}",
        }
        if worker.role == "prefill":
            mine = ports.workers[worker.name]
            entry |= {"bootstrap_host": worker.host, "bootstrap_port": mine.bootstrap}
            if fleet.transfer.backend == "prfaas":
                entry["telemetry_url"] = f"http://{LOOPBACK}:{mine.telemetry}"
        else:
            # SGLang has a pool of this size (engine_arguments), so this is what admission may give away.
            entry["kv_tokens"] = fleet.engine.max_total_tokens
        if worker.profile:
            path = str(Path(worker.profile).expanduser().resolve())
            entry["profile"] = profiles.setdefault(path, f"profile-{len(profiles)}")
        workers.append(entry)
    config = {
        "listen": f"{fleet.router.host}:{ports.router}",
        "site": fleet.router_site(),
        "model": {
            "name": fleet.model.served_name,
            "path": str(model),
            "context_length": fleet.engine.context_length,
            "page_size": fleet.engine.page_size,
        },
        "index": f"{fleet.cache_service.host}:{ports.cache}",
        "index_insecure": fleet.cache_service.insecure,
        "policy": fleet.routing.router_policy(),
        "admission": fleet.admission.given(),
        "tune": fleet.tune.given(),
        "profiles": {name: path for path, name in profiles.items()},
        "early_first_token": fleet.routing.early_first_token,
        "workers": workers,
        "links": [link.given() for link in fleet.links],
    }
    return _service("router", config, f"http://{fleet.router.host}:{ports.router}/health", run_dir)


def _service(module: str, config: dict[str, Any], health_url: str, run_dir: Path) -> ProcessSpec:
    name = f"{module}.json"
    return ProcessSpec(
        module.replace("_", "-"),
        "service",
        (sys.executable, "-m", module, "--config", str(run_dir / name)),
        health_url,
        60.0,
        files={name: json.dumps(config, indent=1)},
    )
