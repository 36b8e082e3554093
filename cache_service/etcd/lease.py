"""Leases that are kept alive, and their holders told when one is lost.

One stream renews all leases of a client. A lease is lost when the server says so ("expired"), or when nothing
has confirmed it for its TTL ("unconfirmed": it may still exist, but must not be counted on). `on_lost` is
then called, once, in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from enum import Enum

from cache_service import logs
from cache_service.core.errors import PrfaasError
from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd import rpc
from cache_service.etcd.connections import Connections, Stream
from cache_service.etcd.core.errors import EtcdDeadline, EtcdUnavailable, TokenRejected
from cache_service.etcd.core.leases import LeaseClock
from cache_service.etcd.core.retry import backoff_s

log = logging.getLogger(__name__)


class Loss(Enum):
    """Why a lease is not to be counted on any more."""

    EXPIRED = "expired"  # the server does not know it
    UNCONFIRMED = "unconfirmed"  # no renewal was confirmed for its whole TTL


OnLost = Callable[["Lease", Loss], None]


class Lease:
    """A lease that its keeper renews until it is lost, revoked or released."""

    def __init__(self, keeper: LeaseKeeper, lease: int, clock: LeaseClock, on_lost: OnLost | None) -> None:
        self._keeper = keeper
        self.id = lease
        self.clock = clock
        self._on_lost = on_lost
        self._gone: asyncio.Future[Loss] = asyncio.get_running_loop().create_future()

    @property
    def ttl_s(self) -> float:
        """Seconds the lease lives without renewal, as the server granted them."""
        return self.clock.ttl_s

    @property
    def loss(self) -> Loss | None:
        """Why it was lost, None while it holds."""
        return self._gone.result() if self._gone.done() else None

    async def lost(self) -> Loss:
        """Wait until it is lost."""
        return await asyncio.shield(self._gone)

    def release(self) -> None:
        """Renew it no longer: it runs out after its TTL, and nobody is told."""
        self._keeper.remove(self)

    def lose(self, loss: Loss) -> None:
        """Tell the holder; the keeper's to call."""
        if self._gone.done():
            return
        self._gone.set_result(loss)
        logs.event(log, "etcd_lease_lost", logging.WARNING, lease=f"{self.id:x}", loss=loss.value)
        if self._on_lost is not None:
            try:
                self._on_lost(self, loss)
            except Exception:  # noqa: BLE001 - the holder's mistake must not end every other lease
                logs.event(log, "etcd_lease_callback_failed", logging.ERROR, exc_info=True)


class LeaseKeeper:
    """Renews the leases of one client. Its task runs while there is a lease; `close` ends it."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._leases: dict[int, Lease] = {}
        self._asked: deque[tuple[int, float]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def add(self, lease: int, ttl_s: float, sent_at_s: float, on_lost: OnLost | None) -> Lease:
        """Renew a lease that was asked for at `sent_at_s` of the event loop's clock."""
        kept = Lease(self, lease, LeaseClock(ttl_s, sent_at_s), on_lost)
        self._leases[lease] = kept
        self._watch_expiry(kept)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="etcd-lease-keeper")
        self._changed.set()
        return kept

    def remove(self, lease: Lease) -> None:
        """Stop renewing a lease."""
        self._leases.pop(lease.id, None)
        self._changed.set()

    async def close(self) -> None:
        """Stop renewing every lease; they run out by themselves, and nobody is told."""
        self._leases.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _watch_expiry(self, lease: Lease) -> None:
        """Look at the clock when the lease would run out, whatever the stream is doing then."""
        if self._leases.get(lease.id) is not lease:
            return
        if lease.clock.expired(self._connections.now_s()):
            self._lose(lease, Loss.UNCONFIRMED)
        else:
            asyncio.get_running_loop().call_at(lease.clock.valid_until_s, self._watch_expiry, lease)

    def _lose(self, lease: Lease, loss: Loss) -> None:
        self.remove(lease)
        lease.lose(loss)

    async def _run(self) -> None:
        failures = 0
        avoid: frozenset[str] = frozenset()
        while self._leases:
            stream: Stream[pb.LeaseKeepAliveResponse] | None = None
            token = ""
            try:
                stream = await self._connections.open(rpc.LEASE_KEEP_ALIVE, avoid=avoid)
                token = self._connections.token
                failures = await self._serve(stream, failures)
            except TokenRejected:
                failures += 1
                self._connections.drop_token(token)
            except PrfaasError as error:
                failures += 1
                if stream is None:
                    logs.event(log, "etcd_login_failed", logging.WARNING, error=str(error))
                else:
                    avoid = frozenset({stream.address})
                    self._connections.failed(stream.address, str(error))
            finally:
                if stream is not None:
                    await stream.close()
            self._asked.clear()
            for lease in self._leases.values():
                lease.clock.cut()
            if failures:
                await asyncio.sleep(backoff_s(failures, most_s=1.0) if failures > 1 else 0)

    async def _serve(self, stream: Stream[pb.LeaseKeepAliveResponse], failures: int) -> int:
        """Ask and take answers while there are leases. Returns the failures to go on counting from."""
        answer_s = self._connections.config.attempt_s
        while self._leases:
            now_s = self._connections.now_s()
            await self._ask(stream, now_s)
            if self._asked and now_s >= self._asked[0][1] + answer_s:
                raise EtcdDeadline(f"etcd keep-alive: no answer from {stream.address} in {answer_s} s")
            message = await self._read(stream, self._wake_at_s(answer_s) - now_s)
            if message is not None:
                self._take(message)
                self._connections.answered(stream.address)
                failures = 0
        return failures

    async def _read(
        self, stream: Stream[pb.LeaseKeepAliveResponse], timeout_s: float
    ) -> pb.LeaseKeepAliveResponse | None:
        """Return an answer, or None when it is time to look at the leases again."""
        if self._asked:
            return await stream.read(max(timeout_s, 0.0))
        # Nothing is under way: a lease that is added now must not wait for the next one that is due.
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._changed.wait()
        return None

    def _wake_at_s(self, answer_s: float) -> float:
        times = [lease.clock.due_at_s for lease in self._leases.values()]
        if self._asked:
            times.append(self._asked[0][1] + answer_s)
        return min(times, default=self._connections.now_s())

    async def _ask(self, stream: Stream[pb.LeaseKeepAliveResponse], now_s: float) -> None:
        for lease in list(self._leases.values()):
            if lease.clock.due_at_s <= now_s:
                sent_at_s = self._connections.now_s()
                lease.clock.asked(sent_at_s)
                self._asked.append((lease.id, sent_at_s))
                request = pb.LeaseKeepAliveRequest(ID=lease.id)
                await stream.write(request, timeout_s=self._connections.config.attempt_s)

    def _take(self, message: pb.LeaseKeepAliveResponse) -> None:
        # Answers come in the order of the questions.
        while self._asked:
            lease_id, sent_at_s = self._asked.popleft()
            if lease_id == message.ID:
                break
        else:
            raise EtcdUnavailable(
                f"etcd keep-alive: an answer for lease {message.ID:x}, which was not asked for"
            )
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        if message.TTL <= 0:
            self._lose(lease, Loss.EXPIRED)
        else:
            lease.clock.confirmed(sent_at_s, message.TTL)
