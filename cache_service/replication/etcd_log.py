"""A delta log in etcd: `DeltaLog` of store.py over keys of replication/core/layout.py.

Decides what is written in which transaction, and what an answer that was lost means. Facts it rests on:
* Every write compares the key `epoch` with what its writer put there, and a part of a segment compares that
  its key is absent. So a transaction that was cut off may be sent again: it is carried out once, and an old
  one that arrives late does nothing.
* A segment of several parts is complete with its last; a snapshot counts when `head` names it.
* Outages do not end a writer: `append` tries until etcd is back, `trouble` says so meanwhile. Only a lost
  data lease or a lost epoch raises (LocalProtocolError, reasons "lease_lost" and "fenced"): `begin` again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from cache_service import logs
from cache_service.core.errors import LocalProtocolError, PrfaasError, RemoteProtocolError
from cache_service.core.ids import Namespace, SiteId
from cache_service.core.log import LogEntry, LogPosition
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import LeaseNotFound, NoSpace
from cache_service.etcd.core.model import Changes, EventKind, KeyRange, KeyValue, Page, RangeResult
from cache_service.etcd.core.retry import Repeat, backoff_s
from cache_service.etcd.lease import Lease
from cache_service.replication.core.layout import Head, LogKeys, decode_epoch, encode_epoch, frames
from cache_service.replication.core.reading import LogReader

log = logging.getLogger(__name__)

#: How long an outage may last before a service's entries leave etcd by themselves.
DATA_LEASE_S = 1200
_EPOCH_BITS = 40
_RETRY_MOST_S = 1.0


class EtcdLog:
    """One site's log of one namespace. `writer` names this process in the key `epoch`, uniquely.

    `guard`: more comparisons that `begin` makes (that this process is the site's writer).
    """

    def __init__(
        self,
        etcd: EtcdClient,
        namespace: Namespace,
        site: SiteId,
        *,
        writer: str = "",
        data_lease_s: int = DATA_LEASE_S,
        guard: Callable[[], Sequence[t.Compare]] = tuple,
        progress_s: float = 10.0,
        max_behind: int = 10_000,
    ) -> None:
        self._etcd = etcd
        self.keys = LogKeys(namespace, site)
        self._writer = writer or secrets.token_hex(8)
        self._data_lease_s = data_lease_s
        self._guard = guard
        self._progress_s = progress_s
        self._max_behind = max_behind
        self._lease: Lease | None = None
        self._end = LogPosition(0, 0)
        self._base = LogPosition(0, 0)
        self._head = b""
        #: Why the last attempt to write failed, "" when it did not.
        self.trouble = ""
        #: Called whenever a reader heard from etcd, be it that nothing is new.
        self.on_heard: Callable[[], None] = lambda: None
        #: Called whenever what a listing had has been taken by who watches.
        self.on_caught_up: Callable[[], None] = lambda: None

    @property
    def end(self) -> LogPosition:
        """The last position this writer has written."""
        return self._end

    async def begin(self) -> LogPosition:
        """Start a new writer's life: one transaction empties the log and fences every earlier writer."""
        lease = await self._data_lease()
        known = await self._etcd.get(self.keys.epoch)
        while True:
            epoch = _next_epoch(known)
            mine = encode_epoch(epoch, self._writer)
            result = await self._write(
                t.Txn()
                .when(t.mod_revision(self.keys.epoch, "=", known.mod_revision if known else 0))
                .when(*self._guard())
                .then(
                    t.Put(self.keys.epoch, mine),
                    t.Delete(KeyRange.prefix(self.keys.log)),
                    t.Delete(KeyRange.prefix(self.keys.snapshots)),
                    t.Put(self.keys.head, Head(epoch, 0, 0).encode(), lease),
                )
                .otherwise(t.Get(KeyRange.one(self.keys.epoch)))
            )
            found = None if result.succeeded else _only(result.results[0])
            if result.succeeded or (found is not None and found.value == mine):
                self._base = self._end = LogPosition(epoch, 0)
                self._head = Head(epoch, 0, 0).encode()
                return self._end
            if found == known:
                raise LocalProtocolError(f"{self.keys.prefix!r}: not this site's writer", reason="fenced")
            known = found

    async def intact(self) -> bool:
        """Say whether what this writer wrote is still there; True before it began."""
        if self._end.epoch == 0:
            return True
        head = await self._etcd.get(self.keys.head)
        return head is not None and head.value == self._head

    async def append(self, epoch: int, payload: bytes) -> LogPosition:
        """Add a segment; waits while etcd is away."""
        self._fence(epoch)
        at = LogPosition(epoch, self._end.seq + 1)
        for part, value in enumerate(frames(payload)):
            await self._put_new(epoch, self.keys.segment(epoch, at.seq, part), value)
        self._fence(epoch)
        self._end = at
        return at

    async def snapshot(self, at: LogPosition, payload: bytes) -> None:
        """Replace everything up to `at`: the parts, then the one transaction that makes them count."""
        self._fence(at.epoch)
        if not self._base <= at <= self._end:
            raise LocalProtocolError(f"snapshot at {at}, but the log ends at {self._end}", reason="position")
        prefix = self.keys.snapshot(at.epoch, at.seq)
        values = frames(payload)
        for part, value in enumerate(values):
            await self._put_new(at.epoch, prefix + b"%04x" % part, value)
        before = KeyRange(self.keys.snapshots, prefix)
        behind = KeyRange(KeyRange.prefix(prefix).end, KeyRange.prefix(self.keys.snapshots).end)
        log_below = KeyRange(self.keys.segment(0, 0), self.keys.segment(at.epoch, at.seq + 1))
        head = Head(at.epoch, at.seq, len(values)).encode()
        result = await self._write(
            self._mine(at.epoch)
            .when(t.value_of(self.keys.head, "=", self._head))
            .then(
                t.Put(self.keys.head, head, self._held_lease()),
                t.Delete(before),
                t.Delete(behind),
                t.Delete(log_below),
            )
            .otherwise(t.Get(KeyRange.one(self.keys.head)))
        )
        found = None if result.succeeded else _only(result.results[0])
        if not result.succeeded and (found is None or found.value != head):
            raise self._fenced(at.epoch)
        self._head = head
        self._base = at

    async def watch(self, after: LogPosition | None) -> AsyncGenerator[LogEntry, None]:
        """Yield what follows `after`, for ever. Raises RemoteProtocolError for a value that is no log's."""
        reader = LogReader(self.keys, after)
        items = self._etcd.follow(
            KeyRange.prefix(self.keys.prefix), progress_s=self._progress_s, max_behind=self._max_behind
        )
        async with aclosing(items):
            async for item in items:
                self.on_heard()
                match item:
                    case Page():
                        kvs = ((kv.key, kv.value) for kv in item.kvs)
                        for entry in reader.page(kvs, first=item.first, last=item.last):
                            yield entry
                        if item.last:
                            self.on_caught_up()
                    case Changes():
                        for event in item.events:
                            put = event.kind is EventKind.PUT
                            kv = event.kv
                            for entry in reader.put(kv.key, kv.value) if put else reader.deleted(kv.key):
                                yield entry

    async def _put_new(self, epoch: int, key: bytes, value: bytes) -> None:
        """Write a key that nobody else may have written."""
        one = KeyRange.one(key)
        result = await self._write(
            self._mine(epoch)
            .when(t.absent(key))
            .then(t.Put(key, value, self._held_lease()))
            .otherwise(t.Get(KeyRange.one(self.keys.epoch)), t.Get(one))
        )
        if result.succeeded:
            return
        owner, found = _only(result.results[0]), _only(result.results[1])
        if owner is None or owner.value != encode_epoch(epoch, self._writer):
            raise self._fenced(epoch)
        if found is None or found.value != value:
            raise LocalProtocolError(f"{key!r}: written by somebody else", reason="fenced")

    async def _write(self, txn: t.Txn) -> t.TxnResult:
        """Carry out a transaction that may be sent again, for as long as it takes."""
        failures = 0
        while True:
            try:
                # Every transaction here compares, so that it is carried out once however often it is sent.
                result = await self._etcd.txn(txn, repeat=Repeat.IDEMPOTENT)
            except LeaseNotFound as error:
                self._lease = None
                raise LocalProtocolError(f"data lease: {error}", reason="lease_lost") from error
            except PrfaasError as error:
                ambiguous = error.reason == "etcd_ambiguous"
                if not (error.retryable or ambiguous or isinstance(error, NoSpace)):
                    raise
                failures += 1
                if not self.trouble:
                    logs.event(log, "delta_log_waits", logging.WARNING, reason=error.reason, error=str(error))
                self.trouble = error.reason
                await asyncio.sleep(backoff_s(failures, most_s=_RETRY_MOST_S))
            else:
                if self.trouble:
                    logs.event(log, "delta_log_goes_on", attempts=failures + 1)
                self.trouble = ""
                return result

    async def _data_lease(self) -> int:
        if self._lease is None or self._lease.loss is not None:
            self._lease = await self._etcd.lease(self._data_lease_s)
        return self._lease.id

    def _held_lease(self) -> int:
        # A loss that is only unconfirmed is the server's to decide: a put with a lease that is gone says so.
        assert self._lease is not None, "begin comes first"
        return self._lease.id

    def _mine(self, epoch: int) -> t.Txn:
        return t.Txn().when(t.value_of(self.keys.epoch, "=", encode_epoch(epoch, self._writer)))

    def _fence(self, epoch: int) -> None:
        if epoch != self._end.epoch or self._lease is None:
            raise self._fenced(epoch)
        if self._lease.loss is not None:  # nobody renews it any more
            raise LocalProtocolError(f"data lease: {self._lease.loss.value}", reason="lease_lost")

    def _fenced(self, epoch: int) -> LocalProtocolError:
        return LocalProtocolError(f"{self.keys.prefix!r}: epoch {epoch} is over", reason="fenced")


def _next_epoch(known: KeyValue | None) -> int:
    if known is not None:
        with contextlib.suppress(RemoteProtocolError):
            return decode_epoch(known.value) + 1
    # Not 1: a store that was wiped must not lead readers to take the new log for the one they knew.
    return 1 + secrets.randbits(_EPOCH_BITS)


def _only(result: t.OpResult) -> KeyValue | None:
    assert isinstance(result, RangeResult)
    return result.kvs[0] if result.kvs else None
