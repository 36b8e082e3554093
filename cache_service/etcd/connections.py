"""Channels to the endpoints: calls with deadlines and retries, streams, and the login token.

What may be repeated is decided in core/retry.py; this file carries it out. Every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Generic

import grpc
from google.protobuf.message import Message

from cache_service import logs
from cache_service.core.errors import LocalProtocolError, PrfaasError
from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd import rpc
from cache_service.etcd.config import EtcdConfig, TlsPaths
from cache_service.etcd.core.errors import Ambiguous, EtcdDeadline, EtcdUnavailable, translate
from cache_service.etcd.core.retry import EndpointRing, Repeat, Verdict, backoff_s, judge
from cache_service.etcd.rpc import Method, Response

log = logging.getLogger(__name__)

_MAX_TOKEN_RENEWALS = 2
_EOF: Any = vars(grpc.aio)["EOF"]  # not in the type stubs


class Stream(Generic[Response]):
    """One bidirectional stream. One reader and one writer; `close` it."""

    def __init__(self, address: str, method: Method[Response], call: Any) -> None:
        self.address = address
        self._what = f"{method.name} at {address}"
        self._call = call
        self._reading: asyncio.Future[Any] | None = None

    async def write(self, message: Message, *, timeout_s: float) -> None:
        """Send. Raises the error that ended the stream, or EtcdDeadline, which ends it too."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(message)
        except TimeoutError:
            raise EtcdDeadline(f"etcd {self._what}: a message was not taken in {timeout_s} s") from None
        except grpc.aio.AioRpcError as error:
            raise _error(error, self._what) from error
        except asyncio.InvalidStateError:
            raise await self._ended() from None

    async def read(self, timeout_s: float) -> Response | None:
        """Return the next message, or None when none came in time: the stream goes on then.

        Raises the error that ended the stream.
        """
        # Cancelling a read cancels the RPC, so an unfinished one is kept for the next call.
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        done, _ = await asyncio.wait({self._reading}, timeout=timeout_s)
        if not done:
            return None
        reading, self._reading = self._reading, None
        try:
            message = reading.result()
        except grpc.aio.AioRpcError as error:
            raise _error(error, self._what) from error
        except asyncio.CancelledError:
            raise EtcdUnavailable(f"etcd {self._what}: the stream was closed here") from None
        if message is _EOF:
            raise await self._ended()
        result: Response = message
        return result

    async def close(self) -> None:
        """Cancel the stream and wait for what is left of it."""
        self._call.cancel()
        if self._reading is not None:
            reading, self._reading = self._reading, None
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()

    async def _ended(self) -> PrfaasError:
        code, details = await self._call.code(), await self._call.details()
        if code is grpc.StatusCode.OK:
            return EtcdUnavailable(f"etcd {self._what}: ended by the server")
        return translate(code.name, details or "", what=self._what)


class Connections:
    """All channels of one client; make it inside the running event loop and `close` it."""

    def __init__(self, config: EtcdConfig) -> None:
        self.config = config
        self._ring = EndpointRing(config.endpoints)
        self._credentials = _credentials(config.tls) if config.tls else None
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._token = ""
        self._token_lock = asyncio.Lock()
        self._closed = False
        self.now_s = asyncio.get_running_loop().time

    async def call(
        self,
        method: Method[Response],
        request: Message,
        *,
        timeout_s: float | None = None,
        endpoint: str | None = None,
        repeat: Repeat | None = None,
        leader: bool | None = None,
        patience: int = 1,
    ) -> Response:
        """Call an RPC, on `endpoint` or on any, repeating what may be repeated until `timeout_s` is over.

        `patience` multiplies the configured time of an attempt and, unless `timeout_s` is given, of the call.

        Raises an error of core/errors.py; its context says how many attempts were `unsure`: cut off, but
        perhaps carried out.
        """
        return await _Call(self, method, timeout_s, endpoint, repeat, leader, patience=patience).run(request)

    async def open(
        self, method: Method[Response], *, avoid: frozenset[str] = frozenset()
    ) -> Stream[Response]:
        """Open a stream to an endpoint, preferably none in `avoid`. Nothing is known of it before a read."""
        address = self._ring.choose(self.now_s(), avoid=avoid)
        metadata = await self.metadata(leader=method.leader)
        make: Any = self.channel(address).stream_stream(
            method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=method.response.FromString,
        )
        return Stream(address, method, make(metadata=metadata))

    def channel(self, address: str) -> grpc.aio.Channel:
        """Return the channel to an endpoint, made at first use."""
        if self._closed:
            raise LocalProtocolError("etcd client: used after close")
        if address not in self._channels:
            if address not in self.config.endpoints:
                raise LocalProtocolError(f"etcd: {address} is not one of {', '.join(self.config.endpoints)}")
            self._channels[address] = self._connect(address)
        return self._channels[address]

    def choose(self, avoid: frozenset[str]) -> str:
        """Return the endpoint for the next attempt."""
        return self._ring.choose(self.now_s(), avoid=avoid)

    def failed(self, address: str, details: str) -> None:
        """Note a failure of an endpoint: others go first for a while."""
        if self._ring.failed(address, self.now_s()):
            logs.event(log, "etcd_endpoint_failed", logging.WARNING, address=address, details=details)

    def answered(self, address: str) -> None:
        """Note that an endpoint answered."""
        if self._ring.answered(address):
            logs.event(log, "etcd_endpoint_recovered", address=address)

    async def metadata(self, *, leader: bool) -> tuple[tuple[str, str], ...]:
        """Return what goes with a call: the token, and that a leader is required."""
        found: list[tuple[str, str]] = [("hasleader", "true")] if leader else []
        if self.config.user:
            if not self._token:
                await self._login()
            found.append(("token", self._token))
        return tuple(found)

    @property
    def token(self) -> str:
        """The login token in use; never to be logged."""
        return self._token

    def drop_token(self, rejected: str) -> None:
        """Forget a token that was rejected, unless there is a newer one: the next call logs in."""
        if self._token == rejected:
            self._token = ""

    async def _login(self) -> None:
        async with self._token_lock:
            if self._token:
                return
            request = pb.AuthenticateRequest(name=self.config.user, password=self.config.password)
            answer = await _Call(self, rpc.AUTHENTICATE, None, None, None, None, login=True).run(request)
            self._token = answer.token

    async def close(self) -> None:
        """Close every channel; calls in flight end as unavailable."""
        self._closed = True
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close(None) for channel in channels))

    def _connect(self, address: str) -> grpc.aio.Channel:
        config = self.config
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
            # Channels of one process share connections otherwise, and with them each other's failures.
            ("grpc.use_local_subchannel_pool", 1),
            # etcd is never behind a proxy that the environment names.
            ("grpc.enable_http_proxy", 0),
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        if config.tls is not None and config.tls.server_name:
            options.append(("grpc.ssl_target_name_override", config.tls.server_name))
        return grpc.aio.secure_channel(address, self._credentials, options=options)


