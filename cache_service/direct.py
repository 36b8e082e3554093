"""Match without gRPC: the same messages in frames of our own over TCP, for the router's hot path.

Decides the frames and what a connection may cost. gRPC for Python takes 0.4 ms for an empty call, some four
times what this takes for a whole Match; everything else stays with gRPC, which also tells the port (Stats).

    opening      the client sends "PXM1", the service answers the same
    question     u32 length of the rest, u32 call, MatchRequest           (little-endian)
    answer       u32 length of the rest, u32 call, u8 status, MatchResponse or, status not 0, UTF-8 text

The status is gRPC's number. Answers come in the order of the questions. Plain TCP: not served with tls.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

from cache_service.core.errors import ConfigError, RemoteProtocolError
from cache_service.wire.codec import MAX_MESSAGE_BYTES

MAGIC = b"PXM1"
MAX_CONNECTIONS = 1024
_QUESTION = struct.Struct("<II")
_ANSWER = struct.Struct("<IIB")
_CALL_BYTES = 4
_STATUS_BYTES = 1

#: A question's bytes -> status and the answer's bytes.
Answerer = Callable[[bytes], tuple[int, bytes]]


class Frames:
    """Cuts a byte stream into frames; `feed` raises RemoteProtocolError for a length out of bounds."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._buffer = bytearray()
        self._opened = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that `data` completes, without their length."""
        buffer = self._buffer
        buffer += data
        if not self._opened:
            if not MAGIC.startswith(buffer[: len(MAGIC)]):
                raise RemoteProtocolError("direct: the connection does not begin with PXM1")
            if len(buffer) < len(MAGIC):
                return []
            del buffer[: len(MAGIC)]
            self._opened = True
        found = []
        at = 0
        while len(buffer) - at >= 4:
            length = int.from_bytes(buffer[at : at + 4], "little")
            if not self._least <= length <= MAX_MESSAGE_BYTES:
                raise RemoteProtocolError(f"direct: a frame of {length} bytes, at most {MAX_MESSAGE_BYTES}")
            if len(buffer) - at - 4 < length:
                break
            found.append(bytes(buffer[at + 4 : at + 4 + length]))
            at += 4 + length
        del buffer[:at]
        return found

    @property
    def opened(self) -> bool:
        """Whether the other side has said PXM1."""
        return self._opened


class DirectServer:
    """The listening side."""

    def __init__(self, answer: Answerer) -> None:
        self._answer = answer
        self._connections: set[_Served] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def listen(self, host: str, port: int) -> None:
        """Listen; port 0 for any. Raises ConfigError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._accepted, host, port)
        except OSError as error:
            raise ConfigError(
                f"direct_listen: cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and end the connections."""
        if self._server is not None:
            self._server.close()
            for connection in tuple(self._connections):
                connection.end()
            await self._server.wait_closed()

    def _accepted(self) -> _Served:
        return _Served(self._answer, self._connections)


class _Served(asyncio.Protocol):
    def __init__(self, answer: Answerer, all_of_them: set[_Served]) -> None:
        self._answer = answer
        self._all = all_of_them
        self._frames = Frames(_CALL_BYTES)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if len(self._all) >= MAX_CONNECTIONS:
            self._transport.abort()
            return
        self._all.add(self)
        _tune(self._transport)
        self._transport.write(MAGIC)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            questions = self._frames.feed(data)
        except RemoteProtocolError:
            self._transport.abort()
            return
        answers = []
        for question in questions:
            status, body = self._answer(question[_CALL_BYTES:])
            length = _CALL_BYTES + _STATUS_BYTES + len(body)
            call = int.from_bytes(question[:_CALL_BYTES], "little")
            answers.append(_ANSWER.pack(length, call, status) + body)
        if answers:
            self._transport.write(b"".join(answers))

    def pause_writing(self) -> None:
        """Who does not read the answers is not asked for more questions."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        assert self._transport is not None
        self._transport.resume_reading()

    def end(self) -> None:
        assert self._transport is not None
        self._transport.close()


class DirectLost(Exception):
    """The connection is gone, or did not answer in time (`late`)."""

    def __init__(self, text: str, *, late: bool = False) -> None:
        super().__init__(text)
        self.late = late


class DirectClient(asyncio.Protocol):
    """The asking side of one connection; `open` it, then `ask`."""

    def __init__(self) -> None:
        self._frames = Frames(_CALL_BYTES + _STATUS_BYTES)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self._call = 0
        #: Set when the connection is gone.
        self.lost = self._loop.create_future()

    @classmethod
    async def open(cls, host: str, port: int, timeout_s: float) -> DirectClient:
        """Connect. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            _, protocol = await loop.create_connection(cls, host, port)
        return protocol

    @property
    def usable(self) -> bool:
        """Whether the service has said PXM1 and the connection stands."""
        return self._frames.opened and not self.lost.done()

    async def ask(self, question: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Return status and answer of one question. Raises DirectLost."""
        assert self._transport is not None
        self._call = call = (self._call + 1) & 0xFFFFFFFF
        answer = self._waiting[call] = self._loop.create_future()
        timer = self._loop.call_later(timeout_s, self._late, answer)
        self._transport.write(_QUESTION.pack(_CALL_BYTES + len(question), call) + question)
        try:
            return await answer
        finally:
            timer.cancel()
            self._waiting.pop(call, None)

    def close(self) -> None:
        """End the connection; questions in flight raise DirectLost."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _tune(self._transport)
        self._transport.write(MAGIC)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(DirectLost(f"connection lost: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        try:
            answers = self._frames.feed(data)
        except RemoteProtocolError:
            self.close()
            return
        for body in answers:
            waiting = self._waiting.get(int.from_bytes(body[:_CALL_BYTES], "little"))
            if waiting is not None and not waiting.done():
                waiting.set_result((body[_CALL_BYTES], body[_CALL_BYTES + _STATUS_BYTES :]))

    @staticmethod
    def _late(answer: asyncio.Future[tuple[int, bytes]]) -> None:
        if not answer.done():
            answer.set_exception(DirectLost("no answer in time", late=True))


def _tune(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
