"""The etcd client: what the rest of the project calls.

Errors are those of core/errors.py; every call is bounded by `EtcdConfig.timeout_s` unless it says otherwise.
What is sent again after a failure: core/retry.py.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from types import TracebackType

from cache_service.core.errors import ConfigError, LocalProtocolError
from cache_service.etcd import codec, rpc
from cache_service.etcd import etcd_pb2 as pb
from cache_service.etcd.config import EtcdConfig
from cache_service.etcd.connections import Connections
from cache_service.etcd.core import txn as t
from cache_service.etcd.core.errors import Compacted, LeaseExists, LeaseNotFound, TooLarge
from cache_service.etcd.core.model import (
    Alarm,
    Changes,
    KeyRange,
    KeyValue,
    LeaseInfo,
    Member,
    Page,
    Progress,
    RangeResult,
    Status,
)
from cache_service.etcd.core.paging import PagePlan
from cache_service.etcd.core.retry import Repeat, loses_data, parse_version
from cache_service.etcd.lease import Lease, LeaseKeeper, OnLost
from cache_service.etcd.watch import Watcher, follow

__all__ = ["EtcdClient"]

#: How many times the usual time a page may take: megabytes over a wide-area link.
PAGE_PATIENCE = 4
#: Defragmenting rewrites the member's database, at some 100 MB/s.
DEFRAGMENT_S = 120.0


class EtcdClient:
    """One client of one cluster; make it inside the running event loop, share it, `close` it at the end."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._connections = Connections(config)
        self._keeper = LeaseKeeper(self._connections)

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop renewing leases and close every connection. Leases are not revoked."""
        await self._keeper.close()
        await self._connections.close()

    # Keys

    async def get(self, key: bytes, *, revision: int = 0, serializable: bool = False) -> KeyValue | None:
        """Return a key, now or as of `revision`. `serializable`: one member's view, needs no leader."""
        found = await self.range(KeyRange.one(key), revision=revision, serializable=serializable)
        return found.kvs[0] if found.kvs else None

    async def range(
        self,
        keys: KeyRange,
        *,
        limit: int = 0,
        revision: int = 0,
        serializable: bool = False,
        keys_only: bool = False,
        count_only: bool = False,
    ) -> RangeResult:
        """Return a range in one answer, by key. Raises TooLarge past `max_message_bytes`: use `pages`."""
        request = codec.range_request(
            keys,
            limit=limit,
            revision=revision,
            serializable=serializable,
            keys_only=keys_only,
            count_only=count_only,
        )
        leader = False if serializable else None
        return codec.range_result(await self._connections.call(rpc.RANGE, request, leader=leader))

    async def pages(self, keys: KeyRange, *, revision: int = 0) -> AsyncGenerator[Page, None]:
        """Yield a range of any size in pages of one revision. Raises Compacted if that goes meanwhile.

        Each page may take PAGE_PATIENCE times as long as another call.
        """
        plan = PagePlan(keys, page_bytes=self._config.page_bytes, page_keys=self._config.page_keys)
        first = True
        while plan.rest is not None:
            request = codec.range_request(plan.rest, limit=plan.limit, revision=revision)
            try:
                message = await self._connections.call(rpc.RANGE, request, patience=PAGE_PATIENCE)
            except TooLarge:
                plan.refused()
                continue
            found = codec.range_result(message)
            revision = revision or found.revision
            last_key = found.kvs[-1].key if found.kvs else None
            plan.took(last_key, count=len(found.kvs), size_bytes=message.ByteSize(), more=found.more)
            yield Page(revision, found.kvs, first=first, last=plan.rest is None)
            first = False

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Write a key and return the revision. Raises TooLarge, NoSpace, LeaseNotFound, PermissionDenied."""
        put = t.Put(key, value, lease)
        if t.op_bytes(put) > self._config.max_request_bytes:
            raise TooLarge(
                f"etcd put: {len(value)} bytes of value, etcd takes {self._config.max_request_bytes}"
            )
        message = await self._connections.call(rpc.PUT, codec.put_request(put))
        return message.header.revision

    async def delete(self, keys: KeyRange) -> int:
        """Delete a range in one revision; return how many keys (by the last attempt, if repeated)."""
        message = await self._connections.call(rpc.DELETE_RANGE, codec.delete_request(keys))
        return message.deleted

    async def txn(self, txn: t.Txn, *, repeat: Repeat = rpc.TXN.repeat) -> t.TxnResult:
        """Carry out a transaction. Raises Ambiguous when cut off: it was carried out once, or not at all.

        `repeat` may be widened for one whose repetition does no harm: only reads, or puts without a compare.
        """
        txn.check(max_bytes=self._config.max_request_bytes)
        message = await self._connections.call(rpc.TXN, codec.txn_request(txn), repeat=repeat)
        return codec.txn_result(message)

    async def apply(
        self, ops: Iterable[t.Op], *, guard: Sequence[t.Compare] = (), repeat: Repeat = rpc.TXN.repeat
    ) -> list[t.TxnResult]:
        """Carry out any number of operations as transactions one after the other, each under the whole guard.

        Ends with the first whose guard failed (`succeeded` False): what came before stands.
        """
        results = []
        for part in t.split(ops, guard=guard, max_bytes=self._config.max_request_bytes):
            results.append(await self.txn(part, repeat=repeat))
            if not results[-1].succeeded:
                break
        return results

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        """Forget history below `revision`; `physical` waits for it. Raises Compacted when done before."""
        request = pb.CompactionRequest(revision=revision, physical=physical)
        try:
            await self._connections.call(rpc.COMPACT, request)
        except Compacted as error:
            if not error.context.get("unsure"):
                raise

    # Leases

    async def grant(self, ttl_s: int) -> LeaseInfo:
        """Make a lease; etcd raises a TTL below its minimum (2 s). Nothing renews it: see `lease`."""
        if ttl_s < 1:
            raise LocalProtocolError(f"etcd lease: a TTL of {ttl_s} s is not above 0")
        while True:
            # The id is ours, so that a grant whose answer was lost can be asked for again.
            lease = secrets.randbits(62) + 1
            try:
                message = await self._connections.call(
                    rpc.LEASE_GRANT, pb.LeaseGrantRequest(TTL=ttl_s, ID=lease)
                )
            except LeaseExists as error:
                if not error.context.get("unsure"):
                    continue
                return await self.time_to_live(lease)
            return LeaseInfo(lease, message.TTL, message.TTL, ())

    async def lease(self, ttl_s: int, on_lost: OnLost | None = None) -> Lease:
        """Make a lease and keep it alive until it is lost, revoked or the client closed."""
        sent_at_s = self._connections.now_s()
        granted = await self.grant(ttl_s)
        return self._keeper.add(granted.lease, granted.granted_s, sent_at_s, on_lost)

    async def revoke(self, lease: Lease | int) -> None:
        """End a lease and delete its keys, in one revision. Raises LeaseNotFound."""
        if isinstance(lease, Lease):
            lease.release()
            lease = lease.id
        try:
            await self._connections.call(rpc.LEASE_REVOKE, pb.LeaseRevokeRequest(ID=lease))
        except LeaseNotFound as error:
            if not error.context.get("unsure"):
                raise

    async def time_to_live(self, lease: int, *, keys: bool = False) -> LeaseInfo:
        """Return what is left of a lease, with its keys when asked for. Raises LeaseNotFound."""
        request = pb.LeaseTimeToLiveRequest(ID=lease, keys=keys)
        found = codec.lease_info(await self._connections.call(rpc.LEASE_TIME_TO_LIVE, request))
        if found.remaining_s < 0:
            raise LeaseNotFound(f"etcd lease {lease:x}: expired or revoked")
        return found

    async def leases(self) -> tuple[int, ...]:
        """Return the ids of all leases."""
        message = await self._connections.call(rpc.LEASE_LEASES, pb.LeaseLeasesRequest())
        return tuple(found.ID for found in message.leases)

    # Watches

    def watch(
        self,
        keys: KeyRange,
        start_revision: int,
        *,
        previous: bool = False,
        progress_s: float = 10.0,
        max_behind: int | None = None,
    ) -> Watcher:
        """Return a watch of every event from a revision on, none lost, none twice: iterate its `run`."""
        return Watcher(
            self._connections,
            keys,
            start_revision,
            previous=previous,
            progress_s=progress_s,
            max_behind=max_behind,
        )

    def follow(
        self, keys: KeyRange, *, progress_s: float = 10.0, max_behind: int = 10_000
    ) -> AsyncGenerator[Page | Changes | Progress, None]:
        """Yield a listing in pages, then what changes after it; a new listing when the history is gone.

        More than `max_behind` revisions behind after an outage, a new listing is cheaper for the server than
        catching up (etcd-io/etcd#22264).
        """
        return follow(
            lambda: self.pages(keys),
            lambda revision: self.watch(keys, revision, progress_s=progress_s, max_behind=max_behind),
        )

    # The cluster

    async def members(self) -> tuple[Member, ...]:
        """Return the members."""
        message = await self._connections.call(rpc.MEMBER_LIST, pb.MemberListRequest())
        return codec.members(message.members)

    async def status(self, endpoint: str) -> Status:
        """Return the state of the member at one of the configured endpoints."""
        request = pb.StatusRequest()
        return codec.status(await self._connections.call(rpc.STATUS, request, endpoint=endpoint))

    async def check_versions(self) -> dict[str, str]:
        """Return endpoint -> version. Raises ConfigError for a release that loses data, EtcdUnavailable."""
        found = {endpoint: (await self.status(endpoint)).version for endpoint in self._config.endpoints}
        for endpoint, version in found.items():
            if loses_data(parse_version(version)):
                raise ConfigError(
                    f"etcd at {endpoint}: release {version} loses data when a member dies; use 3.5.6 or later"
                )
        return found

    async def alarms(self) -> tuple[Alarm, ...]:
        """Return the active alarms."""
        return codec.alarms(await self._connections.call(rpc.ALARM, pb.AlarmRequest()))

    async def disarm(self, alarm: Alarm) -> None:
        """End an alarm. With its cause still there etcd raises it again."""
        await self._connections.call(rpc.ALARM, codec.disarm_request(alarm))

    async def defragment(self, endpoint: str, *, timeout_s: float = DEFRAGMENT_S) -> None:
        """Give a member's free space back to its disk. It answers nothing meanwhile: one at a time."""
        await self._connections.call(
            rpc.DEFRAGMENT, pb.DefragmentRequest(), endpoint=endpoint, timeout_s=timeout_s
        )
