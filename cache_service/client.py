"""Asking the index from a router or an engine: an answer in time, or "no index".

Decides nothing about routing. An index that is down, slow or of another namespace is an answer
(`available=False` and a reason), never an exception; the channel reconnects by itself in the background.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import grpc

from cache_service import logs
from cache_service.core.errors import ConfigError, IndexUnavailable, RemoteProtocolError
from cache_service.core.ids import BlockHash, Namespace
from cache_service.core.query import Holder, MatchResult
from cache_service.wire import cache_pb2_grpc, codec

__all__ = ["Holder", "IndexClient", "MatchResult"]

log = logging.getLogger(__name__)

#: gRPC status -> reason of an unavailable answer; any other status is "error".
REASONS = {
    grpc.StatusCode.UNAVAILABLE: "unreachable",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.NOT_FOUND: "unknown_namespace",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_query",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "too_large",
}
_OPTIONS = [
    ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A peer that vanished without closing is noticed within these; the deadline covers each call meanwhile.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
]


class IndexClient:
    """One service's client; make it inside the running event loop, share it, `close` it at the end."""

    def __init__(self, address: str, *, timeout_s: float = 0.25) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"index timeout: {timeout_s} s is not above 0")
        self._address = address
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub: Any = cache_pb2_grpc.PrefixIndexStub(self._channel)  # type: ignore[no-untyped-call]
        self._last_reason = ""

    async def match(
        self, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int
    ) -> MatchResult:
        """Ask who holds how much of a prompt; `hashes` are its full pages', `total_tokens` its length.

        Raises LocalProtocolError for a value that does not fit the message, nothing for the index's state.
        """
        request = codec.encode_query(namespace, hashes, total_tokens)
        try:
            response = await self._stub.Match(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            return self._unavailable(REASONS.get(error.code(), "error"), error.details() or "")
        self._last_reason = ""
        return codec.decode_result(response)

    async def stats(self, *, timeout_s: float = 5.0) -> codec.Stats:
        """Ask what the index holds and how its streams are doing. Raises IndexUnavailable."""
        try:
            response = await self._stub.Stats(codec.encode_stats_request(), timeout=timeout_s)
            return codec.decode_stats(response)
        except (grpc.aio.AioRpcError, RemoteProtocolError) as error:
            raise IndexUnavailable(f"index at {self._address}: {error}") from error

    async def close(self) -> None:
        """Close the connection; calls in flight end as unavailable."""
        await self._channel.close(None)

    def _unavailable(self, reason: str, details: str) -> MatchResult:
        if reason != self._last_reason:  # one line per change, not per request
            self._last_reason = reason
            logs.event(
                log,
                "index_unavailable",
                logging.WARNING,
                address=self._address,
                reason=reason,
                details=details,
            )
        return MatchResult(available=False, reason=reason, holders=(), revision=0)
