"""The HTTP surface: OpenAI's routes, SGLang's /generate, models, health and metrics.

Decides nothing about a request; `serve` does. Errors of the HTTP layer itself (no such path, wrong method)
come in the same shape as all others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from router.core.health import State
from router.core.workers import Role
from router.openai import Api, error_body, error_type
from router.serve import PATHS, Server

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DRAINING = web.AppKey("draining", asyncio.Event)


def build(server: Server) -> web.Application:
    """Return the application; set `app[DRAINING]` to make /health say so."""
    app = web.Application(client_max_size=server.config.limits.body_bytes, middlewares=[_errors])
    app[DRAINING] = asyncio.Event()
    created = int(time.time())
    for api, path in PATHS.items():
        app.router.add_post(path, _handler(server, api))

    async def models(_: web.Request) -> web.Response:
        model = server.config.model
        entry = {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "prfaas",
            "max_model_len": model.context_length,
        }
        return web.json_response({"object": "list", "data": [entry]})

    async def health(request: web.Request) -> web.Response:
        return _health(server, draining=request.app[DRAINING].is_set())

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(server.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def decisions(request: web.Request) -> web.Response:
        text = request.query.get("n", "100")
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            return web.json_response(
                error_body("n: accepted are whole numbers >= 0", error_type(400), param="n"), status=400
            )
        found = server.tuner.proposal
        body = {
            "policy": server.policy.name,
            "threshold_tokens": server.policy.threshold_tokens,
            "proposal": None if found is None else asdict(found),
            "decisions": server.decisions.last(int(text)),
        }
        return web.json_response(body)

    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/decisions", decisions)
    return app


def _handler(server: Server, api: Api) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await server.handle(request, api)

    return handle


def _health(server: Server, *, draining: bool) -> web.Response:
    """Say whether a request would find a route now: 200, or 503 with the same body."""
    now_s = asyncio.get_running_loop().time()
    view = server.table.view(now_s)
    in_flight = server.table.in_flight()
    workers = {
        worker.worker_id: {
            "site": worker.site,
            "usable": worker.healthy,
            "breaker": server.table.breakers.state(worker.worker_id),
            "in_flight": in_flight[worker.worker_id],
        }
        for worker in view.workers.values()
    }
    site = server.table.site
    healthy = [w for w in view.workers.values() if w.healthy]
    served = any(w.role is Role.PREFILL for w in healthy) and any(
        w.role is Role.DECODE and w.site == site for w in healthy
    )
    degraded = any(entry["breaker"] != State.CLOSED for entry in workers.values())
    status = "draining" if draining else "unavailable" if not served else "degraded" if degraded else "ok"
    body = {
        "status": status,
        "site": site,
        "model": server.config.model.name,
        "workers": workers,
        "links": [asdict(link) for link in server.links.links(now_s)],
    }
    return web.json_response(body, status=503 if status in ("draining", "unavailable") else 200)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every error of the HTTP layer OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}"
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return web.json_response(
            error_body(message, error_type(error.status)), status=error.status, headers=headers
        )
