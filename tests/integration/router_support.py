"""Small workers that speak SGLang's prefill-decode protocol, and a model directory, for the router's tests.

A decode worker answers only after a prefill worker was given the same bootstrap room, as the real one does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from tokenizers import Tokenizer, models, pre_tokenizers

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
Script = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]


def write_model(path: Path) -> Path:
    """Write a tokenizer with one token for each byte, and `CHAT` as its template."""
    path.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"chat_template": CHAT, "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<s>")}))
    return path


class Rooms:
    """Stands for the KV transfer: which rooms have been prefilled."""

    def __init__(self) -> None:
        self._events: dict[int, asyncio.Event] = {}

    def of(self, room: int) -> asyncio.Event:
        return self._events.setdefault(room, asyncio.Event())


def chunk(text: str, **more: object) -> bytes:
    """One event of a chat stream."""
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], **more}).encode() + b"\n\n"


USAGE = {"prompt_tokens": 23, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}
STREAM = (chunk("caf\u00e9 "), b": ping\n\n", chunk("end"), chunk("", usage=USAGE), b"data: [DONE]\n\n")
ANSWER = json.dumps({"id": "1", "choices": [{"message": {"content": "hi"}}], "usage": USAGE}).encode()


INFO: dict[str, Any] = {
    "max_total_num_tokens": 4096,
    "page_size": 16,
    "incremental_streaming_output": False,
    "reasoning_parser": None,
    "preferred_sampling_params": None,
    "chat_template": None,
}


@dataclass
class Worker:
    """One scripted worker; `script` may answer instead of the usual behaviour.

    A prefill worker's stream is over at once, so that the client gets decode's, unless `stream` is set.
    """

    role: str
    rooms: Rooms
    script: Script | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    aborted: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    stream: tuple[bytes, ...] = STREAM
    asked: list[dict[str, str]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=lambda: dict(INFO))
    server: TestServer | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        for path in ("/v1/chat/completions", "/v1/completions", "/generate"):
            app.router.add_post(path, self._serve)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/server_info", self._info)
        self.server = TestServer(app)
        await self.server.start_server()

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.port}"

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.close()

    async def _info(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.headers))
        return web.json_response(self.info, status=200 if self.info else 404)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.put_nowait((await request.json())["rid"])
        return web.Response()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        self.raw.append(raw)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.arrived.set()
        try:
            if self.script is not None and (answer := await self.script(request, body)) is not None:
                return answer
            ready = self.rooms.of(body["bootstrap_room"])
            if self.role == "prefill":
                ready.set()
            else:
                await asyncio.wait_for(ready.wait(), 20)
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.closed.set()
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            return web.Response(body=ANSWER, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in STREAM[-1:] if self.role == "prefill" and self.stream is STREAM else self.stream:
            await response.write(piece)
        return response


def answer(status: int, message: str) -> Script:
    """Script: always this error, in SGLang's shape."""

    async def run(_: web.Request, __: dict[str, Any]) -> web.Response:
        return web.json_response(
            {"object": "error", "message": message, "type": "Error", "code": status}, status=status
        )

    return run


async def hang(_: web.Request, __: dict[str, Any]) -> None:
    """Script: never answer."""
    await asyncio.Event().wait()
