"""The RPCs of the prefix index: decode, ask the core, encode.

Decides how an error becomes a gRPC status (one table, `_STATUS`), and what of an answer may be done while
others wait: what reads the whole index works on a snapshot, in a process of its own. It must not decide what
matches.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

import grpc

from cache_service.core import history
from cache_service.core.blocks import usable_tokens
from cache_service.core.errors import PrfaasError, RemoteProtocolError
from cache_service.core.explain import presence, report
from cache_service.core.ids import BlockHash, SourceId
from cache_service.core.query import Holder, Query
from cache_service.snapshot import on_snapshot
from cache_service.state import IndexState, UnknownNamespace
from cache_service.wire import api_codec, cache_pb2_grpc, codec
from cache_service.wire.api_codec import Changes, CheckReport, Explained, Explanation, HotHeld

MAX_WATCHERS = 64
_MAX_SNAPSHOTS = {"report": 1, "dump": 2}
#: A dump that a client reads more slowly is ended: its snapshot holds memory.
SNAPSHOT_S = 300.0
#: Changes are remembered for so long after the last dump or watch, for who comes back.
REMEMBER_S = 60.0
_WATCH_BLOCKS = 16_384
_MAX_VIOLATIONS = 20

Answer = TypeVar("Answer")


class Busy(PrfaasError):
    """So much is being done for others already."""

    reason = "busy"


_STATUS: dict[type[PrfaasError], tuple[grpc.StatusCode, str]] = {
    RemoteProtocolError: (grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
    UnknownNamespace: (grpc.StatusCode.NOT_FOUND, "unknown_namespace"),
    history.FellBehind: (grpc.StatusCode.OUT_OF_RANGE, "fell_behind"),
    Busy: (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy"),
}


class PrefixIndexService(cache_pb2_grpc.PrefixIndexServicer):
    """The RPCs of cache.proto."""

    def __init__(self, state: IndexState, stats: Callable[[], codec.Stats]) -> None:
        self._state = state
        self._stats = stats
        #: Tells one life of the service from another, where revisions start again.
        self.life = secrets.randbits(63) | 1
        #: Snapshots being worked on.
        self._snapshots = {"report": 0, "dump": 0}
        self._followed_s = 0.0

    @property
    def watchers(self) -> int:
        """Watch calls now."""
        return len(self._state.followers)

    async def Match(self, request: Any, context: Any) -> Any:
        """Answer which workers hold how much of a prompt's prefix."""
        started_s = time.perf_counter()
        try:
            query = codec.decode_query(request)
            holders = self._state.answer(query)
        except PrfaasError as error:
            await self._refuse(context, "Match", error, started_s)
        response = codec.encode_result(holders, self._state.index.revision, starting=self._state.starting)
        self._matched([query], [holders], started_s)
        return response

    def match_bytes(self, question: bytes) -> tuple[int, bytes]:
        """Answer the bytes of a MatchRequest: gRPC's status number, and the answer or what is wrong."""
        started_s = time.perf_counter()
        try:
            query = codec.read_query(question)
            holders = self._state.answer(query)
        except (RemoteProtocolError, UnknownNamespace) as error:
            status, outcome = _STATUS[type(error)]
            self._state.metrics.match(outcome, time.perf_counter() - started_s, 0, 0)
            number: int = status.value[0]
            return number, str(error).encode()
        response = codec.encode_result(holders, self._state.index.revision, starting=self._state.starting)
        self._matched([query], [holders], started_s)
        return 0, response.SerializeToString()

    async def MatchBatch(self, request: Any, context: Any) -> Any:
        """Answer several queries as of one revision."""
        started_s = time.perf_counter()
        answers = []
        queries = []
        try:
            queries = api_codec.decode_batch(request)
            for position, query in enumerate(queries):
                try:
                    answers.append(self._state.answer(query))
                except UnknownNamespace as error:
                    raise UnknownNamespace(f"queries[{position}].{error}") from error
        except PrfaasError as error:
            await self._refuse(context, "MatchBatch", error, started_s)
        response = api_codec.encode_batch_result(
            answers, self._state.index.revision, starting=self._state.starting
        )
        self._matched(queries, answers, started_s)
        return response

    async def Explain(self, request: Any, context: Any) -> Any:
        """Answer why each holder, offered or not, has what it has of a prompt."""
        started_s = time.perf_counter()
        try:
            query = codec.decode_query(request)
            self._state.check_namespace(query.namespace)
            explanation = await self._explain(query)
        except PrfaasError as error:
            await self._refuse(context, "Explain", error, started_s)
        self._called("Explain", started_s)
        return api_codec.encode_explanation(explanation, self._state.namespace.page_size)

    async def HotPrefixes(self, request: Any, context: Any) -> Any:
        """Answer which prefixes were used most, and who holds them now."""
        started_s = time.perf_counter()
        try:
            namespace, top = api_codec.decode_hot_request(request)
            self._state.check_namespace(namespace)
        except PrfaasError as error:
            await self._refuse(context, "HotPrefixes", error, started_s)
        page_size = self._state.namespace.page_size
        prefixes = [
            HotHeld(hot, hot.blocks * page_size, self._holders_of(hot.last))
            for hot in self._state.hot.top(top)
        ]
        self._called("HotPrefixes", started_s)
        return api_codec.encode_hot(prefixes, self._state.hot.observed)

    async def Dump(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Send what the followed workers hold, page by page."""
        started_s = time.perf_counter()
        try:
            namespace, page_blocks = api_codec.decode_dump_request(request)
            self._state.check_namespace(namespace)
            with self._following():
                async with aclosing(self._on_snapshot("dump", lambda: self._pages(page_blocks))) as pages:
                    async for page in pages:
                        yield api_codec.read_page(page)
        except PrfaasError as error:
            await self._refuse(context, "Dump", error, started_s)
        self._called("Dump", started_s)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Send what changed since a revision, then what changes."""
        started_s = time.perf_counter()
        more = asyncio.Event()
        try:
            namespace, life, revision = api_codec.decode_watch_request(request)
            self._state.check_namespace(namespace)
            if len(self._state.followers) >= MAX_WATCHERS:
                raise Busy(f"watch: {MAX_WATCHERS} clients watch already")
            with self._following():
                self._state.followers.add(more)
                position, revision = self._resume(life, revision)
                yield api_codec.encode_event(Changes(self.life, revision, ()))
                while True:
                    more.clear()
                    batch = self._state.history.read(position, revision, _WATCH_BLOCKS)
                    if not batch.changes:
                        await more.wait()
                        continue
                    pages = list(history.slices(batch.changes, _WATCH_BLOCKS))
                    for page in pages[:-1]:
                        yield api_codec.encode_event(Changes(self.life, revision, tuple(page)))
                    position, revision = batch.position, batch.revision
                    yield api_codec.encode_event(Changes(self.life, revision, tuple(pages[-1])))
        except PrfaasError as error:
            await self._refuse(context, "Watch", error, started_s)
        finally:
            self._state.followers.discard(more)

    async def Check(self, request: Any, context: Any) -> Any:
        """Hold the invariants of the index against a snapshot of it."""
        started_s = time.perf_counter()
        try:
            self._state.check_namespace(api_codec.decode_check_request(request))
            revision, counts = self._state.index.revision, self._state.index.counts()
            violations = await self._report(lambda: _violations(self._state.index.check))
        except PrfaasError as error:
            await self._refuse(context, "Check", error, started_s)
        self._called("Check", started_s)
        seconds = time.perf_counter() - started_s
        return api_codec.encode_check(
            CheckReport(violations, revision, counts.blocks, counts.entries, seconds)
        )

    async def Stats(self, request: Any, context: Any) -> Any:
        """Answer what the index holds and how each stream is doing."""
        return codec.encode_stats(self._stats())

    # -- the whole index -------------------------------------------------------------------------------------

    async def _explain(self, query: Query) -> Explanation:
        state, page_size = self._state, self._state.namespace.page_size
        answered = {SourceId(one.worker_id, one.dp_rank): one for one in state.answer(query)}
        index, revision = state.index, state.index.revision
        blocks = len(query.hashes)
        limit = usable_tokens(blocks * page_size, query.total_tokens, page_size) // page_size

        def read() -> list[Explained]:
            for source in index.sources():
                index.restore(source)  # in the snapshot alone
            held = presence(query.hashes, index.dump())
            found = []
            for source, matched, usable in index.match(query.hashes, limit):
                if not state.follows(source):
                    continue
                holder = Holder(
                    source.worker_id,
                    state.site_of(source),
                    source.dp_rank,
                    matched * page_size,
                    usable * page_size,
                )
                explained = report(source, matched, usable, limit, blocks, held)
                found.append(Explained(holder, explained, None, -1.0, source in answered))
            return found

        own = await self._report(read)
        states = {stats.source: stats.state for stats in self._stats().sources}
        now_s = time.monotonic()
        holders = []
        for one in own:
            source = one.report.source
            heard_s = state.heard_s.get(source)
            age_s = now_s - heard_s if heard_s is not None else -1.0
            holders.append(Explained(one.holder, one.report, states.get(source), age_s, one.offered))
        for source, holder in answered.items():
            if not state.follows(source):
                matched, usable = holder.matched_tokens // page_size, holder.usable_tokens // page_size
                explained = report(source, matched, usable, min(limit, usable), matched, {})
                holders.append(Explained(holder, explained, None, -1.0, True))
        return Explanation(tuple(holders), blocks, limit * page_size, revision)

    def _pages(self, page_blocks: int) -> Iterator[bytes]:
        """Yield the pages of a dump; takes the index apart, so only on a snapshot."""
        index, revision = self._state.index, self._state.index.revision
        for source in index.sources():
            if not self._state.follows(source):
                index.drop(source)
        counts = index.counts()
        entries = counts.entries + counts.group_entries
        previous: tuple[history.Change, ...] = ()
        for page in history.slices(index.dump(), page_blocks):
            if previous:
                yield api_codec.encode_page(Changes(self.life, revision, previous, entries=entries))
            previous = tuple(page)
        yield api_codec.encode_page(Changes(self.life, revision, previous, True, entries))

    async def _report(self, work: Callable[[], Answer]) -> Answer:
        """Return what `work` does on a snapshot. Raises Busy."""
        async with aclosing(self._on_snapshot("report", lambda: iter([pickle.dumps(work())]))) as pieces:
            answer: Answer = pickle.loads(await anext(pieces))  # of a process of ours
        return answer

    async def _on_snapshot(
        self, kind: str, work: Callable[[], Iterator[bytes]]
    ) -> AsyncGenerator[bytes, None]:
        """Yield what `work` yields on a snapshot of everything as it is now. Raises Busy."""
        if self._snapshots[kind] >= _MAX_SNAPSHOTS[kind]:
            raise Busy(f"{kind}: {_MAX_SNAPSHOTS[kind]} at a time; ask again later")
        self._snapshots[kind] += 1
        try:
            async with aclosing(on_snapshot(work, timeout_s=SNAPSHOT_S)) as pieces:
                async for piece in pieces:
                    yield piece
        except TimeoutError as error:
            raise Busy(f"{kind}: not done, or not read, within {SNAPSHOT_S:g} s") from error
        except OSError as error:
            raise Busy(f"{kind}: no process for it: {error.strerror}; ask again later") from error
        finally:
            self._snapshots[kind] -= 1

    def _holders_of(self, block: BlockHash) -> tuple[Holder, ...]:
        return tuple(
            Holder(
                match.source.worker_id, self._state.claims.site_of(match.source), match.source.dp_rank, 0, 0
            )
            for match in self._state.index.match([block])
        )

    # -- following -------------------------------------------------------------------------------------------

    def _resume(self, life: int, revision: int) -> tuple[int, int]:
        """Return the position in the history and the revision where a watch starts. Raises FellBehind."""
        if not life:
            return self._state.history.end, self._state.index.revision
        if life != self.life:
            raise history.FellBehind("life: is of another life of this service; start over from Dump")
        if revision > self._state.index.revision:
            raise history.FellBehind(
                f"revision: {revision} is to come; the index is at {self._state.index.revision}"
            )
        return self._state.history.position(revision), revision

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """Remember changes during this, and for a while after it."""
        self._state.history.start(self._state.index.revision)
        try:
            yield
        finally:
            loop = asyncio.get_running_loop()
            self._followed_s = loop.time()
            loop.call_later(REMEMBER_S, self._forget)

    def _forget(self) -> None:
        idle_s = asyncio.get_running_loop().time() - self._followed_s
        if not self._state.followers and idle_s > 0.9 * REMEMBER_S:
            self._state.history.stop()

    # -- calls -----------------------------------------------------------------------------------------------

    def _matched(self, queries: list[Query], answers: list[list[Holder]], started_s: float) -> None:
        seconds = (time.perf_counter() - started_s) / max(1, len(queries))
        page_size = self._state.namespace.page_size
        for query, holders in zip(queries, answers, strict=True):
            matched = holders[0].matched_tokens // page_size if holders else 0
            self._state.metrics.match("ok", seconds, len(query.hashes), matched)

    def _called(self, method: str, started_s: float) -> None:
        self._state.metrics.called(method, "ok", time.perf_counter() - started_s)

    async def _refuse(self, context: Any, method: str, error: PrfaasError, started_s: float) -> NoReturn:
        for kind in type(error).__mro__:
            if kind in _STATUS:
                break
        else:
            raise error
        status, outcome = _STATUS[kind]
        seconds = time.perf_counter() - started_s
        if method in ("Match", "MatchBatch"):
            self._state.metrics.match(outcome, seconds, 0, 0)
        else:
            self._state.metrics.called(method, outcome, seconds)
        await context.abort(status, str(error))
        raise AssertionError("abort does not return")


def _violations(check: Callable[[], None]) -> tuple[str, ...]:
    try:
        check()
    except AssertionError as error:
        return tuple((str(error) or "an invariant does not hold").splitlines()[:_MAX_VIOLATIONS])
    return ()
