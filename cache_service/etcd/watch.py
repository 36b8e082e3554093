"""Watching a range over cut connections, and following it from a listing on.

Back-pressure: nothing is read ahead. While the caller works on what it got, the stream is not read, HTTP/2
flow control holds the member back and the member keeps the rest as history; what is in memory here is one
message and the unfinished revision it ends with. Close an iterator that is left early: `contextlib.aclosing`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from cache_service import logs
from cache_service.core.errors import PrfaasError
from cache_service.etcd import codec, rpc
from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd.connections import Connections, Stream
from cache_service.etcd.core.errors import (
    Compacted,
    EtcdDeadline,
    EtcdUnavailable,
    FarBehind,
    PermissionDenied,
    TokenRejected,
)
from cache_service.etcd.core.model import Changes, KeyRange, Page, Progress
from cache_service.etcd.core.retry import backoff_s, parse_version, progress_is_sound
from cache_service.etcd.core.watching import State, WatchState

log = logging.getLogger(__name__)

#: New tokens that may be rejected one after the other.
_MAX_REJECTIONS = 3
_Pages = Callable[[], AsyncGenerator[Page, None]]


class Watcher:
    """One watch. Iterate `run` once; the counters may be read at any time.

    A quiet stream is asked for its progress every `progress_s`; one that does not answer in `answer_s` is
    given up and opened elsewhere. `max_behind`: raise FarBehind rather than catch up with more revisions than
    this.
    """

    def __init__(
        self,
        connections: Connections,
        keys: KeyRange,
        start_revision: int,
        *,
        previous: bool = False,
        progress_s: float = 10.0,
        answer_s: float = 3.0,
        max_behind: int | None = None,
    ) -> None:
        self._connections = connections
        self._keys = keys
        self._previous = previous
        self._progress_s = progress_s
        self._answer_s = answer_s
        self._max_behind = max_behind
        self._state = WatchState(start_revision)
        self._sound: dict[str, bool] = {}
        self._failures = 0
        self._rejections = 0
        #: How often the stream was lost and opened again.
        self.resumes = 0

    @property
    def next_revision(self) -> int:
        """Everything below has been handed on."""
        return self._state.next_revision

    async def run(self) -> AsyncGenerator[Changes | Progress, None]:
        """Yield changes and progress for ever. Raises Compacted, FarBehind, PermissionDenied, AuthFailed."""
        avoid: frozenset[str] = frozenset()
        while True:
            stream: Stream[pb.WatchResponse] | None = None
            known = token = self._connections.token
            try:
                stream = await self._connections.open(rpc.WATCH, avoid=avoid)
                token = self._connections.token
                await self._create(stream)
                async with aclosing(self._serve(stream)) as answers:
                    async for answer in answers:
                        yield answer
            except (EtcdUnavailable, EtcdDeadline) as error:
                avoid = self._lost(stream, error)
                await asyncio.sleep(backoff_s(self._failures) if self._failures > 1 else 0)
            except TokenRejected:
                self._rejections += 1
                if self._rejections > _MAX_REJECTIONS:
                    raise
                self._state.reopen()
                self._connections.drop_token(token)
            except PermissionDenied:
                # Some releases say so of a token that ran out; one that was new has been refused for good.
                if not self._connections.config.user or token != known or self._rejections:
                    raise
                self._rejections += 1
                self._state.reopen()
                self._connections.drop_token(token)
            finally:
                if stream is not None:
                    await stream.close()

    async def _create(self, stream: Stream[pb.WatchResponse]) -> None:
        request = codec.watch_request(self._keys, self._state.next_revision, previous=self._previous)
        await stream.write(request, timeout_s=self._connections.config.attempt_s)

    async def _serve(self, stream: Stream[pb.WatchResponse]) -> AsyncGenerator[Changes | Progress, None]:
        while True:
            message = await self._next(stream)
            opening = self._state.state is State.OPENING
            sound = self._sound.get(stream.address, False)
            found = self._state.take(codec.watch_answer(message), progress_sound=sound)
            if opening:
                await self._opened(stream.address)
            else:
                # Not at its opening: a stream that is cut right after must not be opened without a pause.
                self._failures = self._rejections = 0
            if found is not None:
                yield found

    async def _next(self, stream: Stream[pb.WatchResponse]) -> pb.WatchResponse:
        if self._state.state is State.OPEN:
            message = await stream.read(self._progress_s)
            if message is not None:
                return message
            await stream.write(codec.progress_request(), timeout_s=self._answer_s)
        message = await stream.read(self._answer_s)
        if message is None:
            raise EtcdDeadline(f"etcd watch: {stream.address} gave no sign of life in {self._answer_s} s")
        return message

    async def _opened(self, address: str) -> None:
        self._connections.answered(address)
        behind = self._state.behind
        if self._max_behind is not None and behind > self._max_behind:
            raise FarBehind(
                f"etcd watch: {behind} revisions behind, more than {self._max_behind}: list again"
            )
        if self._state.newest < self.next_revision - 1:
            await self._check_history()
        if address not in self._sound:
            status = await self._connections.call(rpc.STATUS, pb.StatusRequest(), endpoint=address)
            self._sound[address] = progress_is_sound(parse_version(status.version))

    async def _check_history(self) -> None:
        """Raise Compacted when the store is older than what was seen of it: wiped, or restored from a backup.

        A member may lag; a linearizable read does not. Without this the watch would wait in silence until the
        store's revision passes the old one, and miss what happens until then.
        """
        request = codec.range_request(KeyRange.one(self._keys.start), count_only=True)
        newest = (await self._connections.call(rpc.RANGE, request)).header.revision
        if newest < self.next_revision - 1:
            raise Compacted(
                f"etcd watch: at revision {self.next_revision}, but the store is at {newest}: list again"
            )

    def _lost(self, stream: Stream[pb.WatchResponse] | None, error: PrfaasError) -> frozenset[str]:
        self._state.cut()
        self._failures += 1
        self.resumes += 1
        if stream is None:
            return frozenset()
        self._connections.failed(stream.address, str(error))
        logs.event(
            log, "etcd_watch_resumes", address=stream.address, revision=self.next_revision, error=str(error)
        )
        return frozenset({stream.address})


async def follow(
    list_pages: _Pages, watcher: Callable[[int], Watcher]
) -> AsyncGenerator[Page | Changes | Progress, None]:
    """Yield a listing in pages, then what changes after it, for ever; a new listing when the history is gone.

    Survives outages of any length. Raises what a new listing does not cure: PermissionDenied, AuthFailed, ...
    """
    failures = 0
    while True:
        revision = 0
        try:
            async with aclosing(list_pages()) as pages:
                async for page in pages:
                    revision = page.revision
                    yield page
            async with aclosing(watcher(revision + 1).run()) as answers:
                async for answer in answers:
                    failures = 0
                    yield answer
        except (Compacted, EtcdUnavailable, EtcdDeadline) as error:
            failures += 1
            logs.event(log, "etcd_lists_again", logging.WARNING, revision=revision, error=str(error))
            await asyncio.sleep(backoff_s(failures))
