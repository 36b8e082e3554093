"""The plain HTTP side of a cache service, read-only: GET /metrics (Prometheus), /health and /ready (JSON)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from cache_service.core.errors import ConfigError

_MAX_BODY_BYTES = 1024


class HttpSide:
    """The listening HTTP server of a cache service."""

    def __init__(self, runner: web.AppRunner, port: int) -> None:
        self._runner = runner
        self.port = port

    @classmethod
    async def listen(
        cls, host: str, port: int, registry: CollectorRegistry, health: Callable[[], Mapping[str, object]]
    ) -> HttpSide:
        """Listen on `port`, 0 for any. Raises ConfigError when the address cannot be had.

        /health is always 200; /ready is 503 with the same body until `health` says that `ready` is true.
        """

        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

        async def healthy(_: web.Request) -> web.Response:
            return web.json_response(health())

        async def ready(_: web.Request) -> web.Response:
            body = health()
            return web.json_response(body, status=200 if body["ready"] else 503)

        application = web.Application(client_max_size=_MAX_BODY_BYTES)
        application.router.add_get("/metrics", metrics)
        application.router.add_get("/health", healthy)
        application.router.add_get("/ready", ready)
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(
                f"metrics_listen: cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error
        return cls(runner, runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()
