"""The delta log over gRPC: one cache service follows another's log, with no store in between.

Decides when a silent stream is given up and what is resumed. Messages: replication/core/stream.py; they are
bytes of our own, so no generated stub is involved. A follower that is slow is held back by flow control, and
gets a snapshot when the log has moved on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from cache_service import logs
from cache_service.channels import Encryption, open_channel
from cache_service.core.errors import RemoteProtocolError
from cache_service.core.log import LogEntry, LogPosition
from cache_service.etcd.core.retry import backoff_s
from cache_service.replication.core.stream import (
    BEAT,
    MAX_MESSAGE_BYTES,
    Ask,
    EntryReader,
    Hello,
    decode_ask,
    decode_hello,
    encode_entry,
)
from cache_service.store import DeltaLog

log = logging.getLogger(__name__)

SERVICE = "prfaas.cache.v1.DeltaStream"
METHOD = f"/{SERVICE}/Follow"
BEAT_S = 1.0
#: The first one comes sooner: it tells the follower that it has caught up.
_FIRST_BEAT_S = 0.05
#: No entry and no beat for so long: the connection is dead.
SILENCE_S = 4.0
MAX_FOLLOWERS = 256


class DeltaStreamService:
    """Serves one site's log to the services of other sites."""

    def __init__(self, delta_log: DeltaLog, namespace_id: str, hello: Hello) -> None:
        self._log = delta_log
        self._namespace_id = namespace_id
        self._hello = hello
        #: Followers now.
        self.followers = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answer the method on a gRPC server."""
        handler = grpc.unary_stream_rpc_method_handler(self._follow)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Follow": handler}),))

    async def _follow(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            ask = decode_ask(request)
        except RemoteProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if ask.namespace != self._namespace_id:
            await context.abort(grpc.StatusCode.NOT_FOUND, "follow.namespace: is not the one indexed here")
        if self.followers >= MAX_FOLLOWERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_FOLLOWERS} followers")
        self.followers += 1
        try:
            yield self._hello.encode()
            async with aclosing(self._entries_and_beats(ask.after)) as messages:
                async for message in messages:
                    yield message
        finally:
            self.followers -= 1

    async def _entries_and_beats(self, after: LogPosition | None) -> AsyncGenerator[bytes, None]:
        entries = self._log.watch(after)
        waiting: asyncio.Future[LogEntry] | None = None
        wait_s = _FIRST_BEAT_S
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(entries))
                await asyncio.wait({waiting}, timeout=wait_s)
                if not waiting.done():
                    wait_s = BEAT_S
                    yield BEAT
                    continue
                entry, waiting = waiting.result(), None
                for message in encode_entry(entry):
                    yield message
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait({waiting})


class PeerReader:
    """Follows the log of the service at `address`; make it inside the event loop, `close` it at the end.

    `site` is what the service must call itself, "" for any name; with `encryption` its certificate must, too.
    Raises ConfigError for files that cannot be used.
    """

    def __init__(
        self,
        address: str,
        namespace_id: str,
        *,
        site: str = "",
        encryption: Encryption | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._address = address
        self._namespace_id = namespace_id
        self._silence_s = silence_s
        self._site = site
        self._channel = open_channel(address, encryption, name=site, most_bytes=MAX_MESSAGE_BYTES)
        self._call = self._channel.unary_stream(METHOD, None, None)  # bytes as they are
        #: How often the stream was lost and opened again.
        self.resumes = 0

    async def watch(
        self,
        after: LogPosition | None,
        *,
        on_hello: Callable[[Hello], None] = lambda hello: None,
        on_heard: Callable[[], None] = lambda: None,
        on_caught_up: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[LogEntry, None]:
        """Yield what follows `after`, for ever, over any number of streams."""
        failures = 0
        while True:
            stream = self._call(Ask(self._namespace_id, after).encode())
            reader = EntryReader()
            try:
                on_hello(self._expected(decode_hello(await self._read(stream))))
                while True:
                    entry = reader.take(await self._read(stream))
                    failures = 0
                    on_heard()
                    if entry is None:
                        on_caught_up()
                    else:
                        after = entry.position
                        yield entry
            except (grpc.aio.AioRpcError, TimeoutError, EOFError, RemoteProtocolError) as error:
                failures += 1
                self.resumes += 1
                what = error.details() if isinstance(error, grpc.aio.AioRpcError) else repr(error)
                level = logging.WARNING if failures == 1 else logging.INFO
                logs.event(
                    log,
                    "peer_stream_lost",
                    level,
                    site=self._site,
                    address=self._address,
                    error=str(what)[:300],
                )
            finally:
                stream.cancel()
            await asyncio.sleep(backoff_s(failures, first_s=0.1))

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    def _expected(self, hello: Hello) -> Hello:
        if self._site and hello.site != self._site:
            raise RemoteProtocolError(
                f"replication.peers.{self._site}: {self._address} says that it is of site {hello.site}",
                reason="site",
            )
        return hello

    async def _read(self, stream: Any) -> bytes:
        # Running out of time cancels the call, which is what is wanted: it is given up then. Not wait_for:
        # before Python 3.12 it loses a cancellation that meets a message.
        async with asyncio.timeout(self._silence_s):
            message = await stream.read()
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise EOFError("the stream ended")
        found: bytes = message
        return found