class _Call(Generic[Response]):
    """One call with its attempts."""

    def __init__(
        self,
        connections: Connections,
        method: Method[Response],
        timeout_s: float | None,
        endpoint: str | None,
        repeat: Repeat | None,
        leader: bool | None,
        *,
        patience: int = 1,
        login: bool = False,
    ) -> None:
        self._connections = connections
        self._method = method
        self._timeout_s = connections.config.timeout_s * patience if timeout_s is None else timeout_s
        self._attempt_s = connections.config.attempt_s * patience
        self._endpoint = endpoint
        self._repeat = repeat or method.repeat
        self._leader = method.leader if leader is None else leader
        self._login = login
        self._tried: frozenset[str] = frozenset()
        self._rounds = 0
        self._unsure = 0
        self._renewals = 0

    async def run(self, request: Message) -> Response:
        connections = self._connections
        deadline_s = connections.now_s() + self._timeout_s
        last: grpc.aio.AioRpcError | None = None
        while (left_s := deadline_s - connections.now_s()) > 0:
            address = self._endpoint or connections.choose(self._tried)
            metadata = await self._metadata(left_s)
            token = connections.token
            try:
                response = await self._attempt(address, request, metadata, left_s)
            except grpc.aio.AioRpcError as error:
                last = error
                await self._after(error, address, token, deadline_s)
                continue
            connections.answered(address)
            return response
        raise self._give_up(last)

    async def _metadata(self, left_s: float) -> tuple[tuple[str, str], ...]:
        if self._login:
            return ()
        try:
            async with asyncio.timeout(left_s):
                return await self._connections.metadata(leader=self._leader)
        except TimeoutError:
            raise EtcdDeadline(f"etcd {self._method.name}: no login within {left_s:.1f} s") from None

    async def _attempt(
        self, address: str, request: Message, metadata: tuple[tuple[str, str], ...], left_s: float
    ) -> Response:
        # What may not be repeated gets all the time there is.
        once = self._repeat is Repeat.ONCE or self._endpoint is not None
        timeout_s = left_s if once else min(left_s, self._attempt_s)
        call = self._connections.channel(address).unary_unary(
            self._method.path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self._method.response.FromString,
        )
        response: Response = await call(request, timeout=timeout_s, metadata=metadata)
        return response

    async def _after(self, error: grpc.aio.AioRpcError, address: str, token: str, deadline_s: float) -> None:
        """Return to try again, or raise."""
        code, details = error.code().name, error.details() or ""
        verdict = judge(self._repeat, code, details)
        if verdict is Verdict.RENEW_TOKEN and self._can_renew():
            self._renewals += 1
            self._connections.drop_token(token)
            return
        if verdict in (Verdict.FAIL, Verdict.RENEW_TOKEN):
            raise self._error(error)
        self._connections.failed(address, details or code)
        self._unsure += self._repeat is not Repeat.READ
        if verdict is Verdict.AMBIGUOUS:
            raise Ambiguous(
                f"etcd {self._method.name}: cut off, may have been carried out: {details or code}"
            )
        self._tried |= {address}
        if self._endpoint is not None or self._tried >= set(self._connections.config.endpoints):
            self._tried = frozenset()
            self._rounds += 1
            left_s = deadline_s - self._connections.now_s()
            await asyncio.sleep(max(0.0, min(backoff_s(self._rounds), left_s)))

    def _can_renew(self) -> bool:
        return (
            bool(self._connections.config.user) and not self._login and self._renewals < _MAX_TOKEN_RENEWALS
        )

    def _give_up(self, last: grpc.aio.AioRpcError | None) -> PrfaasError:
        if last is not None and last.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._error(last)
        error = EtcdDeadline(f"etcd {self._method.name}: no answer in {self._timeout_s} s")
        error.context["unsure"] = self._unsure
        return error

    def _error(self, error: grpc.aio.AioRpcError) -> PrfaasError:
        translated = _error(error, self._method.name)
        translated.context["unsure"] = self._unsure
        return translated


def _error(error: grpc.aio.AioRpcError, what: str) -> PrfaasError:
    return translate(error.code().name, error.details() or "", what=what)


def _credentials(tls: TlsPaths) -> grpc.ChannelCredentials:
    certificate = Path(tls.cert).read_bytes() if tls.cert else None
    key = Path(tls.key).read_bytes() if tls.key else None
    return grpc.ssl_channel_credentials(Path(tls.ca).read_bytes(), key, certificate)
