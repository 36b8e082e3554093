"""`python -m cache_service --config FILE`: one cache service process.

Exit status: 0 after SIGTERM or SIGINT, 2 for a wrong configuration or an address that cannot be had (the
reason on stderr), 1 for a bug of ours.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

# Before gRPC is loaded: its handlers would run, and log, at every fork (cache_service/snapshot.py).
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from cache_service import config, logs
from cache_service.core.errors import ConfigError
from cache_service.native import core_name
from cache_service.server import CacheServer

log = logging.getLogger("cache_service")

_EPILOG = """\
The configuration file is JSON or YAML:

  site: B                        # where this service runs
  listen: 127.0.0.1:7001         # gRPC: prfaas.cache.v1.PrefixIndex, health, reflection; port 0 = any free
  metrics_listen: 127.0.0.1:7002 # optional HTTP: /metrics and /health
  namespace: {model: tiny-gdn, page_size: 64}   # must equal the workers' model and --page-size
  workers:                       # one entry per worker and data-parallel rank
    - worker_id: a-prefill-0
      site: A
      dp_rank: 0                 # SGLang publishes rank r at port + r: give each rank its exact address
      events: tcp://127.0.0.1:5557
      replay: tcp://127.0.0.1:5558   # without it a lost batch costs all that is known of the worker
      topic: kv

On the worker (SGLang 0.5.21; the endpoint must be a wildcard, or SGLang connects instead of binding):
  --kv-events-config '{"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558","topic":"kv"}'

`listen` beyond loopback needs  tls: {ca: ca.pem, cert: B.pem, key: B.key}  (`prfaas certs` makes them;
clients then need a certificate of the same authority), or  insecure: true.

Optional: ingest: {probe_s: 2, replay_timeout_s: 2, lease_s: 10, queue_batches: 10000}, log_flush_s: 0.1,
ready_wait_s: 10,
index_budget_bytes: 4294967296 (above it, what was used longest ago is forgotten; 0: no bound),
log_level: INFO, replication: {etcd: {endpoints: [etcd-1:2379]}} (docs/configuration.md), and in namespace:
revision, kv_dtype, layout.

Logs are JSON lines on stdout; the line with the event "listening" names the ports. "ready" comes when the
service has caught up with its workers and the other sites, or after ready_wait_s without ("behind" says).
"""


def main(argv: list[str] | None = None) -> int:
    """Run until a signal; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cache_service",
        description="Prefix index: follows SGLang workers' KV events and tells who holds which prefix.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, type=Path, metavar="FILE", help="configuration, JSON or YAML"
    )
    parser.add_argument("--log-level", metavar="LEVEL", help="overrides log_level of the file")
    arguments = parser.parse_args(argv)
    try:
        settings = config.load(arguments.config)
        logs.configure("cache_service", level=arguments.log_level or settings.log_level)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(settings))
    except ConfigError as error:
        sys.stderr.write(f"cache_service: {error}\n")
        return 2


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed, None for the standard one."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


async def _serve(settings: config.CacheConfig) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = CacheServer(settings)
    try:
        await server.start()
    except ConfigError:
        await server.stop()
        raise
    logs.event(
        log,
        "listening",
        pid=os.getpid(),
        site=settings.site,
        port=server.port,
        metrics_port=server.metrics_port,
        workers=len(settings.workers),
        index_core=core_name(),
    )
    server.on_failure(stopping.set)
    await stopping.wait()
    crashed = server.failed
    await server.stop()
    logs.event(log, "stopped", crashed=crashed)
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
