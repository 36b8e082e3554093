"""Who speaks for a site: the key `live/<namespace>/<site>` under a short lease.

Decides which process of a site writes its log. One holds the key; others of the site stand by. A process that
starts under the same `name` takes the key over (it is a restart: the one before is dead, or fenced by that);
afterwards it may only take a key that nobody holds, so two of one name do not fight.

While etcd is away the holder goes on as such: what fences it is the log's epoch, not this key.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec

from cache_service import logs
from cache_service.core.errors import PrfaasError, RemoteProtocolError
from cache_service.core.ids import Namespace, SiteId
from cache_service.etcd.client import EtcdClient
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import LeaseNotFound
from cache_service.etcd.core.model import Changes, EventKind, KeyRange, KeyValue, Page, RangeResult
from cache_service.etcd.core.retry import backoff_s
from cache_service.etcd.lease import Lease
from cache_service.replication.core.layout import ROOT, namespace_id

log = logging.getLogger(__name__)

LIVE_LEASE_S = 10
_MAX_LIVE_BYTES = 4096


class Live(msgspec.Struct, frozen=True):
    """The value of a live key. `stride`: how many blocks an entry of this site's log stands for."""

    site: str
    name: str
    instance: str
    stride: int


def live_prefix(namespace: Namespace) -> bytes:
    """Return what the live keys of a namespace begin with."""
    return ROOT + f"live/{namespace_id(namespace)}/".encode()


def read_live(key: bytes, value: bytes, prefix: bytes) -> Live:
    """Return a live key's value; raises RemoteProtocolError when it is none or not of this key's site."""
    if len(value) > _MAX_LIVE_BYTES:
        raise RemoteProtocolError(f"{key!r}: {len(value)} bytes", reason="malformed")
    try:
        live = msgspec.json.decode(value, type=Live)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"{key!r}: {error}", reason="malformed") from error
    if key != prefix + live.site.encode() or not 1 <= live.stride <= 256:
        raise RemoteProtocolError(f"{key!r}: says {live}", reason="malformed")
    return live


class Presence:
    """Holds, or waits for, a site's live key for as long as `run` runs."""

    def __init__(
        self,
        etcd: EtcdClient,
        namespace: Namespace,
        site: SiteId,
        *,
        name: str,
        stride: int,
        lease_s: int = LIVE_LEASE_S,
    ) -> None:
        self._etcd = etcd
        self.key = live_prefix(namespace) + site.encode()
        self.instance = secrets.token_hex(8)
        self._name = name
        self._value = msgspec.json.encode(Live(site, name, self.instance, stride))
        self._lease_s = lease_s
        self._lease: Lease | None = None
        self._fresh = True
        #: Whether this process speaks for its site.
        self.held = False
        #: Awaited whenever the key was put: while it was away, other things may have gone.
        self.on_acquired: Callable[[], Awaitable[None]] | None = None
        #: Called when `held` changes.
        self.on_change: Callable[[bool], None] = lambda held: None

    def guard(self) -> tuple[t.Compare, ...]:
        """Return what a write may compare to be sure that this process holds the key."""
        return (t.value_of(self.key, "=", self._value),)

    async def run(self) -> None:
        """Hold the key, or stand by."""
        failures = 0
        while True:
            try:
                if await self._acquire():
                    failures = 0
                    self._set(True)
                    if self.on_acquired is not None:
                        await self.on_acquired()
                    await self._until_lost()
                else:
                    self._set(False)
                    await self._until_changed()
            except PrfaasError as error:
                failures += 1
                logs.event(log, "presence_failed", logging.WARNING, reason=error.reason, error=str(error))
                await asyncio.sleep(backoff_s(failures))

    async def leave(self) -> None:
        """Give the key up at once: other sites stop offering this one's entries."""
        if self._lease is not None and self._lease.loss is None:
            await self._etcd.revoke(self._lease)

    async def _acquire(self) -> bool:
        if self._lease is None or self._lease.loss is not None:
            self._lease = await self._etcd.lease(self._lease_s)
        while True:
            known = await self._etcd.get(self.key)
            if known is not None and not self._may_replace(known):
                return False
            try:
                done = await self._etcd.txn(
                    t.Txn()
                    .when(t.mod_revision(self.key, "=", known.mod_revision if known else 0))
                    .then(t.Put(self.key, self._value, self._lease.id))
                    .otherwise(t.Get(KeyRange.one(self.key)))
                )
            except LeaseNotFound:
                self._lease.release()
                self._lease = None
                raise
            if done.succeeded:
                self._fresh = False
                return True
            found = done.results[0]
            if isinstance(found, RangeResult) and found.kvs and found.kvs[0].value == self._value:
                return True

    def _may_replace(self, known: KeyValue) -> bool:
        if known.value == self._value:
            return True
        try:
            live = msgspec.json.decode(known.value, type=Live)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return True  # nobody's
        return self._fresh and live.name == self._name

    async def _until_lost(self) -> None:
        """Return when the lease is lost or the key is somebody else's."""
        assert self._lease is not None
        lost = asyncio.ensure_future(self._lease.lost())
        changed = asyncio.ensure_future(self._until_changed())
        try:
            await asyncio.wait({lost, changed}, return_when=asyncio.FIRST_COMPLETED)
            if changed.done():
                changed.result()
        finally:
            lost.cancel()
            changed.cancel()
            await asyncio.wait({lost, changed})

    async def _until_changed(self) -> None:
        """Return when the key is not what the last `_acquire` left or found there."""
        async with aclosing(self._etcd.follow(KeyRange.one(self.key))) as items:
            first: bytes | None = self._value if self.held else None
            async for item in items:
                if isinstance(item, Page):
                    value = item.kvs[0].value if item.kvs else b""
                    if value != (first if first is not None else value) or not value:
                        return
                    first = value
                elif isinstance(item, Changes):
                    last = item.events[-1]
                    if last.kind is EventKind.DELETE or last.kv.value != first:
                        return

    def _set(self, held: bool) -> None:
        if held != self.held:
            self.held = held
            logs.event(log, "site_writer" if held else "site_standby", instance=self.instance)
            self.on_change(held)
