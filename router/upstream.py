"""One request on one pair of workers: the same body to prefill and decode, decode's answer to the client.

Decides which side an attempt failed on; whether to try another route is the caller's. Rests on SGLang 0.5.21:
both workers get the same JSON with `bootstrap_host`, `bootstrap_port`, `bootstrap_room` and `rid` and must be
called concurrently (decode waits for the KV that prefill sends); an abort is POST /abort_request with the rid
and must go to both; a closed connection aborts too, but later.

Must not hand out a byte of an answer before it is known to be one: the first event of a stream may be an
error, and until a byte went out another route can still serve the client.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

from cache_service import logs
from cache_service.core.errors import RemoteProtocolError
from router.answers import AnswerError, Facts, StreamWatch, error_of, facts_of, message_of
from router.config import LimitConfig, TimeoutConfig, WorkerConfig
from router.core.hold import worker_reason
from router.core.join import FirstToken, Mismatch, Rest
from router.core.sse import SseParser
from router.metrics import RouterMetrics
from router.openai import with_fields
from router.traits import TraitTable

_log = logging.getLogger(__name__)
_ERROR_BODY_BYTES = 64 << 10
#: Below uvicorn's 5 s, so that a kept connection is dropped by us first and never under a request.
_KEEPALIVE_S = 2.0


#: In decode's words when KV did not arrive although prefill has answered (SGLang's exception of this name).
_TRANSFER_FAILED = "KVTransferError"


class Side(StrEnum):
    """The two workers of a request."""

    PREFILL = "prefill"
    DECODE = "decode"


class Kind(StrEnum):
    """How a call to a worker failed."""

    CONNECT = "connect"
    STATUS = "status"
    BROKEN = "broken"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that ended before the client got a byte.

    Attributes:
        side: where it was seen.
        suspect: which worker to leave out of the next attempt.
        certain: the suspect itself is at fault (it counts against its breaker).
        status: HTTP status for the client if no other attempt is made.
        client_fault: the worker refused the request itself; another one would too.
    """

    side: Side
    kind: Kind
    suspect: Side
    certain: bool
    status: int
    message: str
    client_fault: bool = False

    @property
    def hard(self) -> bool:
        """True when a worker had taken the request and broke, rather than being away, busy or slow."""
        return self.kind is Kind.BROKEN or (self.kind is Kind.STATUS and self.status in (500, 502))


@dataclass(frozen=True, slots=True)
class Call:
    """What both workers are sent, less what differs between attempts.

    Attributes:
        held: why the first token has to come from decode, "" when prefill's may be sent (core/join.py).
        stops: the request's stop strings.
        ends: texts of the tokens that end the answer, None when they are not known.
        fields: the parsed body, not to be changed.
    """

    path: str
    body: bytes
    empty: bool
    listed: bool
    stream: bool
    api: str = ""
    held: str = "off"
    stops: tuple[str, ...] = ()
    ends: Collection[str] | None = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class StreamBroken(Exception):
    """Decode's stream ended early; bytes may have gone to the client."""


class Upstream:
    """HTTP to the workers: one connection pool, and the aborts that outlive their requests."""

    def __init__(self, timeouts: TimeoutConfig, limits: LimitConfig, metrics: RouterMetrics) -> None:
        """Open the pool; needs a running loop, and `close`."""
        self.timeouts = timeouts
        self.limits = limits
        self._metrics = metrics
        self._background: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
        )
        self.traits = TraitTable(self._session)

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> aiohttp.client._RequestContextManager:
        """Start a POST of JSON bytes."""
        return self._session.post(
            url,
            data=io.BytesIO(body),
            headers={"Content-Type": "application/json", **headers},
            allow_redirects=False,
        )

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside the requests; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def abort(self, side: Side, worker: WorkerConfig, rid: str, headers: dict[str, str]) -> None:
        """Tell a worker to stop a request; never raises, waits at most `abort_s`."""
        outcome = "ok"
        try:
            async with asyncio.timeout(self.timeouts.abort_s):
                url = worker.url.rstrip("/") + "/abort_request"
                async with self.post(url, b'{"rid":"%s"}' % rid.encode(), headers) as response:
                    if response.status >= 400:
                        outcome = "refused"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            outcome = "unreachable"
            logs.event(
                _log, "abort_failed", logging.DEBUG, worker_id=worker.worker_id, rid=rid, error=str(error)
            )
        self._metrics.aborts.labels(side, outcome).inc()

    async def close(self) -> None:
        """Wait for the aborts under way (each bounded), then close every connection."""
        while self._background:
            await asyncio.wait(self._background)
        await self.traits.close()
        await self._session.close()


