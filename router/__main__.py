"""`python -m router --config FILE`: read the configuration, serve until SIGTERM or SIGINT, drain, exit.

Exit status: 0 after a drain, 2 for a wrong configuration, 1 when the address cannot be listened on.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from cache_service import logs
from cache_service.core.errors import ConfigError
from router.config import RouterConfig, load
from router.index import PrefixIndex
from router.service import Service
from router.tokenize import PromptTokenizer

_log = logging.getLogger("router")

_HELP = """\
OpenAI-compatible router for SGLang with separate prefill and decode workers in several sites.

Each prompt is tokenised with the model's own tokenizer; the cache service says which prefill worker holds
how much of it; prompts whose uncached part is longer than the threshold are prefilled in a remote site, the
others in the router's own; the decode worker of the router's site answers. Response headers x-prfaas-* and
one log line for each request say what was decided and why.
"""

_EXAMPLE = """\
configuration file (JSON or YAML; unknown keys are refused):

  listen: 127.0.0.1:8000            # the HTTP API
  site: B                           # its decode workers serve the clients
  model: {name: tiny-gdn, path: /models/tiny-gdn, context_length: 4096, page_size: 64}
  index: 127.0.0.1:7001             # cache service; null routes without it
  policy: {name: prfaas, threshold_tokens: 512}      # or ttft, local, remote,
                                                             # round_robin, cache_aware
  workers:
    - {worker_id: a-prefill-0, site: A, role: prefill, url: "http://10.1.0.5:30001",
       bootstrap_host: 10.1.0.5, bootstrap_port: 8998}
    - {worker_id: b-prefill-0, site: B, role: prefill, url: "http://10.2.0.5:30001",
       bootstrap_host: 10.2.0.5, bootstrap_port: 8998}
    - {worker_id: b-decode-0, site: B, role: decode, url: "http://10.2.0.6:30001"}
  links: [{src: A, dst: B, gbps: 10}]                # KV flows from the prefill site to the decode site
  timeouts: {connect_s: 5, first_byte_s: 300, total_s: 600, index_s: 0.25, abort_s: 5, drain_s: 30}
  limits: {body_bytes: 33554432, answer_bytes: 268435456, tokenizer_threads: 2}
  health: {failures: 3, cooldown_s: 2, max_cooldown_s: 30}
  log_level: INFO

routes:
  POST /v1/chat/completions, /v1/completions, /generate      GET /v1/models, /health, /metrics,
                                                             /decisions?n=100
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the router; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m router",
        description=_HELP,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration, see below")
    parser.add_argument(
        "--check", action="store_true", help="check the configuration and the model, then exit"
    )
    options = parser.parse_args(arguments)
    try:
        config = load(options.config)
        tokenizer = PromptTokenizer(Path(config.model.path))
    except ConfigError as error:
        sys.stderr.write(f"router: {options.config}: {error}\n")
        return 2
    if options.check:
        return 0
    logs.configure("router", level=config.log_level)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(config, tokenizer))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        sys.stderr.write(f"router: listen: {config.listen} cannot be used: {reason}\n")
        return 1
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it is installed, None for the standard one."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def _open_index(config: RouterConfig) -> PrefixIndex | None:
    """Return a client of the cache service; gRPC is loaded only when one is configured."""
    if config.index is None:
        return None
    from cache_service.channels import Encryption
    from cache_service.client import IndexClient

    tls = config.index_tls
    encryption = Encryption(tls.ca, tls.cert, tls.key, tls.server_name) if tls else None
    return IndexClient(config.index, timeout_s=config.timeouts.index_s, encryption=encryption)


async def _serve(config: RouterConfig, tokenizer: PromptTokenizer) -> None:
    """Serve until a signal; raises OSError when the address is taken."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service = Service(config, tokenizer, _open_index(config))
    try:
        address = await service.start()
        logs.event(
            _log,
            "router_ready",
            listen=address,
            site=config.site,
            policy=config.policy.name,
            workers=len(config.workers),
        )
        await stop.wait()
        logs.event(_log, "router_draining", in_flight=service.in_flight())
    finally:
        await service.stop()
    logs.event(_log, "router_stopped")


if __name__ == "__main__":
    sys.exit(main())
