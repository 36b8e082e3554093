"""Asking the index from a router or an engine: an answer in time, or "no index".

Decides which of a site's services is asked, and when another one. Nothing about routing: an index that is
down, slow or of another namespace is an answer (`available=False` and a reason), never an exception.

Every service has a circuit. One failed attempt opens it; a probe in the background (grpc.health.v1) closes it
again. So a dead service costs the request that finds out, and none after; with all of them dead, `match`
returns at once. A service that is still catching up says so in its answers: others are asked before it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cache_service import logs
from cache_service.channels import Encryption, open_channel
from cache_service.core.addresses import split_address
from cache_service.core.endpoints import Endpoints
from cache_service.core.errors import ConfigError, IndexUnavailable, RemoteProtocolError
from cache_service.core.ids import BlockHash, Namespace
from cache_service.core.query import Holder, MatchResult
from cache_service.direct import DirectClient, DirectLost
from cache_service.wire import api_codec, cache_pb2_grpc, codec

__all__ = ["Holder", "IndexClient", "MatchResult"]

log = logging.getLogger(__name__)

SERVICE = "prfaas.cache.v1.PrefixIndex"
#: gRPC status -> reason of an unavailable answer; any other status is "error".
REASONS = {
    grpc.StatusCode.UNAVAILABLE: "unreachable",
    grpc.StatusCode.CANCELLED: "unreachable",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.NOT_FOUND: "unknown_namespace",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_query",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "too_large",
}
#: Another service would say the same: these say nothing about this one's health.
_FINAL = frozenset(["unknown_namespace", "invalid_query", "too_large"])
_PROBE_TIMEOUT_S = 1.0
#: A name is resolved again after so long.
_RESOLVE_S = 30.0
_DIRECT_RETRY_S = 0.5
MAX_ADDRESSES = 64

Answer = TypeVar("Answer")


class IndexClient:
    """A client of a site's cache services; make it inside the running event loop, share it, `close` it.

    `addresses` is one host:port or several; a name may stand for several machines. Raises ConfigError for
    what is no address, or TLS files that cannot be used.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        timeout_s: float = 0.25,
        encryption: Encryption | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"index timeout: {timeout_s} s is not above 0")
        names = [addresses] if isinstance(addresses, str) else list(addresses)
        if not 1 <= len(names) <= MAX_ADDRESSES:
            raise ConfigError(f"index: {len(names)} addresses; give 1 to {MAX_ADDRESSES}")
        self._names = {name: split_address(name, field="index") for name in names}
        self._timeout_s = timeout_s
        self._encryption = encryption
        if encryption is not None:
            encryption.client()  # say what is wrong with the files now, not at the first call
        self._endpoints = Endpoints()
        self._open: dict[str, _Connection] = {}
        #: Host to expect in the certificate, by resolved address.
        self._hosts: dict[str, str] = {}
        self._resolved = asyncio.Event()
        self._resolver = asyncio.get_running_loop().create_task(self._resolve(), name="index resolver")
        self._prober: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._last_reason = ""
        #: Unavailable answers by reason, and attempts that went to another service after a failed one.
        self.unavailable: Counter[str] = Counter()
        self.failovers = 0

    @property
    def healthy(self) -> int:
        """Services that would be asked now."""
        return len(self._endpoints) - self._endpoints.broken

    async def match(
        self, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int
    ) -> MatchResult:
        """Ask who holds how much of a prompt; `hashes` are its full pages', `total_tokens` its length.

        Raises LocalProtocolError for a value that does not fit the message, nothing for the index's state.
        """
        request = codec.encode_query(namespace, hashes, total_tokens)

        async def call(to: _Connection, timeout_s: float) -> MatchResult:
            direct = to.direct
            if direct is None or not direct.usable:
                return codec.decode_result(await to.stub.Match(request, timeout=timeout_s))
            status, answer = await direct.ask(request.SerializeToString(), timeout_s)
            if status:
                raise _Refused(_REFUSALS.get(status, "error"), answer.decode(errors="replace"))
            return codec.read_result(answer)

        return await self._ask(call)

    async def match_many(
        self, queries: Sequence[tuple[Namespace, Sequence[BlockHash], int]]
    ) -> list[MatchResult]:
        """Ask several questions in one call; as `match`, in their order. At most api_codec.MAX_QUERIES."""
        if not queries:
            return []
        request = api_codec.encode_batch(queries)

        async def call(to: _Connection, left_s: float) -> list[MatchResult]:
            response = await to.stub.MatchBatch(request, timeout=left_s)
            return api_codec.decode_batch_result(response, len(queries))

        answers = await self._ask(call)
        return [answers] * len(queries) if isinstance(answers, MatchResult) else answers

    async def stats(self, *, timeout_s: float = 5.0) -> codec.Stats:
        """Ask what one of the services holds and how its streams are doing. Raises IndexUnavailable."""
        request = codec.encode_stats_request()
        response = await self._ask(lambda to, left_s: to.stub.Stats(request, timeout=left_s), timeout_s)
        if isinstance(response, MatchResult):
            raise IndexUnavailable(f"index at {', '.join(self._names)}: {response.reason}")
        try:
            return codec.decode_stats(response)
        except RemoteProtocolError as error:
            raise IndexUnavailable(f"index at {', '.join(self._names)}: {error}") from error

    async def close(self) -> None:
        """Close the connections; calls in flight end as unavailable."""
        tasks = [self._resolver, *([self._prober] if self._prober else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(connection.close(None) for connection in self._open.values()))
        await asyncio.gather(*self._closing)

    # -- attempts --------------------------------------------------------------------------------------------

    async def _ask(
        self, call: Callable[[_Connection, float], Awaitable[Answer]], timeout_s: float | None = None
    ) -> Answer | MatchResult:
        """Ask one service after the other until one answers or the time is up."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + (timeout_s or self._timeout_s)
        failure = _Failure("unreachable", "every service is down")
        if not self._resolved.is_set():
            try:
                async with asyncio.timeout_at(ends_s):
                    await self._resolved.wait()
            except TimeoutError:
                return self._unavailable(_Failure("deadline", "the name did not resolve in time"))
        tried: set[str] = set()
        #: Of a service that is starting: better than none.
        poor: Answer | None = None
        while (address := self._endpoints.pick(tried, starting=poor is None)) is not None:
            left_s = ends_s - loop.time()
            if left_s <= 0:
                break
            if tried:
                self.failovers += 1
            tried.add(address)
            # A silent service must leave time for another one.
            spare = self._endpoints.pick(tried) is not None
            try:
                answer = await call(self._connection(address), left_s / 2 if spare else left_s)
            except (grpc.aio.AioRpcError, DirectLost, _Refused, RemoteProtocolError) as error:
                failure = _failure(error)
                if failure.reason in _FINAL:
                    self._endpoints.answered(address)
                    break
                self._failed(address)
                continue
            if _starting(answer):
                self._endpoints.starts(address, loop.time())
                self._probe_soon()
                poor = answer
                continue
            self._endpoints.answered(address)
            self._last_reason = ""
            return answer
        if poor is not None:
            self._last_reason = ""
            return poor
        return self._unavailable(failure)

    def _connection(self, address: str) -> _Connection:
        connection = self._open.get(address)
        if connection is None:
            name = self._hosts.get(address, "")
            connection = _Connection(address, open_channel(address, self._encryption, name=name))
            self._open[address] = connection
        return connection

    def _failed(self, address: str) -> None:
        self._endpoints.failed(address, asyncio.get_running_loop().time())
        self._probe_soon()

    def _probe_soon(self) -> None:
        if self._prober is None or self._prober.done():
            self._prober = asyncio.get_running_loop().create_task(self._probe(), name="index prober")

    async def _probe(self) -> None:
        """Ask the services that failed or are starting for their health until every one is well."""
        loop = asyncio.get_running_loop()
        while (at_s := self._endpoints.next_probe_s()) is not None:
            await asyncio.sleep(max(0.0, at_s - loop.time()))
            due = self._endpoints.due(loop.time())
            await asyncio.gather(*map(self._probe_one, due))

    async def _probe_one(self, address: str) -> None:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            answer = await self._connection(address).health.Check(request, timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            self._endpoints.failed(address, asyncio.get_running_loop().time())
            return
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            self._endpoints.answered(address)
        else:
            self._endpoints.starts(address, asyncio.get_running_loop().time())

    async def _resolve(self) -> None:
        """Find out what the names stand for, now and again."""
        loop = asyncio.get_running_loop()
        while True:
            found: dict[str, str] = {}
            for host, port in self._names.values():
                with contextlib.suppress(OSError):
                    for *_, where in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                        ip = f"[{where[0]}]" if ":" in str(where[0]) else where[0]
                        found[f"{ip}:{where[1]}"] = host
            if found:
                self._hosts = found
                addresses = random.sample(sorted(found), len(found))  # clients spread over the services
                for gone in self._endpoints.update(addresses):
                    self._drop(gone)
            elif not self._resolved.is_set():
                self._note("unreachable", "no name resolves")
            self._resolved.set()
            await asyncio.sleep(_RESOLVE_S if found else _PROBE_TIMEOUT_S)

    def _drop(self, address: str) -> None:
        connection = self._open.pop(address, None)
        if connection is not None:
            closing = asyncio.get_running_loop().create_task(connection.close(self._timeout_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _unavailable(self, failure: _Failure) -> MatchResult:
        self.unavailable[failure.reason] += 1
        self._note(failure.reason, failure.details)
        return MatchResult(available=False, reason=failure.reason, holders=(), revision=0)

    def _note(self, reason: str, details: str) -> None:
        if reason != self._last_reason:  # one line per change, not per request
            self._last_reason = reason
            addresses = ",".join(self._names)
            logs.event(
                log,
                "index_unavailable",
                logging.WARNING,
                address=addresses,
                reason=reason,
                details=details,
            )


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str
    details: str


class _Refused(Exception):
    """A direct answer that is a refusal."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(details)
        self.reason = reason


def _starting(answer: Any) -> bool:
    starting: bool = (answer[0] if isinstance(answer, list) else answer).starting
    return starting


#: gRPC's status numbers, as direct answers carry them.
_REFUSALS = {code.value[0]: reason for code, reason in REASONS.items()}


def _failure(error: Exception) -> _Failure:
    if isinstance(error, grpc.aio.AioRpcError):
        return _Failure(REASONS.get(error.code(), "error"), error.details() or "")
    if isinstance(error, DirectLost):
        return _Failure("deadline" if error.late else "unreachable", str(error))
    return _Failure(error.reason if isinstance(error, _Refused) else "error", str(error))


class _Connection:
    """One service's channel and stubs, and the direct connection for Match as long as there is one."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self._address = address
        self._channel = channel
        self.stub: Any = cache_pb2_grpc.PrefixIndexStub(channel)  # type: ignore[no-untyped-call]
        self.health: Any = health_pb2_grpc.HealthStub(channel)
        self.direct: DirectClient | None = None
        self._opening = asyncio.get_running_loop().create_task(self._keep_direct(), name="index direct")

    async def close(self, grace_s: float | None) -> None:
        """End both; calls in flight fail."""
        self._opening.cancel()
        await asyncio.gather(self._opening, return_exceptions=True)
        if self.direct is not None:
            self.direct.close()
        await self._channel.close(grace_s)

    async def _keep_direct(self) -> None:
        """Ask the service for its port and stay connected to it, for as long as it has one."""
        host, _ = split_address(self._address, field="index")
        while True:
            try:
                stats = await self.stub.Stats(
                    codec.encode_stats_request(), timeout=_PROBE_TIMEOUT_S, wait_for_ready=True
                )
                port = codec.decode_stats(stats).direct_port
                if port:
                    self.direct = await DirectClient.open(host, port, _PROBE_TIMEOUT_S)
                    await self.direct.lost
                    self.direct = None
                else:
                    await asyncio.sleep(_RESOLVE_S)  # a newer release may serve it
            except (grpc.aio.AioRpcError, RemoteProtocolError, OSError, TimeoutError):
                self.direct = None
            await asyncio.sleep(_DIRECT_RETRY_S)