class Exchange:
    """One attempt. `start`, then on success `chunks` to the end, then `close`; on anything else `abandon`."""

    def __init__(
        self,
        upstream: Upstream,
        call: Call,
        *,
        prefill: WorkerConfig,
        decode: WorkerConfig,
        room: int,
        rid: str,
        prefilled: Callable[[], None],
        first: FirstToken | None = None,
        rest: Rest | None = None,
    ) -> None:
        """Prepare an attempt.

        Args:
            prefilled: called once when the prefill side is over, however it ended.
            first: reads the first token in prefill's stream; None to wait for decode's.
            rest: an earlier attempt has sent the first token; decode's stream goes behind it.
        """
        self._first_token = first
        self._rest = rest
        self._early: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._upstream = upstream
        self._call = call
        self._workers = {Side.PREFILL: prefill, Side.DECODE: decode}
        self._rid = rid
        self._prefilled = prefilled
        self._body = with_fields(
            call.body,
            empty=call.empty,
            fields={
                "bootstrap_host": prefill.bootstrap_host,
                "bootstrap_port": prefill.bootstrap_port,
                "bootstrap_room": room,
                "rid": [rid] if call.listed else rid,
            },
        )
        self._asked: asyncio.Task[str] | None = None
        self._prefill: asyncio.Task[Failure | None] | None = None
        self._decode: asyncio.Task[Failure | None] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._first: list[bytes] = []
        self._watch = StreamWatch()
        self._facts: Facts | None = None
        self.content_type = "application/json"

    async def start(
        self, deadline_s: float, send_early: Callable[[bytes, Rest], Awaitable[None]]
    ) -> Failure | None:
        """Call both workers and wait until decode's answer has begun (streamed) or is whole.

        Returns the failure that ends this attempt, None when `chunks` may be read. `deadline_s` is on the
        loop's clock. `send_early` gets the events of the first token when prefill has it before decode, and
        what decode's stream has to follow.
        """
        loop = asyncio.get_running_loop()
        if self._first_token is not None:
            self._asked = loop.create_task(self._ask_workers())
        self._prefill = loop.create_task(self._run_prefill())
        self._prefill.add_done_callback(lambda _: self._prefilled())
        self._decode = loop.create_task(self._open_decode())
        waiting: set[asyncio.Future[Any]] = {self._prefill, self._decode, self._early}
        while True:
            done, _ = await asyncio.wait(
                waiting, timeout=max(0.0, deadline_s - loop.time()), return_when=asyncio.FIRST_COMPLETED
            )
            if self._decode in done:
                failure = self._decode.result()
                if failure is None or failure.client_fault:
                    return failure
            if self._prefill in done and (failure := self._prefill.result()) is not None:
                return failure
            if self._decode in done:
                return self._decode.result()
            if self._early in done and self._first_token is not None:
                token = self._first_token
                self._rest = Rest(token.api, token.text, token.ident, token.created)
                await send_early(self._early.result(), self._rest)
            if not done:
                suspect = Side.DECODE if self._prefill.done() else Side.PREFILL
                return Failure(
                    suspect, Kind.TIMEOUT, suspect, True, 504, "the workers did not answer in time"
                )
            waiting -= done

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the answer's bytes as they come. Raises StreamBroken when the worker ends it early."""
        join = self._passed if self._rest is None else self._joined(self._rest)
        try:
            for chunk in self._first:
                if out := join(chunk):
                    yield out
            if self._chunks is None:
                return
            async for chunk in self._chunks:
                self._watch.feed(chunk)
                if out := join(chunk):
                    yield out
        except (aiohttp.ClientError, OSError) as error:
            raise StreamBroken(str(error) or type(error).__name__) from error
        except (Mismatch, RemoteProtocolError) as error:
            raise StreamBroken(f"decode's stream does not follow the first token: {error}") from error

    @staticmethod
    def _passed(chunk: bytes) -> bytes:
        return chunk

    @staticmethod
    def _joined(rest: Rest) -> Callable[[bytes], bytes]:
        parser = SseParser()
        return lambda chunk: b"".join(rest.feed(event) for event in parser.feed(chunk))

    def facts(self) -> Facts:
        """Return what the answer said about its prompt; call after the last chunk."""
        return self._watch.facts() if self._facts is None else self._facts

    def late_error(self) -> AnswerError | None:
        """Return an error that the stream carried after its first event."""
        return self._watch.error() if self._facts is None else None

    def close(self) -> None:
        """The answer is complete: give the connection back; prefill gets a moment to end by itself."""
        if self._response is not None:
            self._response.release()
        if self._prefill is not None and not self._prefill.done():
            self._upstream.spawn(self._reap())

    def abandon(self) -> None:
        """Stop both workers, without waiting: abort calls first, then the connections are closed."""
        self._upstream.spawn(self._abandon())

    async def _abandon(self) -> None:
        await asyncio.gather(
            *(
                self._upstream.abort(side, worker, self._rid, self._call.headers)
                for side, worker in self._workers.items()
            )
        )
        tasks = [task for task in (self._asked, self._prefill, self._decode) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._response is not None:
            self._response.close()

    async def _reap(self) -> None:
        assert self._prefill is not None
        await asyncio.wait({self._prefill}, timeout=self._upstream.timeouts.abort_s)
        self._prefill.cancel()
        await asyncio.gather(self._prefill, return_exceptions=True)

    def _post(self, side: Side) -> aiohttp.client._RequestContextManager:
        url = self._workers[side].url.rstrip("/") + self._call.path
        return self._upstream.post(url, self._body, self._call.headers)

    async def _run_prefill(self) -> Failure | None:
        """Read the prefill worker's answer to its end and throw it away; it matters only when it failed."""
        watch = StreamWatch()
        try:
            async with self._post(Side.PREFILL) as response:
                if response.status != 200:
                    return await self._refused(Side.PREFILL, response)
                async for chunk in response.content.iter_any():
                    for event in watch.feed(chunk) if self._call.stream else ():
                        if (error := error_of(event)) is not None:
                            return self._answered(Side.PREFILL, error)
                        await self._look_for_token(event)
                return None
        except (aiohttp.ClientError, OSError) as error:
            return _lost(Side.PREFILL, error)

    async def _ask_workers(self) -> str:
        """Return why these workers' first token has to come from decode, "" when it need not."""
        sides = (self._workers[Side.PREFILL], self._workers[Side.DECODE])
        traits = await asyncio.gather(*(self._upstream.traits.get(w, self._call.headers) for w in sides))
        return worker_reason(self._call.api, self._call.fields, self._call.prompt_tokens, *traits)

    async def _look_for_token(self, event: bytes) -> None:
        if self._first_token is None or self._asked is None or not (early := self._first_token.feed(event)):
            return
        if reason := await self._asked:
            self._first_token.reason = reason
        else:
            self._early.set_result(early)

    async def _open_decode(self) -> Failure | None:
        try:
            response = self._response = await self._post(Side.DECODE)
            if response.status != 200:
                return await self._refused(Side.DECODE, response)
            self.content_type = response.headers.get("Content-Type", "application/json")
            if not self._call.stream or not self.content_type.startswith("text/event-stream"):
                return await self._read_whole(response)
            self._chunks = response.content.iter_any()
            async for chunk in self._chunks:
                self._first.append(chunk)
                events = self._watch.feed(chunk)
                if events or self._watch.blind:
                    error = error_of(events[0]) if events else None
                    return None if error is None else self._answered(Side.DECODE, error)
            return Failure(
                Side.DECODE, Kind.BROKEN, Side.DECODE, True, 502, "the decode worker sent no event"
            )
        except (aiohttp.ClientError, OSError) as error:
            return _lost(Side.DECODE, error)

    async def _read_whole(self, response: aiohttp.ClientResponse) -> Failure | None:
        limit = self._upstream.limits.answer_bytes
        parts: list[bytes] = []
        size = 0
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > limit:
                message = f"the answer is longer than limits.answer_bytes = {limit}; ask for a stream"
                return Failure(Side.DECODE, Kind.STATUS, Side.DECODE, False, 502, message, client_fault=True)
            parts.append(chunk)
        whole = b"".join(parts)
        self._first = [whole]
        self._facts = facts_of(whole)
        return None

    async def _refused(self, side: Side, response: aiohttp.ClientResponse) -> Failure:
        body = b""
        async for chunk in response.content.iter_chunked(16 << 10):
            body += chunk
            if len(body) > _ERROR_BODY_BYTES:
                break
        return self._answered(side, AnswerError(response.status, message_of(body)))

    def _answered(self, side: Side, error: AnswerError) -> Failure:
        """Judge an error that a worker answered with."""
        status = error.status
        if status in (408, 429, 503):  # it has no room now: not broken, but not for this request either
            return Failure(side, Kind.STATUS, side, False, 503 if status == 408 else status, error.message)
        if 400 <= status < 500:
            return Failure(side, Kind.STATUS, side, False, status, error.message, client_fault=True)
        status = 504 if status == 504 else 502
        prefilled = self._prefill is not None and self._prefill.done()
        if side is Side.DECODE and (not prefilled or _TRANSFER_FAILED in error.message):
            # Most likely the KV never arrived: the sender is the one to replace, but nobody is convicted.
            return Failure(side, Kind.STATUS, Side.PREFILL, False, status, error.message)
        return Failure(side, Kind.STATUS, side, True, status, error.message)


def _lost(side: Side, error: Exception) -> Failure:
    """Judge a connection that could not be made or did not last."""
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return Failure(side, Kind.CONNECT, side, True, 503, f"the {side} worker cannot be reached")
    return Failure(side, Kind.BROKEN, side, True, 502, f"the {side} worker broke off: {error}")
