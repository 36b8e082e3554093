"""From a fleet file to processes: command lines, environments, configuration files. Starts nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prfaas_sglang.cpu.environment import cpu_arguments
from prfaas_sglang.fleet.config import Fleet, Site, Worker
from prfaas_sglang.fleet.ports import PortPlan

LOOPBACK = "127.0.0.1"


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
    """True when the checkpoint's config lists linear-attention layers."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    return "linear_attention" in (text.get("layer_types") or [])


def claim_worker_ports(fleet: Fleet, ports: PortPlan) -> dict[str, WorkerPorts]:
    """Claim every worker's ports. Raises ConfigError."""
    claimed = {}
    for i, site in enumerate(fleet.sites):
        for j, worker in enumerate(site.workers):
            path = f"sites[{i}].workers[{j}]"
            prefill = worker.role == "prefill"
            http = ports.claim(f"{path}.port", worker.host, worker.port)
            bootstrap = ports.claim(f"{path}.bootstrap_port", worker.host, worker.bootstrap_port)
            claimed[worker.name] = WorkerPorts(
                http=http,
                bootstrap=bootstrap,
                events=ports.claim(path, worker.host, 0) if prefill else 0,
                replay=ports.claim(path, worker.host, 0) if prefill else 0,
                telemetry=ports.claim(path, LOOPBACK, 0),
            )
    return claimed


def build(fleet: Fleet, model: Path, run_dir: Path, ports: PortPlan) -> Plan:
    """Claim ports and describe every process. Raises ConfigError for a taken port."""
    of_worker = claim_worker_ports(fleet, ports)
    cache = fleet.cache_service
    cache_port = ports.claim("cache_service.port", cache.host, cache.port)
    metrics_port = ports.claim("cache_service.metrics_port", cache.host, cache.metrics_port)
    router_port = ports.claim("router.port", fleet.router.host, fleet.router.port)
    pairs = fleet.workers()
    services = (
        _cache_service(fleet, pairs, of_worker, cache_port, metrics_port, run_dir),
        _router(fleet, model, pairs, of_worker, cache_port, router_port, run_dir),
    )
    return Plan(
        engines=tuple(_engine(fleet, model, s, w, of_worker[w.name], run_dir) for s, w in pairs),
        services=services,
        router_url=f"http://{fleet.router.host}:{router_port}",
        worker_urls={w.name: f"http://{w.host}:{of_worker[w.name].http}" for _, w in pairs},
        telemetry_urls={w.name: f"http://{LOOPBACK}:{of_worker[w.name].telemetry}" for _, w in pairs}
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
    env, files = {}, {}
    if backend == "prfaas":
        config = {
            "worker_id": worker.name,
            "site": site.name,
            "listen_host": worker.host,
            "telemetry_listen": f"{LOOPBACK}:{ports.telemetry}",
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


def _cache_service(
    fleet: Fleet,
    pairs: list[tuple[Site, Worker]],
    ports: dict[str, WorkerPorts],
    port: int,
    metrics_port: int,
    run_dir: Path,
) -> ProcessSpec:
    host = fleet.cache_service.host
    config = {
        "site": fleet.router_site(),
        "listen": f"{host}:{port}",
        "metrics_listen": f"{host}:{metrics_port}",
        "namespace": {"model": fleet.model.served_name, "page_size": fleet.engine.page_size},
        "workers": [
            {
                "worker_id": worker.name,
                "site": site.name,
                "dp_rank": 0,
                "events": f"tcp://{worker.host}:{ports[worker.name].events}",
                "replay": f"tcp://{worker.host}:{ports[worker.name].replay}",
                "topic": "kv",
            }
            for site, worker in pairs
            if worker.role == "prefill"
        ],
    }
    return _service("cache_service", config, f"http://{host}:{metrics_port}/health", run_dir)


def _router(
    fleet: Fleet,
    model: Path,
    pairs: list[tuple[Site, Worker]],
    ports: dict[str, WorkerPorts],
    cache_port: int,
    port: int,
    run_dir: Path,
) -> ProcessSpec:
    workers: list[dict[str, Any]] = []
    for site, worker in pairs:
        entry: dict[str, Any] = {
            "worker_id": worker.name,
            "site": site.name,
            "role": worker.role,
            "url": f"http://{worker.host}:{ports[worker.name].http}",
        }
        if worker.role == "prefill":
            entry |= {"bootstrap_host": worker.host, "bootstrap_port": ports[worker.name].bootstrap}
        workers.append(entry)
    config = {
        "listen": f"{fleet.router.host}:{port}",
        "site": fleet.router_site(),
        "model": {
            "name": fleet.model.served_name,
            "path": str(model),
            "context_length": fleet.engine.context_length,
            "page_size": fleet.engine.page_size,
        },
        "index": f"{fleet.cache_service.host}:{cache_port}",
        "policy": {"name": fleet.routing.policy, "threshold_tokens": fleet.routing.threshold_tokens},
        "workers": workers,
        "links": [{"src": link.src, "dst": link.dst, "gbps": link.gbps} for link in fleet.links],
    }
    return _service("router", config, f"http://{fleet.router.host}:{port}/health", run_dir)


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
