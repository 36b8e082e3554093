"""Asking one service about its whole index: what an operator's tool needs, one address, errors raised.

Decides how a refused or failed call is told to a person. The router's client is client.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from cache_service.channels import Encryption, open_channel
from cache_service.core.addresses import split_address
from cache_service.core.errors import ConfigError, IndexUnavailable, RemoteProtocolError
from cache_service.core.events import AllCleared
from cache_service.core.history import FellBehind
from cache_service.core.ids import BlockHash, Namespace
from cache_service.core.index_protocol import BlockIndex
from cache_service.core.query import MatchResult
from cache_service.native import make_index
from cache_service.wire import api_codec, cache_pb2_grpc, codec
from cache_service.wire.api_codec import Changes, CheckReport, Explanation, HotHeld

_SAMPLED_CHAINS = 200
_SAMPLED_BLOCKS = 256

Answer = TypeVar("Answer")


class IndexAdmin:
    """A client of one service; make it inside the running event loop, `close` it at the end.

    Every call raises IndexUnavailable when there is no answer within `timeout_s`, ConfigError when the
    service refuses what was asked, RemoteProtocolError for an answer that cannot be meant.
    """

    def __init__(
        self, address: str, *, timeout_s: float = 30.0, encryption: Encryption | None = None
    ) -> None:
        split_address(address, field="address")
        self._address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, encryption)
        self._stub: Any = cache_pb2_grpc.PrefixIndexStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def stats(self) -> codec.Stats:
        """Return what the service holds and how its streams are doing."""
        return codec.decode_stats(await self._call(self._stub.Stats, codec.encode_stats_request()))

    async def match(
        self, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int
    ) -> MatchResult:
        """Return who holds how much of a prompt."""
        request = codec.encode_query(namespace, hashes, total_tokens)
        return codec.decode_result(await self._call(self._stub.Match, request))

    async def explain(
        self, namespace: Namespace, hashes: Sequence[BlockHash], total_tokens: int
    ) -> Explanation:
        """Return why each holder has what it has of a prompt."""
        request = codec.encode_query(namespace, hashes, total_tokens)
        response = await self._call(self._stub.Explain, request)
        return api_codec.decode_explanation(response, namespace.page_size)

    async def hot(self, namespace: Namespace, top: int) -> tuple[list[HotHeld], int]:
        """Return the most used prefixes, and how many matches were counted."""
        request = api_codec.encode_hot_request(namespace, top)
        return api_codec.decode_hot(await self._call(self._stub.HotPrefixes, request), namespace.page_size)

    async def check(self, namespace: Namespace) -> CheckReport:
        """Let the service hold its index against its invariants."""
        request = api_codec.encode_check_request(namespace)
        return api_codec.decode_check(await self._call(self._stub.Check, request))

    async def dump(self, namespace: Namespace, *, page_blocks: int = 0) -> AsyncIterator[Changes]:
        """Yield the pages of a dump; raises IndexUnavailable when it ends before its last page."""
        call = self._stub.Dump(
            api_codec.encode_dump_request(namespace, page_blocks), timeout=max(self._timeout_s, 300.0)
        )
        try:
            async for message in call:
                page = api_codec.decode_page(message)
                yield page
                if page.last:
                    return
        except grpc.aio.AioRpcError as error:
            raise self._told(error) from error
        finally:
            call.cancel()
        raise IndexUnavailable(f"index at {self._address}: the dump ended before its last page")

    async def watch(
        self, namespace: Namespace, *, life: int = 0, revision: int = 0
    ) -> AsyncIterator[Changes]:
        """Yield where the watch starts, then changes, for ever. Raises FellBehind: start over from a dump."""
        call = self._stub.Watch(api_codec.encode_watch_request(namespace, life, revision))
        try:
            async for message in call:
                yield api_codec.decode_event(message)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                raise FellBehind(error.details() or "") from error
            raise self._told(error) from error
        finally:
            call.cancel()
        raise IndexUnavailable(f"index at {self._address}: the watch ended")

    async def _call(self, method: Any, request: Any) -> Any:
        call: Awaitable[Any] = method(request, timeout=self._timeout_s)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._told(error) from error

    def _told(self, error: grpc.aio.AioRpcError) -> ConfigError | IndexUnavailable:
        """Return the error that says what to do about a failed call."""
        code, details = error.code(), error.details() or ""
        where = f"index at {self._address}"
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
            return ConfigError(f"{where}: {details}")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return IndexUnavailable(f"{where}: is of an older release: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return IndexUnavailable(f"{where}: no answer within {self._timeout_s:g} s")
        if code is grpc.StatusCode.UNAVAILABLE:
            return IndexUnavailable(
                f"{where}: cannot be reached ({details}); is it running, and is the address its `listen`?"
            )
        return IndexUnavailable(f"{where}: {details or code}")


async def rebuild(pages: AsyncIterator[Changes]) -> tuple[BlockIndex, Changes]:
    """Return an index of a dump's pages, and its last page.

    Raises RemoteProtocolError when pages are missing.
    """
    index = make_index()
    last: Changes | None = None
    async with aclosing(pages) as reading:  # type: ignore[type-var]
        async for page in reading:
            last = page
            for source, event in page.changes:
                if isinstance(event, AllCleared):
                    raise RemoteProtocolError("dump: has a change that is none of a dump")
                index.add(source)
                index.apply(source, event)
            await asyncio.sleep(0)
    if last is None:
        raise RemoteProtocolError("dump: has no page")
    counts = index.counts()
    if counts.entries + counts.group_entries != last.entries:
        raise RemoteProtocolError(
            f"dump: {counts.entries + counts.group_entries} entries rebuilt, {last.entries} announced"
        )
    return index, last


def chains(index: BlockIndex, most: int = _SAMPLED_CHAINS) -> list[tuple[BlockHash, ...]]:
    """Return up to `most` chains of the index's content from its roots down, each at most 256 blocks."""
    parents: dict[BlockHash, BlockHash | None] = {}
    for _, event in index.dump():
        parent = getattr(event, "parent", None)
        if not hasattr(event, "parent"):
            continue
        for block in event.hashes:
            parents[block] = parent
            parent = block
    inner = set(parents.values())
    found = []
    leaves = sorted(block for block in parents if block not in inner)
    for leaf in leaves[:: max(1, len(leaves) // most)][:most]:
        chain: list[BlockHash] = []
        at: BlockHash | None = leaf
        while at is not None and at in parents and len(chain) < len(parents):
            chain.append(at)
            at = parents[at]
        if at is None:
            found.append(tuple(reversed(chain))[:_SAMPLED_BLOCKS])
    return found


async def verify(admin: IndexAdmin, namespace: Namespace) -> tuple[list[str], CheckReport, int]:
    """Check a service: its own invariants, then a fresh dump of it, rebuilt, against its answers.

    Return the violations, the service's report and how many answers were compared. Answers of another
    revision than the dump's are not compared: the index has changed since.
    """
    report = await admin.check(namespace)
    violations = [f"service: {text}" for text in report.violations]
    stale = frozenset(
        source.source
        for source in (await admin.stats()).sources
        if source.state is not codec.SourceState.LIVE
    )
    index, last = await rebuild(admin.dump(namespace))
    try:
        index.check()
    except AssertionError as error:
        violations.append(f"dump: {error or 'an invariant does not hold'}")
    compared = 0
    for chain in chains(index):
        answer = await admin.match(namespace, chain, len(chain) * namespace.page_size + 1)
        if answer.revision != last.revision:
            continue
        compared += 1
        said = {(h.worker_id, h.dp_rank): h.matched_tokens // namespace.page_size for h in answer.holders}
        for source, matched, _ in index.match(chain):
            answered = said.get((source.worker_id, source.dp_rank), 0)
            if source not in stale and answered != matched:
                violations.append(
                    f"match: {source.worker_id}/{source.dp_rank} holds {matched} blocks of the chain to "
                    f"{chain[-1]} in the dump, the answer says {answered}"
                )
    return violations, report, compared
