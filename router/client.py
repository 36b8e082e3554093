"""The client's side of one request: an answer that begins when there is something to say, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
from aiohttp import web

from router.core.join import Rest
from router.openai import error_body, error_type
from router.record import Record


class Client:
    """Who waits for one answer.

    Attributes:
        record: what is noted of the request.
        stream: the answer's stream once it has begun; from then on no other answer can be given.
        rest: the first token has been sent, and this is what has to follow; None before.
    """

    def __init__(self, http: web.Request, record: Record) -> None:
        self.record = record
        self.stream: web.StreamResponse | None = None
        self.rest: Rest | None = None
        self._http = http

    async def begin(self, content_type: str) -> None:
        """Begin a stream, if it has not."""
        if self.stream is not None:
            return
        self.record.status = 200
        headers = self.record.headers() | {"Content-Type": content_type, "Cache-Control": "no-cache"}
        self.stream = web.StreamResponse(headers=headers)
        await self.stream.prepare(self._http)

    async def write(self, chunk: bytes) -> None:
        """Send bytes of the stream that has begun."""
        assert self.stream is not None
        await self.stream.write(chunk)
        if self.record.ttft_s is None:
            self.record.ttft_s = asyncio.get_running_loop().time() - self.record.started_s

    async def send_first(self, events: bytes, rest: Rest) -> None:
        """Send the first token, which prefill had before decode."""
        await self.begin("text/event-stream; charset=utf-8")
        await self.write(events)
        self.rest = rest

    async def end(self, status: int = 200, message: str = "", code: str = "") -> web.StreamResponse:
        """End the stream, with an error if there is one to tell."""
        assert self.stream is not None
        if message:
            body: Mapping[str, object] = error_body(message, error_type(status), code=code)
            # the blank line ends an event that was cut off
            await self.stream.write(b"\n\ndata: " + msgspec.json.encode(body) + b"\n\n")
        await self.stream.write_eof()
        return self.stream
