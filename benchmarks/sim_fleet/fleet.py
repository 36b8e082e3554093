"""Site A prefills, site B prefills and decodes: real SGLang on CPU, the real router, a 40 ms link."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.fleet.sides import START_S, Sides, until_healthy
from benchmarks.transfer.peers import ROOT
from prfaas_sglang.cpu.environment import cpu_arguments
from router.core.profile import ModelProfile, to_dict
from router.plan.measure import Options
from tests.wan.link import Wan

PAGE, CHUNK, CONTEXT = 64, 512, 4096
MAX_RUNNING = 16
CACHE_TOKENS, STATES = 65536, 96
SERVED = "tiny"
HTTP_PORT, BOOTSTRAP_PORT, TELEMETRY_PORT, EVENTS_PORT = 31000, 32000, 33000, 34000
ROUTER_PORT, INDEX_PORT, METRICS_PORT = 30000, 30001, 30002
#: Name -> (side of the link, role). Upper-cased, the side is the site.
WORKERS = {"a-prefill": ("a", "prefill"), "b-prefill": ("b", "prefill"), "b-decode": ("b", "decode")}


class SimFleet(Sides):
    """The workers on the two sides of `wan`, and a router when asked for. Use as a context manager.

    indexed: prefill workers tell what they hold, and a router is given a cache service that listens.
    """

    def __init__(self, wan: Wan, folder: Path, indexed: bool = False) -> None:
        super().__init__(wan, folder)
        self._indexed = indexed

    def _start_workers(self) -> None:
        pids = {name: self._spawn(name) for name in WORKERS}
        deadline_s = time.monotonic() + START_S
        for name, pid in pids.items():
            self._until_started(WORKERS[name][0], pid, self.url(name), name, deadline_s)

    def _spawn(self, name: str) -> int:
        side, role = WORKERS[name]
        address, number = self.wan.address(side), list(WORKERS).index(name)
        argv = [
            *("--model-path", str(self._model), "--served-model-name", SERVED),
            *("--host", address, "--port", str(HTTP_PORT + number), "--enable-cache-report"),
            *(
                "--page-size",
                str(PAGE),
                "--context-length",
                str(CONTEXT),
                "--max-total-tokens",
                str(CACHE_TOKENS),
            ),
            *("--chunked-prefill-size", str(CHUNK), "--max-running-requests", str(MAX_RUNNING)),
            *("--mamba-radix-cache-strategy", "extra_buffer"),
            *cpu_arguments(disaggregation_mode=role, state_slots=STATES),
            *("--disaggregation-mode", role, "--disaggregation-transfer-backend", "prfaas"),
            *("--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT + number)),
        ]
        config: dict[str, Any] = {
            "worker_id": name,
            "site": side.upper(),
            "listen_host": address,
            "telemetry_listen": f"{address}:{TELEMETRY_PORT + number}",
            "insecure": True,
            "compression": "none",  # the simulator knows none
        }
        if self._indexed and role == "prefill":
            events, replay, states, dumps = self._streams(name)
            stock = {"publisher": "zmq", "endpoint": f"tcp://*:{events}", "topic": "kv"}
            stock["replay_endpoint"] = f"tcp://*:{replay}"
            argv += ["--kv-events-config", json.dumps(stock)]
            ends = {"endpoint": states, "replay_endpoint": dumps}
            config["state_events"] = {key: f"tcp://{address}:{port}" for key, port in ends.items()}
        env = {
            "SGLANG_HOST_IP": address,
            "SGLANG_LOCAL_IP_NIC": self.wan.name,
            "PRFAAS_CONFIG": json.dumps(config),
        }
        return self._zygotes[side].spawn(name, argv, env, self._folder / f"{name}.log")

    @staticmethod
    def _streams(name: str) -> tuple[int, int, int, int]:
        """Return a worker's ports: stock events and replay, ours and replay."""
        first = EVENTS_PORT + 10 * list(WORKERS).index(name)
        return first, first + 1, first + 2, first + 3

    # --- addresses -------------------------------------------------------------------------------------

    def url(self, name: str) -> str:
        """Return a worker's base URL."""
        return f"http://{self.wan.address(WORKERS[name][0])}:{HTTP_PORT + list(WORKERS).index(name)}"

    def telemetry(self, name: str) -> str:
        """Return the base URL of a worker's transfer telemetry."""
        return f"http://{self.wan.address(WORKERS[name][0])}:{TELEMETRY_PORT + list(WORKERS).index(name)}"

    @property
    def router(self) -> str:
        """Return the router's base URL."""
        return f"http://{self.wan.address('b')}:{ROUTER_PORT}"

    def flush(self) -> None:
        """Empty every cache, when its worker is idle. Raises requests.RequestException."""
        for name in WORKERS:
            requests.post(f"{self.url(name)}/flush_cache?timeout=30", timeout=60).raise_for_status()

    def options(self, name: str, lengths: tuple[int, ...], repeats: int, step_s: float) -> Options:
        """Return what `prfaas profile` is told to measure prefill worker `name`."""
        return Options(
            self.url(name), self.telemetry(name), self.url("b-decode"), "", Path(), name, lengths, repeats,
            step_s,
        )  # fmt: skip

    # --- the router ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def routed(
        self,
        policy: dict[str, Any],
        profiles: dict[str, ModelProfile] | None = None,
        gbps: float = 1.0,
        told: bool = False,
    ) -> Iterator[str]:
        """Run `python -m router` at site B; gives its base URL.

        Args:
            policy: the router's `policy` section.
            profiles: by worker name; None for a router that knows no costs.
            gbps: configured capacity of the link.
            told: the router asks the senders what the link carries; else it believes `gbps`.
        """
        profiles = profiles or {}
        workers = []
        for number, (name, (side, role)) in enumerate(WORKERS.items()):
            entry: dict[str, Any] = {
                "worker_id": name,
                "site": side.upper(),
                "role": role,
                "url": self.url(name),
                "profile": name if name in profiles else "",
            }
            if role == "prefill":
                entry |= {"bootstrap_host": self.wan.address(side), "bootstrap_port": BOOTSTRAP_PORT + number}
                entry["telemetry_url"] = self.telemetry(name) if told else ""
            workers.append(entry)
        config: dict[str, Any] = {
            "listen": f"{self.wan.address('b')}:{ROUTER_PORT}",
            "site": "B",
            "model": {
                "name": SERVED,
                "path": str(self._model),
                "context_length": CONTEXT,
                "page_size": PAGE,
            },
            "workers": workers,
            "policy": policy,
            "profiles": {name: to_dict(profile) for name, profile in profiles.items()},
            # so that a first token means the same in both: it comes after the KV is at decode
            "early_first_token": False,
            "links": [{"src": "A", "dst": "B", "gbps": gbps}],
            "timeouts": {"drain_s": 2},
        }
        with contextlib.ExitStack() as stack:
            if self._indexed:
                config |= {"index": f"{self.wan.address('b')}:{INDEX_PORT}", "index_insecure": True}
                stack.enter_context(self._service("cache_service", self._index_config(), METRICS_PORT))
            stack.enter_context(self._service("router", config, ROUTER_PORT))
            yield self.router

    def _index_config(self) -> dict[str, Any]:
        workers = []
        for name, (side, role) in WORKERS.items():
            if role == "prefill":
                _, _, states, dumps = self._streams(name)
                host = f"tcp://{self.wan.address(side)}"
                streams = {"events": f"{host}:{states}", "replay": f"{host}:{dumps}", "format": "prfaas"}
                workers.append({"worker_id": name, "site": side.upper(), "dp_rank": 0, **streams})
        address = self.wan.address("b")
        return {
            "site": "B",
            "listen": f"{address}:{INDEX_PORT}",
            "insecure": True,
            "metrics_listen": f"{address}:{METRICS_PORT}",
            "namespace": {"model": SERVED, "page_size": PAGE},
            "workers": workers,
        }

    @contextlib.contextmanager
    def _service(self, module: str, config: dict[str, Any], port: int) -> Iterator[None]:
        """Run one of our services at site B while the block lasts."""
        file, log_path = self._folder / f"{module}.yaml", self._folder / f"{module}.log"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(file)], cwd=ROOT, stdout=log, stderr=log
            )
        try:
            url = f"http://{self.wan.address('b')}:{port}"
            deadline_s = time.monotonic() + START_S
            until_healthy(
                url, lambda: not time.sleep(0.05) and process.poll() is None, deadline_s, module, log_path
            )
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
